"""Prompts and transcripts that come with the markers of a template: known, taken apart, never rendered again."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rlhf.data.row_values import END_OF_TEXT, without_end_marks
from rlhf.data.spec import DataError

if TYPE_CHECKING:
    from rlhf.types import TokenizedPrompt


@dataclass(frozen=True)
class Markup:
    """How a family of templates marks turns. `question` begins the user's turn, `answer` the assistant's, `marker` any.

    `next_question` begins the user's turn after an answer. `end` ends a turn, "" where nothing does. `special` is for
    markers that are special tokens of the models that have them and that nobody writes by chance.
    """

    name: str
    question: re.Pattern[str]
    answer: re.Pattern[str]
    marker: re.Pattern[str]
    next_question: re.Pattern[str]
    end: str = ""
    special: bool = False


def _markup(
    name: str, question: str, answer: str, marker: str, end: str = "", special: bool = False, next_question: str = ""
) -> Markup:
    following = re.compile(next_question or question)
    return Markup(name, re.compile(question), re.compile(answer), re.compile(marker), following, end, special)


_BREAK = r"(?:\n(?!\n))?"
"""A line break that belongs to the marker, not to the answer."""
MARKUPS = (
    _markup(  # KULLM, Alpaca, KoAlpaca, Law-Polyglot
        "headings",
        r"(?:^|\n)### (?:명령어|질문|Instruction):",
        r"### (?:답변|응답|Response):" + _BREAK,
        r"(?:^|\n)### (?:명령어|입력|응답|질문|맥락|답변|Instruction|Input|Response):",
    ),
    _markup(  # hh-rlhf; after an answer a line of its own is enough for the next question
        "Human/Assistant",
        r"(?:^|\n\n)Human:",
        r"\n\nAssistant:" + _BREAK,
        r"(?:^|\n\n)(?:Human|Assistant):",
        next_question=r"\n?\nHuman:",
    ),
    _markup(  # Solar, Orca; Guanaco writes the turns without a line break between them
        "### User", r"### (?:User|Human):", r"### Assistant:" + _BREAK, r"### (?:System|User|Human|Assistant):"
    ),
    _markup(
        "ChatML",
        r"<\|im_start\|>user\b",
        r"<\|im_start\|>assistant\b\n?",
        r"<\|im_start\|>(?:system|user|assistant)\b|<\|im_end\|>",
        "<|im_end|>",
        special=True,
    ),
    _markup(  # Mistral too
        "Llama-2", r"\[INST\]", r"\[/INST\]", r"(?:<s>\s*)?\[/?INST\]|<</?SYS>>|</s>", "</s>", special=True
    ),
    _markup(
        "Llama-3",
        r"<\|start_header_id\|>user<\|end_header_id\|>",
        r"<\|start_header_id\|>assistant<\|end_header_id\|>(?:\n\n)?",
        r"<\|begin_of_text\|>|<\|start_header_id\|>(?:system|user|assistant)<\|end_header_id\|>|<\|eot_id\|>",
        "<|eot_id|>",
        special=True,
    ),
    _markup(
        "Gemma",
        r"<start_of_turn>user\b",
        r"<start_of_turn>model\b\n?",
        r"<bos>|<start_of_turn>(?:user|model)\b|<end_of_turn>",
        "<end_of_turn>",
        special=True,
    ),
)


def markup_of(prompt: str) -> Markup | None:
    """The markup of a prompt that went through a template: it asks something and ends where the answer begins."""
    for markup in MARKUPS:
        ends = [match.end() for match in markup.answer.finditer(prompt)]
        if ends and not prompt[ends[-1] :].strip() and markup.question.search(prompt):
            return markup
    return None


def begins_with_marker(text: str) -> bool:
    """Whether a text begins with the marker of a turn."""
    return any(markup.marker.match(text) or markup.marker.match(text.lstrip()) for markup in MARKUPS)


def holds_transcript(text: str) -> bool:
    """Whether a text holds a marked question and a marked answer."""
    return any(markup.answer.search(text) and markup.question.search(text) for markup in MARKUPS)


def unfinished_markup(prompt: str) -> Markup | None:
    """The markup whose marker a prompt begins with and asks by, where it does not end where the answer begins.

    Where that is of special tokens the prompt was cut; other markers someone may also write by chance.
    """
    if markup_of(prompt) is not None:
        return None
    prompt = prompt.lstrip()
    begins = (markup for markup in MARKUPS if markup.marker.match(prompt))
    return next((markup for markup in begins if markup.question.search(prompt)), None)


def split_rendered(text: str) -> tuple[str, str] | None:
    """A rendered prompt with its answer, cut after the last answer marker; None where the text holds no such marker.

    What ends the answer's turn, and a marker of the next turn with nothing after it, are cut off. Raises DataError
    where the user's next turn follows the answer.
    """
    markup = _first_markup(text)
    if markup is None:
        return None
    *_, last = markup.answer.finditer(text)
    start, end = last.end(), len(text)
    # the line break before the next marker may belong to this one
    following = markup.next_question.search(text, start - 1 if text[start - 1] == "\n" else start)
    if following is not None:
        if text[following.end() :].strip():
            raise DataError("ends with a user's turn: there is no response to it")
        end = max(start, following.start())
    answer = text[start:end]
    closed = without_end_marks(answer, (markup.end, *END_OF_TEXT)) if markup.end else answer
    return text[:start], closed if markup.end in answer[len(closed) :] else answer


def _first_markup(text: str) -> Markup | None:
    """The markup whose question comes first; where no question is marked, the one whose answer does."""
    answered = [(found.start(), markup) for markup in MARKUPS if (found := markup.answer.search(text))]
    asked = [(found.start(), markup) for _, markup in answered if (found := markup.question.search(text))]
    return min(asked or answered, key=lambda place: place[0])[1] if answered else None


def turns_of(rendered: str) -> list[str]:
    """The turns of a rendered prompt without markers and introduction; the whole text where it has no markers."""
    markup = markup_of(rendered) or _first_markup(rendered)
    pieces = markup.marker.split(rendered) if markup else [rendered]
    return [piece.strip() for piece in pieces[1:] if piece.strip()] if len(pieces) > 1 else [rendered]


def raw_prompt(rendered: str) -> str:
    """What was said in a rendered prompt: its turns, a line each."""
    return "\n".join(turns_of(rendered))


def asked(prompt: TokenizedPrompt) -> str:
    """What the data row asks: the user's last turn (instruction and input), without the template around it.

    All turns, a line each, of a prompt that came with markers of its own.
    """
    return prompt.messages[-1]["content"] if prompt.messages else raw_prompt(prompt.text)
