"""Published files, damaged in every way a disk and a download can; and one line of 100 MB."""

from __future__ import annotations

import gzip
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf.data.records import rows_to_records
from rlhf.data.sources import DataError, DatasetSpec, Row, SkippedRow
from rlhf.data.templates import load_template
from tests.support.property_inputs import cases, read, read_both_ways, written
from tests.support.published import published

ROOT = Path(__file__).parents[2]
FILES = (
    "songys_chatbot/ChatbotData.csv", "songys_question_pair/kor_Pair_test.csv", "kobest_v1/SentiNeg/dev.tsv",
    "hrc_human_rights/counsel.jsonl.json", "ko_arena_hard/ranked.jsonl.gz", "hh_rlhf/harmless-base-test.jsonl.gz",
    "llama_factory_demo/v1_dpo_demo.jsonl", "llama_factory_demo/identity.json", "kullm/kullm-v1.jsonl",
    "naver_square_kosbi/square_response_iter0.json", "legalqa_haven/legalqa_small.jsonlines",
    "korean_hate_speech/dev.tsv",
)  # fmt: skip
SIZE = 30_000


@cache
def beginning(name: str) -> bytes:
    """About the first 30,000 bytes of a published file, cut after a row."""
    path = published(name)
    with (gzip.open if name.endswith(".gz") else open)(path, "rb") as stream:
        content = stream.read()
    if content[:1] == b"[" or len(content) <= SIZE:
        return content if len(content) <= 10 * SIZE else pytest.skip(f"{name} is one large array")
    return content[: content.index(b"\n", SIZE) + 1]


def suffixes(name: str) -> str:
    return "".join(Path(name.removesuffix(".gz")).suffixes[-1:])


def records_of(rows: list[Row], skipped: list[SkippedRow]) -> None:
    """Every kind of record of the rows: records, or a DataError."""
    for kind in ("prompt", "response", "comparison"):
        try:
            rows_to_records(
                rows, kind, template=load_template("kullm"), spec=DatasetSpec("a"), on_bad_row="skip", skipped=skipped
            )
        except DataError as error:
            assert str(error)


@pytest.mark.parametrize("name", FILES)
@cases(3)
@given(data=st.data())
def test_damaged_published_files(name: str, data: st.DataObject) -> None:
    content = beginning(name)
    with written("a" + suffixes(name), content) as path:
        whole, _, error = read_both_ways(path)
        assert error is None
    damage = data.draw(st.sampled_from(["cut", "flip", "insert", "drop"]))
    place = data.draw(st.integers(0, len(content) - 1))
    some = data.draw(
        st.one_of(
            st.binary(min_size=1, max_size=3), st.sampled_from([b"\n", b'"', b"\0", b"\xff", b"\\", b"\t", b"[" * 2000])
        )
    )
    damaged = {
        "cut": content[:place],
        "flip": content[:place] + bytes([content[place] ^ (some[0] or 1)]) + content[place + 1 :],
        "insert": content[:place] + some + content[place:],
        "drop": content[:place] + content[place + len(some) :],
    }[damage]
    with written("a" + suffixes(name), damaged) as path:
        rows, skipped, error = read_both_ways(path)
        assert rows or skipped or error
        before = content.count(b"\n", 0, place)
        if (
            suffixes(name) in (".jsonl", ".jsonlines", ".csv", ".tsv")
            and error is None
            and rows
            and suffixes(name) != "a"
        ):
            kept = [row for row in rows if row.line < before]  # what stands before the damage is not touched by it
            wanted = [row for row in whole if row.line < before]
            assert [row.values for row in kept][: len(kept) - 1] == [row.values for row in wanted][: len(kept) - 1]
        records_of(rows, skipped)
    packed = gzip.compress(content, compresslevel=1, mtime=0)
    place = data.draw(st.integers(10, len(packed) - 1))
    with written("a.gz" if suffixes(name) == "" else f"a{suffixes(name)}.gz", packed[:place]) as path:
        rows, _, error = read_both_ways(path)
        assert error is not None and "gzip" in error
        assert [row.values for row in rows] == [row.values for row in whole][: len(rows)]


LONG = """
import resource, sys, time
from rlhf.data.records import rows_to_records
from rlhf.data.sources import DatasetSpec, read_rows
from rlhf.data.templates import load_template
before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
spec, skipped = DatasetSpec(sys.argv[1]), []
rows = list(read_rows(spec, "skip", skipped))
assert [row.line for row in rows] == [1, 2, 4], [row.line for row in rows]
assert [item.line for item in skipped] == [3]
records = rows_to_records(rows, "response", template=load_template("none"), spec=spec)
assert [len(record.response) for record in records] == [1, 34_000_000, 1]
assert records[1].response == "\\uac00\\ub098" * 17_000_000
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print((after - before) / 1024, time.process_time() - start)
"""


def test_a_line_of_100_megabytes(tmp_path: Path) -> None:
    """It is read in bounded memory and time, and one that is broken is a counted skip like a short one."""
    path = tmp_path / "a.jsonl"
    with path.open("wb") as stream:
        stream.write(b'{"prompt": "a", "response": "b"}\n{"prompt": "a", "response": "')
        for _ in range(17):
            stream.write("가나".encode() * 1_000_000)
        stream.write(b'"}\n')
        stream.write(b'{"prompt": "a", "response": ' + b"[" * 100_000_000 + b"\n")
        stream.write(b'{"prompt": "a", "response": "c"}\n')
    assert path.stat().st_size > 200_000_000
    done = subprocess.run(
        [sys.executable, "-c", LONG, str(path)], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    megabytes, seconds = map(float, done.stdout.split()[-2:])
    assert megabytes < 1000 and seconds < 60, (megabytes, seconds)


def test_a_table_field_of_100_megabytes(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b'q,a\nx,y\nx,"' + b"ab\t" * 34_000_000 + b'\n"\nx,z\n')
    rows, skipped, error = read(path)
    assert error is None and not skipped and [len(row.values["a"]) for row in rows] == [1, 102_000_001, 1]
    assert [row.line for row in rows] == [2, 3, 5]
