"""Tables of words, and templates that are read both ways: a meaning is written as text, a text is parsed to meanings.

A template is text with choices and slots. `[a|b]` is one of several wordings. `{stain}` is the first form of the
entry that table `stain` has in the meaning, `{stain.remedy}` another form of it, `{stain:을}` takes a particle.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

from rlhf.data.world.particles import attach

Meaning = Mapping[str, int]
"""What is talked about: the number of an entry for each table."""
_CHOICE = re.compile(r"\[([^\]]*)\]")
_SLOT = re.compile(r"\{(\w+)(?:\.(\w+))?(?::(\w+))?\}")
_PIECE = re.compile(r"\[[^\]]*\]|\{[^}]*\}|[^\[{]+")
_SENTENCE_END = re.compile(r"(?<=[.?!])\s+")


@dataclass(frozen=True)
class Table:
    """The entries that a slot can take, each in several forms.

    `forms`: their names; a form with a star is a *fact*: answers state it and prompts do not tell it.
    """

    name: str
    forms: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    @classmethod
    def parse(cls, name: str, forms: str, text: str) -> Table:
        """A table from lines `form | form | ...`; ValueError for a line that has another number of them."""
        names = tuple(forms.split())
        rows = tuple(tuple(cell.strip() for cell in line.split("|")) for line in text.strip().splitlines())
        for row in rows:
            if len(row) != len(names) or not all(row):
                raise ValueError(f"table {name}: {' | '.join(row)} has not the {len(names)} forms {forms}")
        return cls(name, names, rows)

    @property
    def facts(self) -> tuple[str, ...]:
        """The names of the forms that are facts, without their star."""
        return tuple(form.removesuffix("*") for form in self.forms if form.endswith("*"))

    def __len__(self) -> int:
        return len(self.rows)

    def texts(self, form: str) -> list[str]:
        """One form of every entry; "" is the first one."""
        names = [name.removesuffix("*") for name in self.forms]
        column = names.index(form) if form else 0
        return [row[column] for row in self.rows]


@dataclass(frozen=True)
class Slot:
    """A place in a template: a form of a table, with a particle or ""."""

    table: str
    form: str
    particle: str

    @property
    def fact(self) -> str:
        """The name `table.form` that facts go by."""
        return f"{self.table}.{self.form}"


@dataclass(frozen=True)
class Template:
    """A text with choices and slots over `tables`."""

    text: str
    tables: Mapping[str, Table]

    @cached_property
    def slots(self) -> tuple[Slot, ...]:
        """Its slots in order. ValueError for a table or form that there is not."""
        found = tuple(Slot(name, form or "", particle or "") for name, form, particle in _SLOT.findall(self.text))
        for slot in found:
            if slot.table not in self.tables:
                raise ValueError(f"template {self.text!r}: no table `{slot.table}`")
            self.tables[slot.table].texts(slot.form)
        return found

    @cached_property
    def mentions(self) -> tuple[Slot, ...]:
        """The slots that say what a prompt says too."""
        return tuple(slot for slot in self.slots if slot.form not in self.tables[slot.table].facts)

    @cached_property
    def claims(self) -> tuple[Slot, ...]:
        """The slots that state a fact."""
        return tuple(slot for slot in self.slots if slot.form in self.tables[slot.table].facts)

    def write(
        self,
        meaning: Meaning,
        chance: random.Random,
        *,
        claimed: Meaning | None = None,
        joined: Callable[[str, str], str] = attach,
    ) -> str:
        """The text of `meaning`, its choices drawn with `chance`, words and particles joined by `joined`.

        `claimed`: the meaning whose facts are stated, where it is another.
        """
        written = []
        for piece in self._pieces:
            if isinstance(piece, _Words):
                entries = claimed if claimed is not None and piece.fact else meaning
                word = piece.texts[entries[piece.table]]
                written.append(joined(word, piece.particle) if piece.particle else word)
            else:
                written.append(piece[0] if len(piece) == 1 else chance.choice(piece))
        return "".join(written)

    def wordings(self) -> int:
        """How many ways there are to write one meaning."""
        count = 1
        for found in _CHOICE.findall(self.text):
            count *= len(set(found.split("|")))
        return count

    def parse(self, text: str) -> dict[Slot, frozenset[int]] | None:
        """For each slot the entries whose form stands there; None where `text` is not of this template."""
        found = self._pattern.fullmatch(text)
        if found is None:
            return None
        return {slot: self._entries[number][found[f"s{number}"]] for number, slot in enumerate(self.slots)}

    @cached_property
    def _entries(self) -> list[dict[str, frozenset[int]]]:
        """For each slot: text with its particle -> the entries that it may stand for."""
        result = []
        for slot in self.slots:
            entries: dict[str, set[int]] = {}
            for number, word in enumerate(self.tables[slot.table].texts(slot.form)):
                entries.setdefault(attach(word, slot.particle) if slot.particle else word, set()).add(number)
            result.append({word: frozenset(numbers) for word, numbers in entries.items()})
        return result

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        parts, number = [], 0
        for piece in self._pieces:
            if isinstance(piece, _Words):
                words = sorted(self._entries[number], key=len, reverse=True)
                parts.append(f"(?P<s{number}>{'|'.join(map(re.escape, words))})")
                number += 1
            else:
                parts.append(f"(?:{'|'.join(map(re.escape, piece))})")
        return re.compile("".join(parts))

    @cached_property
    def _pieces(self) -> tuple[tuple[str, ...] | _Words, ...]:
        """The template in order: the wordings of a choice (of one for plain text), and the words of a slot."""
        result: list[tuple[str, ...] | _Words] = []
        slots = iter(self.slots)
        for piece in _PIECE.findall(self.text):
            if piece.startswith("{"):
                slot = next(slots)
                table = self.tables[slot.table]
                result.append(_Words(slot.table, table.texts(slot.form), slot.form in table.facts, slot.particle))
            else:
                result.append(tuple(piece[1:-1].split("|")) if piece.startswith("[") else (piece,))
        return tuple(result)


@dataclass(frozen=True)
class _Words:
    """What may stand in a slot, by entry; `fact`: it is a form that answers state."""

    table: str
    texts: list[str]
    fact: bool
    particle: str


def sentences(text: str) -> list[str]:
    """The sentences of a text: cut after a full stop, question or exclamation mark with white space behind it."""
    return [part for part in _SENTENCE_END.split(" ".join(text.split())) if part]
