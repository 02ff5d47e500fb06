"""The command `rlhf` (also `python -m rlhf.cli`): tools around training, one subcommand each."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

SUBCOMMANDS = {
    "base": "train a tokenizer and a small base model on your own texts",
    "doctor": "diagnose a run from its files",
    "eval": "evaluate a reward model on preferences, an actor on conversations and prompts",
    "judge": "have a language model score answers, or say which of two are better",
    "report": "write an HTML report of a run, or of several beside one another",
    "sample": "write a data set of a model's own responses: best of N, pairs, rankings",
    "samples": "show responses of a run's rollouts: the worst, the best, of an iteration",
    "serve-reward": "serve a reward over HTTP",
    "summary": "write summary.json of a finished run and print its table",
    "watch": "watch a run in the terminal",
    "world": "write the data sets of the embedded world as files",
}
"""Name -> one line of help; the module of that name (`_` for `-`) has `add_arguments` and `run`, and is imported when
it is asked for: some of them load torch."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand; its exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="rlhf", description="Tools around training.")
    subparsers = parser.add_subparsers(dest="subcommand", required=True, metavar="COMMAND")
    module = None
    for name, text in SUBCOMMANDS.items():
        subparser = subparsers.add_parser(name, help=text)
        if name in words[:1]:
            module = importlib.import_module(f"rlhf.cli.{name.replace('-', '_')}")
            module.add_arguments(subparser)
    arguments = parser.parse_args(words)
    assert module is not None  # without a subcommand argparse has ended the process
    status: int = module.run(arguments)
    return status


if __name__ == "__main__":
    sys.exit(main())
