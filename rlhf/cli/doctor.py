"""`rlhf doctor RUN_DIR`: what is wrong with a run, since when, what it means and what to try."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rlhf.doctor.report import NotARunError, StageView, diagnose
from rlhf.pipeline.stages import STAGES

EXIT_INCOMPLETE = 3
"""Goes before 1: figures of a run that was cut short are not its last, and the findings are printed all the same."""


def stage_views() -> list[StageView]:
    """What the doctor knows of each stage."""
    return [StageView(stage.name, stage.checks, stage.curves, stage.unit) for stage in STAGES.values()]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `rlhf doctor`."""
    parser.description = (
        "Read a finished or running run and print a diagnosis. Exit status: 0 healthy, 1 findings, 2 no run there, "
        "3 incomplete (stopped, killed or failed, and not running any more), also where there are findings."
    )
    parser.add_argument("run_dir", metavar="RUN_DIR", type=Path, help="output_dir of a run, or one stage's directory")


def run(arguments: argparse.Namespace) -> int:
    """Print the diagnosis; the exit status."""
    try:
        diagnosis = diagnose(arguments.run_dir, stage_views())
    except NotARunError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(diagnosis.text())
    if diagnosis.incomplete:
        return EXIT_INCOMPLETE
    return 0 if diagnosis.healthy else 1
