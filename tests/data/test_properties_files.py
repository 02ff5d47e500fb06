"""Properties of the file readers: every file gives its rows as they were written, a counted skip, or a clear error."""

from __future__ import annotations

import gzip
import json
import os
import re
from pathlib import Path

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from rlhf.data.sources import DataError, DatasetSpec, read_rows
from tests.support.property_inputs import (
    broken_texts,
    cases,
    file_bytes,
    json_rows,
    json_values,
    read,
    read_both_ways,
    written,
)

BOM = b"\xef\xbb\xbf"
NAMES = ("a.jsonl", "a.json", "a.csv", "a.tsv", "a.parquet", "a.txt", "a.jsonl.gz", "a.csv.gz", "a.tsv.gz", "a")
PACKINGS = ("plain", "gzip", "cut gzip", "gzip and more", "gzip of gzip")


def packed(content: bytes, packing: str, cut: int) -> bytes:
    if packing == "plain":
        return content
    data = gzip.compress(content, mtime=0)
    if packing == "gzip of gzip":
        return gzip.compress(data, mtime=0)
    return {"gzip": data, "cut gzip": data[: -1 - cut % len(data)], "gzip and more": data + b"\x01more"}[packing]


@cases(40)
@example("a.jsonl", b"[" * 100_000, "plain", 0)  # RecursionError
@example("a.jsonl", b'{"a":' * 100_000, "gzip", 0)
@example("a.json", b"[" + b'{"a":' * 100_000, "plain", 0)
@example("a.jsonl", b'{"a": ' + b"1" * 5000 + b"}", "plain", 0)  # ValueError: more digits than Python converts
@example("a.json", b'[{"a": ' + b"1" * 5000 + b"}]", "plain", 0)
@example("a.jsonl", b'{"a": 1, "a": 2}\n', "plain", 0)  # the first value was lost
@example("a.json", b'[{"a": 1}, {"a": 1, "a": 2}]', "plain", 0)
@example("a.csv", b"q,a\nx\ry,z\n", "plain", 0)
@example("a.tsv", b'q\ta\n"x\ty\nz"\tw\n', "plain", 0)  # one row or two
@given(st.sampled_from(NAMES), file_bytes, st.sampled_from(PACKINGS), st.integers(0, 10_000))
def test_any_bytes_give_rows_skips_or_a_clear_error(name: str, content: bytes, packing: str, cut: int) -> None:
    with written(name, packed(content, packing, cut)) as path:
        rows, skipped, error = read_both_ways(path)
        assert rows or skipped or error
        if packing in ("cut gzip", "gzip and more"):
            assert error is not None


@cases(30)
@given(
    st.sampled_from(NAMES), file_bytes, st.sampled_from(["json", "csv", "tsv", "parquet", "nonsense", None]), st.data()
)
def test_any_format_and_delimiter_of_any_bytes(
    name: str, content: bytes, given_format: str | None, data: st.DataObject
) -> None:
    delimiter = data.draw(
        st.one_of(st.none(), st.sampled_from(["\n", "\r", '"', "\0", " ", "", "||"]), st.characters())
    )
    with written(name, content) as path:
        read_both_ways(path, format=given_format, delimiter=delimiter)


@cases(40)
@example([{"a": "\ud83d"}, {"\udc80": 10**4000}], "lines", True, False, "\r\n", True)
@example([{"a": 10**400, "b": float("nan"), "": [[[[{}]]]]}], "array", False, False, "\n", False)
@given(
    st.lists(json_rows, min_size=1, max_size=5),
    st.sampled_from(["lines", "array", "indented"]),
    st.booleans(), st.booleans(), st.sampled_from(["\n", "\r\n", "\n\n", "\n \t\n"]), st.booleans(),
)  # fmt: skip
def test_json_rows_come_back_as_they_were_written(
    rows: list[dict], layout: str, escaped: bool, bom: bool, end: str, gz: bool
) -> None:
    if not escaped:
        try:
            json.dumps(rows, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            escaped = True
    if layout == "lines":
        text = end.join(json.dumps(row, ensure_ascii=escaped) for row in rows)
    else:
        text = json.dumps(rows, ensure_ascii=escaped, indent=1 if layout == "indented" else None).replace("\n", end)
    content = (BOM if bom else b"") + text.encode()
    with written("a.jsonl", gzip.compress(content) if gz else content) as path:
        found, skipped, error = read_both_ways(path)
        assert error is None and not skipped
        assert repr([dict(row.values) for row in found]) == repr(rows)


BAD_LINES = (
    b"{", b'{"a": ', b'{"a": "\xff"}', b"[1]", b"[{}]", b"7", b'"x"', b"null", b"nul", b"{'a': 1}", b'{"a": "\x01"}',
    b'{"a": 1, "a": 2}', b'{"a": {"b": 1, "c": 2, "b": 1}}', b'{"a": 1}{"a": 2}', b'{"a": 1}\r{"a": 2}',
    BOM + b'{"a": 1}', b"["*101, b'{"a": ' + b"["*101 + b"]"*101 + b"}", b'{"a": ' + b"["*5000 + b"]"*5000 + b"}",
    b'{"a": ' + b"1"*5000 + b"}", b'{"a": "\\ud8"}', b"\xff\xfe", b"]", b"\x1a", "{“a”: 1}".encode(),
)  # fmt: skip


@cases(40)
@example([(True, {"a": 1}), (False, BAD_LINES[16]), (True, {"b": 2})], False)
@given(
    st.lists(
        st.one_of(st.tuples(st.just(True), json_rows), st.tuples(st.just(False), st.sampled_from(BAD_LINES))),
        max_size=8,
    ),
    st.booleans(),
)
def test_bad_json_lines_are_counted_and_the_good_ones_come_back(lines: list[tuple], gz: bool) -> None:
    lines = [(True, {"first": 0}), *lines]
    content = b"\n".join(json.dumps(item).encode() if good else item for good, item in lines)
    with written("a.jsonl", gzip.compress(content) if gz else content) as path:
        rows, skipped, error = read_both_ways(path)
        assert error is None and len(rows) + len(skipped) == len(lines)
        wanted = [(number, item) for number, (good, item) in enumerate(lines, start=1) if good]
        assert repr([(row.line, dict(row.values)) for row in rows]) == repr(wanted)
        assert [item.line for item in skipped] == [
            number for number, (good, _) in enumerate(lines, start=1) if not good
        ]


@cases(20)
@example([{}, '{"a": 1, "a": 2}', 3])
@given(st.lists(st.one_of(json_rows, json_values, st.just('{"a": 1, "a": 2}')), max_size=6))
def test_bad_elements_of_an_array_are_counted(elements: list) -> None:
    elements = [{"first": 0}, *elements]
    twice = '{"a": 1, "a": 2}'
    content = "[" + ", ".join(item if item == twice else json.dumps(item) for item in elements) + "]"
    with written("a.jsonl", content.encode()) as path:
        rows, skipped, error = read_both_ways(path)
        assert error is None and len(rows) + len(skipped) == len(elements)
        wanted = [(place, item) for place, item in enumerate(elements, start=1) if isinstance(item, dict)]
        assert repr([(row.line, dict(row.values)) for row in rows]) == repr(wanted)


@cases(20)
@given(st.lists(json_rows, min_size=1, max_size=20), st.integers(0, 10**6), st.integers(1, 255))
def test_a_flipped_byte_of_gzip_data_is_found(rows: list[dict], place: int, change: int) -> None:
    data = bytearray(gzip.compress("\n".join(map(json.dumps, rows)).encode(), mtime=0))
    data[place % len(data)] ^= change
    assume(data[:2] == b"\x1f\x8b")
    with written("a.jsonl.gz", bytes(data)) as path:
        found, _, error = read_both_ways(path)
        if error is None:  # the flipped byte says nothing of the content: one of the header's, or padding of the last
            assert repr([dict(row.values) for row in found]) == repr(rows)
        else:
            assert "gzip" in error


@cases(20)
@example("~nobody-of-this-name/a.jsonl")  # RuntimeError
@example("x" * 5000)  # OSError: file name too long
@example("a\0b")
@example("\ud800.jsonl")
@given(broken_texts)
def test_any_path_is_a_clear_error(path: str) -> None:
    assume(not re.fullmatch(r"[\w.-]+/[\w.-]+", path) and not os.path.exists(path) and path.strip("~"))
    with pytest.raises(DataError) as caught:
        list(read_rows(DatasetSpec(path)))
    assert path in str(caught.value)


keys = st.sampled_from(["path", "columns", "format", "weight", "split", "category", "delimiter", "subset", "colums"])


@cases(30)
@example({"path": "a", "weight": 10**400})  # OverflowError
@example('{"path": ' + "[" * 5000)  # RecursionError
@example('{"path": "a", "weight": ' + "1" * 5000 + "}")
@example('{"path": "a", "path": "b"}')
@example({"path": "a", "columns": []})
@given(st.one_of(broken_texts, broken_texts.map("{{{}".format), st.dictionaries(keys, json_values, max_size=4)))
def test_any_data_set_text_is_a_specification_or_a_clear_error(given_text: str | dict) -> None:
    text = given_text if isinstance(given_text, str) else json.dumps({"path": "a.jsonl", **given_text})
    try:
        spec = DatasetSpec.parse(text)
    except DataError as error:
        assert str(error)
        return
    assert spec == DatasetSpec.parse(text) and spec.path and 0 < spec.weight < float("inf")
    if isinstance(given_text, dict):
        for name, value in {"path": "a.jsonl", **given_text}.items():
            if value is not None:
                assert getattr(spec, name) == value and isinstance(
                    getattr(spec, name), float if name == "weight" else type(value)
                )
    else:
        assert spec.path == text.strip() or text.strip().startswith("{")


def test_a_repeated_path_is_refused() -> None:
    with pytest.raises(DataError, match="`path` twice"):
        DatasetSpec.parse('{"path": "a", "path": "b"}')


def test_many_bad_lines_before_the_first_good_one_take_linear_time(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("{oops}\n" * 20_000 + '{"a": 1}\n', encoding="utf-8")
    rows, skipped, error = read(path, "skip")  # each of them used to read the whole file again: 70 s
    assert error is None and len(skipped) == 20_000 and [row.line for row in rows] == [20_001]


def test_white_space_before_an_array_does_not_hide_it(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("\n" * 10_000 + '[{"a": 1}]', encoding="utf-8")
    assert [row.values for row in read_rows(DatasetSpec(str(path)))] == [{"a": 1}]
