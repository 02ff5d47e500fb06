"""The error where a file's columns must be named: with the option that names them, ready to paste."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, product
from typing import Any

from rlhf.data.headers import guessed_role
from rlhf.data.json_text import parse_json
from rlhf.data.row_values import BadRow, is_missing, read_label
from rlhf.data.spec import FILE_FORMATS, DataError, Row

MOST_CHOICES = 4
"""Ways to name the columns of one file that an error offers at most."""


@dataclass(frozen=True)
class ColumnChoice:
    """One way to read a file: our name -> its column, or a row format. `guessed`, `filled`: names that need a look."""

    columns: Mapping[str, str]
    format: str | None = None
    guessed: tuple[str, ...] = ()
    filled: tuple[str, ...] = ()

    def keys(self) -> dict[str, Any]:
        """The keys of a data set that say it."""
        return {"format": self.format} if self.format else {"columns": dict(self.columns)}

    def caution(self) -> str:
        """What a reader should know of the choice before using it, or ""."""
        notes = ((self.guessed, "guessed from the headers"), (self.filled, "only filled in: put the right column"))
        return "; ".join(f"{', '.join(f'`{name}`' for name in names)} {what}" for names, what in notes if names)


class ColumnsError(DataError):
    """A file whose columns must be named; `choices` are the ways to do so that its rows allow."""

    def __init__(self, reason: str, choices: Sequence[ColumnChoice]) -> None:
        self.reason = reason
        self.choices = tuple(choices)[:MOST_CHOICES]
        shown = json_text(self.choices[0].keys()) if self.choices else ""
        super().__init__(f"{reason}; say which is which, such as {shown}" if shown else reason)

    def with_option(self, field: str, texts: Sequence[str], place: int) -> DataError:
        """The same error with the option `field` of all `texts` written out, the data set at `place` as it must be."""
        if not self.choices:
            return self
        several = len(self.choices) > 1
        lines = [f"{self.reason}; say which is which with {'one of these' if several else 'this'}:"]
        for choice in self.choices:
            given = _keys_of(texts[place])
            if given.get("format") not in FILE_FORMATS:
                given.pop("format", None)
            entries = [*texts[:place], json_text({**given, **choice.keys()}), *texts[place + 1 :]]
            lines.append(f"  --{field} {' '.join(map(shlex.quote, entries))}")
            in_file = [parse_json(text) if text.lstrip().startswith("{") else text for text in entries]
            lines.append(f"  in a configuration file  {field}: {json_text(in_file)}")
            if choice.caution():
                lines.append(f"  ({choice.caution()})")
        return DataError("\n".join(lines))


def choices_of(rows: Sequence[Row], there: Sequence[str], kind: str, kept: Mapping[str, str]) -> list[ColumnChoice]:
    """Ways to name the columns of a file as records of `kind`, by its headers, and by its order where they say nothing.

    `kept`: what the data set maps besides. None where the file has fewer columns of text than are needed.
    """
    texts = [column for column in there if _holds_text(rows, column) and column not in kept.values()]
    roles = {column: role for column in texts if (role := guessed_role(column)) is not None}
    guesses = {name: _best(roles, name) for name in ("prompt", "response", "chosen", "rejected")}
    names = _needed(kind)
    label = next((column for column in there if _holds_labels(rows, column)), None) if "chosen" in names else None
    if label and len(guesses["response"]) == 1 and not guesses["chosen"] + guesses["rejected"]:
        names, guesses = (*names[:1], "response", "label"), {**guesses, "label": [label]}
    free = iter([column for column in texts if not any(column in guesses[name] for name in names)])
    options: list[list[str]] = []
    for name in names:
        options.append(guesses[name] or list(islice(free, 1)))
        if not options[-1]:
            return []
    guessed = tuple(name for name in names if guesses[name])
    filled = tuple(name for name in names if not guesses[name])
    found = [dict(zip(names, columns, strict=True)) for columns in product(*options)]
    return [ColumnChoice({**kept, **columns}, guessed=guessed, filled=filled) for columns in found]


def _needed(kind: str) -> tuple[str, ...]:
    if kind == "prompt":
        return ("prompt",)
    return ("prompt", "response") if kind == "response" else ("prompt", "chosen", "rejected")


def _best(roles: Mapping[str, tuple[str, bool]], name: str) -> list[str]:
    """The columns that may be `name`: those whose header says nothing else, where there are any."""
    found = [column for column, (role, _) in roles.items() if role == name]
    alone = [column for column in found if roles[column][1]]
    return alone or found


def _holds_text(rows: Sequence[Row], column: str) -> bool:
    values = [value for row in rows if not is_missing(value := row.values.get(column))]
    texts = [value for value in values if not isinstance(value, int | float)]
    return 2 * len(texts) > len(values) and not all(str(text).strip().isdigit() for text in texts)


def _holds_labels(rows: Sequence[Row], column: str) -> bool:
    try:
        return len({read_label(row.values.get(column), column) for row in rows}) == 2
    except BadRow:
        return False


def _keys_of(text: str) -> dict[str, Any]:
    """The keys of a data set as it was given, before variables in its path were replaced."""
    return dict(parse_json(text)) if text.strip().startswith("{") else {"path": text.strip()}


def json_text(value: Any) -> str:
    """`value` as JSON on one line, in letters where they can be written."""
    text = json.dumps(value, ensure_ascii=False)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return json.dumps(value)
    return text
