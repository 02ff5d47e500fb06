"""What a stage's result shows in the summary table."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Figure:
    """A line of the summary: the entries of a stage's `result.json` before and after training, with a note.

    `each` names an entry that is a mapping, which makes a line for each of its items.
    """

    label: str
    before: str | None = None
    after: str | None = None
    each: str | None = None
    note: Callable[[Mapping[str, Any]], str] | None = None

    def needed_keys(self) -> list[str]:
        """The entries of `result.json` that the figure needs."""
        return [key for key in (self.before, self.after, self.each) if key is not None]

    def lines(self, result: Mapping[str, Any]) -> Iterator[tuple[str, float | None, float | None, str]]:
        """(label, before, after, note) of each line."""
        if self.each is not None:
            for name, value in result[self.each].items():
                yield f"  {name}", None, value, ""
            return
        before = None if self.before is None else result[self.before]
        after = None if self.after is None else result[self.after]
        yield self.label, before, after, "" if self.note is None else self.note(result)
