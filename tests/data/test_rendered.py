"""Prompts and transcripts that carry markers: known, split at the right place, read once, never rendered again."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from rlhf.data.formats import Layout
from rlhf.data.prompts import answers_begin_with_prompt
from rlhf.data.records import UNFINISHED, rows_to_records
from rlhf.data.rendered import markup_of, raw_prompt, split_rendered
from rlhf.data.sources import DataError, DatasetSpec, Row, SkippedRow, read_rows
from rlhf.data.spec import ReadingNotes
from rlhf.data.templates import load_template
from rlhf.data.token_cache import record_key_parts
from rlhf.data.tokenize import tokenize_records
from rlhf.models.tiny_base import train_tokenizer
from rlhf.types import PromptRecord
from tests.support.published import published


def records_of(kind: str, *rows: dict[str, Any], notes: ReadingNotes | None = None, **spec: Any) -> list[Any]:
    made = [Row(row, "set/f.jsonl", line) for line, row in enumerate(rows, start=1)]
    dataset = DatasetSpec("set/f.jsonl", **spec)
    return rows_to_records(made, kind, template=load_template("kullm"), spec=dataset, notes=notes)


CHATML = "<|im_start|>system\n짧게.<|im_end|>\n<|im_start|>user\n물음<|im_end|>\n<|im_start|>assistant\n"
PROMPTS = {
    "ChatML": CHATML,
    "ChatML without its last line break": CHATML.rstrip(),
    "Llama-2": "<s>[INST] <<SYS>>\n짧게.\n<</SYS>>\n\n물음 [/INST]",
    "Mistral": "[INST] 짧게. [/INST] 네 </s>[INST] 물음 [/INST] ",
    "Solar": "### System:\n짧게.\n\n### User:\n물음\n\n### Assistant:\n",
    "Guanaco": "### Human: 짧게.### Assistant: 네### Human: 물음### Assistant:",
    "Llama-3": "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n짧게.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\n물음<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    "Gemma": "<start_of_turn>user\n짧게.\n\n물음<end_of_turn>\n<start_of_turn>model\n",
}


@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS.keys())
def test_a_prompt_of_a_chat_model_gets_no_other_template(prompt: str) -> None:
    assert markup_of(prompt) is not None and "".join(raw_prompt(prompt).split()) in ("짧게.물음", "짧게.네물음")
    for kind, answers in (
        ("prompt", {}),
        ("response", {"response": "답"}),
        ("preference", {"chosen": "좋은 답", "rejected": "나쁜 답"}),
    ):
        (record,) = records_of(kind, {"prompt": prompt, **answers})
        assert record.prompt == prompt and record.meta["rendered"] is True
    (record,) = records_of("response", {"instruction": prompt, "output": "답"})
    assert record.prompt == prompt


@pytest.mark.parametrize(
    "prompt",
    [
        "<|im_start|>user 는 무슨 뜻이에요?",
        "[INST] 물음",
        "<|start_header_id|>user<|end_header_id|>\n\n물음<|eot_id|>",
        "<start_of_turn>user\n물음<end_of_turn>",
    ],
)
def test_markers_without_the_place_of_the_answer_are_an_error(prompt: str) -> None:
    with pytest.raises(DataError, match=r"field `prompt` begins with the markers of .* does not end where the answer"):
        records_of("response", {"prompt": prompt, "response": "답"})


@pytest.mark.parametrize(
    "prompt",
    [
        "### User: 라는 표기는 뭐예요?",
        "[INST]는 뭐예요?\n[/INST]는?",
        "이게 뭐야: <|im_start|>assistant",
        "### Assistant:",
    ],
)
def test_a_question_about_markers_is_a_plain_prompt(prompt: str) -> None:
    if prompt.startswith("[INST]"):
        prompt = "왜 " + prompt
    (record,) = records_of("response", {"prompt": prompt, "response": "답"})
    assert record.prompt == load_template("kullm").render(prompt) and "rendered" not in record.meta


@pytest.mark.parametrize(
    "prompt", ["### User:\n안녕", "### Instruction:\n안녕", "\n\nHuman: 안녕", "### 명령어:\n안녕\n\n### 입력:\n글"]
)
def test_prompts_that_begin_with_plain_markers_alone_are_counted(prompt: str) -> None:
    for kind, row in (("prompt", {"prompt": prompt}), ("response", {"instruction": prompt, "output": "답"})):
        notes = ReadingNotes()
        (record, _, _) = records_of(kind, row, row, {name: "물음" for name in row}, notes=notes)
        assert record.prompt == load_template("kullm").render(prompt)
        assert notes.warnings == Counter({UNFINISHED: 2})


@pytest.mark.parametrize("prompt", [*PROMPTS.values(), "왜 ### User: 라고 써요?", "### 제목\n안녕", "### Assistant:"])
def test_whole_markers_and_those_within_a_prompt_warn_of_nothing(prompt: str) -> None:
    notes = ReadingNotes()
    records_of("prompt", {"prompt": prompt}, notes=notes)
    assert not notes.warnings


def test_the_markers_of_a_chat_model_are_read_as_its_special_tokens() -> None:
    tokenizer = train_tokenizer(["물음 답 짧게"] * 5, 300)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    start = tokenizer.convert_tokens_to_ids("<|im_start|>")
    plain = "<|im_start|> 이 표기는 뭐예요?"
    records = records_of("prompt", {"prompt": plain}, {"prompt": CHATML}, {"prompt": plain + "!"})
    rows, _ = tokenize_records(records, tokenizer, max_prompt_tokens=500, max_response_tokens=5)
    assert [row.input_ids.count(start) for row in rows] == [0, 3, 0]
    assert [tokenizer.decode(row.input_ids) for row in rows] == [record.prompt for record in records]
    read_as_text = PromptRecord(records[1].id, records[1].prompt)
    assert len(set(record_key_parts([records[1], read_as_text]))) == 2  # the cache tells the two readings apart


# rows of one text


@pytest.mark.parametrize(
    ("text", "prompt", "answer"),
    [
        ("### 질문: 가\n\n### 답변: 나\n\n### 질문: ", "### 질문: 가\n\n### 답변:", " 나\n"),
        ("\n\nHuman: 가\n\nAssistant: 나\n\nHuman:", "\n\nHuman: 가\n\nAssistant:", " 나"),
        ("\n\nHuman: 가\n\nAssistant: 나\nHuman:", "\n\nHuman: 가\n\nAssistant:", " 나"),
        ("### Human: 가### Assistant: 나### Human: ", "### Human: 가### Assistant:", " 나"),
        (CHATML + "답<|im_end|>\n", CHATML, "답"),
        (CHATML + "답<|im_end|>\n<|im_start|>user\n", CHATML, "답"),
        (CHATML + "답<|im_end|>\n<|endoftext|>", CHATML, "답"),
        (CHATML + "답<|im_end|> </s>\n<|im_start|>user\n", CHATML, "답"),
        (CHATML + "답 </s>", CHATML, "답 </s>"),  # no end of the turn before it: what the answer says
        ("<s>[INST] 가 [/INST] 나 </s>", "<s>[INST] 가 [/INST]", " 나 "),
        # the markers of another family are text
        ("### 질문: 가\n\n### 답변: 대본:\n\nHuman: 안녕", "### 질문: 가\n\n### 답변:", " 대본:\n\nHuman: 안녕"),
        (
            "\n\nHuman: 가\n\nAssistant: 표기는\n### 답변: 입니다",
            "\n\nHuman: 가\n\nAssistant:",
            " 표기는\n### 답변: 입니다",
        ),
    ],
)
def test_the_answer_of_a_text_ends_before_the_next_turn(text: str, prompt: str, answer: str) -> None:
    assert split_rendered(text) == (prompt, answer)
    (record,) = records_of("response", {"text": text})
    assert (record.prompt, record.response) == (prompt, answer)


@pytest.mark.parametrize(
    "text",
    [
        "### 질문: 가\n\n### 답변: 나\n\n### 질문: 다",
        "### 명령어:\n가\n\n### 응답:\n나\n### 명령어:\n다",
        "\n\nHuman: 가\n\nAssistant: 나\n\nHuman: 다",
        "\n\nHuman: 가\n\nAssistant: 나\nHuman: 다",
        "### Human: 가### Assistant: 나### Human: 다",
        CHATML + "답<|im_end|>\n<|im_start|>user\n다<|im_end|>",
        "[INST] 가 [/INST] 나 </s>[INST] 다",
    ],
)
def test_a_text_that_ends_with_the_users_turn_is_an_error(text: str) -> None:
    for kind in ("response", "prompt"):
        with pytest.raises(DataError, match="field `text` ends with a user's turn"):
            records_of(kind, {"text": text})


# whole transcripts beside their prompt


def hh(*turns: str) -> str:
    return "".join(f"\n\n{'Assistant' if n % 2 else 'Human'}: {turn}" for n, turn in enumerate(turns))


TRANSCRIPTS = {
    "the user's words": ("물음", hh("물음", ""), ""),
    "the user's last words": ("물음", hh("가", "나", "물음", ""), ""),
    "the rendered prompt": (hh("물음") + "\n\nAssistant:", hh("물음", ""), ""),
    "ChatML": ("물음", CHATML, "<|im_end|>\n"),
    "the prompt in ChatML": (CHATML, CHATML, "<|im_end|>"),
    "Llama-2": ("물음", "<s>[INST] 물음 [/INST]", " </s>"),
    "KULLM": ("물음", load_template("kullm").render("물음"), ""),
}


@pytest.mark.parametrize(("prompt", "front", "end"), TRANSCRIPTS.values(), ids=TRANSCRIPTS.keys())
def test_a_prompt_beside_whole_transcripts_is_read_once(prompt: str, front: str, end: str) -> None:
    row = {"prompt": prompt, "chosen": f"{front}좋은 답{end}", "rejected": f"{front}나쁜 답{end}"}
    (record,) = records_of("preference", row)
    assert (record.prompt.strip(), record.chosen.strip(), record.rejected.strip()) == (
        front.strip(),
        "좋은 답",
        "나쁜 답",
    )
    assert record.meta["rendered"] is True
    (asked,) = records_of("prompt", row)
    assert asked.prompt == record.prompt
    (ranked,) = records_of("ranked", row)
    assert [text.strip() for text in ranked.responses] == ["좋은 답", "나쁜 답"]
    if not front.startswith("아래"):  # one transcript alone must begin with a marker
        (imitated,) = records_of("response", row, columns={"response": "chosen"})
        assert (imitated.prompt, imitated.response) == (record.prompt, record.chosen)


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def bot(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


EARLIER = [{"role": "system", "content": "짧게."}, user("가"), bot("나"), user("물음")]
DIALOGUES = {"chosen": [*EARLIER, bot("좋은 답")], "rejected": [*EARLIER, bot("나쁜 답")]}
"""Lists of messages beside the last question, as UltraFeedback has them."""


@pytest.mark.parametrize(
    "answers", [DIALOGUES, {"chosen": hh("가", "나", "물음", "다"), "rejected": hh("가", "나", "물음", "라")}]
)
@pytest.mark.parametrize(
    "names", [("prompt", "chosen", "rejected"), ("질문", "chosen", "rejected"), ("질문", "갑", "을")]
)
def test_every_kind_reads_one_prompt_from_whole_dialogues(answers: dict[str, Any], names: tuple[str, ...]) -> None:
    row = dict(zip(names, ("물음", answers["chosen"], answers["rejected"]), strict=True))
    columns = {} if names[0] == "prompt" else {"prompt": names[0]}
    columns |= {} if names[1] == "chosen" else {"chosen": names[1], "rejected": names[2]}
    (pair,) = records_of("comparison", row, columns=columns)
    (asked,) = records_of("prompt", row, columns=columns)
    assert all(turn in asked.prompt for turn in ("가", "나", "물음")) and asked.prompt == pair.prompt
    assert asked.meta["prompt_key"] == pair.meta["prompt_key"]
    assert set(asked.columns) == set(names[1:])


def test_published_transcripts_beside_their_last_question_are_read_as_without_it() -> None:
    path = published("hh_rlhf/harmless-base-test.jsonl.gz")
    rows = [dict(row.values) for row in read_rows(DatasetSpec(str(path)))][:300]
    rows = [
        row for row in rows if row["chosen"].rpartition("Assistant:")[0] == row["rejected"].rpartition("Assistant:")[0]
    ]
    rows = [row for row in rows if all(text.rpartition("Assistant:")[2].strip() for text in row.values())]
    wanted = records_of("preference", *rows)
    questions = [row["chosen"].rpartition("\n\nHuman:")[2].rpartition("\n\nAssistant:")[0].strip() for row in rows]
    with_prompt = [{"prompt": text or "x", **row} for text, row in zip(questions, rows, strict=True)]
    found = records_of("preference", *with_prompt)
    assert len(found) > 200 and [r.prompt for r in found] == [r.prompt for r in wanted]
    assert [(r.chosen, r.rejected) for r in found] == [(r.chosen, r.rejected) for r in wanted]


def test_transcripts_that_do_not_fit_are_errors() -> None:
    whole = hh("물음", " 좋은 답")
    with pytest.raises(DataError, match="field `rejected` is an answer alone, and `chosen` a whole transcript"):
        records_of("preference", {"prompt": "물음", "chosen": whole, "rejected": "나쁜 답"})
    with pytest.raises(DataError, match="field `rejected` has no common prompt"):
        records_of("preference", {"prompt": "물음", "chosen": whole, "rejected": hh("물음", "가", "나", "다")})
    with pytest.raises(DataError, match="field `chosen` ends with a user's turn"):
        row = {"prompt": "물음", "chosen": hh("물음", "가", "나"), "rejected": hh("물음", "가", "나")}
        records_of("preference", row)


def test_answers_that_only_quote_a_transcript_stay_whole() -> None:
    quoted = f"이렇게 써 보세요:{hh('물음', '답')}"
    (record,) = records_of("response", {"prompt": "물음", "response": quoted})
    assert record.response == quoted and "rendered" not in record.meta
    other = {"prompt": "대본을 써 줘.", "chosen": hh("가", "나"), "rejected": hh("다", "라")}
    (pair,) = records_of("preference", other)
    assert pair.chosen == other["chosen"] and pair.prompt == load_template("kullm").render("대본을 써 줘.")


def test_prompts_without_markers_before_every_answer_are_cut_off() -> None:
    rows = [{"prompt": f"물음 {n}", "chosen": f"물음 {n} 좋은 답", "rejected": f"물음 {n}\n나쁜 답"} for n in range(4)]
    for record in records_of("preference", *rows):
        assert (record.chosen, record.rejected) == ("좋은 답", "나쁜 답")
    responses = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows]
    assert {record.response for record in records_of("response", *responses)} == {"좋은 답"}
    notes = ReadingNotes()
    rows[2] = {"prompt": "물음", "chosen": "좋은 답", "rejected": "나쁜 답"}
    records = records_of("preference", *rows, notes=notes)
    assert records[0].chosen == "물음 0 좋은 답"
    assert notes.warnings == Counter({"answers begin with their prompt and were kept as they are": 3})
    notes = ReadingNotes()
    records_of(
        "preference",
        *({"prompt": "사과", "chosen": "사과는 좋아.", "rejected": "사과가 싫어."} for _ in "12"),
        notes=notes,
    )
    assert not notes.warnings


def test_prompts_that_touch_every_answer_are_kept_and_counted() -> None:
    rows = [{"prompt": f"q{n}", "chosen": f"q{n}good", "rejected": f"q{n} bad"} for n in range(3)]
    notes = ReadingNotes()
    assert records_of("preference", *rows, notes=notes)[0].chosen == "q0good"
    assert notes.warnings == Counter({"answers begin with their prompt and were kept as they are": 3})
    for fewer in (rows[:2], [*rows, {"prompt": "q", "chosen": "a", "rejected": "b"}]):  # may be chance
        notes = ReadingNotes()
        records_of("preference", *fewer, notes=notes)
        assert not notes.warnings


def ranking_rows(answers: list[list[str]], prompts: list[str]) -> dict[str, list[dict[str, Any]]]:
    """The same two answers to each prompt in every layout that ranks them."""
    rows: dict[str, list[dict[str, Any]]] = {"scores": [], "ranks": [], "columns": [], "scored pair": []}
    for prompt, pair in zip(prompts, answers, strict=True):
        rows["scores"].append({"prompt": prompt, "responses": pair, "scores": [2, 1]})
        rows["ranks"].append({"query": prompt, "responses": json.dumps(pair), "ranks": [0, 1]})
        rows["columns"].append(
            {"prompt": prompt, "completion_0": pair[0], "completion_1": pair[1], "completion_2": "", "ranking": [0, 1]}
        )
        rows["scored pair"].append({"prompt": prompt, "response1": pair[0], "sum1": 2, "response2": pair[1], "sum2": 1})
    return rows


LAYOUTS = ("scores", "ranks", "columns", "scored pair")


def ranked_texts(record: Any) -> tuple[str, ...]:
    return record.responses if hasattr(record, "responses") else (record.chosen, record.rejected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_whole_transcripts_of_a_ranking_are_read_once(layout: str) -> None:
    transcripts = [[hh("가", "나", "물음", "좋은 답"), hh("가", "나", "물음", "나쁜 답")]]
    rows = ranking_rows(transcripts, ["물음"])[layout]
    (record,) = records_of("comparison", *rows)
    assert record.prompt == hh("가", "나", "물음", "").rstrip() and record.meta["rendered"] is True
    assert [text.strip() for text in ranked_texts(record)] == ["좋은 답", "나쁜 답"]
    (asked,) = records_of("prompt", *rows)
    assert asked.prompt == record.prompt and asked.meta["prompt_key"] == record.meta["prompt_key"]
    with pytest.raises(DataError, match="is an answer alone, and .* a whole transcript"):
        records_of("comparison", *ranking_rows([[transcripts[0][0], "나쁜 답"]], ["물음"])[layout])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_prompt_before_every_answer_of_a_ranking_is_cut_off(layout: str) -> None:
    prompts = [f"물음 {n}" for n in range(3)]
    rows = ranking_rows([[f"{prompt} 좋은 답", f"{prompt}\n나쁜 답"] for prompt in prompts], prompts)[layout]
    for record in records_of("comparison", *rows):
        assert ranked_texts(record) == ("좋은 답", "나쁜 답")
    notes = ReadingNotes()
    assert ranked_texts(records_of("comparison", *rows[:2], notes=notes)[0]) == ("물음 0 좋은 답", "물음 0\n나쁜 답")
    assert notes.warnings == Counter({"answers begin with their prompt and were kept as they are": 2})


def test_a_prompt_is_read_from_one_whole_transcript_and_beside_answers_that_cannot_be_read() -> None:
    row = {"prompt": "물음", "response": hh("가", "나", "물음", "답")}
    (record,) = records_of("response", row)
    (asked,) = records_of("prompt", row)
    assert asked.prompt == record.prompt and asked.meta["prompt_key"] == record.meta["prompt_key"]
    (asked,) = records_of("prompt", {"prompt": "물음", "responses": 3, "scores": [1]})
    assert asked.prompt == load_template("kullm").render("물음")


def test_skipped_transcripts_are_counted(tmp_path: Path) -> None:
    skipped: list[SkippedRow] = []
    rows = [
        Row({"prompt": "물음", "chosen": hh("물음", "답"), "rejected": hh("물음", "아니")}, "f", 1),
        Row({"prompt": "물음", "chosen": hh("물음", "답"), "rejected": "아니"}, "f", 2),
    ]
    template = load_template("kullm")
    kept = rows_to_records(
        rows, "preference", template=template, spec=DatasetSpec("f"), on_bad_row="skip", skipped=skipped
    )
    assert len(kept) == 1 and [(item.line, item.field) for item in skipped] == [(2, "rejected")]


@pytest.mark.parametrize("answer", ["네", " 네", "\n1"])
def test_a_prompt_with_the_shortest_answer_behind_its_marker_is_none(answer):
    prompt = "### 질문: 물은 몇 도에서 끓나요?\n\n### 답변:"
    assert markup_of(prompt) is not None and markup_of(prompt + " \n") is not None
    assert markup_of(prompt + answer) is None


@pytest.mark.parametrize(
    ("prompt", "answer", "found"),
    [
        ("소음이 심해요.", "소음이 심해요. 신고하세요.", True),
        ("소음이 심해요.", "신고하세요.", False),
        ("", " 신고하세요.", False),  # every text begins with nothing
        (" ", "  신고하세요.", False),
        ("### 질문: 소음?\n\n### 답변:", "### 질문: 소음?\n\n### 답변: 신고하세요.", False),  # markers came with it
        (3, "3 신고하세요.", False),
    ],
)
def test_which_answers_begin_with_their_prompt(prompt, answer, found):
    layout = Layout("columns", {"prompt": "q", "response": "a"})
    assert answers_begin_with_prompt(Row({"q": prompt, "a": answer}, "a.jsonl", 1), layout) == found
