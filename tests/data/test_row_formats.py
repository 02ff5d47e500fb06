"""The recognised row formats, written out once more by hand: what each reads, and beside what it reads nothing."""

from __future__ import annotations

import pytest

from rlhf.data import DataError
from rlhf.data.formats import Layout, layout_of
from rlhf.data.row_formats import ROW_FORMATS
from rlhf.data.spec import DatasetSpec, Row

DIALOGUE = [{"role": "user", "content": "물음"}, {"role": "assistant", "content": "답"}]


def layout(kind: str, *headers: str) -> Layout:
    """Of a file with one row; `chosen` holds a whole dialogue where no other column holds the prompt."""
    row = {**dict.fromkeys(headers, "글"), "text": "### 질문: 물음\n\n### 답변: 답", "label": True}
    if not {"prompt", "instruction", "question", "conversations"} & set(headers):
        row["chosen"] = DIALOGUE
    return layout_of([Row({header: row[header] for header in headers}, "a.jsonl", 1)], kind, DatasetSpec("a.jsonl"))


def format_read(kind: str, *headers: str) -> str | None:
    """The format in which the file is read; None where it is not."""
    try:
        return layout(kind, *headers).format
    except DataError:
        return None


INSTRUCTED = "input:input input:context system:system system:system_prompt history:history"
PROMPTED = "input:input system:system system:system_prompt history:history"
SPOKEN = "system:system system:system_prompt"
READ = {
    "alpaca": ("prompt:instruction response:output", "prompt response", INSTRUCTED),
    "alpaca_response": ("prompt:instruction response:response", "prompt response", INSTRUCTED),
    "instances": (
        "prompt:instruction instances:instances", "prompt response", SPOKEN + " history:history"
    ),
    "completion": ("prompt:prompt response:completion", "prompt response", PROMPTED),
    "response": ("prompt:prompt response:response", "prompt response", PROMPTED),
    "prompt_answer": ("prompt:prompt response:answer", "prompt response", PROMPTED),
    "question_answer": ("prompt:question response:answer", "prompt response", INSTRUCTED),
    "input_output": ("prompt:input response:output", "prompt response", SPOKEN),
    "text": ("text:text", "prompt response", ""),
    "messages": ("messages:messages", "prompt response", SPOKEN),
    "sharegpt": ("messages:conversations", "prompt response", SPOKEN),
    "preference": (
        "prompt:prompt chosen:chosen rejected:rejected", "prompt preference ranked comparison", PROMPTED
    ),
    "alpaca_preference": (
        "prompt:instruction chosen:chosen rejected:rejected", "prompt preference ranked comparison", INSTRUCTED
    ),
    "question_preference": (
        "prompt:question chosen:chosen rejected:rejected", "prompt preference ranked comparison", INSTRUCTED
    ),
    "sharegpt_preference": (
        "prompt:conversations chosen:chosen rejected:rejected", "prompt preference ranked comparison", SPOKEN
    ),
    "message_pairs": (
        "chosen:chosen_messages rejected:rejected_messages", "prompt preference ranked comparison", SPOKEN
    ),
    "transcripts": ("chosen:chosen rejected:rejected", "prompt preference ranked comparison", SPOKEN),
    "scored_pair": (
        "prompt:prompt response1:response1 sum1:sum1 response2:response2 sum2:sum2",
        "prompt preference ranked comparison", "scores1:scores1 scores2:scores2 " + PROMPTED,
    ),
    "labelled": ("prompt:prompt response:completion label:label", "prompt response preference comparison", PROMPTED),
    "labelled_response": (
        "prompt:prompt response:response label:label", "prompt response preference comparison", PROMPTED
    ),
    "labelled_messages": ("messages:messages label:label", "prompt response preference comparison", SPOKEN),
    "labelled_sharegpt": ("messages:conversations label:label", "prompt response preference comparison", SPOKEN),
    "completions": (
        "prompt:prompt completion_0:completion_0 completion_1:completion_1 ranks:ranking",
        "prompt ranked comparison", PROMPTED,
    ),
    "rrhf": ("prompt:query responses:responses scores:scores", "prompt ranked comparison", PROMPTED),
    "rrhf_ranks": ("prompt:query responses:responses ranks:ranks", "prompt ranked comparison", PROMPTED),
    "scores": ("prompt:prompt responses:responses scores:scores", "prompt ranked comparison", PROMPTED),
    "ranks": ("prompt:prompt responses:responses ranks:ranks", "prompt ranked comparison", PROMPTED),
    "prompts": ("prompt:prompt", "prompt", PROMPTED),
    "instructions": ("prompt:instruction", "prompt", INSTRUCTED),
    "questions": ("prompt:question", "prompt", INSTRUCTED),
}  # fmt: skip
"""Format -> its columns as `ours:theirs`, the kinds of record it gives, the columns that it reads where they are."""


def pairs(text: str) -> list[tuple[str, str]]:
    return [(name, header) for name, _, header in (each.partition(":") for each in text.split())]


def test_every_format_is_in_the_table() -> None:
    assert list(READ) == list(ROW_FORMATS)


@pytest.mark.parametrize("name", READ)
def test_a_format_reads_its_columns_and_what_may_stand_beside_them(name: str) -> None:
    fields, kinds, beside = READ[name]
    columns = dict(pairs(fields))
    for kind in kinds.split():
        found = layout(kind, *columns.values())
        assert dict(found.columns).items() <= columns.items() and found.ignored == ()
        assert kind == "prompt" or (found.format == name and dict(found.columns) == columns)
        for ours, header in pairs(beside):
            found = layout(kind, *columns.values(), header, "메모")
            assert found.columns[ours] == header and found.ignored == ("메모",)
    for kind in {"prompt", "response", "preference", "ranked", "comparison"} - set(kinds.split()):
        assert format_read(kind, *columns.values()) != name


PROMPTS = ("prompt", "instruction", "query", "messages", "conversations")
NOT_BESIDE = {
    "prompt_answer": ("response", "output", "completion", "messages", "conversations"),
    "question_answer": PROMPTS,
    "input_output": (*PROMPTS, "question"),
    "question_preference": PROMPTS,
    "questions": PROMPTS,
}
CASES = [(name, header) for name, headers in NOT_BESIDE.items() for header in headers]


@pytest.mark.parametrize(("name", "header"), CASES)
def test_beside_another_prompt_or_answer_a_format_is_not_certain(name: str, header: str) -> None:
    kind = {"questions": "prompt", "question_preference": "preference"}.get(name, "response")
    columns = dict(pairs(READ[name][0]))
    assert format_read(kind, *columns.values()) == name != format_read(kind, *columns.values(), header)


@pytest.mark.parametrize("name", ["alpaca", "alpaca_response", "completion", "response", "prompt_answer"])
def test_a_question_beside_the_prompt_makes_two_readings(name: str) -> None:
    columns = dict(pairs(READ[name][0]))
    with pytest.raises(DataError, match="ambiguous") as caught:
        layout("response", *columns.values(), "question")
    for prompt in (columns["prompt"], "question"):
        assert f"`{name}` (prompt = {prompt}, response = {columns['response']})" in str(caught.value)


@pytest.mark.parametrize(("name", "rivals"), [
    ("question_answer", ("response", "output", "completion")), ("input_output", ("response", "answer", "completion")),
])  # fmt: skip
def test_another_answer_makes_two_readings(name: str, rivals: tuple[str, ...]) -> None:
    columns = dict(pairs(READ[name][0]))
    for rival in rivals:
        with pytest.raises(DataError, match="ambiguous") as caught:
            layout("response", *columns.values(), rival)
        for answer in (columns["response"], rival):
            assert f"`{name}` (prompt = {columns['prompt']}, response = {answer})" in str(caught.value)


@pytest.mark.parametrize("header", ["prompt", "instruction"])
def test_a_question_beside_a_bare_prompt_makes_two_readings(header: str) -> None:
    with pytest.raises(DataError, match="ambiguous"):
        layout("prompt", header, "question")


@pytest.mark.parametrize(("mapped", "read"), [
    ({"prompt": "물음"}, ("prompt", "chosen", "rejected")),
    ({"prompt": "물음", "chosen": "chosen", "rejected": "rejected"}, ("prompt", "chosen", "rejected")),
    ({"prompt": "물음", "response": "response"}, ("prompt", "response")),
    ({"prompt": "물음", "responses": "responses"}, ("prompt", "responses")),
])  # fmt: skip
def test_beside_a_named_prompt_the_answers_that_were_named_count(mapped: dict[str, str], read: tuple[str, ...]) -> None:
    """Where an answer is a whole dialogue, the prompt is what it says before its last turn."""
    row = dict.fromkeys(("물음", "chosen", "rejected", "responses", "response"), "글")
    found = layout_of([Row(row, "a.jsonl", 1)], "prompt", DatasetSpec("a.jsonl", columns=mapped))
    assert tuple(found.columns) == read and found.columns["prompt"] == "물음"


def test_bare_headers_are_not_read_beside_a_passage_and_those_that_say_what_they_are_are() -> None:
    for name in ("prompt_answer", "question_answer", "input_output", "questions"):
        kind = "prompt" if name == "questions" else "response"
        with pytest.raises(DataError, match="no known format"):
            layout(kind, *dict(pairs(READ[name][0])).values(), "passage")
    for name in ("alpaca", "alpaca_response", "completion", "response", "prompts", "instructions"):
        kind = READ[name][1].split()[-1]
        assert layout(kind, *dict(pairs(READ[name][0])).values(), "passage").ignored == ("passage",)
    assert layout("response", "text", "prompt", "completion").format == "completion", "a rendered text only alone"
