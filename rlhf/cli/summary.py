"""`python -m rlhf.cli.summary OUTPUT_DIR`: write `summary.json` of a finished run and print its table."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from rlhf.pipeline.stages import default_run
from rlhf.report.summary import SummaryError, closing_table, write_summary


def main(argv: Sequence[str] | None = None) -> int:
    """Write the summary of the run directory in `argv` and print it; returns 1 when a result is missing."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if len(arguments) != 1 or arguments[0].startswith("-"):
        print("usage: python -m rlhf.cli.summary OUTPUT_DIR", file=sys.stderr)
        return 2
    stages = default_run()
    try:
        path = write_summary(Path(arguments[0]), stages)
    except SummaryError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(closing_table(json.loads(path.read_text(encoding="utf-8")), stages))
    print(f"written to {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
