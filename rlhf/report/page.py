"""`report.html`: what a run came to, or several beside one another, in one file that needs nothing else."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rlhf import __version__
from rlhf.config.explain import value_text
from rlhf.doctor.findings import SICKNESSES
from rlhf.report.charts import Line as Curves
from rlhf.report.charts import bars, histogram, picture, reliability
from rlhf.report.differences import marked
from rlhf.report.figures import Line
from rlhf.report.run_record import RunRecord, StageRecord

REPORT_FILE = "report.html"
SAMPLE_BYTES = 1_200_000
"""Of the answers in a report: beyond them those whose score changed least are left out, which is told."""
DIRECTORIES = ("output_dir", "cache_dir")
"""Fields that always differ and say nothing."""


AUDITED = {"of like length": "matched", "longer one chosen": "chosen_more", "shorter one chosen": "chosen_less"}
"""Rows of the length audit and the entries that they are of."""


class ReportError(ValueError):
    """A report that cannot be made, with what to do."""


@dataclass(frozen=True)
class Picture:
    """A chart with its title."""

    title: str
    source: str


def report_page(runs: Sequence[RunRecord]) -> str:
    """The page of one run, or of several beside one another. ReportError where a library is missing."""
    try:
        import jinja2
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ReportError(f"a report needs jinja2 and matplotlib: pip install jinja2 matplotlib ({error})") from error
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("rlhf.report", "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["number"] = number
    content = _single(runs[0]) if len(runs) == 1 else _several(runs)
    return environment.get_template("report.html.j2").render(version=__version__, **content)


def write_report(runs: Sequence[RunRecord], path: Path) -> Path:
    """Write `report_page` to `path` at once: a reader never sees half of it."""
    page = report_page(runs)
    part = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(page, encoding="utf-8", errors="backslashreplace")  # a text may hold half a surrogate pair
        os.replace(part, path)
    except OSError as error:
        raise ReportError(f"{path} cannot be written: {error.strerror or error}") from error
    return path


def number(value: Any) -> str:
    """A figure for reading: four digits, nothing where there is none."""
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int):
        return str(value)
    return f"{value:.3f}" if 0.01 <= abs(value) < 1000 else f"{value:.3g}"


# ------------------------------------------------------------------------------------------------------- one run


class _Sections:
    """Makes the parts of a page: one that cannot be made costs itself, and is told in `notes`."""

    def __init__(self) -> None:
        self.notes: list[tuple[str, str]] = []

    def made(self, name: str, make: Callable[..., Any], *given: Any, instead: Any) -> Any:
        """What `make` gives of `given`, or `instead`."""
        try:
            return make(*given)
        except Exception as error:  # files of a run that died, of another release, or changed by hand
            self.notes.append((name, f"cannot be shown: {type(error).__name__}: {error}"))
            return instead


NO_SAMPLES: dict[str, Any] = {"samples": [], "sample_names": (), "samples_left_out": 0}


def _single(run: RunRecord) -> dict[str, Any]:
    parts = _Sections()
    made = parts.made
    notes = [(stage.stage.label, note) for stage in run.stages for note in stage.notes]
    none: list[Any] = []
    content = {
        "title": run.name,
        "runs": [_overview(run, parts)],
        "headline": [_headline(stage) for stage in run.stages],
        "findings": _findings(run),
        "charts": [(stage.stage.label, _charts([(run.name, stage)], parts)) for stage in run.stages],
        "reward": made("reward model", _reward, run.stage("reward"), parts, instead=None),
        **made("answers", _samples, run, instead=NO_SAMPLES),
        "configuration": made("configuration", _configuration, [run], instead={"columns": (), "rows": []}),
        "data": made("data", _data, run, instead=none),
        "time": made("time and memory", _time, run, instead=none),
        "starts": [(stage.stage.label, start) for stage in run.stages for start in stage.starts],
    }
    return {**content, "notes": [*notes, *parts.notes]}


def _several(runs: Sequence[RunRecord]) -> dict[str, Any]:
    parts, names = _Sections(), distinct_names(runs)
    together = list(zip(names, runs, strict=True))
    charts, headline = [], []
    for name in dict.fromkeys(stage.stage.name for run in runs for stage in run.stages):
        having = [(label, stage) for label, run in together if (stage := run.stage(name))]
        charts.append((having[0][1].stage.label, _charts(having, parts)))
        headline.append(_side_by_side(names, [run.stage(name) for run in runs]))
    notes = [(f"{name}: {stage.stage.label}", note) for name, run in together for stage in run.stages
             for note in stage.notes]  # fmt: skip
    return {
        "title": " | ".join(names),
        "runs": [_overview(run, parts, name) for name, run in together],
        "headline": headline,
        "findings": [{**each, "run": name} for name, run in together for each in _findings(run)],
        "notes": [*notes, *parts.notes],
        "charts": charts,
        "reward": None,
        **NO_SAMPLES,
        "configuration": _configuration(runs, names),
        "data": [],
        "time": [],
        "starts": [],
    }


def distinct_names(runs: Sequence[RunRecord]) -> list[str]:
    """The directories' names, with as much of the path as tells them apart."""
    parts = [run.directory.resolve().parts for run in runs]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(each[-length:]) for each in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{run.name} ({place})" for place, run in enumerate(runs, 1)]


def _overview(run: RunRecord, parts: _Sections, name: str = "") -> dict[str, Any]:
    starts = [start for stage in run.stages for start in stage.starts]
    return {
        "name": name or run.name,
        "directory": str(run.directory.resolve()),
        "states": [(stage.stage.label, stage.diagnosis.kind, stage.diagnosis.state) for stage in run.stages],
        "start": starts[0] if starts else {},
        "verdict": parts.made("verdict", _verdict, run, instead=[]),
    }


def _verdict(run: RunRecord) -> list[str]:
    """What came out, in sentences."""
    said: list[str] = []
    for stage in run.stages:
        gold = stage.result.get("gold")
        if isinstance(gold, dict):
            said.append(
                f"Gold on {gold['prompts']} held-out prompts {number(gold['before'])} → {number(gold['after'])}; "
                f"better than before on {gold['win_rate']:.0%} of them."
            )
    findings = sum(len(stage.diagnosis.findings) for stage in run.stages)
    said.append(f"The doctor found {findings or 'nothing'}." if findings != 1 else "The doctor found one thing.")
    return said


def _headline(record: StageRecord) -> dict[str, Any]:
    """The lines that the summary table has of a stage; none before it is finished."""
    return {"label": record.stage.label, "state": record.diagnosis.state, "lines": _lines(record)}


def _lines(record: StageRecord) -> list[Line]:
    lines: list[Line] = []
    for figure in record.stage.figures if record.result else ():
        try:
            lines += figure.lines(record.result)
        except (KeyError, TypeError, ValueError):  # of another release
            continue
    return lines


def _side_by_side(names: Sequence[str], records: Sequence[StageRecord | None]) -> dict[str, Any]:
    """The figures of a stage after training, a column for each run."""
    found = [{} if record is None else {line.label.strip(): line for line in _lines(record)} for record in records]
    labels = list(dict.fromkeys(label for lines in found for label in lines))
    rows = [(label, [lines[label].after if label in lines else None for lines in found]) for label in labels]
    label = next(record.stage.label for record in records if record is not None)
    return {"label": label, "names": names, "rows": [row for row in rows if any(each is not None for each in row[1])]}


def _findings(run: RunRecord) -> list[dict[str, Any]]:
    return [
        {
            "run": "",
            "stage": stage.stage.label,
            "unit": stage.stage.unit,
            "severity": found.severity,
            "since": found.since,
            "title": found.title,
            "meaning": found.meaning,
            "message": found.message,
            "advice": found.advice or SICKNESSES[found.check].remedy,
        }
        for stage in run.stages
        for found in stage.diagnosis.findings
    ]


def _charts(stages: Sequence[tuple[str, StageRecord]], parts: _Sections) -> list[Picture]:
    lines = [
        Curves(name, record.metrics, [(found.since, found.check) for found in record.diagnosis.findings])
        for name, record in stages
    ]
    first = stages[0][1].stage
    drawn = [
        (chart.title, parts.made(chart.title, partial(picture, unit=first.unit), chart, lines, instead=None))
        for chart in first.charts
    ]
    return [Picture(title, source) for title, source in drawn if source is not None]


def _reward(record: StageRecord | None, parts: _Sections) -> dict[str, Any] | None:
    """What the evaluation of a reward model says beside its curves."""
    evaluation = {} if record is None else record.evaluation
    if not evaluation:
        return None
    makers = {"by_category": _by_category, "histogram": _histogram, "calibration": _calibration}
    pictures = [
        parts.made(f"reward model: {name}", make, evaluation[name], instead=None)
        for name, make in makers.items()
        if evaluation.get(name)
    ]
    audit = parts.made("audit of the reward model", _audit, evaluation.get("shortcuts"), instead=None)
    return {"pictures": [each for each in pictures if each is not None], "audit": audit}


def _by_category(found: Mapping[str, Any]) -> Picture | None:
    groups, each = list(found), list(found.values())
    series = {
        "reward model": [entry["accuracy"] for entry in each],
        "longer response": [entry.get("length_baseline_accuracy") for entry in each],
    }
    known = all("accuracy_low" in entry for entry in each)
    errors = {"reward model": [(entry["accuracy_low"], entry["accuracy_high"]) for entry in each]} if known else None
    return Picture("accuracy by category", bars(groups, series, level=0.5, errors=errors))


def _histogram(found: Mapping[str, Any]) -> Picture | None:
    counts = {name: found[name] for name in ("chosen", "rejected")}
    return Picture("held-out scores", histogram(found["edges"], counts, label="score"))


def _calibration(found: Mapping[str, Any]) -> Picture | None:
    return Picture(f"calibration (expected error {found['error']:.3f})", reliability(found["bins"]))


def _audit(shortcuts: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Accuracies where a shortcut is of no use, or misleads: length first, then what else was looked at."""
    if not shortcuts:
        return None
    rows = []
    length = shortcuts["length"]
    for label, name in AUDITED.items():
        share = length[name]
        rows.append((label, share["accuracy"], share["low"], share["high"], share["pairs"]))
    return {"verdict": shortcuts["verdict"], "notes": shortcuts["notes"], "rows": rows}


def _samples(run: RunRecord) -> dict[str, Any]:
    """Both answers to held-out prompts, from the largest rise of the score to its largest fall."""
    found = [sample for stage in run.stages for sample in stage.result.get("samples") or []]
    ordered = sorted(found, key=lambda sample: sample["score_sft"] - sample["score_ppo"])
    kept = _within(ordered, SAMPLE_BYTES)
    rows = []
    for sample in kept:
        before, after = marked(sample["sft"], sample["ppo"])
        rows.append(
            {
                "prompt": sample["prompt"],
                "before": before,
                "after": after,
                "score_before": sample["score_sft"],
                "score_after": sample["score_ppo"],
                "change": sample["score_ppo"] - sample["score_sft"],
                "gold_before": sample.get("gold_sft"),
                "gold_after": sample.get("gold_ppo"),
            }
        )
    return {"samples": rows, "sample_names": ("SFT", "PPO"), "samples_left_out": len(ordered) - len(kept)}


def _within(ordered: Sequence[dict[str, Any]], limit: int) -> list[dict[str, Any]]:
    """As many from both ends as have `limit` bytes, in order."""
    sizes = [len(json.dumps(sample, ensure_ascii=False).encode("utf-8", "surrogatepass")) for sample in ordered]
    first, last, left = 0, len(ordered), limit
    while first < last:
        place = first if first <= len(ordered) - last else last - 1
        if sizes[place] > left:
            break
        left -= sizes[place]
        first, last = (first + 1, last) if place == first else (first, last - 1)
    return [*ordered[:first], *ordered[last:]]


def _configuration(runs: Sequence[RunRecord], names: Sequence[str] = ()) -> dict[str, Any]:
    """Of one run what is not the default, by stage; of several what differs between them."""
    if len(runs) == 1:
        rows = [
            (record.stage.label, name, value_text(value), "" if default is None else value_text(default))
            for record in runs[0].stages
            for name, (value, default) in record.changed().items()
            if name not in DIRECTORIES
        ]
        return {"columns": ("stage", "field", "value", "default"), "rows": rows}
    stages = list(dict.fromkeys(stage.stage.name for run in runs for stage in run.stages))
    differing: list[tuple[str, ...]] = []
    for name in stages:
        records = [run.stage(name) for run in runs]
        fields = dict.fromkeys(field for record in records if record for field in record.config)
        label = next(record.stage.label for record in records if record)
        for field in fields:
            values = ["" if record is None else value_text(record.config.get(field)) for record in records]
            if len(set(values)) > 1 and field not in DIRECTORIES:
                differing.append((label, field, *values))
    return {"columns": ("stage", "field", *names), "rows": differing}


def _data(run: RunRecord) -> list[dict[str, Any]]:
    """Rows and lengths of each stage's data."""
    rows = []
    for record in run.stages:
        for split in ("train", "evaluation"):
            found = record.data.get(split)
            if not isinstance(found, dict) or not found.get("rows"):
                continue
            count = found.get("responses") or found["rows"]
            rows.append(
                {
                    "stage": record.stage.label,
                    "split": split,
                    "rows": found["rows"],
                    "prompt": found.get("prompt_tokens", 0) / found["rows"],
                    "response": found.get("response_tokens", 0) / count if found.get("responses") else None,
                    "cut": found.get("truncated_prompts", 0) + found.get("truncated_responses", 0),
                    "skipped": (record.data.get("skipped") or {}).get("rows", 0) if split == "train" else None,
                    "sets": [str(each.get("path")) for each in record.data.get(
                        "datasets" if split == "train" else "evaluation_datasets") or []],
                }
            )  # fmt: skip
    return rows


PHASES = ("seconds_generation", "seconds_scoring", "seconds_update")


def _time(run: RunRecord) -> list[dict[str, Any]]:
    """Seconds and the most memory of each stage; the phases of an on-policy one by its logged iterations."""
    rows = []
    for record in run.stages:
        last = max((float(line.get("seconds") or 0.0) for line in record.metrics), default=0.0)
        sums: dict[str, float] = {}
        for name in PHASES:
            values = [float(line[name]) for line in record.metrics if isinstance(line.get(name), int | float)]
            if values:
                sums[name.removeprefix("seconds_")] = sum(values)
        memory = record.result.get("peak_memory_bytes") or {}
        rows.append(
            {
                "stage": record.stage.label,
                "seconds": record.result.get("seconds", last),
                "phases": {name: value / sum(sums.values()) for name, value in sums.items()} if sums else {},
                "host": memory.get("host", 0) / 2**30 or None,
                "device": memory.get("device", 0) / 2**30 or None,
            }
        )
    return rows
