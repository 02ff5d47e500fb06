"""Cells of text tables: lists of messages, missing values; and strings of JSON lines, which are none of these."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf.data.printed_lists import parse_printed
from rlhf.data.records import rows_to_records
from rlhf.data.sources import DataError, DatasetSpec, SkippedRow, read_rows
from rlhf.data.templates import load_template
from tests.support.published import published

HOSTILE = 'it\'s "so"\n} {\\ [1] {\'role\': \'user\'}\u2028{"content": "} {"} 한글'
TURNS = [{"role": "user", "content": "질문 " + HOSTILE}, {"role": "assistant", "content": HOSTILE}]


def records_of(path: Path, kind: str = "response", skipped: list[SkippedRow] | None = None, **spec: Any) -> list[Any]:
    dataset = DatasetSpec(str(path), **spec)
    on_bad_row = "error" if skipped is None else "skip"
    rows = read_rows(dataset, on_bad_row, skipped)
    template = load_template("none")
    return rows_to_records(rows, kind, template=template, spec=dataset, on_bad_row=on_bad_row, skipped=skipped)


@pytest.fixture
def pandas() -> Any:
    return pytest.importorskip("pandas", reason="pandas, which writes such cells, is not installed")


@pytest.mark.parametrize("through_parquet", [False, True], ids=["lists", "numpy arrays"])
def test_messages_as_pandas_writes_them_to_csv(pandas: Any, tmp_path: Path, through_parquet: bool) -> None:
    frame = pandas.DataFrame({"prompt": [TURNS[:1]] * 2, "chosen": [TURNS[1:]] * 2, "rejected": ["나쁜 답"] * 2})
    dialogues = pandas.DataFrame({"messages": [TURNS, TURNS * 2]})
    if through_parquet:
        for name, table in (("pairs", frame), ("dialogues", dialogues)):
            table.to_parquet(tmp_path / f"{name}.parquet")
        frame, dialogues = (pandas.read_parquet(tmp_path / f"{name}.parquet") for name in ("pairs", "dialogues"))
    for suffix, separator in (("csv", ","), ("tsv", "\t")):
        frame.to_csv(tmp_path / f"pairs.{suffix}", index=False, sep=separator)
        dialogues.to_csv(tmp_path / f"dialogues.{suffix}", index=False, sep=separator)
        for record in records_of(tmp_path / f"pairs.{suffix}", "preference", format="csv", delimiter=separator):
            assert (record.prompt, record.chosen) == (TURNS[0]["content"], HOSTILE) and record.rejected == "나쁜 답"
        for record in records_of(tmp_path / f"dialogues.{suffix}", format="csv", delimiter=separator):
            assert record.response == HOSTILE and record.prompt.startswith("질문 it's")
    answers = records_of(tmp_path / "pairs.csv", columns={"prompt": "prompt", "response": "chosen"})
    assert [record.response for record in answers] == [HOSTILE] * 2


@pytest.mark.parametrize("name", ["dpo_en_demo.json", "v1_dpo_demo.jsonl", "kto_en_demo.json"])
def test_published_conversations_are_the_same_through_csv(pandas: Any, tmp_path: Path, name: str) -> None:
    original = published(f"llama_factory_demo/{name}")
    rows = [dict(row.values) for row in read_rows(DatasetSpec(str(original)))]
    pandas.DataFrame(rows).to_csv(tmp_path / "a.csv", index=False)
    for kind in ("prompt", "response") if "kto" in name else ("prompt", "preference"):
        wanted, found = (records_of(path, kind, skipped=[]) for path in (original, tmp_path / "a.csv"))
        assert len(wanted) == len(found) >= 10
        for first, second in zip(wanted, found, strict=True):
            assert first.prompt == second.prompt
            for field in {"response", "chosen", "rejected"} & vars(first).keys():
                assert getattr(first, field) == getattr(second, field)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("['a', 'b']", ["a", "b"]),
        ("['a' 'b']", ["a", "b"]),  # numpy's; Python's own reading would be one text, "ab"
        ("['a'\n \"b's\" 'c,  d']", ["a", "b's", "c,  d"]),
        ("[0.5 -1.  2]", [0.5, -1.0, 2]),
        ("[1, 0]", [1, 0]),
        ("{'a': [1 2]}", {"a": [1, 2]}),
        ('["a", null]', ["a", None]),
        ("['a' ... 'b']", None),  # shortened by numpy
        ("[1, ...]", None),
        ("[array(['a'], dtype=object)]", None),
        ("['a", None),
        ("[nan]", None),
        ("['\\d']", None),
        ("plain", None),
        ("[" * 5000 + "]" * 5000, None),
    ],
)
def test_printed_lists(text: str, value: Any) -> None:
    assert parse_printed(text) == value


def test_lists_of_a_text_table(pandas: Any, tmp_path: Path) -> None:
    rows = [{"query": "q", "responses": ["it's", 'a "b"', "c"], "scores": [0.1, 2.0, -1.5]}] * 2
    pandas.DataFrame(rows).to_parquet(tmp_path / "a.parquet")
    pandas.DataFrame(rows).to_csv(tmp_path / "lists.csv", index=False)
    pandas.read_parquet(tmp_path / "a.parquet").to_csv(tmp_path / "arrays.csv", index=False)
    for name in ("a.parquet", "lists.csv", "arrays.csv"):
        for record in records_of(tmp_path / name, "ranked"):
            assert record.responses == ("it's", 'a "b"', "c") and record.ranks == (1, 0, 2)


@pytest.mark.parametrize("names", [("role", "content"), ("from", "value")])
@pytest.mark.parametrize("more", [{}, {"weight": 1}])
def test_messages_of_both_spellings_with_and_without_more(tmp_path: Path, names: tuple[str, str], more: Any) -> None:
    turns = [dict(zip(names, turn, strict=True)) | more for turn in (("user", "질문"), ("assistant", "답"))]
    asked, said = (json.dumps([turn], ensure_ascii=False).replace('"', '""') for turn in turns)
    (tmp_path / "a.csv").write_text(f'prompt,chosen,rejected\n"{asked}","{said}",싫어\n', encoding="utf-8")
    (record,) = records_of(tmp_path / "a.csv", "preference")
    assert (record.prompt, record.chosen, record.rejected) == ("질문", "답", "싫어")


@pytest.mark.parametrize(
    "cell",
    [
        "[{'role': 'assistant', 'content': array(['a'], dtype=object)}]",
        "[{'role': 'assistant', 'content': 'a'} ... {'role': 'assistant', 'content': 'b'}]",
        "[{'content': 'cut, 'role': 'assistant'}]",
    ],
)
def test_messages_that_cannot_be_read_back_are_an_error(tmp_path: Path, cell: str) -> None:
    path = tmp_path / "a.csv"
    quoted = cell.replace('"', '""')
    path.write_text(f'prompt,response\nq,네\nq,"{quoted}"\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"a\.csv:3: field `response` looks like a list of messages and cannot be read"):
        records_of(path)


def test_answers_that_only_look_like_lists_stay_text(tmp_path: Path) -> None:
    answers = ["[1, 2]", "['a', 'b']", '{"a": 1}', "[{'a': 1}]", "[대괄호]", "[{'role': 'x'}", "[1] {'content': 2}"]
    path = tmp_path / "a.csv"
    cells = "".join('q,"{}"\n'.format(answer.replace('"', '""')) for answer in answers)
    path.write_text(f"prompt,response\n{cells}", encoding="utf-8")
    assert [record.response for record in records_of(path)] == answers


@pytest.mark.parametrize("dump", [json.dumps, repr], ids=["JSON", "Python"])
def test_a_json_string_stays_an_answer_whatever_it_holds(tmp_path: Path, dump: Any) -> None:
    answer = dump([{"role": "assistant", "content": "안"}])
    path = tmp_path / "a.jsonl"
    row = {"prompt": dump([{"role": "user", "content": "대화를 JSON으로 써 줘."}]), "response": answer}
    path.write_text(json.dumps(row), encoding="utf-8")
    (record,) = records_of(path)
    assert record.response == answer and record.prompt == row["prompt"]
    path.write_text(json.dumps({"prompt": "q", "chosen": answer, "rejected": "싫어"}), encoding="utf-8")
    (pair,) = records_of(path, "preference")
    assert pair.chosen == answer
    path.write_text(json.dumps({"prompt": "q", "responses": [answer, "b"], "scores": [1, 0]}), encoding="utf-8")
    (ranking,) = records_of(path, "ranked")
    assert ranking.responses == (answer, "b")


MISSING = ["nan", "NaN", "NULL", "null", "None", "<NA>", "NaT", "\\N", "#N/A", " nan "]


@pytest.mark.parametrize("word", MISSING)
@pytest.mark.parametrize("suffix", ["csv", "tsv"])
def test_a_word_for_a_missing_value_is_no_text(tmp_path: Path, word: str, suffix: str) -> None:
    separator = "," if suffix == "csv" else "\t"
    path = tmp_path / f"a.{suffix}"
    rows = [["instruction", "input", "output"], ["q", word, "네"], ["q", "", "nan입니다"], ["q", "맥락", word]]
    path.write_text("".join(separator.join(row) + "\n" for row in rows), encoding="utf-8")
    with pytest.raises(DataError, match=rf"a\.{suffix}:4: field `output` is missing"):
        records_of(path)
    skipped: list[SkippedRow] = []
    kept = records_of(path, skipped=skipped)
    assert [(record.prompt, record.response) for record in kept] == [("q", "네"), ("q", "nan입니다")]
    assert [(item.line, item.field) for item in skipped] == [(4, "output")]


def test_what_pandas_writes_for_missing(pandas: Any, tmp_path: Path) -> None:
    frame = pandas.DataFrame({"prompt": ["a", "b", "c"], "response": ["x", None, float("nan")]})
    for name, table in (("as_is", frame), ("as_text", frame.astype(str))):
        table.to_csv(tmp_path / f"{name}.csv", index=False)
        skipped: list[SkippedRow] = []
        assert [record.response for record in records_of(tmp_path / f"{name}.csv", skipped=skipped)] == ["x"]
        assert [item.line for item in skipped] == [3, 4]
    frame.to_json(tmp_path / "a.jsonl", orient="records", lines=True)
    assert len(records_of(tmp_path / "a.jsonl", skipped=[])) == 1
    (tmp_path / "text.jsonl").write_text('{"prompt": "a", "response": "nan"}', encoding="utf-8")
    assert records_of(tmp_path / "text.jsonl")[0].response == "nan"  # a JSON string is what it says
