"""The command line of a stage's script, read before torch is loaded: a mistake or `--help` does not wait for it."""

from __future__ import annotations

import os
import sys

from rlhf.config import ConfigError
from rlhf.distributed.exit_codes import EXIT_USER
from rlhf.distributed.place import is_main
from rlhf.pipeline.stages import parse_stage


def check_command_line(stage: str) -> None:
    """End the process with one sentence and status 2 where the arguments of `stage` are wrong, or after `--help`."""
    asks_for_help = bool({"-h", "--help"} & set(sys.argv[1:]))
    if asks_for_help and not is_main():
        raise SystemExit(0)
    try:
        parse_stage(stage)
    except ConfigError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":  # once a machine: a file may be missing on one of them only
            print(f"error: {error}", file=sys.stderr, flush=True)
        raise SystemExit(EXIT_USER) from None
    except BrokenPipeError:  # `--help | head`
        leave_broken_pipe()
        raise SystemExit(0) from None


def leave_broken_pipe() -> None:
    """Let the process end quietly although nobody reads its output any more."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
