"""One field of a row -> a checked value: texts, numbers, lists, messages."""

from __future__ import annotations

import json
import math
import unicodedata
from collections.abc import Mapping
from typing import Any

_INVISIBLE = dict.fromkeys(map(ord, "\u00ad\u034f\u180e\u200b\u200c\u200d\u200e\u200f\u2060\ufeff"))
_EOS = ("<|endoftext|>", "</s>", "<|im_end|>", "<|eot_id|>", "<|end_of_text|>", "<end_of_turn>", "<eos>", "[EOS]")
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
    text = text.translate(_INVISIBLE).strip()
    while ending := next((eos for eos in _EOS if text.endswith(eos)), None):
        text = text.removesuffix(ending).rstrip()
    return text


def shown(value: Any) -> str:
    """The beginning of a value and its type, for an error message."""
    text = repr(value)
    return f"{text[:60]}{'...' if len(text) > 60 else ''} ({type(value).__name__})"


def read_text(value: Any, column: str, *, blank: bool = False) -> str:
    """A text in NFC; with `blank`, one without visible content is "" and not an error."""
    if value is None:
        raise BadRow(column, "is missing")
    if not isinstance(value, str):
        raise BadRow(column, f"needs a text, got {shown(value)}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise BadRow(column, "holds half of a surrogate pair, which is not a character") from None
    text = unicodedata.normalize("NFC", value)
    if content_of(text):
        return text
    if blank:
        return ""
    raise BadRow(
        column, "is empty" if not text else "holds nothing but white space, invisible or end-of-text characters"
    )


def read_answer(value: Any, column: str) -> str:
    """A response: a text, a message, or a list of one assistant message."""
    messages = [value] if isinstance(value, Mapping) else decoded(value)
    if not isinstance(messages, list):
        return read_text(value, column)
    turns = read_messages(messages, column)
    if len(turns) != 1 or turns[0]["role"] != "assistant":
        raise BadRow(column, f"needs one assistant message, got {', '.join(turn['role'] for turn in turns)}")
    return read_text(turns[0]["content"], column)


def decoded(value: Any) -> Any:
    """A list of messages that a text table holds as JSON; any other text stays a text."""
    if isinstance(value, str) and value.lstrip()[:1] == "[":
        try:
            content = json.loads(value)
        except json.JSONDecodeError:
            return value
        if content and all(isinstance(entry, dict) and _is_message(entry) for entry in content):
            return content
    return value


def _is_message(entry: Mapping[str, Any]) -> bool:
    return {"role", "content"} <= entry.keys() or {"from", "value"} <= entry.keys()


def read_label(value: Any, column: str) -> bool:
    """Whether a person called the response acceptable."""
    label = _LABELS.get(str(value).strip().casefold())
    if label is None:
        raise BadRow(column, f"needs true or false (or 1 or 0), got {shown(value)}")
    return label


def read_list(value: Any, column: str) -> list[Any]:
    """A list that is not empty, or the JSON of one."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise BadRow(column, f"needs a list, got {shown(value)}") from error
    if value is None:
        raise BadRow(column, "is missing")
    if not isinstance(value, list) or not value:
        raise BadRow(column, f"needs a list with something in it, got {shown(value)}")
    return value


def read_number(value: Any, column: str) -> float:
    """A finite number, or the text of one."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            raise BadRow(column, f"needs a number, got {shown(value)}") from None
    if value is None:
        raise BadRow(column, "is missing")
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise BadRow(column, f"needs a finite number, got {shown(value)}")
    return float(value)


def read_messages(value: Any, column: str) -> list[dict[str, str]]:
    """Messages of {role, content} or {from, value} as {role, content}, roles named system, user, assistant."""
    entries = decoded(value)
    if not isinstance(entries, list) or not entries:
        raise BadRow(column, "is missing" if value is None else f"needs a list of messages, got {shown(value)}")
    messages = []
    for index, entry in enumerate(entries):
        place = f"{column}[{index}]"
        if not isinstance(entry, Mapping):
            raise BadRow(place, f"needs a message {{role, content}}, got {shown(entry)}")
        given = entry.get("role", entry.get("from"))
        role = _ROLES.get(str(given).strip().casefold())
        if role is None:
            raise BadRow(place, f"has the role {given!r}; known: {', '.join(_ROLES)}")
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
