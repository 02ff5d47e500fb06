"""The stages' `result.json` merged into `summary.json`, and the closing table.

Each stage writes `OUTPUT_DIR/<stage>/result.json` with its own figures, `seconds`, `seed` and the doctor's `health`.
Where a stage trained the embedded base model first, the summary counts that beside the stages.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from rlhf.checkpoint.atomic import write_json
from rlhf.doctor.findings import SICKNESSES
from rlhf.report.figures import Figure, NoteFigure, PartsFigure, ShortcutFigure

SAMPLES = "samples"
BASE_SECONDS = "base_seconds"
"""In the result of the stage that had to train the embedded base model first: how long that took."""
GOLD = "gold"
"""What the world's judge says before and after: in the result of the stage that measured it, and of the summary."""
SAMPLE_KEYS = ("prompt", "sft", "ppo", "score_sft", "score_ppo")
"""The fields of one sample: a prompt, both models' responses and their scores."""
SAMPLE_GOLD = ("gold_sft", "gold_ppo")
"""Where gold was measured: that of both responses."""


class SummarisedStage(Protocol):
    """What the summary needs of a stage (`rlhf.pipeline.stages.Stage`)."""

    @property
    def name(self) -> str: ...
    @property
    def label(self) -> str: ...
    @property
    def script(self) -> str: ...
    @property
    def figures(self) -> Sequence[Figure | NoteFigure | PartsFigure | ShortcutFigure]: ...
    @property
    def result_keys(self) -> Sequence[str]: ...
    @property
    def optional_result_keys(self) -> Sequence[str]: ...


class SummaryError(ValueError):
    """A stage's result that is missing or incomplete, with how to make it."""


def summarize(output_dir: Path, stages: Sequence[SummarisedStage]) -> dict[str, Any]:
    """Merge the results of `stages` under `output_dir`, all figures held-out ones.

    What an earlier release did not measure is left out. Raises SummaryError when a stage's result is missing, is not
    JSON, lacks a figure, or comes from another seed.
    """
    results = {stage.name: _read_result(output_dir, stage) for stage in stages}
    seeds = {name: result["seed"] for name, result in results.items()}
    if len(set(seeds.values())) > 1:
        raise SummaryError(
            f"the stages under {output_dir} were run with different seeds: {seeds}; run them again alike, with "
            "--overwrite"
        )
    summary: dict[str, Any] = {}
    for stage in stages:
        keys = [key for key in _result_keys(stage) if key != SAMPLES]
        optional = [key for key in _optional_keys(stage) if key in results[stage.name]]
        summary[stage.name] = {key: results[stage.name][key] for key in (*keys, *optional)}
    samples = [sample for result in results.values() for sample in result.get(SAMPLES, [])]
    summary[SAMPLES] = [
        {key: sample[key] for key in (*SAMPLE_KEYS, *(key for key in SAMPLE_GOLD if key in sample))}
        for sample in samples
    ]
    golds = [result[GOLD] for result in results.values() if result.get(GOLD)]
    if golds:
        summary[GOLD] = golds[-1]
    seconds = {name: float(result["seconds"]) for name, result in results.items()}
    base = sum(float(result.get(BASE_SECONDS, 0.0)) for result in results.values())
    seconds = {"base": base, **seconds} if base else seconds
    summary["seconds"] = {**seconds, "total": sum(seconds.values())}
    summary["seed"] = next(iter(seeds.values()))
    summary["health"] = {name: result.get("health") for name, result in results.items()}  # None: an earlier version's
    return summary


def write_summary(output_dir: Path, stages: Sequence[SummarisedStage]) -> Path:
    """Write `summary.json` for `output_dir` and return its path."""
    path = output_dir / "summary.json"
    write_json(path, summarize(output_dir, stages))
    return path


def closing_table(
    summary: Mapping[str, Any], stages: Sequence[SummarisedStage], *, samples: int = 3, width: int = 170
) -> str:
    """The figures of `summary` as lines of text, with `samples` samples (see `spread_samples`) of `width` columns."""
    rows = []
    gold = {GOLD: summary.get(GOLD)}
    for stage in stages:
        stage_lines = [line for figure in stage.figures for line in figure.lines({**summary[stage.name], **gold})]
        rows += [("" if index else stage.label, line) for index, line in enumerate(stage_lines)]
    label_columns = max(_columns(line.label) for _, line in rows)
    lines = [f"{'stage':<8}{_pad('figure', label_columns)}  {'before':>9} {'after':>9} {'n':>6}"]
    for title, line in rows:
        figures = f"{_figure(line.before)} {_figure(line.after)} {'' if line.count is None else line.count:>6}"
        lines.append(f"{title:<8}{_pad(line.label, label_columns)}  {figures}  {line.note}".rstrip())
    shown = spread_samples(summary[SAMPLES], samples)
    if 0 < len(shown) < len(summary[SAMPLES]):
        lines += [
            "",
            f"{len(shown)} of {len(summary[SAMPLES])} samples, from the largest rise of the score to its largest fall",
        ]
    for sample in shown:
        lines += [
            "",
            f"prompt       {_cut(_one_line(sample['prompt']), width - 13)}",
            _cut(f"SFT {_judged(sample, 'sft')} {_one_line(sample['sft'])}", width),
            _cut(f"PPO {_judged(sample, 'ppo')} {_one_line(sample['ppo'])}", width),
        ]
    lines += ["", *_health_lines(summary["health"])]
    seconds = ", ".join(f"{name} {value:.0f}" for name, value in summary["seconds"].items())
    return "\n".join([*lines, f"seconds: {seconds}; seed {summary['seed']}"])


def spread_samples(samples: Sequence[Mapping[str, Any]], count: int) -> list[Mapping[str, Any]]:
    """`count` samples evenly spaced over the changes of the score, the largest rise first and the largest fall last."""
    ordered = sorted(samples, key=lambda sample: sample["score_sft"] - sample["score_ppo"])
    if count >= len(ordered):
        return ordered
    places = [len(ordered) // 2] if count == 1 else [
        round(number * (len(ordered) - 1) / (count - 1)) for number in range(count)
    ]  # fmt: skip
    return [ordered[place] for place in places]


def _health_lines(health: Mapping[str, Any]) -> list[str]:
    """What the doctor found in each stage."""
    looked = {stage: found for stage, found in health.items() if found}
    findings = [(stage, entry) for stage, found in looked.items() for entry in found["findings"]]
    if findings:
        lines = [
            f"doctor: {stage} since step {entry['since']}: {SICKNESSES[entry['check']].title}: {entry['message']}"
            for stage, entry in findings
        ]
        return [*lines, "doctor: `python -m rlhf.cli doctor OUTPUT_DIR` says what each means and what to try"]
    return [f"doctor: nothing found in {', '.join(looked)}" if looked else "doctor: has not looked at this run"]


def _result_keys(stage: SummarisedStage) -> list[str]:
    return [*(key for figure in stage.figures for key in figure.needed_keys()), *stage.result_keys]


def _optional_keys(stage: SummarisedStage) -> list[str]:
    """What a result of an earlier release may lack; each once."""
    counts = [figure.count for figure in stage.figures if figure.count is not None]
    return list(dict.fromkeys([*counts, *stage.optional_result_keys]))


def _read_result(output_dir: Path, stage: SummarisedStage) -> dict[str, Any]:
    path = output_dir / stage.name / "result.json"
    command = f"deepspeed {stage.script} --output_dir {output_dir}"
    again = f"run `{command} --overwrite`, which makes it anew"
    if not path.is_file():
        raise SummaryError(f"stage {stage.name} has left no result: {path} does not exist; run `{command}`")
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise SummaryError(f"{path} is not JSON ({error}); {again}") from error
    needed = (*_result_keys(stage), "seconds", "seed")
    missing = [key for key in needed if not isinstance(result, dict) or key not in result]
    if missing:
        raise SummaryError(f"{path} lacks {', '.join(missing)}; {again}")
    for index, sample in enumerate(result.get(SAMPLES, [])):
        lacking = [key for key in SAMPLE_KEYS if key not in sample]
        if lacking:
            raise SummaryError(f"{path}: sample {index} lacks {', '.join(lacking)}; {again}")
    return dict(result)


def _figure(value: float | None) -> str:
    return f"{'':>9}" if value is None else f"{value:>9.3f}"


def _judged(sample: Mapping[str, Any], model: str) -> str:
    """The score of a response, with its gold where that was measured."""
    gold = sample.get(f"gold_{model}")
    return f"{sample[f'score_{model}']:+8.2f}" + ("" if gold is None else f"  gold {gold:.2f} ")


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _columns(text: str) -> int:
    return sum(2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in text)


def _pad(text: str, columns: int) -> str:
    """`text` filled up to `columns` terminal columns; a Korean letter takes two."""
    return text + " " * (columns - _columns(text))


def _cut(text: str, columns: int) -> str:
    if _columns(text) <= columns:
        return text
    kept = text
    while _columns(kept) > columns - 3:
        kept = kept[:-1]
    return kept + "..."
