"""One field of a row -> a checked value: texts, numbers, lists, messages."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Collection, Mapping
from typing import Any

from rlhf.data.printed_lists import parse_printed

_INVISIBLE_RANGES = (
    # Unicode's Default_Ignorable_Code_Point: zero-width and directional marks, fillers, variation selectors, tags
    *((0xAD, 0xAD), (0x34F, 0x34F), (0x61C, 0x61C), (0x115F, 0x1160), (0x17B4, 0x17B5), (0x180B, 0x180F)),
    *((0x200B, 0x200F), (0x202A, 0x202E), (0x2060, 0x206F), (0x3164, 0x3164), (0xFE00, 0xFE0F), (0xFEFF, 0xFEFF)),
    *((0xFFA0, 0xFFA0), (0xFFF0, 0xFFF8), (0x1BCA0, 0x1BCA3), (0x1D173, 0x1D17A), (0xE0000, 0xE0FFF)),
    # control characters that are no white space, and the blank of Braille
    *((0x00, 0x08), (0x0E, 0x1B), (0x7F, 0x84), (0x86, 0x9F), (0x2800, 0x2800)),
)
INVISIBLE = frozenset(chr(code) for first, last in _INVISIBLE_RANGES for code in range(first, last + 1))
"""Characters that show nothing and are no white space."""
_WITHOUT_INVISIBLE = {ord(character): None for character in INVISIBLE}
END_OF_TEXT = (
    "<|endoftext|>",
    "</s>",
    "<|im_end|>",
    "<|eot_id|>",
    "<|end_of_text|>",
    "<end_of_turn>",
    "<eos>",
    "[EOS]",
)
_ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
}
_LABELS = {
    **dict.fromkeys(("1", "1.0", "true", "yes", "y", "safe", "acceptable", "desirable"), True),
    **dict.fromkeys(("0", "0.0", "-1", "false", "no", "n", "unsafe", "unacceptable", "undesirable"), False),
}
_MESSAGES_AS_TEXT = re.compile(
    r"""\s*\[\s*(?=\{.*(['"])(?:role|from)\1\s*:)(?=\{.*(['"])(?:content|value)\2\s*:).*\]\s*\Z""", re.DOTALL
)


class BadRow(Exception):
    """A row that cannot be used: the file's column and the reason."""

    def __init__(self, column: str, reason: str) -> None:
        super().__init__(f"{column}: {reason}")
        self.column = column
        self.reason = reason


class DroppedRow(BadRow):
    """A row without a fault that teaches nothing, such as a tie: counted, never an error."""


def prompt_key(text: str) -> str:
    """What identifies a prompt: NFC, without white space, casefolded (KULLM-RLHF compares prompts without spaces)."""
    folded = unicodedata.normalize("NFC", text).casefold()
    return "".join(unicodedata.normalize("NFC", folded).split())


def content_of(text: str) -> str:
    """A text without white space around it, invisible characters and literal end-of-sequence tokens at its end."""
    text = text.translate(_WITHOUT_INVISIBLE).strip()
    return without_end_marks(text, END_OF_TEXT).rstrip()


def without_end_marks(text: str, marks: Collection[str]) -> str:
    """`text` without the marks that close it; white and invisible characters may stand among them."""
    kept = end = len(text)
    while True:
        while end and (text[end - 1].isspace() or text[end - 1] in INVISIBLE):
            end -= 1
        ending = next((mark for mark in marks if text.endswith(mark, 0, end)), None)
        if ending is None:
            return text[:kept]
        kept = end = end - len(ending)


def shown(value: Any) -> str:
    """The beginning of a value and its type, for an error message."""
    return f"{_beginning(value)} ({type(value).__name__})"


def _beginning(value: Any) -> str:
    text = repr(value[:61] if isinstance(value, str) else value)
    return f"{text[:60]}{'...' if len(text) > 60 else ''}"


def is_missing(value: Any) -> bool:
    """Whether there is no value: None, or the NaN that pandas puts in its place."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def read_text(value: Any, column: str, *, blank: bool = False) -> str:
    """A text in NFC; with `blank`, one without visible content is "" and not an error."""
    if is_missing(value):
        raise BadRow(column, "is missing")
    if not isinstance(value, str):
        raise BadRow(column, f"needs a text, got {shown(value)}")
    text = unicodedata.normalize("NFC", whole_characters(value, column))
    if content_of(text):
        return text
    if blank:
        return ""
    raise BadRow(
        column, "is empty" if not text else "holds nothing but white space, invisible or end-of-text characters"
    )


def whole_characters(text: str, column: str) -> str:
    """`text` where it can be written as UTF-8; BadRow where it holds half of a surrogate pair."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise BadRow(column, "holds half of a surrogate pair, which is not a character") from None
    return text


def json_value(value: Any) -> Any:
    """`value` as JSON and UTF-8 can hold it: null for a number that is not finite, text for what JSON has no word for.

    Half of a surrogate pair becomes its escape, `\\ud83d`.
    """
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(json_value(str(name))): json_value(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [json_value(inner) for inner in value]
    text = value if isinstance(value, str) else str(value)
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode()


def read_answer(value: Any, column: str) -> str:
    """A response: a text, a message, or a list of one assistant message."""
    messages = [value] if isinstance(value, Mapping) else value
    if not isinstance(messages, list):
        return read_text(value, column)
    turns = read_messages(messages, column)
    if len(turns) != 1 or turns[0]["role"] != "assistant":
        raise BadRow(column, f"needs one assistant message, got {', '.join(turn['role'] for turn in turns)}")
    return read_text(turns[0]["content"], column)


def read_cell(cell: Any, column: str) -> Any:
    """A cell of a text table: the message or the list of messages that it holds as text, else the text itself.

    Raises BadRow for a list of messages that cannot be read back, such as one that numpy shortened.
    """
    if not isinstance(cell, str) or cell.lstrip()[:1] not in ("[", "{"):
        return cell
    content = parse_printed(cell)
    entries = content if isinstance(content, list) else [content]
    if entries and all(isinstance(entry, dict) and _is_message(entry) for entry in entries):
        return content
    if _MESSAGES_AS_TEXT.match(cell):
        raise BadRow(
            column, f"looks like a list of messages and cannot be read as one: {shown(cell)}; write it as JSON"
        )
    return cell


def _is_message(entry: Mapping[str, Any]) -> bool:
    return {"role", "content"} <= entry.keys() or {"from", "value"} <= entry.keys()


def read_label(value: Any, column: str) -> bool:
    """Whether a person called the response acceptable."""
    label = _LABELS.get(str(value).strip().casefold())
    if label is None:
        raise BadRow(column, f"needs true or false (or 1 or 0), got {shown(value)}")
    return label


def read_list(value: Any, column: str) -> list[Any]:
    """A list that is not empty, or the text of one: JSON, or as pandas writes it."""
    if isinstance(value, str):
        content = parse_printed(value)
        if content is None:
            raise BadRow(column, f"needs a list, got {shown(value)}")
        value = content
    if value is None:
        raise BadRow(column, "is missing")
    if not isinstance(value, list) or not value:
        raise BadRow(column, f"needs a list with something in it, got {shown(value)}")
    return value


def read_number(value: Any, column: str) -> float:
    """A finite number, or the text of one."""
    if value is None:
        raise BadRow(column, "is missing")
    if isinstance(value, str) and "_" in value:  # `float` would read 1_0 as 10
        raise BadRow(column, f"needs a number, got {shown(value)}")
    try:
        number = math.nan if isinstance(value, bool) or not isinstance(value, int | float | str) else float(value)
    except ValueError:
        raise BadRow(column, f"needs a number, got {shown(value)}") from None
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise BadRow(column, f"needs a finite number, got {shown(value)}")
    return number


def read_messages(value: Any, column: str) -> list[dict[str, str]]:
    """Messages of {role, content} or {from, value} as {role, content}, roles named system, user, assistant.

    A text must be the text of such a list: JSON, or as pandas writes it.
    """
    entries = parse_printed(value) if isinstance(value, str) else value
    if not isinstance(entries, list) or not entries:
        raise BadRow(column, "is missing" if value is None else f"needs a list of messages, got {shown(value)}")
    messages = []
    for index, entry in enumerate(entries):
        place = f"{column}[{index}]"
        if not isinstance(entry, Mapping):
            raise BadRow(place, f"needs a message {{role, content}}, got {shown(entry)}")
        given = entry.get("role", entry.get("from"))
        role = _ROLES.get(given.strip().casefold()) if isinstance(given, str) else None
        if role is None:
            raise BadRow(place, f"has the role {_beginning(given)}; known: {', '.join(_ROLES)}")
        content = entry["content"] if "content" in entry else entry.get("value")
        if isinstance(content, list):
            content = "".join(_text_part(part, place) for part in content)
        if role == "system":
            text = "" if content is None else read_text(content, place, blank=True)
            if not text:
                continue
        else:
            text = read_text(content, place)
        messages.append({"role": role, "content": text})
    if not messages:
        raise BadRow(column, "holds no message but an empty system message")
    return messages


def _text_part(part: Any, place: str) -> str:
    if isinstance(part, Mapping) and part.get("type", "text") == "text":
        text = part.get("text", part.get("value"))
        if isinstance(text, str):
            return text
    raise BadRow(place, f"holds a part that is not text: {shown(part)}")
