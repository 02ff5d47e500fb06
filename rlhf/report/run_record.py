"""What lies in the directory of a run, read for a report: finished, running or half-written."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import yaml

from rlhf.config.yaml_text import read_yaml
from rlhf.doctor.checks import Check
from rlhf.doctor.report import StageDiagnosis, StageView, diagnose, read_lines
from rlhf.doctor.run_state import METRICS_FILE, begun
from rlhf.report.charts import Chart
from rlhf.report.figures import Figure, NoteFigure, PartsFigure, ShortcutFigure

STARTS_FILE = "starts.jsonl"
"""What a stage ran on, a line for each of its starts (`rlhf.pipeline.surroundings`)."""


class ReportedStage(Protocol):
    """What a report needs of a stage (`rlhf.pipeline.stages.Stage`)."""

    @property
    def name(self) -> str: ...
    @property
    def label(self) -> str: ...
    @property
    def unit(self) -> str: ...
    @property
    def checks(self) -> Sequence[Check]: ...
    @property
    def curves(self) -> Sequence[str]: ...
    @property
    def figures(self) -> Sequence[Figure | NoteFigure | PartsFigure | ShortcutFigure]: ...
    @property
    def logged(self) -> Sequence[str]: ...
    @property
    def charts(self) -> Sequence[Chart]: ...
    def defaults(self) -> Mapping[str, Any]: ...


@dataclass(frozen=True)
class StageRecord:
    """One stage that was begun. What a file that is not there would hold is empty.

    `metrics`: the lines of `metrics.jsonl`. `config`: the fields in force; `data`, `evaluation`, `result`: the files of
    these names. `plan`: how many steps there are to be. `starts`: what it ran on, each time. `notes`: what could not
    be read.
    """

    stage: ReportedStage
    directory: Path
    diagnosis: StageDiagnosis
    metrics: Sequence[Mapping[str, Any]] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)
    evaluation: Mapping[str, Any] = field(default_factory=dict)
    result: Mapping[str, Any] = field(default_factory=dict)
    plan: Mapping[str, Any] = field(default_factory=dict)
    starts: Sequence[Mapping[str, Any]] = ()
    notes: Sequence[str] = ()

    def changed(self) -> dict[str, tuple[Any, Any]]:
        """The fields of its configuration that are not the defaults: name -> (value, default)."""
        defaults = self.stage.defaults()
        return {
            name: (value, defaults.get(name))
            for name, value in self.config.items()
            if name not in defaults or value != defaults[name]
        }


@dataclass(frozen=True)
class RunRecord:
    """A run: the stages that were begun, in order."""

    directory: Path
    stages: Sequence[StageRecord]

    @property
    def name(self) -> str:
        """Its directory's name."""
        return self.directory.resolve().name

    def stage(self, name: str) -> StageRecord | None:
        """The stage of this name, where it was begun."""
        return next((each for each in self.stages if each.stage.name == name), None)


def read_run(directory: Path, stages: Iterable[ReportedStage]) -> RunRecord:
    """Read the run in `directory`, or the one stage that it is of. NotARunError where there is none."""
    by_name = {stage.name: stage for stage in stages}
    views = [StageView(stage.name, stage.checks, stage.curves, stage.unit) for stage in by_name.values()]
    diagnosis = diagnose(directory, views)
    single = begun(directory)  # as the doctor tells the directory of one stage from that of a run
    found = [each for each in diagnosis.stages if each.kind != "not started"]
    return RunRecord(
        directory,
        [
            _read_stage(directory if single else directory / each.stage.name, by_name[each.stage.name], each)
            for each in found
        ],
    )


def _read_stage(directory: Path, stage: ReportedStage, diagnosis: StageDiagnosis) -> StageRecord:
    notes: list[str] = []

    def lines(name: str) -> list[dict[str, Any]]:
        if not (directory / name).is_file():
            return []
        entries, told = read_lines(directory / name)
        notes.extend(told)
        return entries

    return StageRecord(
        stage,
        directory,
        diagnosis,
        metrics=[line for line in lines(METRICS_FILE) if isinstance(line.get("step"), int)],
        config=_mapping(directory / "config.yaml", notes),
        data=_mapping(directory / "data.json", notes),
        evaluation=_mapping(directory / "evaluation.json", notes),
        result=_mapping(directory / "result.json", notes),
        plan=_mapping(directory / "plan.json", notes),
        starts=lines(STARTS_FILE),
        notes=list(dict.fromkeys([*diagnosis.notes, *notes])),
    )


def _mapping(path: Path, notes: list[str]) -> dict[str, Any]:
    """The mapping that a JSON or YAML file holds; {} where there is none, which is noted where it is broken."""
    try:
        text = path.read_text(encoding="utf-8")
        content = read_yaml(text) if path.suffix == ".yaml" else json.loads(text)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        notes.append(f"{path.name} cannot be read: {str(error).splitlines()[0]}")
        return {}
    if not isinstance(content, dict):
        notes.append(f"{path.name} holds no mapping")
        return {}
    return content
