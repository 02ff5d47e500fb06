"""The command `rlhf` (also `python -m rlhf.cli`): tools around training, one subcommand each."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from rlhf.cli import base, doctor, report, sample, serve_reward, summary, world

SUBCOMMANDS = {
    "base": (base, "train a tokenizer and a small base model on your own texts"),
    "doctor": (doctor, "diagnose a run from its files"),
    "report": (report, "write an HTML report of a run, or of several beside one another"),
    "sample": (sample, "write a data set of a model's own responses: best of N, pairs, rankings"),
    "serve-reward": (serve_reward, "serve a reward over HTTP"),
    "summary": (summary, "write summary.json of a finished run and print its table"),
    "world": (world, "write the data sets of the embedded world as files"),
}
"""Name -> (module with `add_arguments` and `run`, one line of help)."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand; its exit status."""
    parser = argparse.ArgumentParser(prog="rlhf", description="Tools around training.")
    subparsers = parser.add_subparsers(dest="subcommand", required=True, metavar="COMMAND")
    for name, (module, text) in SUBCOMMANDS.items():
        module.add_arguments(subparsers.add_parser(name, help=text))
    arguments = parser.parse_args(argv)
    return SUBCOMMANDS[arguments.subcommand][0].run(arguments)


if __name__ == "__main__":
    sys.exit(main())
