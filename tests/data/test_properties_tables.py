"""Properties of CSV, TSV and parquet files: the rows that were written come back, or a counted skip, or an error."""

from __future__ import annotations

import csv
import gzip
import io
from collections.abc import Iterable, Mapping
from typing import Any

import pyarrow
import pyarrow.parquet
from hypothesis import example, given
from hypothesis import strategies as st

from tests.support.property_inputs import cases, read, read_both_ways, texts, written

cells = st.one_of(
    texts, st.sampled_from(["", '"', '""', 'a"b', '"ab"', '"a', 'b"', "a\tb", "\ta", "a\nb\tc", "\r", " a ", "#"])
)
tables = st.integers(1, 3).flatmap(
    lambda width: st.lists(st.lists(cells, min_size=width, max_size=width), min_size=1, max_size=5)
)


def encoded(rows: list[list[str]], delimiter: str, end: str, quoting: int, bom: bool) -> bytes:
    return (b"\xef\xbb\xbf" if bom else b"") + table_text([header_of(rows), *rows], delimiter, end, quoting).encode()


def header_of(rows: list[list[str]]) -> list[str]:
    return [f"열{n}" for n in range(len(rows[0]))]


def value_of(cell: str) -> str | None:
    """What a cell is read as: the words for a missing value are None."""
    return None if cell.strip() in ("nan", "NaN", "NaT", "None", "<NA>", "NULL", "null", "\\N", "#N/A") else cell


def table_text(rows: list[list[str]], delimiter: str, end: str, quoting: int = csv.QUOTE_MINIMAL) -> str:
    """What `csv.writer` writes, and a carriage return never bare, which it leaves so where `end` is a line feed."""
    if any("\r" in cell for row in rows for cell in row):
        quoting = csv.QUOTE_ALL
    stream = io.StringIO(newline="")
    csv.writer(stream, delimiter=delimiter, lineterminator=end, quoting=quoting).writerows(rows)  # type: ignore[arg-type]
    return stream.getvalue()


@cases(60)
@example([["a\tx\nb", "c"]], "\t", "\n", csv.QUOTE_MINIMAL, False, False)  # was two rows: `"a`, `x` and `b"`, `c`
@example([["a\nb"]], "\t", "\r\n", csv.QUOTE_MINIMAL, False, False)
@example([['"'], ['""'], ['"a"']], "\t", "\n", csv.QUOTE_MINIMAL, False, False)
@given(
    tables, st.sampled_from([",", "\t", "|", ";", "가"]), st.sampled_from(["\n", "\r\n"]),
    st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]), st.booleans(), st.booleans(),
)  # fmt: skip
def test_written_tables_come_back(rows: list, delimiter: str, end: str, quoting: int, bom: bool, gz: bool) -> None:
    content = encoded(rows, delimiter, end, quoting, bom)
    wanted = [{f"열{n}": value_of(cell) for n, cell in enumerate(row)} for row in rows]
    name = "a.tsv" if delimiter == "\t" else "a.csv"
    with written(name, gzip.compress(content) if gz else content) as path:
        found, skipped, error = read_both_ways(path, delimiter=None if delimiter in ",\t" else delimiter)
        if b"\0" in content:
            assert error is not None and "binary" in error
            return
        if delimiter == "\t" and error is not None:
            assert "two ways" in error and any("\n" in cell for row in rows for cell in row)
            found, skipped, error = read_both_ways(path, format="csv", delimiter="\t")
        assert error is None and not skipped and [dict(row.values) for row in found] == wanted


bare = st.lists(st.sampled_from(['"', "'", "a", "말 ", "\u2028", "\x85", ",", "\u200b"]), min_size=1, max_size=6).map(
    "".join
)


@cases(40)
@example([['"왜', "네"], ['그래" 함', "응"]])
@example([['"왜', "네"], ['그래"', "응"]])  # two rows, or one whose field spans lines
@given(st.lists(st.lists(bare, min_size=2, max_size=2), min_size=1, max_size=5))
def test_bare_quotation_marks_of_a_tsv_file_stay(rows: list[list[str]]) -> None:
    text = "".join("\t".join(row) + "\n" for row in [["q", "a"], *rows])
    with written("a.tsv", text.encode()) as path:
        found, skipped, error = read_both_ways(path)
        if error is not None:
            assert "two ways" in error and sum(text.count(mark) for mark in ('"',)) >= 2
            return
        for row, (question, answer) in zip(found, rows, strict=True):
            for cell, raw in ((row.values["q"], question), (row.values["a"], answer)):
                assert cell == raw or raw == '"' + cell.replace('"', '""') + '"'  # a field in quotes, as CSV writes it


BROKEN_CELLS = (b"\xff", "한".encode("cp949"), b"\xed\xa0\x80", b"\xc0\x80", b"a\xe2\x80")


@cases(30)
@example([["a\nb", "c"]], 0, 1, b"\xff", ",")  # a line left out of the middle of a record gave a shorter text
@example([["a", "b"]], -1, 0, b"\xff", ",")  # a header left out made the first row the header
@given(tables, st.integers(-1, 4), st.integers(0, 9), st.sampled_from(BROKEN_CELLS), st.sampled_from([",", "\t"]))
def test_a_row_that_is_not_utf8_is_counted_once(
    rows: list, row: int, place: int, broken: bytes, delimiter: str
) -> None:
    """The broken bytes stand in one cell: inside quotes, in a line of its own, before or after a line end."""
    rows = [[cell.replace("\0", "") for cell in line] for line in rows]
    mark = "\ue000"
    header = header_of(rows)
    table = [header, *rows]
    target = table[(row % len(rows)) + 1 if row >= 0 else 0]
    column = place % len(target)
    target[column] = target[column][: place % 3] + mark + target[column][place % 3 :]
    text = table_text(table, delimiter, "\n")
    with written("a.csv", text.encode().replace(mark.encode(), broken)) as path:
        found, skipped, error = read_both_ways(path, format="csv", delimiter=delimiter)
        if row < 0:
            assert error is not None and "header is not UTF-8" in error and not found
            return
        wanted = [dict(zip(header, map(value_of, line), strict=True)) for line in table[1:] if line is not target]
        assert len(skipped) == 1 and "not UTF-8" in skipped[0].reason
        assert [dict(item.values) for item in found] == wanted
        assert (error is None) == bool(wanted)


parquet_rows = st.lists(
    st.fixed_dictionaries(
        {"prompt": st.one_of(st.none(), texts), "id": st.integers(-(2**63), 2**63 - 1), "score": st.floats()}
    ),
    min_size=1,
    max_size=6,
)


def in_order(rows: Iterable[Mapping[str, Any]]) -> str:
    """The rows as a text that tells NaN, -0.0 and types apart."""
    return repr([sorted(row.items()) for row in rows])


def parquet(table: Any, **options: Any) -> bytes:
    stream = io.BytesIO()
    pyarrow.parquet.write_table(table, stream, **options)
    return stream.getvalue()


@cases(20)
@given(parquet_rows, st.integers(0, 10**6), st.integers(0, 255), st.booleans())
def test_parquet_rows_come_back_or_the_damage_is_found(rows: list[dict], place: int, change: int, cut: bool) -> None:
    table = pyarrow.Table.from_pylist(rows)
    data = bytearray(parquet(table, write_page_checksum=True, compression="none"))
    with written("a.parquet", bytes(data)) as path:
        found, skipped, error = read_both_ways(path)
        assert (
            error is None
            and not skipped
            and repr([sorted(row.values.items()) for row in found]) == repr([sorted(row.items()) for row in rows])
        )
    place %= len(data)
    damaged = bytes(data[:place]) if cut else bytes([*data[:place], data[place] ^ change, *data[place + 1 :]])
    with written("a.parquet", damaged) as path:
        found, _, error = read_both_ways(path)
        footer = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
        if error is None:  # nothing checks the footer, where names and types stand
            assert not cut and (place >= footer or in_order(row.values for row in found) == in_order(rows))


def test_parquet_values_that_python_cannot_hold_are_an_error() -> None:
    not_utf8 = pyarrow.Array.from_buffers(pyarrow.string(), 1, pyarrow.array([b"\xff\xfe"]).buffers())
    far = pyarrow.array([2**62], pyarrow.timestamp("us"))
    for column in (not_utf8, far):
        with written("a.parquet", parquet(pyarrow.table({"prompt": column}))) as path:
            rows, _, error = read(path)
            assert not rows and error is not None and "not a readable parquet" in error


def test_a_column_twice_is_an_error_in_parquet_too() -> None:
    table = pyarrow.Table.from_arrays([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["q", "q"])
    with written("a.parquet", parquet(table)) as path:
        rows, _, error = read(path)
        assert not rows and error is not None and "column twice: q" in error


def test_a_cr_only_table_says_so() -> None:
    with written("a.csv", b"q,a\rx,y\rz,w\r") as path:
        rows, _, error = read(path)
        assert not rows and error is not None and "carriage return" in error
