"""JSON text -> Python values, where whatever is wrong with the text is one kind of error.

Python's parser alone keeps the last value of a repeated key, and leaves with RecursionError or a ValueError of its
own on nesting and on integers of thousands of digits.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

MAX_DEPTH = 100
"""Lists and objects inside one another; more is no data, and no reader of a row need fear a deeper one."""


class JsonError(ValueError):
    """What is wrong with a JSON text; `line` and `column` count from 1 and are None where the place is not known."""

    def __init__(self, reason: str, line: int | None = None, column: int | None = None) -> None:
        super().__init__(reason if column is None else f"{reason}, column {column}")
        self.reason = reason
        self.line = line
        self.column = column


class _RepeatedKey(JsonError):
    def __init__(self, key: str) -> None:
        super().__init__(f"an object has the key `{key[:60]}` twice")


def parse_json(text: str) -> Any:
    """The value of a JSON text; JsonError for anything wrong, a repeated key and a depth above MAX_DEPTH too."""
    if text.startswith("\ufeff"):
        raise JsonError("a byte-order mark that does not begin the file", 1, 1)
    value, end = _parse(_STRICT, text, len(text) - len(text.lstrip(_WHITE)))
    rest = _after_white(text, end)
    if rest != len(text):
        raise _error_at("Extra data", text, rest)
    return value


def parse_elements(text: str) -> Iterator[tuple[Any, str | None]]:
    """The elements of a JSON array one by one, each with what is wrong with it alone (None where nothing is).

    Raises JsonError where the text ends to be an array, and for what follows one.
    """
    place = _after_white(text, 0)
    if text[place : place + 1] != "[":
        raise _error_at("Expecting '['", text, place)
    place = _after_white(text, place + 1)
    closed = text[place : place + 1] == "]"
    while not closed:
        wrong = None
        try:
            value, end = _parse(_STRICT, text, place)
        except _RepeatedKey as error:
            wrong = error.reason
            value, end = _parse(_LENIENT, text, place)
        yield value, wrong
        end = _after_white(text, end)
        if text[end : end + 1] not in (",", "]"):
            raise _error_at("Expecting ',' delimiter", text, end)
        closed = text[end] == "]"
        place = end if closed else _after_white(text, end + 1)
    rest = _after_white(text, place + 1)
    if rest != len(text):
        raise _error_at("Extra data", text, rest)


_WHITE = " \t\n\r"


def _after_white(text: str, place: int) -> int:
    while text[place : place + 1] and text[place] in _WHITE:
        place += 1
    return place


def _parse(decoder: json.JSONDecoder, text: str, place: int) -> tuple[Any, int]:
    try:
        value, end = decoder.raw_decode(text, place)
    except JsonError:
        raise
    except json.JSONDecodeError as error:
        raise JsonError(error.msg, error.lineno, error.colno) from error
    except RecursionError as error:
        raise JsonError(f"nested deeper than {MAX_DEPTH} levels") from error
    except ValueError as error:
        raise JsonError("an integer has more digits than can be read") from error
    if text.count("[", place, end) + text.count("{", place, end) > MAX_DEPTH and _too_deep(value):
        raise JsonError(f"nested deeper than {MAX_DEPTH} levels")
    return value, end


def _too_deep(value: Any) -> bool:
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
    return any(isinstance(outer, dict | list) for outer in level)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        names = [name for name, _ in pairs]
        raise _RepeatedKey(next(name for name in values if names.count(name) > 1))
    return values


def _error_at(reason: str, text: str, place: int) -> JsonError:
    return JsonError(reason, text.count("\n", 0, place) + 1, place - text.rfind("\n", 0, place))


_STRICT = json.JSONDecoder(object_pairs_hook=_object)
_LENIENT = json.JSONDecoder()
