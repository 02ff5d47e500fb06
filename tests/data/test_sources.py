"""Files as people really have them, broken ones too -> rows or one clear error."""

from __future__ import annotations

import gzip
import json
import os
from itertools import islice
from pathlib import Path

import pytest

from rlhf.data.sources import DataError, DatasetSpec, SkippedRow, read_rows
from rlhf.data.world.datasets import World
from tests.support.published import published

ROWS = [{"prompt": "안녕?", "n": 1}, {"prompt": "둘\u2028줄", "n": 2}]


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
    return path


def read(path: Path | str, **spec: object) -> list[dict]:
    return [dict(row.values) for row in read_rows(DatasetSpec(str(path), **spec))]  # type: ignore[arg-type]


def lines(rows: list[dict], end: str = "\n") -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + end for row in rows)


ENCODINGS = {
    "array": json.dumps(ROWS, ensure_ascii=False, indent=1).encode(),
    "array_bom": b"\xef\xbb\xbf" + json.dumps(ROWS).encode(),
    "lines": lines(ROWS).encode(),
    "lines_bom_crlf": b"\xef\xbb\xbf" + lines(ROWS, "\r\n").encode(),
    "lines_blank_between_no_end": lines(ROWS, "\n\n").rstrip("\n").encode(),
}


@pytest.mark.parametrize("content", ENCODINGS.values(), ids=ENCODINGS.keys())
@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.jsonl.json", "a.jsonlines", "a.JSONL", "data"])
@pytest.mark.parametrize("packed", [False, True])
def test_json_under_any_name(tmp_path: Path, content: bytes, name: str, packed: bool) -> None:
    path = write(tmp_path / (name + ".gz" if packed else name), gzip.compress(content) if packed else content)
    assert read(path) == ROWS


def test_gzip_is_told_by_content_not_by_name(tmp_path: Path) -> None:
    assert read(write(tmp_path / "a.jsonl", gzip.compress(lines(ROWS).encode()))) == ROWS
    assert read(write(tmp_path / "a.jsonl.gz", lines(ROWS))) == ROWS


def test_lines_of_rows(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '\n{"a": 1}\n\n{"a": 2}\n')
    assert [(row.line, row.file) for row in read_rows(DatasetSpec(str(path)))] == [(2, str(path)), (4, str(path))]
    path = write(tmp_path / "b.csv", 'q,a\n"두\n줄",x\n셋,y\n')
    rows = list(read_rows(DatasetSpec(str(path))))
    assert [(row.line, row.values["q"]) for row in rows] == [(2, "두\n줄"), (4, "셋")]
    path = write(tmp_path / "c.json", '[\n\n{"a": 1},\n{"a": 2}]')
    assert [row.line for row in read_rows(DatasetSpec(str(path)))] == [1, 2]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
def test_csv_and_tsv(tmp_path: Path, packed: bool, end: str, bom: bytes) -> None:
    pack = gzip.compress if packed else bytes
    end_gz = ".gz" if packed else ""
    csv_text = end.join(["Q,A,", '"네, 그래요","그는 ""응"" 했다",', "짧다,답,x", ""])
    path = write(tmp_path / ("a.csv" + end_gz), pack(bom + csv_text.encode()))
    assert read(path) == [{"Q": "네, 그래요", "A": '그는 "응" 했다'}, {"Q": "짧다", "A": "답"}]
    path = write(tmp_path / ("a.tsv" + end_gz), pack(bom + csv_text.replace(",", "\t").encode()))
    assert read(path)[1] == {"Q": "짧다", "A": "답"}
    path = write(tmp_path / ("odd.dat" + end_gz), pack(bom + f"Q|A{end}하나|둘{end}".encode()))
    assert read(path, delimiter="|") == [{"Q": "하나", "A": "둘"}]


def test_tsv_quotes(tmp_path: Path) -> None:
    bare = '질문\t답\n"헐 진짜\t네\n그래" 했다\t"전부 ""인용"""\n'
    assert read(write(tmp_path / "bare.tsv", bare)) == [
        {"질문": '"헐 진짜', "답": "네"},
        {"질문": '그래" 했다', "답": '전부 "인용"'},
    ]
    spanning = '질문\t답\n"두\n줄\t탭"\t네\n'
    assert read(write(tmp_path / "spanning.tsv", spanning)) == [{"질문": "두\n줄\t탭", "답": "네"}]


def test_tsv_whose_quotes_could_be_either_is_settled_by_its_format(tmp_path: Path) -> None:
    path = write(tmp_path / "reviews.tsv", 'id\tdocument\tlabel\n1\t"좋다 정말\t1\n2\t최고다"\t1\n')
    with pytest.raises(DataError, match='"format": "tsv" if they are characters'):
        read(path)
    assert read(path, format="tsv") == [
        {"id": "1", "document": '"좋다 정말', "label": "1"},
        {"id": "2", "document": '최고다"', "label": "1"},
    ]


def test_short_csv_row_lacks_the_field_and_long_fields_are_whole(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "q,a\n하나\n둘," + "가" * 200_000 + "\n")
    first, second = read(path)
    assert first == {"q": "하나"} and len(second["a"]) == 200_000


def test_txt_needs_a_format_unless_it_is_json(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "q\ta\n하나\t둘\n")
    with pytest.raises(DataError, match="suffix does not tell.*format.*tsv"):
        read(path)
    assert read(path, format="tsv") == [{"q": "하나", "a": "둘"}]
    assert read(write(tmp_path / "b.txt", lines(ROWS))) == ROWS


def test_parquet(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [{"prompt": "안녕", "messages": [{"role": "user", "content": "x"}]}, {"prompt": None, "messages": []}]
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    assert read(path) == rows
    content = path.read_bytes()
    assert read(write(tmp_path / "a.parquet.gz", gzip.compress(content))) == rows
    with pytest.raises(DataError, match=r"cut\.parquet: not a readable parquet"):
        read(write(tmp_path / "cut.parquet", content[: len(content) // 2]))
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist([{"prompt": "처음 그대로"}]), path, write_page_checksum=True, compression="none"
    )
    content = path.read_bytes()
    assert content.count("그대로".encode()) >= 1 and read(path) == [{"prompt": "처음 그대로"}]
    with pytest.raises(DataError, match=r"bad\.parquet: not a readable parquet"):  # text still, and another one
        read(write(tmp_path / "bad.parquet", content.replace("그대로".encode(), "바뀜요".encode())))
    pyarrow.parquet.write_table(pyarrow.table({"prompt": pyarrow.array([], pyarrow.string())}), path)
    with pytest.raises(DataError, match="no usable row"):
        read(path)


def test_directory(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    write(folder / "b.jsonl", '{"n": 2}\n')
    write(folder / "a.csv", "n\n1\n")
    write(folder / "README.md", "nothing")
    write(folder / "dataset_info.json", "{}")
    write(folder / ".hidden.json", "[")
    rows = list(read_rows(DatasetSpec(str(folder))))
    assert [(Path(row.file).name, row.values["n"]) for row in rows] == [("a.csv", "1"), ("b.jsonl", 2)]
    empty = tmp_path / "empty"
    empty.mkdir()
    write(empty / "notes.md", "x")
    with pytest.raises(DataError, match=r"directory without data files.*notes\.md.*\.jsonl"):
        read(empty)


def test_saved_datasets(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "one")
    assert read(tmp_path / "one") == ROWS
    datasets.DatasetDict({"test": datasets.Dataset.from_list(ROWS[:1])}).save_to_disk(tmp_path / "many")
    assert read(tmp_path / "many", split="test") == ROWS[:1]
    with pytest.raises(DataError, match="no split `train`; there are: test"):
        read(tmp_path / "many")


def test_hub_name(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(path: str, name: str | None, split: str) -> object:
        asked.append((path, name, split))
        if path == "org/absent":
            raise ConnectionError("Couldn't reach the Hub\nmore")
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert read("org/name", split="test") == ROWS
    assert read("org/name", subset="ko") == ROWS
    assert asked == [("org/name", None, "test"), ("org/name", "ko", "train")]
    with pytest.raises(
        DataError, match=r"org/absent: no such file, and not reachable as a hub data set.*Couldn't reach"
    ):
        read("org/absent")


def test_sample() -> None:
    first, second = islice(read_rows(DatasetSpec("sample:prompts_train")), 2)
    expected = list(World().rows("prompts_train", 2))
    assert (first.file, first.line, first.values) == ("sample:prompts_train", 1, expected[0])
    assert (second.line, second.values) == (2, expected[1])
    with pytest.raises(DataError, match="no sample data set `../x`; there are: sft_train, sft_heldout, "):
        read("sample:../x")


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:8be3\nsize 875191\n"
BROKEN = {
    "empty": ("a.jsonl", b"", "empty file"),
    "white": ("a.jsonl", b"\xef\xbb\xbf \n\n", "empty file"),
    "empty_gz": ("a.jsonl.gz", gzip.compress(b""), "empty file"),
    "header_only": ("a.csv", b"q,a\n", "no usable row"),
    "empty_array": ("a.json", b"[]", "no usable row"),
    "lfs": ("a.jsonl", LFS.encode(), "git lfs pull"),
    "lfs_gz": ("a.jsonl.gz", LFS.encode(), "git lfs pull"),
    "lfs_parquet": ("a.parquet", LFS.encode(), "git lfs pull"),
    "binary": ("a.jsonl", b"PK\x03\x04\x00\x00\x08\x00", "binary file"),
    "binary_any": ("weights.bin", bytes(range(256)), "binary file"),
    "utf16": ("a.csv", "q,a\n하나,둘\n".encode("utf-16"), "UTF-16"),
    "cut_gz": ("a.jsonl.gz", gzip.compress(os.urandom(9000).hex().encode())[:5000], "broken or cut gzip"),
    "damaged_gz": ("a.jsonl.gz", gzip.compress(lines(ROWS).encode())[:-8] + b"\0" * 8, "broken or cut gzip"),
    "cut_array": ("a.json", b'[{"a": 1},\n{"a": 2', r"a\.json:2: bad JSON array"),
    "array_of_texts": ("a.json", b'["a", "b"]', "JSON array of objects, or one object a line; this is an array of str"),
    "one_object": ("a.json", b'{"data":\n [{"a": 1}]}', "this is one JSON object with the keys data"),
    "texts": ("a.jsonl", b'"a"\n"b"\n', "a line that is str"),
    "bad_line": ("a.jsonl", b'{"a": 1}\n{"a": \n', r"a\.jsonl:2: bad JSON line"),
    "first_bad_line": ("a.jsonl", b'{"a": oops}\n{"a": 1}\n', r"a\.jsonl:1: bad JSON line"),
    "python_literal": ("a.jsonl", b"{'a': 1}\n", r"a\.jsonl:1: bad JSON line"),
    "array_line": ("a.jsonl", b'{"a": 1}\n[1]\n', r"a\.jsonl:2: the line is a JSON list"),
    "cp949": ("a.csv", "q,a\n하나,둘\n".encode("cp949"), r"a\.csv:2: not UTF-8.*CP949"),
    "latin_line": ("a.jsonl", b'{"a": 1}\n{"a": "caf\xe9"}\n', r"a\.jsonl:2: not UTF-8"),
    "too_many": ("a.csv", b"q,a\n1,2\n1,2,3\n", r"a\.csv:3: too many fields: 3, but the header has 2 \(q, a\)"),
    "open_quote": ("a.csv", b'q,a\n1,2\n"3,4\n5,6\n', r"a\.csv:3: bad quotes"),
    "header_twice": ("a.csv", b"q,q\n1,2\n", "column twice: q"),
    "garbage_parquet": ("a.parquet", b"not parquet at all", "not a readable parquet"),
}


@pytest.mark.parametrize(("name", "content", "message"), BROKEN.values(), ids=BROKEN.keys())
def test_broken_files(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = write(tmp_path / name, content)
    with pytest.raises(DataError, match=message) as caught:
        read(path)
    assert str(path) in str(caught.value)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        read(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match=r"no such file: data/train\.jsonl"):  # no network is asked for this one
        read("data/train.jsonl")


def test_skipping_bad_lines(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", b'{"a": 1}\n{"a": \n{"a": "\xff"}\n7\n{"a": 2}\n')
    skipped: list[SkippedRow] = []
    rows = list(read_rows(DatasetSpec(str(path)), "skip", skipped))
    assert [row.values["a"] for row in rows] == [1, 2] and [row.line for row in rows] == [1, 5]
    assert [(item.file, item.line) for item in skipped] == [(str(path), 2), (str(path), 3), (str(path), 4)]
    path = write(tmp_path / "b.csv", "q,a\n1,2,3\n1,2\n")
    skipped = []
    assert [row.line for row in read_rows(DatasetSpec(str(path)), "skip", skipped)] == [3]
    assert [item.line for item in skipped] == [2]
    path = write(tmp_path / "c.json", '[{"a": 1}, null]')
    skipped = []
    assert len(list(read_rows(DatasetSpec(str(path)), "skip", skipped))) == 1 and skipped[0].line == 2
    with pytest.raises(DataError, match=r"d\.jsonl: empty, no usable row"):
        list(read_rows(DatasetSpec(str(write(tmp_path / "d.jsonl", b"{\n{\n"))), "skip", []))
    with pytest.raises(DataError, match="ignore.*error, skip"):
        list(read_rows(DatasetSpec(str(path)), "ignore"))


def test_spec_parse() -> None:
    assert DatasetSpec.parse("data/a.jsonl") == DatasetSpec("data/a.jsonl")
    assert DatasetSpec.parse("sample:x").path == "sample:x"
    text = json.dumps({"path": "a", "columns": {"prompt": "질의"}, "weight": 2, "split": "dev", "delimiter": "|"})
    assert DatasetSpec.parse(text) == DatasetSpec("a", {"prompt": "질의"}, None, 2.0, "dev", None, "|")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"path": "a", "colums": {}}', "unknown key colums; valid keys: path, columns, format, weight, split"),
        ('{"columns": {}}', "needs `path`"),
        ('{"path": "a"', "is not one"),
        ('{"path": "a", "weight": 0}', "`weight` must be a number above 0"),
        ('{"path": "a", "weight": NaN}', "`weight`"),
        ('{"path": "a", "weight": true}', "`weight`"),
        ('{"path": "a", "columns": ["q"]}', "`columns` must look like"),
        ('{"path": "a", "delimiter": "||"}', "one character"),
        ('{"path": "a", "split": 3}', "`split` must be a text"),
        ("  ", "nothing was given"),
    ],
)
def test_spec_mistakes(text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        DatasetSpec.parse(text)


REAL = {
    "songys_chatbot/ChatbotData.csv": 11823,
    "songys_question_pair/kor_Pair_test.csv": 688,
    "songys_question_pair/kor_pair_train.csv": 6888,
    "hrc_human_rights/humane_right_copus_v1.jsonl.json": 1549,
    "hrc_human_rights/counsel.jsonl.json": 149,
    "ko_arena_hard/pairs.jsonl.gz": 2855,
    "ko_arena_hard/ranked.jsonl.gz": 400,
    "hh_rlhf/harmless-base-test.jsonl.gz": 2312,
    "legalqa_haven/input.2021-06-08.jsonlines": 156,
    "kullm/user_oriented_instructions_eval.jsonl": 252,
    "llama_factory_demo/alpaca_en_demo.json": 999,
    "naver_square_kosbi/question_valid.json": 6882,
    "kobest_v1/HellaSwag/train.tsv": 2029,
}


@pytest.mark.parametrize(("name", "count"), REAL.items(), ids=REAL.keys())
def test_published_files(name: str, count: int) -> None:
    rows = read(published(name))
    assert len(rows) == count and "" not in rows[0] and not any("\ufeff" in column for column in rows[0])


@pytest.mark.parametrize(
    "name",
    [
        "hh_rlhf/helpful-base-test.LFS-POINTER.jsonl.gz",
        "hh_rlhf/helpful-online-train.LFS-POINTER.jsonl.gz",
        "kullm/kullm-v2.LFS-POINTER.jsonl",
    ],
)
def test_published_lfs_pointers(name: str) -> None:
    with pytest.raises(DataError, match="git lfs pull"):
        read(published(name))


def test_a_path_may_name_an_environment_variable(monkeypatch):
    monkeypatch.setenv("SOME_DATA_DIR", "/data/here")
    assert DatasetSpec.parse("${SOME_DATA_DIR}/a.jsonl").path == "/data/here/a.jsonl"
    assert DatasetSpec.parse('{"path": "${SOME_DATA_DIR}/a.jsonl"}').path == "/data/here/a.jsonl"
    monkeypatch.delenv("SOME_DATA_DIR")
    with pytest.raises(DataError, match="SOME_DATA_DIR is not set"):
        DatasetSpec.parse("${SOME_DATA_DIR}/a.jsonl")
