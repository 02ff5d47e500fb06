"""What a reward may ask of a prompt's data row: its other columns and its turns, from the file to the token cache."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import pytest

from rlhf.config import DataConfig
from rlhf.data import load_stage_data
from rlhf.data.records import rows_to_records
from rlhf.data.sources import DataError, DatasetSpec, Row
from rlhf.data.templates import load_template, render_messages
from rlhf.data.token_cache import cached_tokens, record_key_parts
from rlhf.data.tokenize import TokenReport
from rlhf.models.tiny_base import train_tokenizer
from rlhf.types import PromptRecord, TokenizedPrompt

CHAT = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def bot(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    made = train_tokenizer(["### 질문: 하나\n\n### 답변: 둘"] * 3, 300)
    made.chat_template = CHAT
    return made


def prompts_of(rows: list[dict], tokenizer: Any, folder: Path, **config: Any) -> list[TokenizedPrompt]:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    places = {"cache_dir": folder / "cache", "report_dir": folder / "report"}
    data_config = DataConfig(**{"template": "koalpaca", "eval_fraction": 0.0, **config})
    made = [
        load_stage_data(
            "prompt", [str(path)], [], config=data_config, stage="ppo", tokenizer=tokenizer, seed=0, **places
        )
        for _ in range(2)  # tokenised, then read from the cache
    ]
    assert made[0].train == made[1].train
    assert len(list((folder / "cache").glob("*.safetensors"))) == 1
    return made[1].train


def one(row: dict[str, Any], template: str = "none") -> PromptRecord:
    spec = DatasetSpec("f.jsonl")
    (record,) = rows_to_records([Row(row, "f.jsonl", 1)], "prompt", template=load_template(template), spec=spec)
    assert isinstance(record, PromptRecord)
    return record


def test_an_instruction_row_keeps_its_answer_and_its_turn(tokenizer: Any, tmp_path: Path) -> None:
    rows = [
        {"id": 7, "instruction": "더해 줘.", "input": "1과 2", "output": "3", "tests": [{"in": 1, "out": None}]},
        {"id": 8, "instruction": "안녕", "input": "", "output": "네", "tests": None},
    ]
    first, second = prompts_of(rows, tokenizer, tmp_path)
    assert first.text == "### 질문: 더해 줘.\n\n### 맥락: 1과 2\n\n### 답변:"
    assert first.columns == {"id": 7, "output": "3", "tests": [{"in": 1, "out": None}]}
    assert first.messages == (user("더해 줘.\n\n1과 2"),)
    assert second.columns == {"id": 8, "output": "네"} and second.messages == (user("안녕"),)


def test_the_turns_are_whole_where_the_prompt_lost_its_beginning(tokenizer: Any, tmp_path: Path) -> None:
    (row,) = prompts_of([{"prompt": "가나다 " * 40}], tokenizer, tmp_path, max_prompt_tokens=20)
    assert len(row.input_ids) == 20 and row.messages == (user("가나다 " * 40),)


CONVERSATION = [{"role": "system", "content": "짧게."}, user("가"), bot("나"), user("다")]


@pytest.mark.parametrize(
    ("row", "messages", "columns"),
    [
        ({"messages": CONVERSATION, "level": 2}, CONVERSATION, {"level": 2}),
        # the last turn is the reference answer: the column that holds it stays
        ({"messages": [*CONVERSATION, bot("라")]}, CONVERSATION, {"messages": [*CONVERSATION, bot("라")]}),
        ({"prompt": CONVERSATION, "answer": "라"}, CONVERSATION, {"answer": "라"}),
        ({"prompt": "가", "chosen": "나", "rejected": "다"}, [user("가")], {"chosen": "나", "rejected": "다"}),
        ({"prompt": "### 질문: 가\n\n### 답변:", "gold": "나"}, [], {"gold": "나"}),  # turns are not known
        (
            {"instruction": "가", "instances": [{"input": "나", "output": "다"}]},
            [user("가\n\n나")],
            {"instances": [{"input": "나", "output": "다"}]},
        ),
    ],
)
def test_turns_and_columns_of_each_layout(row: dict, messages: list, columns: dict) -> None:
    record = one(row)
    assert (list(record.messages), record.columns) == (messages, columns)


def test_columns_are_json_values_that_can_be_sent_anywhere() -> None:
    row = {
        "prompt": "가",
        "day": datetime.date(2024, 2, 29),
        "raw": b"\xff",
        "ratio": float("nan"),
        "big": [float("inf"), 1.5, True, None],
        "half": "x\ud83d",
        "inner": {1: ("a", "\udfff")},
        "\ud800": 1,
    }
    columns = one(row).columns
    assert columns == {
        "day": "2024-02-29",
        "raw": "b'\\xff'",
        "ratio": None,
        "big": [None, 1.5, True, None],
        "half": "x\\ud83d",
        "inner": {"1": ["a", "\\udfff"]},
        "\\ud800": 1,
    }
    assert json.loads(json.dumps(columns, ensure_ascii=False, allow_nan=False).encode()) == columns


def test_the_cache_tells_prompts_apart_by_their_columns_and_turns(tmp_path: Path) -> None:
    records = [
        PromptRecord("a", "p"),
        PromptRecord("a", "p", columns={"answer": "1"}),
        PromptRecord("a", "p", columns={"answer": 1}),
        PromptRecord("a", "p", messages=(user("p"),)),
    ]
    for record in records:
        row = TokenizedPrompt("a", (1,), "p", "", record.messages, record.columns)
        rows, _ = cached_tokens(
            record_key_parts([record]), cache_dir=tmp_path, make=lambda row=row: ([row], TokenReport(rows=1))
        )
        assert rows == [row]
    assert len(list(tmp_path.glob("*.safetensors"))) == len(records)


def test_messages_in_another_models_template(tokenizer: Any) -> None:
    text = render_messages(tuple(CONVERSATION), tokenizer)
    assert text == "<system>짧게.<user>가<assistant>나<user>다<assistant>"
    (record,) = rows_to_records(
        [Row({"instruction": "가", "input": "나", "output": "다"}, "f", 1)],
        "prompt",
        template=load_template("chat", tokenizer),
        spec=DatasetSpec("f"),
    )
    assert isinstance(record, PromptRecord) and render_messages(record.messages, tokenizer) == record.prompt
    bare = train_tokenizer(["가나다"] * 3, 280)
    with pytest.raises(DataError, match="has no chat template"):
        render_messages((user("가"),), bare)
