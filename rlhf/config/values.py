"""A value of a file or a word of the command line as what its field is, where that loses nothing."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Sequence
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from rlhf.config.errors import ConfigError
from rlhf.config.facts import facts_of
from rlhf.config.yaml_text import WrittenFloat, WrittenInt

YES, NO = ("true", "yes", "1", "t", "y"), ("false", "no", "0", "f", "n")
"""What the command line may say for a yes/no field, in any case."""


def from_yaml(name: str, value: Any, kind: Any, path: str) -> Any:
    """Convert a YAML value to the type `kind` of the field `name` (1 -> 1.0, "5e-5" -> 5e-5).

    Raises ConfigError that names the file `path`, the field and its type.
    """
    wrong = ConfigError(f"{path}: field `{name}` needs {_shown_type(kind)}, got {_shown(value)} ({_type_name(value)})")
    kind, may_be_unset = _without_none(kind)
    if may_be_unset and value is None:
        return None
    if get_origin(kind) is list:
        if value is None:
            raise wrong
        convert = _number if get_args(kind) == (float,) else _list_entry
        return [convert(entry, wrong) for entry in (value if isinstance(value, list) else [value])]
    if get_origin(kind) is Literal:
        return _choice(value, kind, f"{path}: field `{name}`={_shown(value)}")
    if kind is float:
        # infinity is for `check_values` to judge, which knows the field
        return value if isinstance(value, float) and value == math.inf else _number(value, wrong)
    if kind is int and isinstance(value, int) and not isinstance(value, bool):
        return int(value)
    if kind is str:
        return _text(value, wrong)
    if type(value) is not kind:
        raise wrong
    return value


def from_words(name: str, words: Sequence[str], kind: Any) -> Any:
    """Convert what stands after `--name` on the command line to the type `kind` of its field.

    Raises ConfigError that names the option and its type.
    """
    kind, _ = _without_none(kind)
    if get_origin(kind) is list:
        if not words:
            raise ConfigError(f"command line: --{name} needs at least one value after it")
        return [from_words(name, [word], get_args(kind)[0]) for word in words]
    if kind is bool and not words:
        return True
    if not words:
        raise ConfigError(f"command line: --{name} needs a value after it ({_shown_type(kind)})")
    if len(words) > 1:
        raise ConfigError(f"command line: --{name} takes one value; cannot read {words[1]!r} after {words[0]!r}")
    word = words[0]
    if get_origin(kind) is Literal:
        return _choice(word, kind, f"command line: --{name} {_shown(word)}")
    try:
        return _yes_or_no(word) if kind is bool else kind(word)
    except ValueError:
        raise ConfigError(f"command line: --{name} needs {_shown_type(kind)}, got {_shown(word)}") from None


def check_values(config: Any) -> None:
    """ConfigError for a number that is not finite and for a text that no file name and no file could hold."""
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        for entry in value if isinstance(value, list) else [value]:
            infinite = entry == math.inf and facts_of(item).may_be_infinite
            if isinstance(entry, float) and not (math.isfinite(entry) or infinite):
                raise ConfigError(f"{item.name}={entry} must be a finite number")
            if isinstance(entry, str) and not _can_be_written(entry):
                raise ConfigError(f"{item.name}={entry!r} holds a character that cannot be written (NUL, half a pair)")


def _without_none(kind: Any) -> tuple[Any, bool]:
    """The type of a field that may be unset, and whether it may."""
    if get_origin(kind) in (UnionType, Union):  # the second one where a Literal is part of it
        return next(part for part in get_args(kind) if part is not NoneType), True
    return kind, False


def _choice(value: Any, kind: Any, given: str) -> Any:
    for choice in get_args(kind):
        if str(value) == str(choice):
            return choice
    raise ConfigError(f"{given} is not one of {', '.join(map(str, get_args(kind)))}")


def _yes_or_no(word: str) -> bool:
    if word.lower() not in YES + NO:
        raise ValueError(word)
    return word.lower() in YES


def _shown(value: Any) -> str:
    return repr(value) if len(repr(value)) <= 200 else repr(value)[:200] + "..."


def _shown_type(kind: Any) -> str:
    return str(kind) if get_origin(kind) else "true or false" if kind is bool else str(kind.__name__)


def _type_name(value: Any) -> str:
    return type(value).__name__.removeprefix("Written").lower()


def _list_entry(value: Any, wrong: ConfigError) -> str:
    return _text(json.dumps(value, ensure_ascii=False) if isinstance(value, dict) else value, wrong)


def _text(value: Any, wrong: ConfigError) -> str:
    if isinstance(value, WrittenInt | WrittenFloat):
        return value.text  # a name that YAML reads as a number
    if not isinstance(value, str) or not _can_be_written(value):
        raise wrong
    return value


def _can_be_written(text: str) -> bool:
    try:
        return b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        return False


def _number(value: Any, wrong: ConfigError) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise wrong
    try:
        number = float(value)  # YAML reads 5e-5 as a string
    except (ValueError, OverflowError):
        raise wrong from None
    if not math.isfinite(number):
        raise wrong
    return number
