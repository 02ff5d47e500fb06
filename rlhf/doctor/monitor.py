"""The doctor beside a training loop: looks at every line of metrics, and tells what is new, worse or over."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rlhf.distributed.log import logger
from rlhf.distributed.place import is_main
from rlhf.doctor.checks import Check, examine
from rlhf.doctor.findings import SICKNESSES, Finding
from rlhf.doctor.history import condensed

HEALTH_FILE = "health.jsonl"
GONE_AFTER = 3
"""Lines without a sickness after which it counts as over: one that comes and goes is told once."""


class HealthWatch:
    """Follows the findings of one stage over its lines of metrics, in memory alone."""

    def __init__(self, stage_name: str, checks: Sequence[Check]) -> None:
        self.stage_name = stage_name
        self.checks = checks
        self.lines = 0
        self.history: list[dict[str, float]] = []
        self.open: dict[str, Finding] = {}
        self.over: dict[str, Finding] = {}
        """Findings that ended; `step` is where they were last seen."""
        self._told: dict[str, tuple[str, float]] = {}
        self._absent: dict[str, int] = {}

    def look(self, step: int, metrics: Mapping[str, float]) -> list[tuple[str, Finding]]:
        """Take in a line; what there is to tell of it: ("found" | "worse" | "ended", finding)."""
        self.lines += 1
        numbers = {name: float(value) for name, value in metrics.items() if isinstance(value, int | float)}
        self.history = [dict(line) for line in condensed([*self.history, {**numbers, "step": float(step)}])]
        present = {found.check: found for found in examine(self.checks, self.history)}
        events = []
        for name, found in present.items():
            self._absent.pop(name, None)
            before = self.open.get(name)
            earlier = before or self.over.pop(name, None)
            now = found if earlier is None else replace(found, since=min(earlier.since, found.since))
            self.open[name] = now
            if before is None:
                events.append(("found", now))
            elif self._worse(now):
                events.append(("worse", now))
        for name in [name for name in self.open if name not in present]:
            if SICKNESSES[name].of_the_model:
                events.append(("ended", self.open.pop(name)))
                continue
            self._absent[name] = self._absent.get(name, 0) + 1
            if self._absent[name] >= GONE_AFTER:
                ended = self.over[name] = self.open.pop(name)
                self._absent.pop(name)
                self._told.pop(name, None)
                events.append(("ended", ended))
        for kind, found in events:
            if kind != "ended":
                self._told[found.check] = (found.severity, found.badness)
        return events

    def _worse(self, now: Finding) -> bool:
        severity, badness = self._told[now.check]
        return (now.severity == "critical" and severity != "critical") or now.badness >= 2 * badness

    def findings(self) -> list[Finding]:
        """All findings so far, those that are over too, in the order they began; one that came back counts once."""
        return sorted([*self.over.values(), *self.open.values()], key=lambda one: (one.since, one.check))

    def summary(self) -> dict[str, Any]:
        """For `result.json`: whether nothing was found, and each finding with the steps it lasted."""
        return {
            "healthy": not self.open and not self.over,
            "lines": self.lines,
            "findings": [
                {
                    "check": found.check,
                    "severity": found.severity,
                    "since": found.since,
                    "until": None if found.check in self.open else found.step,
                    "message": found.message,
                }
                for found in self.findings()
            ],
        }

    def state(self) -> dict[str, Any]:
        """Everything later findings depend on, fit for JSON (numbers that are not finite as text)."""
        return {
            "lines": self.lines,
            "history": [{name: _to_json(value) for name, value in line.items()} for line in self.history],
            "open": [_finding_to_json(found) for found in self.open.values()],
            "over": [_finding_to_json(found) for found in self.over.values()],
            "told": {name: [severity, _to_json(badness)] for name, (severity, badness) in self._told.items()},
            "absent": dict(self._absent),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state` gave."""
        self.lines = int(state["lines"])
        self.history = [{name: float(value) for name, value in line.items()} for line in state["history"]]
        self.open = {entry["check"]: _finding_from_json(entry) for entry in state["open"]}
        self.over = {entry["check"]: _finding_from_json(entry) for entry in state["over"]}
        self._told = {name: (severity, float(badness)) for name, (severity, badness) in state["told"].items()}
        self._absent = {name: int(count) for name, count in state["absent"].items()}


class HealthMonitor(HealthWatch):
    """A watch that logs what is new and keeps it in `<directory>/health.jsonl` (rank 0).

    Every rank may call it with the same metrics. The file is cut to what this run wrote when the first line comes:
    what an earlier run, or one that was killed after its last saved state, left there is gone.
    """

    def __init__(self, directory: Path, stage_name: str, checks: Sequence[Check]) -> None:
        super().__init__(stage_name, checks)
        self.path = Path(directory) / HEALTH_FILE
        self._written = 0
        self._cut = False

    def observe(self, step: int, metrics: Mapping[str, float]) -> list[Finding]:
        """Take in a line of metrics; the findings that are new or worse, which are logged."""
        events = self.look(step, metrics)
        self._cut_file()
        for kind, found in events:
            self._log(kind, step, found)
            self._written += _append(self.path, {"event": kind, "at": step, **found.as_dict()})
        return [found for kind, found in events if kind != "ended"]

    def state(self) -> dict[str, Any]:
        return {**super().state(), "bytes": self._written}

    def load_state(self, state: Mapping[str, Any]) -> None:
        super().load_state(state)
        self._written = int(state["bytes"])
        self._cut = False
        self._cut_file()

    def _cut_file(self) -> None:
        if self._cut or not is_main():
            return
        self._cut = True
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.touch()  # there and empty: nothing was found
            if self.path.stat().st_size > self._written:
                with self.path.open("r+b") as file:
                    file.truncate(self._written)
        except OSError as error:
            logger.warning("doctor: %s cannot be written (%s); findings are in the log alone", self.path, error)

    def _log(self, kind: str, step: int, found: Finding) -> None:
        if kind == "ended":
            logger.info("doctor: %s step %d: over since step %d: %s", self.stage_name, step, found.step, found.title)
            return
        again = " (worse)" if kind == "worse" else ""
        logger.warning(
            "doctor: %s step %d: %s since step %d%s: %s. %s Try: %s",
            self.stage_name, step, found.title, found.since, again, found.message, found.meaning, found.remedy,
        )  # fmt: skip


def record_stop(directory: Path, found: Finding) -> None:
    """Note in `health.jsonl` what stops a run (on rank 0, right before its error is raised)."""
    _append(Path(directory) / HEALTH_FILE, {"event": "stopped", "at": found.step, **found.as_dict()})


def _append(path: Path, entry: Mapping[str, Any]) -> int:
    """Add a line, on rank 0; the bytes it took, alike on every rank."""
    line = (json.dumps(entry, ensure_ascii=False) + "\n").encode()
    if is_main():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("ab") as file:
                file.write(line)
        except OSError as error:  # a full disk must not end a run; the log has the finding
            logger.warning("doctor: %s cannot be written (%s); findings are in the log alone", path, error)
    return len(line)


def _to_json(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)


def _finding_to_json(found: Finding) -> dict[str, Any]:
    return {**asdict(found), "badness": _to_json(found.badness)}


def _finding_from_json(entry: Mapping[str, Any]) -> Finding:
    return Finding(**{**entry, "badness": float(entry["badness"])})
