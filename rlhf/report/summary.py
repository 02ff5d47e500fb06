"""Merge the stages' `result.json` into `summary.json` and print the closing table.

`python -m rlhf.report.summary OUTPUT_DIR`. Each stage writes `OUTPUT_DIR/<stage>/result.json` with its own figures,
`seconds`, `seed` and the doctor's `health` (PPO also `samples`); see `SUMMARY_KEYS`.
"""

from __future__ import annotations

import json
import sys
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf.checkpoint.atomic import write_json
from rlhf.config import STAGES

SUMMARY_KEYS: Mapping[str, tuple[str, ...]] = {
    "sft": ("eval_loss_before", "eval_loss_after"),
    "reward": ("accuracy", "length_baseline_accuracy", "accuracy_by_category", "mean_margin"),
    "ppo": (
        "score_before",
        "score_after",
        "score_std_before",
        "kl_per_token",
        "eos_rate_before",
        "eos_rate_after",
        "mean_response_tokens_before",
        "mean_response_tokens_after",
    ),
}
"""The figures of each stage that `summary.json` holds."""
SAMPLE_KEYS = ("prompt", "sft", "ppo", "score_sft", "score_ppo")
"""The fields of one sample: a prompt, both models' responses and their scores."""
STAGE_SCRIPTS = {"sft": "step1_sft/main.py", "reward": "step2_reward/main.py", "ppo": "step3_ppo/main.py"}


class SummaryError(ValueError):
    """A stage's result that is missing or incomplete, with how to make it."""


def summarize(output_dir: Path) -> dict[str, Any]:
    """Merge the results of all stages under `output_dir`, all figures held-out ones.

    Raises SummaryError when a stage's result is missing, is not JSON, lacks a figure, or comes from another seed.
    """
    results = {stage: _read_result(output_dir, stage) for stage in STAGES}
    seeds = {stage: result["seed"] for stage, result in results.items()}
    if len(set(seeds.values())) > 1:
        raise SummaryError(
            f"the stages under {output_dir} were run with different seeds: {seeds}; run them again alike"
        )
    summary: dict[str, Any] = {stage: {key: results[stage][key] for key in SUMMARY_KEYS[stage]} for stage in STAGES}
    summary["samples"] = [{key: sample[key] for key in SAMPLE_KEYS} for sample in results["ppo"]["samples"]]
    seconds = {stage: float(results[stage]["seconds"]) for stage in STAGES}
    summary["seconds"] = {**seconds, "total": sum(seconds.values())}
    summary["seed"] = seeds["sft"]
    summary["health"] = {stage: results[stage].get("health") for stage in STAGES}  # None: of an earlier version
    return summary


def write_summary(output_dir: Path) -> Path:
    """Write `summary.json` for `output_dir` and return its path."""
    path = output_dir / "summary.json"
    write_json(path, summarize(output_dir))
    return path


def closing_table(summary: Mapping[str, Any], *, samples: int = 3, width: int = 100) -> str:
    """The figures of `summary` as lines of text, with the first `samples` samples cut to `width` columns."""
    sft, reward, ppo = (summary[stage] for stage in STAGES)
    gain = (ppo["score_after"] or 0.0) - (ppo["score_before"] or 0.0)  # null where nothing was held out
    spread = ppo["score_std_before"] or 0.0
    rows = [
        ("SFT", "held-out loss", sft["eval_loss_before"], sft["eval_loss_after"], ""),
        (
            "reward",
            "held-out accuracy",
            None,
            reward["accuracy"],
            f"choosing the longer response: {_figure(reward['length_baseline_accuracy']).strip()}",
        ),
        ("", "mean margin", None, reward["mean_margin"], ""),
    ]
    rows += [("", f"  {name}", None, value, "") for name, value in reward["accuracy_by_category"].items()]
    in_spreads = f" = {gain / spread:+.2f} standard deviations of the SFT model's scores" if spread > 0 else ""
    rows += [
        ("PPO", "held-out score", ppo["score_before"], ppo["score_after"], f"{gain:+.3f}{in_spreads}"),
        ("", "KL per token (nats)", None, ppo["kl_per_token"], "to the SFT model"),
        ("", "eos rate", ppo["eos_rate_before"], ppo["eos_rate_after"], ""),
        ("", "response tokens", ppo["mean_response_tokens_before"], ppo["mean_response_tokens_after"], ""),
    ]
    label_columns = max(_columns(label) for _, label, *_ in rows)
    lines = [f"{'stage':<8}{_pad('figure', label_columns)}  {'before':>9} {'after':>9}"]
    for stage, label, before, after, note in rows:
        figures = f"{_figure(before)} {_figure(after)}"
        lines.append(f"{stage:<8}{_pad(label, label_columns)}  {figures}  {note}".rstrip())
    for sample in summary["samples"][:samples]:
        lines += [
            "",
            f"prompt       {_cut_beginning(_one_line(sample['prompt']), width - 13)}",
            _cut(f"SFT {sample['score_sft']:+8.2f} {_one_line(sample['sft'])}", width),
            _cut(f"PPO {sample['score_ppo']:+8.2f} {_one_line(sample['ppo'])}", width),
        ]
    lines.append("")
    looked = {stage: health for stage, health in summary["health"].items() if health}
    found = [(stage, found) for stage, health in looked.items() for found in health["findings"]]
    for stage, entry in found:
        lines.append(f"doctor: {stage} since step {entry['since']}: {entry['message']}")
    if found:
        lines.append("doctor: `python -m rlhf.cli doctor OUTPUT_DIR` says what each means and what to try")
    else:
        lines.append(
            f"doctor: nothing found in {', '.join(looked)}" if looked else "doctor: has not looked at this run"
        )
    seconds = ", ".join(f"{name} {value:.0f}" for name, value in summary["seconds"].items())
    return "\n".join([*lines, f"seconds: {seconds}; seed {summary['seed']}"])


def _read_result(output_dir: Path, stage: str) -> dict[str, Any]:
    path = output_dir / stage / "result.json"
    how = f"run `deepspeed {STAGE_SCRIPTS[stage]} --output_dir {output_dir}`"
    if not path.is_file():
        raise SummaryError(f"stage {stage} has left no result: {path} does not exist; {how}")
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise SummaryError(f"{path} is not JSON ({error}); {how} again") from error
    needed = (*SUMMARY_KEYS[stage], "seconds", "seed", *(("samples",) if stage == "ppo" else ()))
    missing = [key for key in needed if not isinstance(result, dict) or key not in result]
    if missing:
        raise SummaryError(f"{path} lacks {', '.join(missing)}; {how} again")
    for index, sample in enumerate(result.get("samples", []) if stage == "ppo" else []):
        lacking = [key for key in SAMPLE_KEYS if key not in sample]
        if lacking:
            raise SummaryError(f"{path}: sample {index} lacks {', '.join(lacking)}; {how} again")
    return dict(result)


def _figure(value: float | None) -> str:
    return f"{'':>9}" if value is None else f"{value:>9.3f}"


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


def _cut_beginning(text: str, columns: int) -> str:
    """The end of `text`: a prompt begins with its template and ends with what was asked."""
    if _columns(text) <= columns:
        return text
    kept = text
    while _columns(kept) > columns - 3:
        kept = kept[1:]
    return "..." + kept


def main(argv: Sequence[str] | None = None) -> int:
    """Write the summary of the run directory in `argv` and print it; returns 1 when a result is missing."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if len(arguments) != 1 or arguments[0].startswith("-"):
        print("usage: python -m rlhf.report.summary OUTPUT_DIR", file=sys.stderr)
        return 2
    try:
        path = write_summary(Path(arguments[0]))
    except SummaryError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(closing_table(json.loads(path.read_text(encoding="utf-8"))))
    print(f"written to {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
