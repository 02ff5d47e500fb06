"""Text files cut into documents, mixed by weight and held out by content."""

import gzip
import json

import pytest

from rlhf.data.spec import DataError, DatasetSpec
from rlhf.data.texts import load_documents, read_documents


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def cut(path, **options):
    return read_documents(DatasetSpec(str(path), **options))


def test_text_is_cut_into_paragraphs_and_without_blank_lines_into_lines(tmp_path):
    lines = write(tmp_path / "lines.txt", "하나\r\n둘 셋\r\n넷")
    assert cut(lines) == ("lines", ["하나", "둘 셋", "넷"])
    paragraphs = write(tmp_path / "paragraphs.txt", "\n하나\n둘\n \t\n\n셋\n\n")
    assert cut(paragraphs) == ("paragraphs", ["하나\n둘", "셋"])
    assert cut(paragraphs, format="lines") == ("lines", ["하나", "둘", "셋"])
    assert cut(lines, format="paragraphs") == ("paragraphs", ["하나\n둘 셋\n넷"])


def test_markdown_is_cut_at_headings_but_not_inside_fenced_blocks(tmp_path):
    text = "앞\n\n# 제목\n글\n\n```bash\n# 주석\n```js\n# 주석\n````\n## 절\n#태그\n~~~\n# 주석\n```\n~~~ \n### 끝\n"
    sections = [
        "앞",
        "# 제목\n글\n\n```bash\n# 주석\n```js\n# 주석\n````",
        "## 절\n#태그\n~~~\n# 주석\n```\n~~~",
        "### 끝",
    ]
    assert cut(write(tmp_path / "a.md", text)) == ("sections", sections)
    packed = write(tmp_path / "a.MD.gz", gzip.compress(text.encode()))
    assert cut(packed) == ("sections", sections)
    assert cut(write(tmp_path / "a.txt", text), format="sections") == ("sections", sections)


def test_rows_give_their_text_column(tmp_path):
    rows = [{"text": " 하나\n둘 "}, {"text": "셋", "id": 3}, {"text": " "}]
    path = write(tmp_path / "a.jsonl", "\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    assert cut(path) == ("rows", ["하나\n둘", "셋"])
    table = write(tmp_path / "a.csv", "본문,번호\n하나,1\n")
    assert cut(table, columns={"text": "본문"}) == ("rows", ["하나"])
    with pytest.raises(DataError, match=r"a.csv:2: .*column `text`, which this row does not have .*: 본문, 번호"):
        cut(table)


def test_texts_are_composed_and_lose_their_byte_order_mark(tmp_path):
    decomposed = "\ufeff" + "\u1112\u1161\u11ab"
    assert cut(write(tmp_path / "a.txt", decomposed)) == ("lines", ["한"])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "a.txt: empty file"),
        ("a.txt", b" \n\n ", "a.txt: empty file"),
        ("a.txt", "한글\n둘".encode("cp949"), r"a.txt:1: not UTF-8; .*cp949"),
        ("a.txt", "하나\n".encode() + b"\xff", r"a.txt:2: not UTF-8"),
        ("a.txt", "한".encode("utf-16"), r"a.txt: not UTF-8 \(it begins with a UTF-16 mark"),
        ("a.txt", b"a\0b", "a.txt: a binary file; needed: text"),
        ("a.txt.gz", gzip.compress(b"one\ntwo\n" * 9, mtime=0)[:-12], "a.txt.gz: broken or cut gzip data"),
        ("a.txt", b"version https://git-lfs.github.com/spec/v1\n", "a.txt: a git-lfs pointer"),
        ("a.jsonl", b'{"text": " "}', "every row's `text` is empty"),
        ("a.doc", b"text", "a.doc: the suffix does not tell how to read it"),
    ],
)
def test_a_file_that_cannot_be_used_says_why(tmp_path, name, content, message):
    path = write(tmp_path / name, content)
    with pytest.raises(DataError, match=message):
        cut(path)


def test_missing_files_and_unknown_cuts_are_named(tmp_path):
    with pytest.raises(DataError, match="no such file: .*none.txt"):
        cut(tmp_path / "none.txt")
    path = write(tmp_path / "a.txt", "하나")
    with pytest.raises(DataError, match=r"must be one of lines, paragraphs, sections, not 'words'"):
        cut(path, format="words")
    with pytest.raises(DataError, match="cannot be read"):
        cut(write_directory(tmp_path / "folder.txt"))


def write_directory(path):
    path.mkdir()
    return path


def many(path, count, word):
    return write(path, "\n".join(f"{word} {number}" for number in range(count)))


def test_equal_documents_are_held_out_together_whatever_file_and_seed(tmp_path):
    one, other = many(tmp_path / "one.txt", 400, "같은"), many(tmp_path / "other.txt", 300, "같은")
    first, second = load_documents([one, other], eval_fraction=0.1, seed=0)
    assert 20 < len(first.held_out) < 70 and len(first.train) + len(first.held_out) == first.found == 400
    assert not set(first.held_out) & {*first.train, *second.train}
    assert set(second.held_out) <= set(first.held_out)
    assert load_documents([one], eval_fraction=0.1, seed=5)[0].held_out == first.held_out
    assert load_documents([one], eval_fraction=0.0, seed=0)[0].held_out == ()


def test_a_weight_counts_training_documents_and_no_held_out_ones(tmp_path):
    path = many(tmp_path / "a.txt", 400, "글")
    whole = load_documents([path], eval_fraction=0.1, seed=0)[0]
    half, more = (
        load_documents([json.dumps({"path": path, "weight": weight})], eval_fraction=0.1, seed=0)[0]
        for weight in (0.5, 2.5)
    )
    assert len(half.train) == round(len(whole.train) / 2 + 1e-9) == len(set(half.train))
    assert {more.train.count(document) for document in set(more.train)} == {2, 3}
    assert abs(len(more.train) - 2.5 * len(whole.train)) <= 0.5
    assert half.held_out == more.held_out == whole.held_out
    again, others = (
        load_documents([json.dumps({"path": path, "weight": 0.5})], eval_fraction=0.1, seed=seed)[0] for seed in (0, 1)
    )
    assert again.train == half.train != others.train


def test_nothing_left_on_one_side_is_an_error(tmp_path):
    path = write(tmp_path / "a.txt", "하나")
    with pytest.raises(DataError, match=r"of 1 documents eval_fraction=0.001 holds none out"):
        load_documents([path], eval_fraction=0.001, seed=0)
    with pytest.raises(DataError, match="of 1 documents none is left to train on"):
        load_documents([path], eval_fraction=0.9999, seed=0)
    with pytest.raises(DataError, match=r"eval_fraction=1.0 must lie in \[0, 1\)"):
        load_documents([path], eval_fraction=1.0, seed=0)
