"""One row -> its prompt and the texts that answer it, which may be texts, messages or whole transcripts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf.data.formats import Layout
from rlhf.data.printed_lists import parse_printed
from rlhf.data.rendered import begins_with_marker, markup_of, raw_prompt, split_rendered, turns_of, unfinished_markup
from rlhf.data.row_values import (
    BadRow,
    content_of,
    is_missing,
    json_value,
    prompt_key,
    read_answer,
    read_cell,
    read_list,
    read_messages,
    read_text,
    shown,
)
from rlhf.data.spec import DataError, Row
from rlhf.data.templates import Template, user_message
from rlhf.types import Message

REPEATING_ROWS = 3
"""Rows of a file that must all begin their answers with their prompt before that is more than chance."""

_ANSWERS = ("response", "chosen", "rejected", "response1", "response2")
"""Our names of the columns that hold one answer each."""


@dataclass(frozen=True)
class Prompt:
    """A prompt as the model sees it (`text`), as the user wrote it (`raw`), and as turns where those are known.

    `rendered`: it came with markers of its own; `special`: which are special tokens of the models that have them.
    """

    text: str
    raw: str
    rendered: bool = False
    special: bool = False
    messages: tuple[Message, ...] = ()


class PromptReader:
    """Reads prompts and answers from the rows of one file; `answers_repeat`: every answer begins with its prompt."""

    def __init__(self, template: Template, layout: Layout, *, answers_repeat: bool = False) -> None:
        self.template = template
        self.layout = layout
        self.answers_repeat = answers_repeat

    def value(self, row: Row, column: str) -> Any:
        """The value of a column, with the messages that a cell of a text table holds as text."""
        value = row.values.get(column)
        return read_cell(value, column) if row.text_cells else value

    def prompt_alone(self, row: Row) -> Prompt:
        """The prompt of a row of any format; its answers are passed over."""
        columns = self.layout.columns
        if "messages" in columns:
            messages = read_messages(row.values.get(columns["messages"]), columns["messages"])
            if messages[-1]["role"] == "assistant":
                messages.pop()
            return self._conversation(row, messages, columns["messages"])
        if "text" in columns:
            return self._rendered_text(row, columns["text"])[0]
        if "chosen" in columns and ("prompt" not in columns or self._holds_dialogues(row)):
            return self.pair(row)[0]
        if "instances" in columns:
            value = row.values.get(columns["instances"])
            first = read_list(value, columns["instances"])[0] if value else {}
            return self.prompt(row, read_input(first.get("input") if isinstance(first, Mapping) else None, "input"))
        answers = _readable_answers(row, self.layout)
        if answers and self._holds_prompt(row, answers):
            return self._split_transcripts(row, answers)[0]
        return self.prompt_of(row)

    def prompt_and_response(self, row: Row) -> tuple[Prompt, str]:
        """The prompt of a row and its one response."""
        columns = self.layout.columns
        if "messages" in columns:
            return self._dialogue(row, row.values.get(columns["messages"]), columns["messages"])
        if "text" in columns:
            prompt, response = self._rendered_text(row, columns["text"])
            return prompt, read_text(response, columns["text"])
        prompt, (response,) = self.prompt_and_answers(row)
        return prompt, response

    def pair(self, row: Row) -> tuple[Prompt, str, str]:
        """Prompt, chosen and rejected, whose columns may hold answers, messages, or whole dialogues with the prompt."""
        columns = self.layout.columns
        names = (columns["chosen"], columns["rejected"])
        sides = [self.value(row, name) for name in names]
        if self._holds_dialogues(row):
            parts = [read_messages(side, name) for side, name in zip(sides, names, strict=True)]
            if parts[0][:-1] != parts[1][:-1]:
                raise BadRow(names[1], f"has no common prompt with `{names[0]}`: the turns before the last one differ")
            if "prompt" in columns and not self._given_turns(row) <= _keys(turn["content"] for turn in parts[0][:-1]):
                raise BadRow(columns["prompt"], f"is not among the turns of `{columns['chosen']}`")
            prompt, chosen = self._dialogue(row, sides[0], names[0])
            return prompt, chosen, self._dialogue(row, sides[1], names[1])[1]
        if "prompt" in columns:
            prompt, (chosen, rejected) = self.prompt_and_answers(row)
            return prompt, chosen, rejected
        prompt, (chosen, rejected) = self._split_transcripts(row, dict(zip(names, sides, strict=True)))
        return prompt, chosen, rejected

    def prompt_and_answers(self, row: Row) -> tuple[Prompt, list[str]]:
        """The prompt of a row and all its answers: its response, its pair or its ranking, in the order of the row.

        Whole transcripts give the prompt; a prompt that every answer of the file repeats is cut off.
        """
        answers = answers_of(row, self.layout)
        if self._holds_prompt(row, answers):
            return self._split_transcripts(row, answers)
        prompt = self.prompt_of(row)
        texts = [read_answer(answer, name) for name, answer in answers.items()]
        if self.answers_repeat:
            given = read_text(self.value(row, self.layout.columns["prompt"]), self.layout.columns["prompt"])
            cut = [text[len(given) :].lstrip() for text in texts]
            texts = [read_text(text, name) for text, name in zip(cut, answers, strict=True)]
        return prompt, texts

    def prompt_of(self, row: Row) -> Prompt:
        """The prompt of a row that has a column of it, with the row's input."""
        return self.prompt(row, self._input(row))

    def prompt(self, row: Row, given: str) -> Prompt:
        """The prompt of the column `prompt` with an input (or ""), system text and earlier turns, rendered once."""
        column = self.layout.columns["prompt"]
        value = self.value(row, column)
        if isinstance(value, list):
            if given:
                raise BadRow(self._name("input"), f"stands beside messages in `{column}`; put it into a message")
            return self._conversation(row, read_messages(value, column), column)
        instruction = read_text(value, column)
        if markup_of(instruction) is not None:
            return self._rendered(row, instruction, given)
        if (unfinished := unfinished_markup(instruction)) is not None and unfinished.special:
            raise BadRow(
                column, f"begins with the markers of {unfinished.name} and does not end where the answer begins"
            )
        if column != "instruction" and f"\n{given.strip()}\n" in f"\n{instruction}\n":
            given = ""  # the prompt holds it already
        before = self._before(row)
        try:
            text = self.template.render_after(before, instruction, given)
        except DataError as error:
            raise BadRow(column, f"cannot be rendered: {error}") from error
        raw = "\n".join([*(message["content"] for message in before), instruction, *([given] if given else [])])
        return Prompt(text, raw, messages=(*before, user_message(instruction, given)))

    def other_columns(self, row: Row) -> dict[str, Any]:
        """The columns that are not part of the prompt; those it was cut out of, which hold an answer too, are kept."""
        columns = self.layout.columns
        used = {columns[name] for name in ("prompt", "input", "system", "history") if name in columns}
        if "messages" in columns:
            messages = read_messages(row.values.get(columns["messages"]), columns["messages"])
            if messages[-1]["role"] != "assistant":
                used.add(columns["messages"])
        others = {name: value for name, value in row.values.items() if value is not None and name not in used}
        return {str(json_value(name)): json_value(value) for name, value in others.items()}

    # parts of a row

    def _name(self, name: str) -> str:
        return self.layout.columns.get(name, name)

    def _input(self, row: Row) -> str:
        return read_input(row.values.get(self.layout.columns.get("input", "")), self._name("input"))

    def _before(self, row: Row) -> list[Message]:
        """The system text and the earlier turns that have columns of their own."""
        columns = self.layout.columns
        before: list[Message] = []
        if "system" in columns and not is_missing(row.values.get(columns["system"])):
            text = read_text(row.values[columns["system"]], columns["system"], blank=True)
            before += [{"role": "system", "content": text}] if text else []
        if "history" in columns:
            before += _history(row.values.get(columns["history"]), columns["history"])
        return before

    def _conversation(self, row: Row, messages: Sequence[Message], column: str) -> Prompt:
        before = self._before(row)
        if column != self.layout.columns.get("prompt"):  # a column of whole dialogues
            said = "\n".join(message["content"] for message in messages)
            earlier = [message for message in before if message["role"] != "system"]
            self._check_held(row, said, self._input(row), earlier, f"the dialogue of `{column}`")
            before = [message for message in before if message["role"] == "system"]
        own = [message for message in messages if message["role"] == "system"]
        if own and any(message["role"] == "system" for message in before):
            if before[0] != own[0]:
                raise BadRow(self._name("system"), f"is another system text than that of `{column}`")
            before = before[1:]
        messages = [*before, *messages]
        try:
            text = self.template.render_messages(messages)
        except DataError as error:
            raise BadRow(column, f"cannot be rendered: {error}") from error
        return Prompt(text, "\n".join(message["content"] for message in messages), messages=tuple(messages))

    def _dialogue(self, row: Row, value: Any, column: str) -> tuple[Prompt, str]:
        messages = read_messages(value, column)
        if messages[-1]["role"] != "assistant":
            raise BadRow(column, f"ends with the {messages[-1]['role']}'s turn: there is no response")
        return self._conversation(row, messages[:-1], column), read_text(messages[-1]["content"], column)

    def _rendered(self, row: Row, text: str, given: str) -> Prompt:
        """A prompt that is already rendered, and holds what the row's other columns give for it."""
        self._check_held(row, text, given, self._before(row), "the prompt, which is already rendered")
        markup = markup_of(text)
        return Prompt(text, raw_prompt(text), rendered=True, special=markup is not None and markup.special)

    def _check_held(self, row: Row, text: str, given: str, before: Sequence[Message], what: str) -> None:
        parts = [(self._name("input"), given)]
        parts += [(self._name("system" if m["role"] == "system" else "history"), m["content"]) for m in before]
        for name, part in parts:
            if prompt_key(part) not in prompt_key(text):
                raise BadRow(name, f"is not in {what}; put it in or leave it empty")

    def _rendered_text(self, row: Row, column: str) -> tuple[Prompt, str]:
        parts = _split(read_text(row.values.get(column), column), column)
        if parts is None:
            raise BadRow(
                column, "has no answer marker (### 답변:, ### 응답:, ### Response:, Assistant:) to split it at"
            )
        if not content_of(raw_prompt(parts[0])):
            raise BadRow(column, "has an empty prompt before its answer marker")
        return self._rendered(row, parts[0], self._input(row)), parts[1]

    # answers beside a prompt, and transcripts that hold both

    def _holds_dialogues(self, row: Row) -> bool:
        """Whether `chosen` and `rejected` are lists of messages with the turns before the answer."""
        sides = [self.value(row, self.layout.columns[name]) for name in ("chosen", "rejected")]
        return all(isinstance(side, list) for side in sides) and any(len(side) > 1 for side in sides)

    def _holds_prompt(self, row: Row, answers: Mapping[str, Any]) -> bool:
        """Whether the answers are whole transcripts, the prompt among their turns; BadRow where only some are."""
        names, sides = list(answers), list(answers.values())
        if not all(isinstance(side, str) for side in sides):
            return False
        fronts = [_front(side) for side in sides]
        if not any(fronts):
            return False
        given = self._given_turns(row)
        # two answers do not begin with one conversation by chance; one alone may quote it
        whole = [
            front is not None and given <= _keys(turns_of(front)) and (len(names) > 1 or begins_with_marker(front))
            for front in fronts
        ]
        if any(whole) and not all(whole):
            alone = names[whole.index(False)]
            raise BadRow(alone, f"is an answer alone, and `{names[whole.index(True)]}` a whole transcript")
        return all(whole)

    def _given_turns(self, row: Row) -> set[str]:
        column = self.layout.columns["prompt"]
        value = self.value(row, column)
        if isinstance(value, list):
            return _keys(turn["content"] for turn in read_messages(value, column))
        text = read_text(value, column)
        return _keys(turns_of(text) if markup_of(text) else [text])

    def _split_transcripts(self, row: Row, transcripts: Mapping[str, Any]) -> tuple[Prompt, list[str]]:
        names = list(transcripts)
        parts = [_split(text, name) for name, text in [(name, read_text(transcripts[name], name)) for name in names]]
        cut: list[tuple[str, str]] = []
        for part, name in zip(parts, names, strict=True):
            if part is None:
                raise BadRow(
                    name, "holds no `\\n\\nAssistant:` turn; where the prompt has its own column, map `prompt`"
                )
            cut.append(part)
        front = cut[0][0]
        for (other, _), name in zip(cut, names, strict=True):
            if other != front:
                raise BadRow(
                    name, f"has no common prompt with `{names[0]}`: the dialogues before the last answer differ"
                )
        if not content_of(raw_prompt(front)):
            raise BadRow(names[0], "has an empty prompt before its last answer")
        answers = [read_text(answer, name) for (_, answer), name in zip(cut, names, strict=True)]
        return self._rendered(row, front, self._input(row)), answers


def read_input(value: Any, column: str) -> str:
    """The input of an instruction; "" where there is none."""
    return "" if is_missing(value) else read_text(value, column, blank=True)


def answers_of(row: Row, layout: Layout) -> dict[str, Any]:
    """The answers of a row in order, by their place (`chosen`, `responses[0]`), as they stand there.

    Raises BadRow where a list of them cannot be read.
    """
    columns = layout.columns
    if layout.response_columns:
        values = [row.values.get(name) for name in layout.response_columns]
        while len(values) > 2 and values[-1] in (None, ""):
            values.pop()  # a file may hold prompts with fewer responses than its widest row
        names = layout.response_columns[: len(values)]
    elif "responses" in columns:
        column = columns["responses"]
        return {f"{column}[{place}]": value for place, value in enumerate(read_list(row.values.get(column), column))}
    else:
        names = tuple(columns[name] for name in _ANSWERS if name in columns)
    return {name: read_cell(row.values.get(name), name) if row.text_cells else row.values.get(name) for name in names}


def _readable_answers(row: Row, layout: Layout) -> dict[str, Any]:
    """The answers of a row that is asked for its prompt alone: none where they cannot be read."""
    try:
        return answers_of(row, layout)
    except BadRow:
        return {}


def answers_begin_with_prompt(row: Row, layout: Layout, *, apart: bool = True) -> bool:
    """Whether every answer of a row of texts is its prompt, which came without markers, and more text.

    With `apart` only where white space stands between the two.
    """
    prompt = row.values.get(layout.columns.get("prompt", ""))
    if not isinstance(prompt, str) or not content_of(prompt) or markup_of(prompt) is not None:
        return False
    answers = _readable_answers(row, layout).values()
    return bool(answers) and all(
        isinstance(answer, str) and answer.startswith(prompt) and (not apart or answer[len(prompt) :][:1].isspace())
        for answer in answers
    )


def begins_with_plain_marker(row: Row, layout: Layout) -> bool:
    """Whether a row's prompt begins with a marker of plain text, such as `### User:`, with no answer's at its end."""
    prompt = row.values.get(layout.columns.get("prompt", ""))
    unfinished = unfinished_markup(prompt) if isinstance(prompt, str) else None
    return unfinished is not None and not unfinished.special


def _split(text: str, column: str) -> tuple[str, str] | None:
    try:
        return split_rendered(text)
    except DataError as error:
        raise BadRow(column, str(error)) from error


def _front(text: str) -> str | None:
    """The part before the last answer of what may be a transcript; all of one that ends with the user's turn."""
    try:
        parts = split_rendered(text)
    except DataError:
        return text
    return None if parts is None else parts[0]


def _keys(texts: Iterable[str]) -> set[str]:
    return {prompt_key(text) for text in texts}


def _history(value: Any, column: str) -> list[Message]:
    """Earlier turns: pairs of question and answer, as LLaMA-Factory has them, or messages."""
    if is_missing(value) or value == [] or (isinstance(value, str) and not value.strip()):
        return []
    entries = parse_printed(value) if isinstance(value, str) else value
    if entries == []:
        return []
    if not isinstance(entries, list):
        raise BadRow(column, f"needs a list of [question, answer] or of messages, got {shown(value)}")
    if isinstance(entries[0], Mapping):
        return list(read_messages(entries, column))
    messages: list[Message] = []
    for index, entry in enumerate(entries):
        if not isinstance(entry, list | tuple) or len(entry) != 2:
            raise BadRow(f"{column}[{index}]", f"needs [question, answer], got {shown(entry)}")
        for role, text in zip(("user", "assistant"), entry, strict=True):
            messages.append({"role": role, "content": read_text(text, f"{column}[{index}]")})
    return messages
