"""Every recognised format -> records, and every kind of bad row."""

from __future__ import annotations

import json
import re
import unicodedata
from typing import Any

import pytest

from rlhf.data.records import BETWEEN, SkippedRow, prompt_key, rows_to_records
from rlhf.data.sources import DataError, DatasetSpec, Row, read_rows
from rlhf.data.spec import ReadingNotes
from rlhf.data.templates import load_template
from rlhf.types import LabelledRecord, PreferenceRecord, PromptRecord, RankedRecord, ResponseRecord
from tests.support.published import published

PLAIN = load_template("none")


def make(
    kind: str, *values: dict[str, Any], template: Any = PLAIN, skipped: list[SkippedRow] | None = None, **spec: Any
) -> list[Any]:
    rows = [Row(value, "set/file.jsonl", line) for line, value in enumerate(values, start=1)]
    on_bad_row = "error" if skipped is None else "skip"
    dataset = DatasetSpec("set/file.jsonl", **spec)
    return rows_to_records(rows, kind, template=template, spec=dataset, on_bad_row=on_bad_row, skipped=skipped)


def one(kind: str, values: dict[str, Any], **more: Any) -> Any:
    (record,) = make(kind, values, **more)
    return record


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def bot(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


RESPONSES = {
    "kullm": ({"id": "k1", "instruction": "질문", "input": "맥락", "output": "답"}, "질문\n\n맥락"),
    "law_polyglot": ({"instruction": "질문", "input": "맥락", "response": "답"}, "질문\n\n맥락"),
    "koalpaca": ({"instruction": "질문", "output": "답"}, "질문"),
    "null_input": ({"instruction": "질문", "input": None, "output": "답"}, "질문"),
    "stanford_with_text": (
        {"instruction": "질문", "input": "", "output": "답", "text": "### Instruction:\n질문\n\n### Response:\n다름"},
        "질문",
    ),
    "kullm_eval": (
        {"id": "u", "motivation_app": "x", "instruction": "질문", "instances": [{"input": "맥락", "output": "답"}]},
        "질문\n\n맥락",
    ),
    "kochatgpt": ({"prompt": "질문", "completion": "답", "tokens": 7}, "질문"),
    "prompt_response": ({"prompt": "질문", "response": "답"}, "질문"),
    "messages": ({"messages": [user("질문"), bot("답")]}, "질문"),
    "turns": ({"messages": [user("가"), bot("나"), user("다"), bot("답")]}, "가\n\n나\n\n다"),
    "sharegpt": ({"conversations": [{"from": "human", "value": "질문"}, {"from": "gpt", "value": "답"}]}, "질문"),
    "parts": ({"messages": [user("질문"), {"role": "assistant", "content": [{"type": "text", "text": "답"}]}]}, "질문"),
    "labelled": ({"prompt": "질문", "completion": "답", "label": True}, "질문"),
    "labelled_messages": ({"messages": [user("질문"), bot("답")], "label": 1}, "질문"),
}


@pytest.mark.parametrize(("values", "prompt"), RESPONSES.values(), ids=RESPONSES.keys())
def test_responses(values: dict[str, Any], prompt: str) -> None:
    record = one("response", values)
    assert isinstance(record, ResponseRecord) and (record.prompt, record.response) == (prompt, "답")
    assert record.meta["source"] == "set/file.jsonl:1" and record.meta["category"] == ""
    assert record.meta["prompt_key"] == "".join(prompt.split()) and "rendered" not in record.meta
    asked = one("prompt", values)
    assert isinstance(asked, PromptRecord) and asked.prompt == prompt
    assert asked.meta["prompt_key"] == record.meta["prompt_key"]


def test_template_is_applied_once() -> None:
    kullm = load_template("kullm")
    row = {"instruction": "질문", "input": "맥락", "output": "답"}
    record = one("response", row, template=kullm)
    assert record.prompt == kullm.render("질문", "맥락")
    again = one("response", {"prompt": record.prompt, "response": "답"}, template=kullm)
    assert again.prompt == record.prompt and again.meta["rendered"] is True
    assert again.meta["prompt_key"] == record.meta["prompt_key"] == "질문맥락"


@pytest.mark.parametrize("marker", ["### 질문: 왜?\n\n### 답변:", "### Instruction:\n왜?\n\n### Response:\n"])
def test_one_text_rows(marker: str) -> None:
    record = one("response", {"text": marker + " 그래서.<|endoftext|>"}, template=load_template("kullm"))
    assert (record.prompt, record.response) == (marker, " 그래서.<|endoftext|>")
    assert record.meta["rendered"] is True and record.meta["prompt_key"] == "왜?"
    assert one("prompt", {"text": marker + " 그래서."}).prompt == marker


def hh(*turns: str) -> str:
    return "".join(f"\n\n{'Assistant' if n % 2 else 'Human'}: {turn}" for n, turn in enumerate(turns))


PAIRS = {
    "kullm_rlhf": {"prompt": "질문", "chosen": "좋은 답<|endoftext|>", "rejected": "나쁜 답<|endoftext|>"},
    "alpaca": {"instruction": "질문", "chosen": "좋은 답", "rejected": "나쁜 답"},
    "trl_lists": {"prompt": [user("질문")], "chosen": [bot("좋은 답")], "rejected": [bot("나쁜 답")]},
    "trl_implicit": {"chosen": [user("질문"), bot("좋은 답")], "rejected": [user("질문"), bot("나쁜 답")]},
    "ultrafeedback": {
        "prompt": "질문",
        "chosen": [user("질문"), bot("좋은 답")],
        "rejected": [user("질문"), bot("나쁜 답")],
        "messages": [user("질문"), bot("좋은 답")],
    },
    "llama_factory": {
        "conversations": [{"from": "human", "value": "질문"}],
        "chosen": {"from": "gpt", "value": "좋은 답"},
        "rejected": {"from": "gpt", "value": "나쁜 답"},
    },
    "message_pairs": {
        "chosen_messages": [user("질문"), bot("좋은 답")],
        "rejected_messages": [user("질문"), bot("나쁜 답")],
    },
    "scored": {
        "id": 3,
        "prompt": "질문",
        "response1": "나쁜 답",
        "scores1": [1, 2, 1.5],
        "sum1": 4.5,
        "response2": "좋은 답",
        "scores2": [5, 5, 5],
        "sum2": 15,
    },
}


@pytest.mark.parametrize("values", PAIRS.values(), ids=PAIRS.keys())
def test_pairs(values: dict[str, Any]) -> None:
    for kind in ("preference", "comparison"):
        record = one(kind, values)
        assert isinstance(record, PreferenceRecord) and record.prompt == "질문" and record.margin == 0
        assert record.chosen.startswith("좋은 답") and record.rejected.startswith("나쁜 답")
    ranked = one("ranked", values)
    assert isinstance(ranked, RankedRecord) and ranked.ranks == (0, 1) and ranked.responses[0].startswith("좋은")
    if "messages" not in values:
        assert one("prompt", values).prompt == "질문"
    if not {"messages", "conversations"} & values.keys():  # pairs are imitated only when `columns` says which side
        with pytest.raises(DataError, match="columns"):
            make("response", values)


def test_literal_end_of_text_is_kept_but_does_not_make_texts_differ() -> None:
    record = one("preference", PAIRS["kullm_rlhf"])
    assert record.chosen.endswith("답<|endoftext|>")
    with pytest.raises(DataError, match="`rejected` is the same text as `chosen`"):
        make("preference", {"prompt": "q", "chosen": "답\n<|endoftext|>", "rejected": " 답</s>"})


def test_transcripts() -> None:
    row = {"chosen": hh("Hi", "Hello", "{why}?", "good"), "rejected": hh("Hi", "Hello", "{why}?", "bad")}
    record = one("preference", row, template=load_template("kullm"))
    assert record.prompt == "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: {why}?\n\nAssistant:"
    assert (record.chosen, record.rejected) == (" good", " bad") and record.meta["rendered"] is True
    assert record.meta["prompt_key"] == "hihello{why}?"
    assert one("prompt", row).prompt == record.prompt
    with pytest.raises(DataError, match="no common prompt"):
        make("preference", {"chosen": hh("a", "b"), "rejected": hh("c", "b")})
    with pytest.raises(DataError, match="no common prompt"):
        make("preference", {"chosen": hh("a", "b", "c", "d"), "rejected": hh("a", "b")})
    with pytest.raises(DataError, match="`chosen` holds nothing but white space"):
        make("preference", {"chosen": hh("a", ""), "rejected": hh("a", "b")})
    with pytest.raises(DataError, match="ends with a .* turn"):
        make("preference", {"chosen": hh("a", "b", "c"), "rejected": hh("a", "d", "e")})
    with pytest.raises(DataError, match="turns before the last one differ"):
        make("preference", {"chosen": [user("a"), bot("b")], "rejected": [user("c"), bot("d")]})


def test_scored_pairs() -> None:
    row = PAIRS["scored"]
    assert one("preference", row, columns={"margin": "sum1-sum2"}).margin == 10.5
    assert one("preference", {**row, "gap": 2}, columns={"margin": "gap"}).margin == 2.0
    assert one("preference", row).id == "3"
    with pytest.raises(DataError, match="field `sum2` is 14, but `scores2` sums to 15"):
        make("preference", {**row, "sum2": 14})
    skipped: list[SkippedRow] = []
    tie = {**row, "scores2": [4.5], "sum2": 4.5}
    rows = [Row(tie, "f", 1), Row(row, "f", 2)]
    kept = rows_to_records(rows, "preference", template=PLAIN, spec=DatasetSpec("f"), skipped=skipped)
    assert len(kept) == 1 and [(item.line, item.field) for item in skipped] == [(1, "sum1")]
    assert "tie" in skipped[0].reason
    with pytest.raises(DataError, match="no usable `preference` record.*tie"):
        make("preference", tie)


@pytest.mark.parametrize(
    ("row", "ranks"),
    [
        (
            {"prompt": "q", "completion_0": "a", "completion_1": "b", "completion_2": "c", "ranking": [2, 0, 1]},
            (2, 0, 1),
        ),
        ({"prompt": "q", "completion_0": "a", "completion_1": "b", "ranking": "[1, 0]"}, (1, 0)),
        ({"query": "q", "responses": ["a", "b", "c", "d"], "scores": [0.5, 2, 2, -1]}, (2, 0, 0, 3)),
        ({"query": "q", "responses": '["a", "b"]', "scores": '["1", "2"]'}, (1, 0)),
        ({"prompt": "q", "responses": ["a", "b", "c"], "ranks": [0, 0, 2]}, (0, 0, 2)),
        ({"prompt": "q", "responses": ["a", "b", "c"], "ranks": [3, 1, 2]}, (2, 0, 1)),
        ({"prompt": "q", "responses": [bot("a"), bot("b")], "scores": [0, 1]}, (1, 0)),
    ],
)
def test_rankings(row: dict[str, Any], ranks: tuple[int, ...]) -> None:
    for kind in ("ranked", "comparison"):
        record = one(kind, row)
        assert isinstance(record, RankedRecord) and record.ranks == ranks
        assert record.prompt == "q" and record.responses == tuple("abcd"[: len(ranks)])
    assert one("prompt", row).prompt == "q"
    with pytest.raises(DataError, match=r"no known format.*\{"):
        make("preference", row)


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (
            [{"prompt": "q", "completion": "a", "label": True}, {"prompt": "q", "completion": "b", "label": False},
             {"prompt": "p", "completion": "c", "label": "yes"}],
            [("q", "a", True), ("q", "b", False), ("p", "c", True)],
        ),
        ([{"messages": [user("q"), bot("a")], "label": 0}, {"messages": [user("q"), bot("b")], "label": 1}],
         [("q", "a", False), ("q", "b", True)]),
        ([{"prompt": "q", "chosen": "a", "rejected": "b"}], [("q", "a", True), ("q", "b", False)]),
        ([{"query": "q", "responses": ["a", "b", "c", "d", "e"], "scores": [0, 2, 1, 2, 0]}],
         [("q", "a", False), ("q", "b", True), ("q", "d", True), ("q", "e", False)]),
        ([{"prompt": "q", "response1": "a", "scores1": [1], "sum1": 1, "response2": "b", "scores2": [2], "sum2": 2}],
         [("q", "b", True), ("q", "a", False)]),
    ],
)  # fmt: skip
def test_labels(rows: list[dict[str, Any]], expected: list[tuple[str, str, bool]]) -> None:
    """One record for each labelled response, and the best and the worst ones of what is compared."""
    found = make("labelled", *rows)
    assert all(isinstance(record, LabelledRecord) for record in found)
    assert [(record.prompt, record.response, record.good) for record in found] == expected
    assert len({record.id for record in found}) == len(found)
    assert found[0].meta["prompt_key"] and found[0].meta["source"] == "set/file.jsonl:1"


def test_responses_between_the_best_and_the_worst_are_counted() -> None:
    notes = ReadingNotes()
    rows = [Row({"query": "q", "responses": ["a", "b", "c"], "scores": [0, 2, 1]}, "f", 1)]
    rows_to_records(rows, "labelled", template=PLAIN, spec=DatasetSpec("f"), notes=notes)
    assert notes.warnings == {BETWEEN: 1}
    with pytest.raises(DataError, match="`scores` is the same for all 2 responses: a tie"):
        make("labelled", {"query": "q", "responses": ["a", "b"], "scores": [1, 1]})


def test_ten_completions_are_in_number_order() -> None:
    row = {"prompt": "q", **{f"completion_{n}": f"r{n}" for n in (10, 2, 1, 0, 3, 4, 5, 6, 7, 8, 9)}}
    record = one("ranked", {**row, "ranking": list(range(11))})
    assert record.responses == tuple(f"r{n}" for n in range(11))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"query": "q", "responses": ["a", "b"], "scores": [1]}, "`scores` has 1 entries for 2 responses"),
        ({"query": "q", "responses": ["a"], "scores": [1]}, "`responses` needs at least two responses, got 1"),
        ({"query": "q", "responses": ["a", "\u200b"], "scores": [1, 2]}, r"`responses\[1\]` holds nothing but white"),
        ({"query": "q", "responses": ["a", "b"], "scores": [1, float("nan")]}, "`scores` needs a finite number"),
        ({"query": "q", "responses": ["a", "b"], "scores": [1, True]}, "`scores` needs a finite number"),
        ({"query": "q", "responses": ["a", "b"], "scores": "high"}, "`scores` needs a list"),
        ({"query": "q", "responses": ["a", "a "], "scores": [1, 2]}, "same text twice with different ranks"),
        ({"query": "q", "responses": "ab", "scores": [1, 2]}, "`responses` needs a list"),
        ({"query": "q", "responses": ["a", "b"], "scores": [1, 1]}, "no usable `ranked` record.*tie"),
    ],
)
def test_bad_rankings(row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        make("ranked", row)


def test_comparison_blends_pairs_and_rankings_of_several_files() -> None:
    rows = [
        Row(PAIRS["kullm_rlhf"], "a.jsonl", 1),
        Row({"query": "q", "responses": ["a", "b"], "scores": [1, 2]}, "b", 1),
    ]
    records = rows_to_records(rows, "comparison", template=PLAIN, spec=DatasetSpec("dir"))
    assert [type(record) for record in records] == [PreferenceRecord, RankedRecord]


LABELS = {"prompt": "question", "response": "response", "label": "acceptable?"}


def test_labelled_rows_become_pairs() -> None:
    def row(question: str, response: str, label: Any) -> dict[str, Any]:
        return {"question": question, "response": response, "acceptable?": label, "category": ["ethical", "other"]}

    skipped: list[SkippedRow] = []
    records = make(
        "preference",
        row("질문", "좋음0", 1),
        row("질 문", "나쁨0", 0),
        row("질문", "좋음1", "TRUE"),
        row("다른", "혼자", True),
        row("질문", "나쁨1", "0"),
        row("질문", "나쁨2", False),
        row("질문", "이상", "maybe"),
        columns=LABELS,
        skipped=skipped,
    )
    pairs = [(record.chosen, record.rejected) for record in records]
    assert pairs == [("좋음0", "나쁨0"), ("좋음0", "나쁨1"), ("좋음1", "나쁨0"), ("좋음0", "나쁨2")]  # 4 of the 6
    assert len({record.id for record in records}) == 4 and records[0].meta["category"] == "ethical,other"
    assert [(item.line, item.field) for item in skipped] == [(7, "acceptable?"), (4, "acceptable?")]
    kept = make("response", row("질문", "좋음", 1), row("질문", "나쁨", 0), columns=LABELS)
    assert [record.response for record in kept] == ["좋음"]
    assert (
        len(make("response", row("질문", "좋음", 1), row("질문", "나쁨", 0), columns=dict(list(LABELS.items())[:2])))
        == 2
    )


def test_labelled_kto_rows() -> None:
    rows = [{"prompt": "q", "completion": text, "label": label} for text, label in (("a", True), ("b", False))]
    assert make("preference", *rows)[0].chosen == "a"
    rows = [{"messages": [user("q"), bot(text)], "label": label} for text, label in (("a", False), ("b", True))]
    assert make("comparison", *rows)[0].chosen == "b"
    with pytest.raises(DataError, match="all have one label"):
        make("preference", rows[0])
    with pytest.raises(DataError, match="field `label` needs true or false"):
        make("response", {"prompt": "q", "completion": "a", "label": "topic"})


def test_columns() -> None:
    row = {"번호": "7", "질의": "질문", "근거": "좋은", "GPT": "나쁜", "종류": "상담"}
    record = one(
        "preference",
        row,
        columns={"id": "번호", "prompt": "질의", "chosen": "근거", "rejected": "GPT", "category": "종류"},
    )
    assert (record.id, record.prompt, record.chosen, record.rejected) == ("7", "질문", "좋은", "나쁜")
    assert record.meta["category"] == "상담"
    assert one("response", row, columns={"prompt": "질의", "response": "근거"}).response == "좋은"
    assert one("prompt", row, columns={"prompt": "질의", "response": "근거"}).prompt == "질문"
    assert (
        one("response", row, columns={"prompt": "질의", "input": "종류", "response": "근거"}).prompt == "질문\n\n상담"
    )
    ranked = one(
        "ranked", {**row, "순위": "[1, 0]"}, columns={"prompt": "질의", "responses": "근거, GPT", "ranks": "순위"}
    )
    assert ranked.responses == ("좋은", "나쁜") and ranked.ranks == (1, 0)
    pair = {"prompt": "q", "chosen": "a", "rejected": "b", "gap": 1.5, "topic": None}
    record = one("preference", pair, columns={"margin": "gap"}, category="법률")
    assert record.margin == 1.5 and record.meta["category"] == "법률"
    assert one("response", pair, columns={"response": "chosen"}).response == "a"
    both = {"instruction": "q", "input": "맥락", "output": "a", "response": "b"}
    assert one("response", both, columns={"prompt": "instruction", "response": "output"}).prompt == "q\n\n맥락"
    assert one("response", both, format="alpaca_response").response == "b"
    assert (
        one("response", {"q": [user("질문")], "a": bot("답")}, columns={"prompt": "q", "response": "a"}).response
        == "답"
    )


@pytest.mark.parametrize(
    ("row", "columns", "message"),
    [
        ({"q": "1", "a": "2"}, {"prompt": "질의", "response": "a"}, "names '질의'.*its columns: q, a"),
        ({"q": "1", "a": "2"}, {"promt": "q"}, "unknown names promt; valid: prompt, response"),
        ({"q": "1", "a": "2"}, {"prompt": "q"}, r"gives prompt; needed: prompt \+ response or messages.*columns: q, a"),
    ],
)
def test_wrong_columns(row: dict[str, Any], columns: dict[str, str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        make("response", row, columns=columns)


@pytest.mark.parametrize(
    ("kind", "row", "readings"),
    [
        ("response", {"instruction": "q", "output": "a", "response": "b"}, ["alpaca", "alpaca_response"]),
        ("response", {"prompt": "q", "completion": "a", "response": "b"}, ["completion", "response"]),
        ("response", {"messages": [], "conversations": []}, ["messages", "sharegpt"]),
        ("prompt", {"instruction": "q", "prompt": "p"}, ["prompts", "instructions"]),
        ("comparison", {**PAIRS["kullm_rlhf"], "responses": ["a"], "ranks": [0]}, ["preference", "ranks"]),
        ("ranked", {"query": "q", "responses": ["a"], "ranks": [0], "scores": [1]}, ["rrhf", "rrhf_ranks"]),
    ],
)
def test_ambiguous_fields(kind: str, row: dict[str, Any], readings: list[str]) -> None:
    with pytest.raises(DataError, match="ambiguous") as caught:
        make(kind, row)
    assert re.findall(r"`(\w+)` \(", str(caught.value))[-len(readings) :] == readings
    assert 'such as {"columns": {"' in str(caught.value)


def test_unknown_fields_and_names() -> None:
    with pytest.raises(
        DataError,
        match='no known format.*columns: 물음, 근거.*such as {"columns": {"prompt": "물음", "response": "근거"}}',
    ):
        make("response", {"물음": "q", "근거": "a"})
    with pytest.raises(DataError, match="as preference.*it could give records of another kind"):
        make("response", PAIRS["kullm_rlhf"])
    with pytest.raises(DataError, match="no known format"):  # a null column is no column
        make("response", {"instruction": "q", "output": None})
    with pytest.raises(DataError, match="no known format.*needs|no known format.*columns: a$"):
        make("preference", {"a": "q"})
    with pytest.raises(DataError, match="'pairs' is not one of prompt, response"):
        make("pairs", PAIRS["kullm_rlhf"])
    with pytest.raises(DataError, match="unknown format `alpacca`; file formats: json.*row formats: alpaca"):
        make("response", {"instruction": "q", "output": "a"}, format="alpacca")
    with pytest.raises(DataError, match="format `rrhf` needs the columns query, responses, scores; not there: query"):
        make("ranked", {"responses": ["a", "b"], "scores": [1, 2]}, format="rrhf")
    with pytest.raises(DataError, match="not both"):
        make("response", {"instruction": "q", "output": "a"}, format="alpaca", columns={"prompt": "instruction"})


GOOD = {"prompt": "질문", "chosen": "좋은", "rejected": "나쁜"}


@pytest.mark.parametrize(
    ("changed", "field", "reason"),
    [
        ({"prompt": ""}, "prompt", "is empty"),
        ({"prompt": None}, "prompt", "is missing"),
        ({"chosen": " \n\t"}, "chosen", "nothing but white space"),
        ({"chosen": "\u200b"}, "chosen", "invisible"),
        ({"chosen": "\u200d\ufeff\u2060"}, "chosen", "invisible"),
        ({"rejected": "<|endoftext|>"}, "rejected", "end-of-text"),
        ({"rejected": 3}, "rejected", "needs a text, got 3 (int)"),
        ({"rejected": ["나쁜"]}, "rejected[0]", "needs a message"),
        ({"rejected": "좋은"}, "rejected", "is the same text as `chosen`"),
        ({"rejected": unicodedata.normalize("NFD", "좋은")}, "rejected", "is the same text as `chosen`"),
        ({"chosen": "half \ud83d"}, "chosen", "surrogate"),
        ({"prompt": [bot("x")]}, "prompt", "last turn is assistant"),
        ({"prompt": [{"role": "tool", "content": "x"}]}, "prompt[0]", "has the role 'tool'; known: system, user"),
        ({"prompt": [{"role": "user", "content": [{"type": "image"}]}]}, "prompt[0]", "not text"),
    ],
)
def test_bad_rows(changed: dict[str, Any], field: str, reason: str) -> None:
    with pytest.raises(DataError) as caught:
        make("preference", GOOD, {**GOOD, **changed})
    assert str(caught.value).startswith(f"set/file.jsonl:2: field `{field}` ") and reason in str(caught.value)
    skipped: list[SkippedRow] = []
    assert len(make("preference", GOOD, {**GOOD, **changed}, GOOD, skipped=skipped)) == 2
    (item,) = skipped
    assert (item.file, item.line, item.field) == ("set/file.jsonl", 2, field) and reason in item.reason


def test_a_field_missing_from_one_row_is_a_bad_row() -> None:
    with pytest.raises(DataError, match="jsonl:2: field `rejected` is missing"):
        make("preference", GOOD, {"prompt": "질문", "chosen": "좋은"})
    with pytest.raises(DataError, match="jsonl:2: field `답` is missing"):
        make("response", {"질": "q", "답": "a"}, {"질": "q"}, columns={"prompt": "질", "response": "답"})
    with pytest.raises(DataError, match="ends with the user's turn"):
        make("response", {"messages": [user("a"), bot("b"), user("c")]})
    with pytest.raises(DataError, match="`messages` holds no message but an empty system message"):
        make("response", {"messages": [{"role": "system", "content": ""}]})
    with pytest.raises(DataError, match="on_bad_row='ignore' is not one of error, skip"):
        rows_to_records([], "prompt", template=PLAIN, spec=DatasetSpec("f"), on_bad_row="ignore")
    with pytest.raises(DataError, match="f: no rows"):
        rows_to_records([], "prompt", template=PLAIN, spec=DatasetSpec("f"))


def test_unicode() -> None:
    family = "👨\u200d👩\u200d👧"
    decomposed = unicodedata.normalize("NFD", "한글 질문")
    record = one("response", {"prompt": decomposed + "  É", "response": f"{family} 좋아요\u200b!"})
    assert record.prompt == "한글 질문  É" and record.response == f"{family} 좋아요\u200b!"
    assert record.meta["prompt_key"] == prompt_key("한글질문é") == "한글질문é"


@pytest.mark.parametrize("role", ["user", "human", "prompter", " Human "])
@pytest.mark.parametrize("answers", ["assistant", "gpt", "chatgpt", "bot", "model", "GPT"])
def test_every_name_of_the_two_who_speak_is_known(role, answers) -> None:
    record = one("response", {"messages": [{"role": role, "content": "질문"}, {"role": answers, "content": "답"}]})
    assert (record.prompt, record.response) == ("질문", "답")


def test_text_that_looks_like_json_stays_text() -> None:
    answer = '{"role": "manager", "name": "kim"}'
    assert one("response", {"prompt": '["a"]', "response": answer}).response == answer
    table = {"messages": json.dumps([user("질문"), bot("답")], ensure_ascii=False)}
    assert one("response", table).response == "답"


def test_ids_are_unique_and_tell_the_row() -> None:
    rows = [{"id": "x", "prompt": "a"}, {"id": "x", "prompt": "b"}, {"prompt": "c"}, {"id": 0, "prompt": "d"}]
    assert [record.id for record in make("prompt", *rows)] == ["x", "x#2", "file-3", "0"]
    assert one("prompt", {"id3": 12, "prompt": "a"}).id == "12"
    instances = [{"input": "가", "output": "a"}, {"input": "", "output": "b"}]
    records = make("response", {"id": "t", "instruction": "q", "instances": instances})
    assert [(r.id, r.prompt, r.response) for r in records] == [("t-0", "q\n\n가", "a"), ("t-1", "q", "b")]


# published data

# file: kind, specification, records, rows skipped
SHEETS: dict[str, tuple[str, dict[str, Any], int, int]] = {
    "songys_chatbot/ChatbotData.csv": ("response", {"columns": {"prompt": "Q", "response": "A"}}, 11823, 0),
    "hrc_human_rights/humane_right_copus_v1.jsonl.json": (
        "preference",
        {"columns": {"prompt": "질의", "chosen": "상담례, 결정례 기반 답변", "rejected": "ChatGPT API 답변"}},
        1549,
        0,
    ),
    "ko_arena_hard/pairs.jsonl.gz": ("comparison", {}, 2855, 0),
    "ko_arena_hard/ranked.jsonl.gz": ("comparison", {}, 399, 1),
    "hh_rlhf/harmless-base-test.jsonl.gz": ("preference", {}, 2303, 9),
    "naver_square_kosbi/square_response_iter0.json": ("preference", {"columns": LABELS}, 150, 0),
    "llama_factory_demo/dpo_en_demo.json": ("preference", {}, 300, 0),
    "llama_factory_demo/v1_dpo_demo.jsonl": ("preference", {}, 10, 0),
    "llama_factory_demo/alpaca_en_demo.json": ("response", {}, 999, 0),
    "llama_factory_demo/kto_en_demo.json": ("response", {}, 150, 150),
    "kullm/user_oriented_instructions_eval.jsonl": ("response", {}, 252, 0),
    "kullm/kullm-v1.jsonl": ("response", {}, 252, 0),
    "legalqa_haven/legalqa_small.jsonlines": (
        "response",
        {"columns": {"prompt": "question", "response": "answer"}},
        10,
        0,
    ),
}


def read_published(name: str, kind: str, spec: dict[str, Any]) -> tuple[list[Any], list[SkippedRow]]:
    dataset = DatasetSpec(str(published(name)), **spec)
    skipped: list[SkippedRow] = []
    rows = read_rows(dataset, "skip", skipped)
    return rows_to_records(
        rows, kind, template=load_template("kullm"), spec=dataset, on_bad_row="skip", skipped=skipped
    ), skipped


@pytest.mark.parametrize(("name", "sheet"), SHEETS.items(), ids=SHEETS.keys())
def test_published_files(name: str, sheet: tuple[str, dict[str, Any], int, int]) -> None:
    kind, spec, count, bad = sheet
    records, skipped = read_published(name, kind, spec)
    assert (len(records), len(skipped)) == (count, bad), [item.reason for item in skipped[:5]]
    assert len({record.id for record in records}) == count
    prompts, _ = read_published(name, "prompt", spec)
    assert {r.meta["prompt_key"] for r in records} <= {p.meta["prompt_key"] for p in prompts}


def test_published_labelled_responses(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "naver_square_kosbi/response_test_ood.json"
    capped, _ = read_published(name, "preference", {"columns": LABELS})
    monkeypatch.setattr("rlhf.data.records.MAX_PAIRS_PER_PROMPT", 10**6)
    records, skipped = read_published(name, "preference", {"columns": LABELS})
    assert len({record.meta["prompt_key"] for record in records}) == 104  # of 254 questions, as its source file says
    assert len(records) == len(capped) == 107 and len(skipped) == 150
