"""What a stage's result shows in the summary table."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar


@dataclass(frozen=True)
class Line:
    """One line of the table; `count` is how many held-out rows its figures rest on, None where that is not known."""

    label: str
    before: float | None = None
    after: float | None = None
    count: int | None = None
    note: str = ""


@dataclass(frozen=True)
class Figure:
    """A line of the summary: the entries of a stage's `result.json` before and after training, with a note.

    `count` names the entry that says on how many rows they were measured, which the result of an earlier release may
    lack. `optional`: there is no line where an entry is missing or null. `each` names an entry that is a mapping, which
    makes a line for each of its items; `count` is then a mapping with the same names.
    """

    label: str
    before: str | None = None
    after: str | None = None
    each: str | None = None
    count: str | None = None
    note: Callable[[Mapping[str, Any]], str] | None = None
    optional: bool = False

    def needed_keys(self) -> list[str]:
        """The entries of `result.json` that the figure needs."""
        return [] if self.optional else self._keys()

    def _keys(self) -> list[str]:
        return [key for key in (self.before, self.after, self.each) if key is not None]

    def lines(self, result: Mapping[str, Any]) -> Iterator[Line]:
        """The lines that the figure makes of a result."""
        if self.optional and any(result.get(key) is None for key in self._keys()):
            return
        count = None if self.count is None else result.get(self.count)
        if self.each is not None:
            for name, value in result[self.each].items():
                yield Line(f"  {name}", after=value, count=None if count is None else count[name])
            return
        before = None if self.before is None else result[self.before]
        after = None if self.after is None else result[self.after]
        yield Line(self.label, before, after, count, "" if self.note is None else self.note(result))


class OptionalFigure:
    """Lines of entries that the result may lack."""

    count: ClassVar[None] = None

    def needed_keys(self) -> list[str]:
        """None."""
        return []


@dataclass(frozen=True)
class NoteFigure(OptionalFigure):
    """A line of words. No line where there is nothing to say, as of the result of an earlier release."""

    label: str
    note: Callable[[Mapping[str, Any]], str]

    def lines(self, result: Mapping[str, Any]) -> Iterator[Line]:
        """The line, where there is something to say."""
        note = self.note(result)
        if note:
            yield Line(self.label, note=note)


@dataclass(frozen=True)
class PartsFigure(OptionalFigure):
    """A measure with its parts, of an entry {before, after, parts_before, parts_after, prompts} of the result.

    No line where the entry is null or missing: it was not measured.
    """

    label: str
    entry: str
    note: Callable[[Mapping[str, Any]], str]

    def lines(self, result: Mapping[str, Any]) -> Iterator[Line]:
        """A line for the measure, one for each part."""
        found = result.get(self.entry)
        if not found:
            return
        yield Line(self.label, found["before"], found["after"], found["prompts"], self.note(found))
        for name, before in found["parts_before"].items():
            yield Line(f"  {name.replace('_', ' ')}", before, found["parts_after"][name], found["prompts"])


@dataclass(frozen=True)
class ShortcutFigure(OptionalFigure):
    """What an audit of shortcuts says of length, of an entry {length: {matched, chosen_more, chosen_less}, verdict}.

    No line where the entry is null or missing: nothing was held out, or an earlier release did not measure it.
    """

    entry: str

    def lines(self, result: Mapping[str, Any]) -> Iterator[Line]:
        """Accuracy on pairs of like length, and where the chosen one is shorter and longer."""
        found = result.get(self.entry)
        if not found:
            return
        parts = {"of like length": "matched", "shorter one chosen": "chosen_less", "longer one chosen": "chosen_more"}
        for label, name in parts.items():
            share = found["length"][name]
            note = found["verdict"].partition(":")[0] if name == "matched" else ""
            yield Line(f"  {label}", after=share["accuracy"], count=share["pairs"], note=note)
