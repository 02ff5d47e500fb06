"""`rlhf samples RUN`: responses of a run's rollouts, also while it goes."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from rlhf.report.rollouts import KeptResponses, NoRolloutsError, Order


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `rlhf samples`."""
    parser.description = (
        "Show responses that were sampled in training. Of each rollout keep_samples of them are kept, from the highest "
        "score to the lowest. Exit status: 0 shown, 2 there are none."
    )
    parser.add_argument("run", metavar="RUN", type=Path, help="output_dir of a run, or the directory of its stage")
    parser.add_argument("--iteration", type=int, help="of one rollout alone")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--worst", action="store_true", help="the lowest scores first (unset: the newest first)")
    which.add_argument("--best", action="store_true", help="the highest scores first")
    parser.add_argument("--contains", default="", metavar="TEXT", help="whose prompt or response has this text")
    parser.add_argument("--count", type=int, default=5, help="how many (5)")
    parser.add_argument("--json", action="store_true", help="as JSON lines")


def run(arguments: argparse.Namespace) -> int:
    """Print them; the exit status."""
    order: Order = "worst" if arguments.worst else "best" if arguments.best else "last"
    try:
        kept = KeptResponses.read(arguments.run)
        found = kept.chosen(
            iteration=arguments.iteration, order=order, contains=arguments.contains, count=max(0, arguments.count)
        )
    except NoRolloutsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for note in kept.notes:
        print(f"note: {note}", file=sys.stderr)
    for line in found:
        print(json.dumps(line, ensure_ascii=False) if arguments.json else shown(line))
    if not found:
        print("none has that text", file=sys.stderr)
    return 0


def shown(line: dict[str, object]) -> str:
    """One response for reading."""
    facts = [f"iteration {line['iteration']}", f"score {line['score']:+.2f}"]
    parts = line.get("parts")
    if isinstance(parts, dict):
        facts += [f"{name} {value:+.2f}" for name, value in parts.items()]
    if "kl" in line:
        facts += [f"KL {line['kl']:.2f}", f"{line['tokens']} tokens"]
    if line.get("ended") is False:
        facts.append("does not end")
    return f"--- {', '.join(facts)}\n{str(line['prompt']).strip()}\n-> {line['response']}\n"
