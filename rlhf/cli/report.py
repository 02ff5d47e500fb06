"""`rlhf report RUN [RUN ...]`: one HTML file of a run, or of several beside one another.

Also `python -m rlhf.cli.report RUN ...`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rlhf.doctor.report import NotARunError
from rlhf.pipeline.stages import STAGES
from rlhf.report.page import REPORT_FILE, ReportError, distinct_names, write_report
from rlhf.report.run_record import read_run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `rlhf report`."""
    parser.description = (
        "Write a report of a finished, running or interrupted run as one HTML file that opens without a network: "
        "figures before and after, findings, curves, answers side by side, configuration, data, time. Of several runs "
        "the curves lie over one another, with a table of what differs in their configuration. Exit status: 0 written, "
        "1 not written, 2 no run there."
    )
    parser.add_argument(
        "runs", metavar="RUN", type=Path, nargs="+", help="output_dir of a run, or one stage's directory"
    )
    parser.add_argument(
        "--output", type=Path, help=f"the file; unset: {REPORT_FILE} in the run's directory, of several runs here"
    )


def run(arguments: argparse.Namespace) -> int:
    """Write the report; the exit status."""
    try:
        records = [read_run(directory, STAGES.values()) for directory in arguments.runs]
    except NotARunError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    default = records[0].directory / REPORT_FILE if len(records) == 1 else Path(REPORT_FILE)
    path = arguments.output or default
    try:
        write_report(records, path)
    except ReportError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"written to {path}" + (f" ({', '.join(distinct_names(records))})" if len(records) > 1 else ""))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """The command as a module of its own; its exit status."""
    parser = argparse.ArgumentParser(prog="python -m rlhf.cli.report")
    add_arguments(parser)
    return run(parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
