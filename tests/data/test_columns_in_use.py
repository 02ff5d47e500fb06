"""Columns beside prompt and answer: an input, a system text, earlier turns are used, every other one is named."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from rlhf.config import DataConfig
from rlhf.data import DataError, load_stage_data
from rlhf.data.records import rows_to_records
from rlhf.data.sources import DatasetSpec, Row
from rlhf.data.templates import load_template
from rlhf.models.tiny_base import train_tokenizer

CHAT = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}<assistant>"


def records_of(kind: str, *rows: dict[str, Any], template: str = "koalpaca", cells: bool = False, **spec: Any) -> list:
    tokenizer = None
    if template == "chat":
        tokenizer = train_tokenizer(["가나다"] * 3, 280)
        tokenizer.chat_template = CHAT
    made = [Row(row, "set/f.jsonl", line, text_cells=cells) for line, row in enumerate(rows, start=1)]
    dataset = DatasetSpec("set/f.jsonl", **spec)
    return rows_to_records(made, kind, template=load_template(template, tokenizer), spec=dataset)


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def bot(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


ANSWERS = {
    "response": {"output": "답"},
    "preference": {"chosen": "좋은 답", "rejected": "나쁜 답"},
}
ASKED = "### 질문: 물음\n\n### 답변:"
WITH_INPUT = "### 질문: 물음\n\n### 맥락: 맥락\n\n### 답변:"


@pytest.mark.parametrize(
    ("columns", "prompt"),
    [
        ({"instruction": "물음", "context": "맥락"}, WITH_INPUT),  # Dolly
        ({"instruction": "물음", "context": ""}, ASKED),
        ({"instruction": "물음", "input": "맥락", "system": "짧게."}, "짧게.\n\n" + WITH_INPUT),
        ({"instruction": "물음", "system_prompt": "짧게."}, "짧게.\n\n" + ASKED),
        ({"instruction": "물음", "system": "", "history": []}, ASKED),
        ({"instruction": "물음", "system": None, "history": None, "input": float("nan")}, ASKED),
        (  # LLaMA-Factory
            {"instruction": "물음", "input": "맥락", "system": "짧게.", "history": [["가", "나"], ["다", "라"]]},
            "짧게.\n\n### 질문: 가\n\n### 답변:나\n\n### 질문: 다\n\n### 답변:라\n\n"
            "### 질문: 물음\n\n맥락\n\n### 답변:",
        ),
        ({"instruction": "물음", "history": [user("가"), bot("나")]}, "### 질문: 가\n\n### 답변:나\n\n" + ASKED),
    ],
)
def test_instruction_rows(columns: dict[str, Any], prompt: str) -> None:
    for kind, answers in ANSWERS.items():
        (record,) = records_of(kind, {**columns, **answers})
        assert record.prompt == prompt
        (asked,) = records_of("prompt", {**columns, **answers})
        assert asked.prompt == prompt and dict(asked.columns) == answers
        assert asked.meta["prompt_key"] == record.meta["prompt_key"]


def test_a_column_that_is_blank_in_every_row_hides_no_other() -> None:
    row = {
        "instruction": "물음",
        "input": "",
        "context": "맥락",
        "system": " ",
        "system_prompt": "짧게.",
        "output": "답",
    }
    for kind in ("prompt", "response"):
        assert records_of(kind, row)[0].prompt == "짧게.\n\n" + WITH_INPUT
        first, second = records_of(kind, row, {**row, "input": "글"})  # where both say something, the first one counts
        assert (first.prompt, second.prompt) == (
            "짧게.\n\n" + ASKED,
            "짧게.\n\n" + WITH_INPUT.replace("맥락\n\n### 답", "글\n\n### 답"),
        )


PROMPT_ROWS = {
    "response": {"response": "답"},
    "completion": {"completion": "답"},
    "preference": {"chosen": "좋은 답", "rejected": "나쁜 답"},
    "ranks": {"responses": ["a", "b"], "ranks": [0, 1]},
    "prompts": {},
}


@pytest.mark.parametrize("name", PROMPT_ROWS)
def test_prompt_rows(name: str) -> None:
    kind = {"completion": "response", "ranks": "ranked", "prompts": "prompt"}.get(name, name)
    row = {"prompt": "물음", "input": "맥락", "system": "짧게.", "history": [["가", "나"]], **PROMPT_ROWS[name]}
    (record,) = records_of(kind, row)
    assert record.prompt == "짧게.\n\n### 질문: 가\n\n### 답변:나\n\n### 질문: 물음\n\n맥락\n\n### 답변:"
    (chat,) = records_of(kind, row, template="chat")
    assert chat.prompt == "<system>짧게.<user>가<assistant>나<user>물음\n\n맥락<assistant>"
    (record,) = records_of(kind, {**row, "history": [], "system": ""})
    assert record.prompt == WITH_INPUT
    (asked,) = records_of("prompt", row)
    assert [turn["content"] for turn in asked.messages] == ["짧게.", "가", "나", "물음\n\n맥락"]


def test_an_input_that_the_prompt_holds_is_not_said_twice() -> None:
    (record,) = records_of("response", {"prompt": "요약해 줘.\n긴 글", "input": "긴 글", "response": "글"})
    assert record.prompt == "### 질문: 요약해 줘.\n긴 글\n\n### 답변:"
    (record,) = records_of("response", {"prompt": "12를 곱해 줘.", "input": "2", "response": "24"})
    assert "### 맥락: 2" in record.prompt


def test_a_system_column_beside_conversations() -> None:
    turns = [{"from": "human", "value": "물음"}, {"from": "gpt", "value": "답"}]
    (record,) = records_of("response", {"conversations": turns, "system": "짧게."})
    assert record.prompt == "짧게.\n\n" + ASKED
    with_system = [{"role": "system", "content": "짧게."}, user("물음"), bot("답")]
    (same,) = records_of("response", {"messages": with_system, "system": "짧게."})
    assert same.prompt == record.prompt
    with pytest.raises(DataError, match="field `system` is another system text than that of `messages`"):
        records_of("response", {"messages": with_system, "system": "길게."})
    pair = {"chosen": [user("물음"), bot("a")], "rejected": [user("물음"), bot("b")], "system": "짧게."}
    assert records_of("preference", pair)[0].prompt == record.prompt


def test_cells_of_a_text_table_hold_the_history_as_text() -> None:
    for history in ('[["가", "나"]]', "[['가', '나']]", "[['가' '나']]", "[{'role': 'user', 'content': '가'}]"):
        row = {"instruction": "물음", "history": history, "output": "답"}
        (record,) = records_of("response", row, cells=True)
        assert record.prompt.startswith("### 질문: 가\n\n")
    assert (
        records_of("response", {"instruction": "물음", "history": " ", "output": "답"}, cells=True)[0].prompt == ASKED
    )


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"history": "가: 나"}, r"field `history` needs a list of \[question, answer\]"),
        ({"history": [["가"]]}, r"field `history\[0\]` needs \[question, answer\]"),
        ({"history": [["가", ""]]}, r"field `history\[0\]` is empty"),
        ({"history": [user("가")], "system": 3}, "field `system` needs a text"),
        ({"instruction": [user("가")], "input": "나"}, "field `input` stands beside messages in `instruction`"),
        ({"instruction": ASKED, "input": "나"}, "field `input` is not in the prompt, which is already rendered"),
        ({"instruction": ASKED, "system": "나"}, "field `system` is not in the prompt, which is already rendered"),
        ({"instruction": ASKED, "history": [["나", "다"]]}, "field `history` is not in the prompt"),
    ],
)
def test_what_cannot_be_joined_is_an_error(columns: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        records_of("response", {"instruction": "물음", "output": "답", **columns})


def test_what_stands_beside_whole_dialogues_must_be_in_them() -> None:
    dialogues = {"chosen": [user("물음"), bot("a")], "rejected": [user("물음"), bot("b")], "prompt": "물음"}
    texts = {side: f"\n\nHuman: 물음\n\nAssistant: {side}" for side in ("chosen", "rejected")}
    for pair in (dialogues, {**dialogues, **texts}):
        assert records_of("preference", {**pair, "input": "물음", "history": []})
        for column, value in (("input", "맥락"), ("history", [["가", "나"]])):
            with pytest.raises(DataError, match=f"field `{column}` is not in the (prompt|dialogue)"):
                records_of("preference", {**pair, column: value})
    with pytest.raises(DataError, match="field `맥락` is not in the dialogue of `messages`"):
        columns = {"messages": "messages", "input": "맥락"}
        records_of("response", {"messages": [user("물음"), bot("답")], "맥락": "길다"}, columns=columns)


def test_a_rendered_prompt_may_hold_its_input() -> None:
    row = {"prompt": WITH_INPUT, "input": "맥락", "system": "", "response": "답"}
    (record,) = records_of("response", row, template="kullm")
    assert record.prompt == WITH_INPUT and record.meta["rendered"]


def test_columns_of_the_users_own_names() -> None:
    row = {"질의": "물음", "지시": "짧게.", "이력": [["가", "나"]], "답": "답"}
    columns = {"prompt": "질의", "response": "답", "system": "지시", "history": "이력"}
    (record,) = records_of("response", row, columns=columns)
    assert record.prompt == "짧게.\n\n### 질문: 가\n\n### 답변:나\n\n" + ASKED


def test_every_ignored_column_is_named_once_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = train_tokenizer(["### 질문: 하나\n\n### 답변: 둘"] * 3, 300)
    folder = tmp_path / "set"
    folder.mkdir()
    for part in range(2):
        rows = [
            {"id": n, "category": "a", "prompt": f"물음 {part}{n}", "response": "답", "source": "x", "lang": None}
            for n in range(3)
        ]
        rows[0] |= {"topic": "", "context": "뒤에 둔 글"}
        (folder / f"{part}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    config = DataConfig(template="koalpaca", eval_fraction=0)

    def load(kind: str, spec: Any) -> Any:
        places = {"cache_dir": tmp_path / "cache", "report_dir": tmp_path / "report"}
        return load_stage_data(
            kind, [json.dumps(spec)], [], config=config, stage="sft", tokenizer=tokenizer, seed=0, **places
        )

    with caplog.at_level(logging.INFO, logger="rlhf"):
        data = load("response", {"path": str(folder)})
    (warning,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert str(folder) in warning.getMessage() and "`source` (6 rows), `context` (2 rows)" in warning.getMessage()
    report = json.loads((tmp_path / "report" / "data.json").read_text(encoding="utf-8"))
    assert report["datasets"][0]["ignored_columns"] == {"context": 2, "source": 6} and report == data.report
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="rlhf"):
        prompts = load("prompt", {"path": str(folder)})
    (warning,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert "no part of the prompt" in warning.getMessage() and "`response`" not in warning.getMessage()
    assert prompts.train[0].columns["context"] == "뒤에 둔 글" and prompts.train[0].columns["response"] == "답"
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="rlhf"):
        columns = {"prompt": "prompt", "response": "response", "input": "context", "category": "source"}
        load("response", {"path": str(folder), "columns": columns})
    (warning,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert "`category` (6 rows)" in warning.getMessage() and "context" not in warning.getMessage()


def test_data_that_is_read_whole_warns_of_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = train_tokenizer(["### 질문: 하나\n\n### 답변: 둘"] * 3, 300)
    places = {"cache_dir": tmp_path / "cache", "report_dir": tmp_path / "report"}
    with caplog.at_level(logging.INFO, logger="rlhf"):
        for kind, name in (("response", "sft"), ("comparison", "preference"), ("prompt", "prompts")):
            data = load_stage_data(
                kind, [f"sample:{name}_train"], [f"sample:{name}_heldout"],
                config=DataConfig(), stage="sft", tokenizer=tokenizer, seed=0, **places,
            )  # fmt: skip
            assert data.train and data.summary
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("names", [("History", "history"), ("history", "History")])
def test_of_two_columns_of_one_name_the_one_with_something_in_it_is_read(names):
    empty, filled = names
    row = {"instruction": "물음", "output": "답", empty: [], filled: [["앞", "뒤"]]}
    (record,) = records_of("response", row)
    assert record.prompt == "### 질문: 앞\n\n### 답변:뒤\n\n### 질문: 물음\n\n### 답변:"
