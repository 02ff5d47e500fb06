"""`rlhf watch RUN`: a run as it goes, in the terminal; it reads the run's files and changes nothing."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from rlhf.checkpoint.run_lock import is_held
from rlhf.doctor.report import NotARunError
from rlhf.doctor.run_state import PIPELINE_LOCK
from rlhf.pipeline.stages import STAGES
from rlhf.report.run_record import RunRecord, read_run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `rlhf watch`."""
    parser.description = (
        "Show how far a run is, its figures as small curves, the time that is left, its last responses and what the "
        "doctor finds, again and again until it ends. It only reads, also over a shared disk. Exit status: 0 finished "
        "or interrupted, 2 no run there, 3 the run was cut short."
    )
    parser.add_argument("run", metavar="RUN", type=Path, help="output_dir of a run, or one stage's directory")
    parser.add_argument("--every", type=float, default=3.0, metavar="SECONDS", help="between two looks (3)")
    parser.add_argument("--once", action="store_true", help="look once")


def run(arguments: argparse.Namespace) -> int:
    """Show the run until it ends; the exit status."""
    try:
        from rich.console import Console
        from rich.live import Live

        from rlhf.report.watching import watched
    except ImportError:
        print("error: rlhf watch needs rich: pip install rich", file=sys.stderr)
        return 1
    if arguments.every <= 0:
        print(f"error: --every {arguments.every:g} must be above 0 seconds", file=sys.stderr)
        return 2
    console = Console()
    try:
        record = read_run(arguments.run, STAGES.values())
        if arguments.once or not console.is_terminal:
            console.print(watched(record))
        else:
            with Live(watched(record), console=console, auto_refresh=False, vertical_overflow="crop") as live:
                while not _ended(record):
                    time.sleep(arguments.every)
                    record = read_run(arguments.run, STAGES.values())
                    live.update(watched(record), refresh=True)
    except NotARunError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 0
    return 3 if any(stage.diagnosis.kind == "incomplete" for stage in record.stages) else 0


def _ended(record: RunRecord) -> bool:
    """Whether nothing will change any more: no stage runs, and no `run_all.sh` is between two of them."""
    if is_held(record.directory / PIPELINE_LOCK):
        return False
    return all(stage.diagnosis.kind in ("finished", "incomplete") for stage in record.stages)
