"""`rlhf eval MODEL`: a reward model on held-out preferences, an actor on held-out conversations and prompts."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `rlhf eval`."""
    parser.description = (
        "Evaluate a directory that this project saved, or any causal model. A reward model: accuracy on pairs and "
        "rankings with its interval, by category and length, beside choosing by the outside alone, calibration, "
        "agreement with a second one; or RewardBench 2's score, on files of that shape. An actor: perplexity of the "
        "responses in --data, and what its own responses to --prompts are like. Exit status: 0 evaluated, 2 a mistake "
        "on the command line or in the data."
    )
    parser.add_argument("model", metavar="MODEL", help="a directory, or for an actor a hub name")
    parser.add_argument("--data", nargs="+", default=[], help="data sets, as preference_data or sft_data has them")
    parser.add_argument("--prompts", nargs="+", default=[], help="data sets of prompts, for an actor")
    parser.add_argument("--second", metavar="DIR", help="another reward model, to compare with")
    parser.add_argument("--output", type=Path, metavar="FILE", help="also write everything as JSON")
    parser.add_argument("--template", default="kullm", help="prompt template (kullm)")
    parser.add_argument("--max_prompt_tokens", type=int, default=256, help="longer prompts lose their beginning (256)")
    parser.add_argument("--max_response_tokens", type=int, default=256, help="of a response (256)")
    parser.add_argument("--samples", type=int, default=1, help="responses to each prompt (1)")
    parser.add_argument("--temperature", type=float, default=1.0, help="of sampling (1)")
    parser.add_argument("--rows", type=int, default=64, help="responses sampled side by side (64)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of the model (fp32)")
    parser.add_argument("--seed", type=int, default=1, help="of the random numbers (1)")
    parser.add_argument("--cache_dir", type=Path, default=Path("runs/.cache"), help="where tokens are kept")


def run(arguments: argparse.Namespace) -> int:
    """Evaluate and print; the exit status."""
    from rlhf.checkpoint.atomic import write_json
    from rlhf.config import ConfigError
    from rlhf.data.spec import DataError
    from rlhf.distributed.log import setup_logging
    from rlhf.evaluation.jobs import EvalJob, evaluate

    setup_logging()
    options = {name: value for name, value in vars(arguments).items() if name not in ("subcommand", "output")}
    try:
        found = evaluate(EvalJob(**options, report_dir=arguments.cache_dir / "evaluation"))
        if arguments.output is not None:
            arguments.output.parent.mkdir(parents=True, exist_ok=True)
            write_json(arguments.output, found)
    except (ConfigError, DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join(lines(found)))
    if arguments.output is not None:
        print(f"written to {arguments.output}")
    return 0


def lines(found: Mapping[str, Any]) -> Iterator[str]:
    """What was found, for reading."""
    yield f"{found['kind']} {found['model']}"
    if "rewardbench" in found:
        yield from _bench_lines(found["rewardbench"])
        if "second" in found:
            yield f"reward model {found['second']['model']}"
            yield from _bench_lines(found["second"]["rewardbench"])
    elif found["kind"] == "reward model":
        yield from _reward_lines(found)
    if "perplexity" in found:
        of = found["perplexity"]
        yield _row("perplexity", of["perplexity"], f"of {of['rows']} responses, {of['tokens']} tokens")
        for name, value in of["by_category"].items():
            yield _row(f"  {name}", value)
    if "generation" in found:
        of = {name: value for name, value in found["generation"].items() if name != "answers"}
        yield f"{of.pop('responses'):.0f} responses to {of.pop('prompts'):.0f} prompts"
        for name, value in of.items():
            yield _row(f"  {name.replace('_', ' ')}", value)
        yield json.dumps(found["generation"]["answers"][0], ensure_ascii=False)


def _reward_lines(found: Mapping[str, Any]) -> Iterator[str]:
    low, high = found["bootstrap"]
    yield _row("accuracy", found["eval_accuracy"], f"95% {low:.3f} to {high:.3f}, of {found['eval_pairs']:.0f} pairs")
    for name, entry in found["by_category"].items():
        yield _row(f"  {name}", entry["accuracy"], f"{entry['pairs']} pairs, margin {entry['margin']:+.2f}")
    for part in found["by_length"]:
        length = f"{part['shortest']:.0f} to {part['longest']:.0f} tokens"
        yield _row(
            f"  {length}", part["accuracy"], f"95% {part['low']:.3f} to {part['high']:.3f}, {part['pairs']} pairs"
        )
    yield _row("margin", found["eval_margin"])
    yield _row("calibration error", found["calibration"]["error"], "distance of confidence and accuracy")
    for part in found["calibration"]["bins"]:
        yield _row(f"  {part['confidence']:.2f} sure", part["accuracy"], f"{part['pairs']} pairs")
    yield "choosing by the outside alone"
    for name, entry in found["baselines"].items():
        yield _row(f"  {'not ' if entry['reversed'] else ''}{name}", entry["accuracy"])
    yield found["shortcuts"]["verdict"]
    yield from found["shortcuts"]["notes"]
    if "second" in found:
        of = found["second"]
        yield _row("agreement", of["agreement"], f"with {of['model']}; kappa {of['kappa']:.3f}")
        yield _row("  of the margins", of["margin_correlation"], "correlation")


def _bench_lines(found: Mapping[str, Any]) -> Iterator[str]:
    yield _row("RewardBench 2", found["score"], f"mean of {len(found['subsets'])} subsets")
    for name, entry in found["subsets"].items():
        interval = f"95% {entry['low']:.3f} to {entry['high']:.3f}, " if "low" in entry else ""
        yield _row(f"  {name}", entry["score"], f"{interval}{entry['prompts']} prompts")


def _row(label: str, value: float, note: str = "") -> str:
    return f"{label:<34}{value:>9.3f}  {note}".rstrip()
