"""The row formats that are recognised: a set of headers each, with its spellings (`rlhf.data.headers`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

PREFERENCE = ("prompt", "preference", "ranked", "comparison", "labelled")
RANKED = ("prompt", "ranked", "comparison", "labelled")
RESPONSE = ("prompt", "response")
LABELLED = ("prompt", "response", "preference", "comparison", "labelled")


@dataclass(frozen=True)
class RowFormat:
    """One way to lay out a row. `fields`: our name -> the header it needs; `optional`: headers it may have.

    `unless`: headers beside which the format is not certain, and not read. `rivals`: our name -> headers that could be
    it as well, so that a file with both has two readings. `bare`: the headers say little, so that beside a label, a
    passage or an option the format is not read (`rlhf.data.formats`).
    """

    name: str
    fields: Mapping[str, str]
    kinds: Sequence[str]
    optional: Mapping[str, Sequence[str]] = field(default_factory=dict)
    unless: Sequence[str] = ()
    rivals: Mapping[str, Sequence[str]] = field(default_factory=dict)
    bare: bool = False
    weak: bool = False
    """Used only when no other format fits."""


_SYSTEM = {"system": ("system", "system_prompt")}
_PROMPT = {"input": ("input",), **_SYSTEM, "history": ("history",)}  # `history`: LLaMA-Factory's earlier turns
_INSTRUCTION = {**_PROMPT, "input": ("input", "context")}  # `context`: Dolly
_QUESTION: dict[str, Sequence[str]] = {"input": ("input", "context"), **_SYSTEM, "history": ("history",)}
_PROMPTS = ("prompt", "instruction", "query", "messages", "conversations")
_TWO_PROMPTS = {"prompt": ("question",)}
ROW_FORMATS = {
    row_format.name: row_format
    for row_format in (
        # instruction data: KULLM, Alpaca, KoAlpaca v1.1 (`output`); Law-Polyglot (`response`); KULLM's evaluation set
        RowFormat(
            "alpaca", {"prompt": "instruction", "response": "output"}, RESPONSE, _INSTRUCTION, rivals=_TWO_PROMPTS
        ),
        RowFormat(
            "alpaca_response",
            {"prompt": "instruction", "response": "response"},
            RESPONSE,
            _INSTRUCTION,
            rivals=_TWO_PROMPTS,
        ),
        RowFormat(
            "instances",
            {"prompt": "instruction", "instances": "instances"},
            RESPONSE,
            {**_SYSTEM, "history": ("history",)},
        ),
        RowFormat("completion", {"prompt": "prompt", "response": "completion"}, RESPONSE, _PROMPT, rivals=_TWO_PROMPTS),
        RowFormat("response", {"prompt": "prompt", "response": "response"}, RESPONSE, _PROMPT, rivals=_TWO_PROMPTS),
        RowFormat(
            "prompt_answer",
            {"prompt": "prompt", "response": "answer"},
            RESPONSE,
            _PROMPT,
            unless=("response", "output", "completion", "messages", "conversations"),
            rivals=_TWO_PROMPTS,
            bare=True,
        ),
        # 질문/답변, 질의/응답, `question,answer` (LawBot), Q/A (a songys chatbot); 입력/출력
        RowFormat(
            "question_answer",
            {"prompt": "question", "response": "answer"},
            RESPONSE,
            _QUESTION,
            unless=_PROMPTS,
            rivals={"response": ("response", "output", "completion")},
            bare=True,
        ),
        RowFormat(
            "input_output",
            {"prompt": "input", "response": "output"},
            RESPONSE,
            _SYSTEM,
            unless=(*_PROMPTS, "question"),
            rivals={"response": ("response", "answer", "completion")},
            bare=True,
        ),  # fmt: skip
        RowFormat("text", {"text": "text"}, RESPONSE, weak=True),  # prompt and answer in one rendered text
        # conversations: `messages` of {role, content}, ShareGPT's `conversations` of {from, value}
        RowFormat("messages", {"messages": "messages"}, RESPONSE, _SYSTEM),
        RowFormat("sharegpt", {"messages": "conversations"}, RESPONSE, _SYSTEM),
        # pairs: KULLM-RLHF, DeepSpeed-Chat, TRL; LLaMA-Factory; hh-rlhf transcripts; G-Eval sums
        RowFormat("preference", {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected"}, PREFERENCE, _PROMPT),
        RowFormat(
            "alpaca_preference",
            {"prompt": "instruction", "chosen": "chosen", "rejected": "rejected"},
            PREFERENCE,
            _INSTRUCTION,
        ),
        RowFormat(  # orca_dpo_pairs and its translations
            "question_preference",
            {"prompt": "question", "chosen": "chosen", "rejected": "rejected"},
            PREFERENCE,
            _QUESTION,
            unless=_PROMPTS,
        ),
        RowFormat(
            "sharegpt_preference",
            {"prompt": "conversations", "chosen": "chosen", "rejected": "rejected"},
            PREFERENCE,
            _SYSTEM,
        ),
        RowFormat("message_pairs", {"chosen": "chosen_messages", "rejected": "rejected_messages"}, PREFERENCE, _SYSTEM),
        RowFormat("transcripts", {"chosen": "chosen", "rejected": "rejected"}, PREFERENCE, _SYSTEM),
        RowFormat(
            "scored_pair",
            {"prompt": "prompt", "response1": "response1", "sum1": "sum1", "response2": "response2", "sum2": "sum2"},
            PREFERENCE,
            {"scores1": ("scores1",), "scores2": ("scores2",), **_PROMPT},
        ),
        # labelled responses (KTO): pairs are made of the rows of one prompt
        RowFormat("labelled", {"prompt": "prompt", "response": "completion", "label": "label"}, LABELLED, _PROMPT),
        RowFormat(
            "labelled_response", {"prompt": "prompt", "response": "response", "label": "label"}, LABELLED, _PROMPT
        ),
        RowFormat("labelled_messages", {"messages": "messages", "label": "label"}, LABELLED, _SYSTEM),
        RowFormat("labelled_sharegpt", {"messages": "conversations", "label": "label"}, LABELLED, _SYSTEM),
        # rankings: KoChatGPT's reward model data; RRHF scores (higher is better); ranks (0 is best)
        RowFormat(
            "completions",
            {"prompt": "prompt", "completion_0": "completion_0", "completion_1": "completion_1", "ranks": "ranking"},
            RANKED,
            _PROMPT,
        ),
        RowFormat("rrhf", {"prompt": "query", "responses": "responses", "scores": "scores"}, RANKED, _PROMPT),
        RowFormat("rrhf_ranks", {"prompt": "query", "responses": "responses", "ranks": "ranks"}, RANKED, _PROMPT),
        RowFormat("scores", {"prompt": "prompt", "responses": "responses", "scores": "scores"}, RANKED, _PROMPT),
        RowFormat("ranks", {"prompt": "prompt", "responses": "responses", "ranks": "ranks"}, RANKED, _PROMPT),
        # prompts alone
        RowFormat("prompts", {"prompt": "prompt"}, ("prompt",), _PROMPT, rivals=_TWO_PROMPTS),
        RowFormat("instructions", {"prompt": "instruction"}, ("prompt",), _INSTRUCTION, rivals=_TWO_PROMPTS),
        RowFormat("questions", {"prompt": "question"}, ("prompt",), _QUESTION, unless=_PROMPTS, bare=True),
    )
}
