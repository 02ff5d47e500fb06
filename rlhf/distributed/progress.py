"""How far a long piece of work has come: a bar on a terminal, plain lines in a log."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any, Self

from tqdm import tqdm

from rlhf.distributed.log import logger
from rlhf.distributed.place import is_main

FIRST_LINE_SECONDS = 5.0
"""Before the first line where there is no terminal: it says how long the work will take."""
LINE_SECONDS = 30.0
"""Between two lines."""


def on_terminal() -> bool:
    """Whether somebody watches: a bar is drawn over and over, which a file or a pipe keeps every copy of."""
    return sys.stdout.isatty() and sys.stderr.isatty()


class Progress:
    """Counts `unit`s of work, named `what`, from `done` up to `total`; rank 0 shows it.

    Without a terminal it says so in the log after FIRST_LINE_SECONDS, every LINE_SECONDS from then on, and at the end
    unless an error ends it.
    """

    def __init__(self, total: int, what: str, unit: str, *, done: int = 0, shown: bool = True) -> None:
        self.total = total
        self.what = what
        self.unit = unit
        self.done = self._first = done
        self.shown = shown and is_main()
        self._figures: dict[str, str] = {}
        self._bar: Any = None
        self._started = time.monotonic()
        self._due_at = self._started + FIRST_LINE_SECONDS
        if self.shown and on_terminal():
            self._bar = tqdm(total=total, initial=done, desc=what, unit=unit, file=sys.stderr)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
        elif error is None:
            self._say(tqdm.format_interval(time.monotonic() - self._started))

    def advance(self, amount: int = 1, **figures: float) -> None:
        """Count `amount` more; `figures` are shown beside them."""
        self.done += amount
        self._figures = {name: f"{value:.4f}" for name, value in figures.items()}
        if self._bar is not None:
            self._bar.set_postfix(self._figures, refresh=False)
            self._bar.update(amount)
            return
        now = time.monotonic()
        if now >= self._due_at and self.done < self.total:
            self._due_at = now + LINE_SECONDS
            left = (now - self._started) / (self.done - self._first) * (self.total - self.done)
            self._say(f"{tqdm.format_interval(left)} left")

    def _say(self, time_text: str) -> None:
        if not self.shown:
            return
        figures = [f"{name} {value}" for name, value in self._figures.items()]
        count = f"{self.done} of {self.total} {self.unit}s"
        logger.info("%s: %s", self.what, ", ".join([count, *figures, time_text]))
