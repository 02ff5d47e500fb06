"""The error where a file's columns must be named: with the option that names them, ready to paste."""

from __future__ import annotations

import json
import shlex
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, permutations, product
from typing import Any

from rlhf.data.headers import guessed_roles, numbers_rows, parts_among, passage_among
from rlhf.data.json_text import parse_json
from rlhf.data.row_values import BadRow, is_missing, read_label
from rlhf.data.spec import FILE_FORMATS, DataError, Row

MOST_CHOICES = 4
"""Ways to name the columns of one file that an error offers at most."""
PLACEHOLDERS = {"chosen": "<column of the better answer>", "rejected": "<column of the worse answer>"}
"""What an option names where no header says which column is the better answer: reading with it is refused."""


@dataclass(frozen=True)
class ColumnChoice:
    """One way to read a file: our name -> its column, or a row format, with its columns where `columns` can say them.

    `guessed`, `filled`: names that need a look. `unread`: the file's columns that nothing is read from.
    """

    columns: Mapping[str, str]
    format: str | None = None
    guessed: tuple[str, ...] = ()
    filled: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()

    def keys(self, file_format: str | None = None) -> dict[str, Any]:
        """The keys of a data set that say it, beside the file format that it was given."""
        if self.format and not (file_format and self.columns):
            return {"format": self.format}
        return {"columns": dict(self.columns)}

    def caution(self) -> str:
        """What a reader should know of the choice before using it, or ""."""
        open_names = tuple(name for name in PLACEHOLDERS if self.columns.get(name) == PLACEHOLDERS[name])
        notes = [
            f"{', '.join(f'`{name}`' for name in names)} {what}"
            for names, what in (
                (self.guessed, "guessed from the headers"),
                (self.filled, "only filled in: put the right column"),
                (open_names, "to be put in: no header says which answer is better"),
            )
            if names
        ]
        if self.unread:
            notes.append(f"not read: {', '.join(f'`{column}`' for column in self.unread)}")
        return "; ".join(notes)


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
            file_format = given.get("format") if given.get("format") in FILE_FORMATS else None
            keys = choice.keys(file_format)
            if file_format and "format" in keys:
                lines.append(
                    f'  as `{choice.format}`, by "format": "{choice.format}" in place of "{file_format}": first '
                    f"give the file the suffix .{file_format}, since `columns` cannot say this format"
                )
                continue
            if not file_format:
                given.pop("format", None)
            entries = [*texts[:place], json_text({**given, **keys}), *texts[place + 1 :]]
            lines.append(f"  --{field} {' '.join(map(shlex.quote, entries))}")
            in_file = [parse_json(text) if text.lstrip().startswith("{") else text for text in entries]
            lines.append(f"  in a configuration file  {field}: {json_text(in_file)}")
            if choice.caution():
                lines.append(f"  ({choice.caution()})")
        return DataError("\n".join(lines))


def choices_of(
    rows: Sequence[Row], there: Sequence[str], kind: str, kept: Mapping[str, str], beside: Mapping[str, str]
) -> list[ColumnChoice]:
    """Ways to name the columns of a file as records of `kind`, by its headers, and by its order where they say nothing.

    `kept`: what the data set maps besides. `beside`: the columns that become part of the prompt where they are nothing
    else. None where the file has fewer columns of text than are needed. A better and a worse answer are never taken
    from the order of the columns: a placeholder stands for them (`PLACEHOLDERS`).
    """
    beside = {name: column for name, column in beside.items() if column not in kept.values()}
    texts = [column for column in there if _holds_text(rows, column) and column not in kept.values()]
    roles = guessed_roles(texts)
    guesses = {name: _best(roles, name) for name in ("prompt", "response", "chosen", "rejected")}
    instead = {column: role for column, role in roles.items() if column not in beside.values()}
    guesses["prompt"] = _best(instead, "prompt") or guesses["prompt"]
    may_label = [column for column in there if not (column in roles or column in kept.values() or numbers_rows(column))]
    label = next((column for column in may_label if holds_labels(rows, column)), None)
    answers = _answers(guesses, label, kind)
    used = {label, *guesses["prompt"], *(column for answer in answers for column in answer.values())}
    free = [column for column in texts if column not in {*used, *parts_among(there)}]
    left = iter(sorted(free, key=lambda column: column in beside.values()))
    prompts = guesses["prompt"] or list(islice(left, 1))
    answers = answers or [{"response": column} for column in islice(left, 1)]
    found = [{"prompt": prompt, **answer} for prompt, answer in product(prompts, answers)]
    known = {name for name in guesses if guesses[name]}
    enough = [columns for columns in found if len(columns) <= len({*texts, label} - {None})]
    return [_choice_of(columns, known, {**beside, **kept}, texts) for columns in enough]


def _choice_of(
    columns: Mapping[str, str], known: Collection[str], beside: Mapping[str, str], texts: Sequence[str]
) -> ColumnChoice:
    """The choice of `columns`, with what else becomes part of the prompt: `beside`, or a passage among `texts`.

    `known`: the names that some header tells.
    """
    others = {name: column for name, column in beside.items() if column not in columns.values()}
    looks = [name for name, column in columns.items() if column != PLACEHOLDERS.get(name)]
    passage = passage_among(column for column in texts if column not in (*columns.values(), *beside.values()))
    if passage is not None and "input" not in others:
        others["input"] = passage
        looks.append("input")
    filled = tuple(name for name in looks if name in ("prompt", "response") and name not in known)
    guessed = tuple(name for name in looks if name not in filled)
    return ColumnChoice({**others, **columns}, guessed=guessed, filled=filled)


def _answers(guesses: Mapping[str, Sequence[str]], label: str | None, kind: str) -> list[dict[str, str]]:
    """The columns of the answers, as the headers tell: none for prompts (one empty choice), [] where they tell none."""
    if kind == "prompt":
        return [{}]
    plain = [{"response": column} for column in guesses["response"]]
    labelled = [{**answer, "label": label} for answer in plain if label is not None]
    if kind == "response":
        return labelled + plain
    if len(labelled) == 1 and not guesses["chosen"] and not guesses["rejected"]:
        return labelled
    return _pairs(guesses)


def _pairs(guesses: Mapping[str, Sequence[str]]) -> list[dict[str, str]]:
    """The columns of a better and a worse answer, both ways round where two answers say no more than that."""
    better, worse, answers = guesses["chosen"], guesses["rejected"], guesses["response"]
    if not better and not worse and len(answers) == 2:
        return [{"chosen": one, "rejected": other} for one, other in permutations(answers)]
    better = better or (answers if worse and len(answers) == 1 else [PLACEHOLDERS["chosen"]])
    worse = worse or (answers if guesses["chosen"] and len(answers) == 1 else [PLACEHOLDERS["rejected"]])
    return [{"chosen": one, "rejected": other} for one, other in product(better, worse)]


def _best(roles: Mapping[str, tuple[str, bool]], name: str) -> list[str]:
    """The columns that may be `name`: those whose header says nothing else, where there are any."""
    found = [column for column, (role, _) in roles.items() if role == name]
    alone = [column for column in found if roles[column][1]]
    return alone or found


def _holds_text(rows: Sequence[Row], column: str) -> bool:
    values = [value for row in rows if not is_missing(value := row.values.get(column))]
    texts = [value for value in values if not isinstance(value, int | float)]
    return 2 * len(texts) > len(values) and not all(str(text).strip().isdigit() for text in texts)


def holds_labels(rows: Sequence[Row], column: str) -> bool:
    """Whether every row says true or false there (`row_values.read_label`), and both occur."""
    try:
        return len({read_label(row.values.get(column), column) for row in rows}) == 2
    except BadRow:
        return False


def _keys_of(text: str) -> dict[str, Any]:
    """The keys of a data set as it was given, before variables in its path were replaced."""
    return dict(parse_json(text)) if text.strip().startswith("{") else {"path": text.strip()}


def json_text(value: Any) -> str:
    """`value` as JSON on one line, in letters where they can be written and seen."""
    text = json.dumps(value, ensure_ascii=False)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return json.dumps(value)
    return "".join(letter if letter.isprintable() or letter > "\uffff" else f"\\u{ord(letter):04x}" for letter in text)
