"""A diagnosis of a run from its files: each stage's state, what is wrong with it, since when, and what to try."""

from __future__ import annotations

import json
import textwrap
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from rlhf.doctor.checks import Check, unchecked
from rlhf.doctor.findings import Finding, finding
from rlhf.doctor.held_out_checks import shortcut_notes
from rlhf.doctor.history import series
from rlhf.doctor.monitor import HEALTH_FILE, HealthWatch
from rlhf.doctor.run_state import BEGUN, METRICS_FILE, RunState, begun, run_state

SETTINGS = ("learning_rate", "critic_learning_rate", "kl_coef", "precision", "zero_stage", "lora_rank")
CUT_RESPONSES = 0.05
"""Share of training responses cut at their longest length from which it is worth a note: they teach not to end."""
WIDTH = 110


class NotARunError(ValueError):
    """A directory without a stage's metrics, with what was looked for."""


@dataclass(frozen=True)
class StageView:
    """What the doctor knows of a stage."""

    name: str
    """Of the stage, and of its directory in that of a run."""
    checks: Sequence[Check]
    figures: Sequence[str]
    """Metrics that are shown as first -> last value."""
    unit: str = "step"
    """What a line of metrics counts: "step" or "iteration"."""


@dataclass
class StageDiagnosis:
    """One stage: its state in a sentence, findings, notes, and the checks that could not be made."""

    stage: StageView
    state: str
    kind: str = "not started"
    figures: list[str] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    over: set[str] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)
    quiet: list[str] = field(default_factory=list)


@dataclass
class Diagnosis:
    """All stages of a run."""

    directory: Path
    stages: list[StageDiagnosis]

    @property
    def healthy(self) -> bool:
        return not any(stage.findings for stage in self.stages)

    @property
    def incomplete(self) -> bool:
        """Whether a stage was cut short: begun or asked for, without a result, and nothing runs any more."""
        return any(stage.kind == "incomplete" for stage in self.stages)

    def text(self) -> str:
        """The diagnosis for a terminal."""
        lines = [f"run {self.directory}"]
        for stage in self.stages:
            lines += ["", *_stage_lines(stage)]
        count = sum(len(stage.findings) for stage in self.stages)
        verdict = "healthy" if self.healthy else f"{count} finding{'s' if count > 1 else ''}"
        if self.incomplete:
            verdict = f"incomplete, {verdict}"
        elif any(stage.kind in ("running", "waiting") for stage in self.stages):
            verdict += " so far: it is running"
        return "\n".join([*lines, "", f"diagnosis: {verdict}"])


def diagnose(run_dir: Path, stages: Sequence[StageView]) -> Diagnosis:
    """Read a finished or running run of `stages`, or one stage's directory. Raises NotARunError where there is none."""
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise NotARunError(f"{run_dir} is not a directory")
    if begun(run_dir):
        stage = _stage_of(run_dir, stages)
        return Diagnosis(run_dir, [_diagnose_stage(run_dir, stage, run_state(run_dir))])
    states = [run_state(run_dir / stage.name) for stage in stages]
    if all(state.kind == "not started" for state in states):
        names = ", ".join(stage.name for stage in stages)
        files = ", ".join((*BEGUN, "result.json"))
        raise NotARunError(
            f"{run_dir} is not the directory of a run: under none of {names} there is one of {files} or a .lock that "
            "names a process; name the output_dir of a run, or the directory of one stage"
        )
    return Diagnosis(
        run_dir,
        [_diagnose_stage(run_dir / stage.name, stage, state) for stage, state in zip(stages, states, strict=True)],
    )


def read_lines(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """The json objects of a file, one a line, and what had to be passed over. A last line may be half-written."""
    lines, notes = [], []
    rows = path.read_text(encoding="utf-8", errors="replace").splitlines()
    broken = []
    for number, row in enumerate(rows, 1):
        try:
            entry = json.loads(row)
        except ValueError:
            entry = None
        if isinstance(entry, dict):
            lines.append(entry)
        elif number == len(rows):
            notes.append(f"{path.name}: its last line is half-written (passed over)")
        elif row.strip():
            broken.append(str(number))
    if broken:
        notes.append(f"{path.name}: {len(broken)} lines are no json (passed over): {', '.join(broken[:5])}")
    return lines, notes


def _diagnose_stage(directory: Path, stage: StageView, state: RunState) -> StageDiagnosis:
    if not begun(directory) and state.kind != "finished":
        return StageDiagnosis(stage, "not started", state.kind, findings=_incomplete(state, 0))
    path = directory / METRICS_FILE
    if path.is_file():
        entries, notes = read_lines(path)
    else:
        entries, notes = [], [f"{METRICS_FILE} is missing"]
    history = [numbers for entry in entries if "step" in (numbers := _numbers(entry))]
    if len(history) < len(entries):
        notes.append(f"{METRICS_FILE}: {len(entries) - len(history)} lines have no step (passed over)")
    watch = HealthWatch(stage.name, stage.checks)
    for line in history:
        watch.look(int(line["step"]), line)
    findings = watch.findings()
    findings += _stops(directory / HEALTH_FILE, notes)
    findings += _incomplete(state, int(history[-1]["step"]) if history else 0)
    notes += shortcut_notes(history)
    missing = unchecked(stage.checks, history) if history else {}
    if missing:
        shown = ", ".join(f"{name} (no {', '.join(names)})" for name, names in missing.items())
        notes.append(f"not checked: {shown}")
    sick = {found.check for found in findings} | set(missing)
    return StageDiagnosis(
        stage,
        _state_line(state, directory / METRICS_FILE, stage, history),
        state.kind,
        figures=_figures(stage, history),
        findings=findings,
        over=set(watch.over),
        notes=notes + _data_notes(directory / "data.json") + _config_notes(directory / "config.yaml"),
        quiet=[check.__name__ for check in stage.checks if check.__name__ not in sick] if history else [],
    )


def _stage_of(directory: Path, stages: Sequence[StageView]) -> StageView:
    """The stage a directory belongs to, by its name or its data report."""
    by_name = {stage.name: stage for stage in stages}
    name = directory.resolve().name
    if name not in by_name:
        name = str(_read_json(directory / "data.json", []).get("stage"))
    if name not in by_name:
        raise NotARunError(f"{directory} has metrics but is none of the stages {', '.join(by_name)}; name their parent")
    return by_name[name]


def _incomplete(state: RunState, step: int) -> list[Finding]:
    if state.kind != "incomplete":
        return []
    return [finding("run_incomplete", "critical", step, step, state.reason, advice=state.advice)]


def _numbers(entry: Mapping[str, Any]) -> dict[str, float]:
    return {
        name: float(value)
        for name, value in entry.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }


def _stops(path: Path, notes: list[str]) -> list[Finding]:
    """What stopped the run, as `health.jsonl` tells; metrics do not show it."""
    if not path.is_file():
        notes.append(f"{path.name} is missing: the findings are from the metrics alone")
        return []
    entries, more = read_lines(path)
    notes += more
    return [
        finding("not_finite", "critical", entry["since"], entry["step"], f"stopped the run: {entry['message']}")
        for entry in entries
        if entry.get("event") == "stopped" and {"since", "step", "message"} <= entry.keys()
    ]


def _state_line(state: RunState, metrics: Path, stage: StageView, history: Sequence[Mapping[str, float]]) -> str:
    last = f"last line at {stage.unit} {int(history[-1]['step'])}" if history else "no line of metrics yet"
    if state.kind == "finished":
        extra = [f"{name} {state.result[name]}" for name in ("seconds", "seed") if name in state.result]
        return f"finished ({', '.join([last, *extra])})"
    if not metrics.is_file():
        return f"{state.kind}, nothing measured yet"
    age = max(0.0, time.time() - metrics.stat().st_mtime)
    return f"{state.kind}; {last}, written {_duration(age)} ago"


def _duration(seconds: float) -> str:
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} seconds"


def _figures(stage: StageView, history: Sequence[Mapping[str, float]]) -> list[str]:
    figures = []
    for name in stage.figures:
        points = series(history, name)
        if points:
            held_out = _held_out(history) if name.startswith("eval_") else ""
            figures.append(f"{name} {points[0][1]:.3g} -> {points[-1][1]:.3g}{held_out}")
    return figures


def _held_out(history: Sequence[Mapping[str, float]]) -> str:
    """` (n = 112)`: the pairs, or rows, that a held-out figure rests on."""
    counts = series(history, "eval_pairs") or series(history, "eval_rows")
    return f" (n = {counts[-1][1]:.0f})" if counts else ""


def _data_notes(path: Path) -> list[str]:
    if not path.is_file():
        return [f"{path.name} is missing"]
    notes: list[str] = []
    report = _read_json(path, notes)
    train, skipped_rows = report.get("train") or {}, report.get("skipped") or {}
    if not isinstance(train, dict) or not isinstance(skipped_rows, dict):
        return [*notes, f"{path.name} is not as a stage writes it"]
    skipped = skipped_rows.get("rows", 0)
    if skipped:
        notes.append(f"data: {skipped} rows could not be used (skipped_rows.jsonl)")
    responses, cut = train.get("responses") or train.get("rows") or 0, train.get("truncated_responses", 0)
    if responses and cut > CUT_RESPONSES * responses:
        notes.append(f"data: {cut} of {responses} responses are cut at max_response_tokens: they teach not to end")
    return notes


def _config_notes(path: Path) -> list[str]:
    if not path.is_file():
        return [f"{path.name} is missing"]
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        return [f"{path.name} cannot be read: {error}"]
    if not isinstance(values, dict):
        return [f"{path.name} holds no settings"]
    shown = ", ".join(f"{name} {values[name]}" for name in SETTINGS if name in values)
    return [f"settings: {shown}"] if shown else []


def _read_json(path: Path, notes: list[str]) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        notes.append(f"{path.name} cannot be read: {error}")
        return {}
    return content if isinstance(content, dict) else {}


def _stage_lines(stage: StageDiagnosis) -> list[str]:
    lines = [f"{stage.stage.name}: {stage.state}"]
    if stage.figures:
        lines += _wrapped("  ", ", ".join(stage.figures))
    for found in stage.findings:
        since = f"since {stage.stage.unit} {found.since}"
        until = f", last seen at {found.step} and over" if found.check in stage.over else ""
        lines += ["", f"  [{found.severity}] {found.title}, {since}{until} ({found.check})"]
        lines += _wrapped("    measured: ", found.message)
        lines += _wrapped("    means:    ", found.meaning)
        lines += _wrapped("    try:      ", found.remedy)
    if stage.findings:
        lines.append("")
    if stage.quiet:
        healthy = "healthy" if not stage.findings else "healthy otherwise"
        lines += _wrapped(f"  {healthy}: nothing found by ", ", ".join(stage.quiet))
    for note in stage.notes:
        lines += _wrapped("  note: ", note)
    return lines


def _wrapped(lead: str, text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=lead, subsequent_indent=" " * min(len(lead), 14)) or [lead]
