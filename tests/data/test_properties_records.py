"""Properties of rows -> records: a row gives the texts that stand in it, is skipped and counted, or is an error."""

from __future__ import annotations

import json
import math
import os
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from rlhf.config import DataConfig
from rlhf.data import DataError, load_stage_data
from rlhf.data.records import rows_to_records
from rlhf.data.row_values import content_of
from rlhf.data.sources import DatasetSpec, Row, SkippedRow
from rlhf.data.templates import load_template
from rlhf.types import PreferenceRecord, RankedRecord, ResponseRecord
from tests.data.test_tokenize import make_tokenizer
from tests.support.property_inputs import (
    EOS,
    broken_texts,
    cases,
    json_values,
    numbers,
    texts,
    unseen_texts,
    visible_texts,
)

PLAIN = load_template("none")
ROLES = st.sampled_from(["user", "assistant", "system", "human", "gpt", "tool", " User "])
messages = st.lists(st.fixed_dictionaries({"role": ROLES, "content": visible_texts}), max_size=4)
anything = st.one_of(
    visible_texts, broken_texts, unseen_texts, json_values, messages, messages.map(json.dumps), numbers
)


def make(
    kind: str, rows: list[dict], on_bad_row: str = "skip", **spec: Any
) -> tuple[list[Any], list[SkippedRow], str | None]:
    """Records, skipped rows and the error; a bad row's error names file, line and field."""
    skipped: list[SkippedRow] = []
    given_rows = [Row(row, "set/file.jsonl", line) for line, row in enumerate(rows, start=1)]
    try:
        dataset = DatasetSpec("set/file.jsonl", **spec)
        records = rows_to_records(
            given_rows, kind, template=PLAIN, spec=dataset, on_bad_row=on_bad_row, skipped=skipped
        )
    except DataError as error:
        assert str(error).startswith("set/file.jsonl")
        return [], skipped, str(error)
    return records, skipped, None


def every_row_once(kind: str, rows: list[dict], **spec: Any) -> list[tuple[Any, dict]]:
    """Each record with its row, after checks: records and skipped rows are all rows; both choices of bad rows agree."""
    records, skipped, error = make(kind, rows, **spec)
    assert repr(make(kind, rows, **spec)) == repr((records, skipped, error))
    if error is not None:
        assert len(skipped) == len(rows) or "columns" in error
        return []
    lines = [int(record.meta["source"].rpartition(":")[2]) for record in records]
    assert lines == sorted(set(lines)) and len(records) + len(skipped) == len(rows)
    assert sorted(lines + [item.line for item in skipped]) == list(range(1, len(rows) + 1))
    assert len({record.id for record in records}) == len(records)
    for record in records:
        json.dumps([record.id, record.prompt, record.meta], ensure_ascii=False).encode()  # can be written anywhere
    faults = [item for item in skipped if "tie" not in item.reason]
    _, _, strict_error = make(kind, rows, "error", **spec)
    if faults:
        assert strict_error == f"set/file.jsonl:{faults[0].line}: field `{faults[0].field}` {faults[0].reason}"
    else:
        assert strict_error is None
    return [(record, rows[line - 1]) for record, line in zip(records, lines, strict=True)]


def nfc(value: Any) -> str:
    """The text that a record holds for a field; a field that is no text gives no record."""
    assert isinstance(value, str)
    return unicodedata.normalize("NFC", value)


def is_plain(value: Any) -> bool:
    return isinstance(value, str) and value.lstrip()[:1] != "["


GOOD = {"prompt": "질문", "response": "답", "id": "x", "category": "말"}


@cases(50)
@example([{"prompt": "a", "response": "[" * 100_000}])  # RecursionError; a text like any other
@example([{"prompt": "[" + "1" * 5000, "response": "b"}])  # ValueError
@example([{"prompt": "a", "response": "b", "id": "\ud800"}])  # failed when the report was written
@example([{"prompt": "a", "response": "b", "category": ["\udfff"]}])
@example([{"prompt": [{"role": [[1]], "content": "x"}], "response": "\u2062"}])
@given(
    st.lists(
        st.fixed_dictionaries({}, optional=dict.fromkeys(["prompt", "response", "id", "category", "\ud800"], anything)),
        max_size=6,
    )
)
def test_prompts_and_responses(rows: list[dict]) -> None:
    rows = [GOOD, *rows]
    made = every_row_once("response", rows)
    assert made and isinstance(made[0][0], ResponseRecord)
    for record, row in made:
        if is_plain(row["prompt"]):
            assert record.prompt == nfc(row["prompt"])
        if is_plain(row["response"]):
            assert record.response == nfc(row["response"])
    lines = {id(row) for _, row in made}
    for row in rows:  # no good row is lost either
        if (
            all(isinstance(value, str) and value[:1] == "x" and value[-1:] == "y" for value in row.values())
            and {"prompt", "response"} <= row.keys()
        ):
            assert id(row) in lines


@cases(25)
@example(["\u2062"], "")  # an answer of one invisible character was an answer
@example(["\0"], "")
@given(st.lists(unseen_texts, min_size=1, max_size=4), st.sampled_from(["", EOS, "</s>"]))
def test_an_answer_that_shows_nothing_is_skipped(answers: list[str], ending: str) -> None:
    answers = [answer.replace(EOS, "").replace("</s>", "") + ending for answer in answers]
    rows = [{"prompt": "a", "response": answer} for answer in answers]
    records, skipped, _ = make("response", [GOOD, *rows])
    assert len(records) == 1 and [item.field for item in skipped] == ["response"] * len(rows)
    pair = {"prompt": "a", "chosen": "b"}
    records, skipped, _ = make(
        "preference", [{**pair, "rejected": "c"}, *({**pair, "rejected": f"b{answer}"} for answer in answers)]
    )
    assert len(records) == 1 and all("same text" in item.reason for item in skipped)


@cases(30)
@given(texts)
def test_content_is_the_text_without_what_does_not_show(text: str) -> None:
    content = content_of(text)
    assert content == content_of(content) == content_of(f" {text}\u200b\n{EOS} ") and content == content.strip()
    assert not content.endswith((EOS, "</s>"))
    assert content_of(f"가{text}나") == "가" + "".join(c for c in text if content_of(f"x{c}y") != "xy") + "나"


@cases(30)
@given(
    st.lists(
        st.fixed_dictionaries(
            {"prompt": anything, "chosen": anything, "rejected": anything}, optional={"gap": anything}
        ),
        max_size=5,
    ),
    st.booleans(),
)
def test_pairs(rows: list[dict], by_gap: bool) -> None:
    rows = [{"prompt": "질문", "chosen": "가", "rejected": "나", "gap": 1}, *rows]
    for record, row in every_row_once("preference", rows, columns={"margin": "gap"} if by_gap else {}):
        assert isinstance(record, PreferenceRecord) and math.isfinite(record.margin)
        if all(is_plain(row[name]) for name in ("prompt", "chosen", "rejected")):
            assert (record.prompt, record.chosen, record.rejected) == tuple(
                nfc(row[name]) for name in ("prompt", "chosen", "rejected")
            )
        if by_gap:
            assert record.margin == float(row["gap"])


scores = st.one_of(
    st.lists(numbers, max_size=4),
    st.lists(anything, max_size=3),
    anything,
    st.lists(numbers, max_size=4).map(json.dumps),
)


@cases(40)
@example([{"query": "a", "responses": ["b", "c"], "scores": [10**400, 1]}])  # OverflowError
@example([{"query": "a", "responses": ["b", "c"], "scores": "[" * 100_000}])
@example([{"query": "a", "responses": ["b", "c"], "scores": ["1_0", 9]}])  # was 10
@given(
    st.lists(
        st.fixed_dictionaries(
            {
                "query": visible_texts,
                "responses": st.one_of(
                    st.lists(visible_texts, max_size=4, unique=True), st.lists(anything, max_size=3), anything
                ),
                "scores": scores,
            }
        ),
        max_size=4,
    )
)
def test_rankings(rows: list[dict]) -> None:
    rows = [{"query": "질문", "responses": ["가", "나"], "scores": [2, 1]}, *rows]
    for record, row in every_row_once("ranked", rows):
        assert isinstance(record, RankedRecord)
        answers = json.loads(row["responses"]) if isinstance(row["responses"], str) else row["responses"]
        values = json.loads(row["scores"]) if isinstance(row["scores"], str) else row["scores"]
        values = [float(value) for value in values]
        assert all(math.isfinite(value) for value in values) and not any("_" in str(v) for v in row["scores"])
        for answer, response in zip(answers, record.responses, strict=True):
            assert not is_plain(answer) or response == nfc(answer)
        for i, value in enumerate(values):
            assert record.ranks[i] == sum(other > value for other in values)


@cases(20)
@example([{"prompt": "a", "response1": "b", "response2": "c", "sum1": 1e308, "sum2": -1e308}])  # an infinite margin
@example([{"prompt": "a", "response1": "b", "response2": "c", "sum1": 1, "scores1": [1e308, 1e308], "sum2": 2}])
@example([{"prompt": "a", "response1": "b", "response2": "c", "sum1": 1, "scores1": [float("nan")], "sum2": 2}])
@given(
    st.lists(
        st.fixed_dictionaries(
            {
                "prompt": visible_texts,
                "response1": visible_texts,
                "response2": anything,
                "sum1": anything,
                "sum2": numbers,
            },
            optional={"scores1": st.lists(numbers, max_size=3)},
        ),
        max_size=4,
    )
)
def test_scored_pairs(rows: list[dict]) -> None:
    rows = [{"prompt": "질문", "response1": "가", "response2": "나", "sum1": 2, "sum2": 1, "scores1": [1, 1]}, *rows]
    for record, row in every_row_once("preference", rows, columns={"margin": "sum1-sum2"}):
        sums = float(row["sum1"]), float(row["sum2"])
        assert math.isfinite(record.margin) and record.margin == abs(sums[0] - sums[1]) > 0
        assert record.chosen == nfc(row["response1" if sums[0] > sums[1] else "response2"]) or not is_plain(
            row["response2"]
        )
        if row.get("scores1"):
            assert math.fsum(row["scores1"]) == pytest.approx(sums[0], abs=1e-6)


parts = st.lists(st.fixed_dictionaries({"type": st.sampled_from(["text", "image"]), "text": visible_texts}), max_size=2)
message = st.one_of(
    st.fixed_dictionaries({"role": ROLES, "content": st.one_of(visible_texts, anything, parts)}),
    st.fixed_dictionaries({"from": ROLES, "value": visible_texts}), anything,
)  # fmt: skip
conversations = st.one_of(st.lists(message, max_size=5), st.lists(message, max_size=5).map(json.dumps), anything)


@cases(40)
@given(st.lists(st.fixed_dictionaries({"messages": conversations}), max_size=4))
def test_conversations(rows: list[dict]) -> None:
    rows = [{"messages": [{"role": "user", "content": "질문"}, {"role": "assistant", "content": "답"}]}, *rows]
    for record, row in every_row_once("response", rows):
        turns = json.loads(row["messages"]) if isinstance(row["messages"], str) else row["messages"]
        said = [turn.get("content", turn.get("value")) for turn in turns]
        said = ["".join(part["text"] for part in text) if isinstance(text, list) else text for text in said]
        assert record.response == nfc(said[-1])
        place = 0
        for text in said[:-1]:  # every turn is there, in order
            place = record.prompt.index(nfc(text or "").rstrip(), place)


@cases(30)
@given(
    st.dictionaries(broken_texts, anything, max_size=5),
    st.sampled_from(["prompt", "response", "preference", "ranked", "comparison"]),
    st.dictionaries(
        st.sampled_from(["prompt", "response", "chosen", "responses", "margin", "id", "else"]), broken_texts, max_size=3
    ),
)
def test_any_columns_are_read_or_a_clear_error(row: dict, kind: str, columns: dict) -> None:
    mapped = {name: column for name, column in zip(columns, row, strict=False)} | {
        name: columns[name] for name in list(columns)[3:]
    }
    for choice in (columns, mapped, {}):
        records, skipped, error = make(kind, [row], columns=choice)
        assert error is not None or len(records) + len(skipped) >= 1


def test_the_report_of_odd_names_can_be_written(tmp_path: Path) -> None:
    """A file whose name is not UTF-8 (Korean in CP949), and a column that is half of a surrogate pair."""
    folder = os.fsencode(tmp_path) + b"/\xc7\xd1.jsonl"
    rows = [{"\ud83d": "질문", "b": "답"}] * 3 + [{"\ud83d": "", "b": "답"}]
    with open(folder, "wb") as stream:
        stream.write("\n".join(map(json.dumps, rows)).encode())
    spec = json.dumps({"path": os.fsdecode(folder), "columns": {"prompt": "\ud83d", "response": "b"}})
    config = DataConfig(template="none", on_bad_row="skip", eval_fraction=0)
    places: dict[str, Any] = {"cache_dir": tmp_path / "cache", "report_dir": tmp_path}
    tokenizer = make_tokenizer()
    data = load_stage_data("response", [spec], [], config=config, stage="sft", tokenizer=tokenizer, seed=0, **places)
    assert len(data.train) == 3
    (skipped,) = map(json.loads, (tmp_path / "skipped_rows.jsonl").read_text(encoding="utf-8").splitlines())
    assert (skipped["file"], skipped["line"], skipped["field"]) == (os.fsdecode(folder), 4, "\ud83d")
    report = json.loads((tmp_path / "data.json").read_text(encoding="utf-8"))
    assert report["datasets"][0]["path"] == os.fsdecode(folder)
    assert all(row.id.isprintable() for row in data.train)
