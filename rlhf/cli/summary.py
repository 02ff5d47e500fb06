"""`rlhf summary OUTPUT_DIR`: write `summary.json` of a finished run and print its table.

Also `python -m rlhf.cli.summary OUTPUT_DIR`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from rlhf.pipeline.stages import STAGES, default_run
from rlhf.report.summary import SummaryError, closing_table, write_summary


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `rlhf summary`."""
    parser.description = (
        "Write summary.json of a finished run and print its table. Exit status: 0 written, 1 a stage's result is "
        "missing or incomplete, 2 a wrong command line."
    )
    parser.add_argument("output_dir", metavar="OUTPUT_DIR", type=Path, help="output_dir of a run")
    default = ",".join(stage.name for stage in default_run())
    parser.add_argument("--stages", default=default, help=f"the stages that it had (default {default})")


def run(arguments: argparse.Namespace) -> int:
    """Write the summary and print it; the exit status."""
    names = arguments.stages.split(",")
    if unknown := [name for name in names if name not in STAGES]:
        print(f"error: --stages {','.join(unknown)}: the stages are {', '.join(STAGES)}", file=sys.stderr)
        return 2
    stages = [STAGES[name] for name in names]
    try:
        path = write_summary(arguments.output_dir, stages)
    except SummaryError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(closing_table(json.loads(path.read_text(encoding="utf-8")), stages))
    print(f"written to {path}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """The command as a module of its own; its exit status."""
    parser = argparse.ArgumentParser(prog="python -m rlhf.cli.summary")
    add_arguments(parser)
    return run(parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
