"""Whether a stage is finished, runs, or was cut short, from what lies in its directory."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from rlhf.checkpoint.run_lock import is_held, last_holder
from rlhf.distributed.peers import GONE_MACHINE_SECONDS
from rlhf.doctor.monitor import HEALTH_FILE

METRICS_FILE = "metrics.jsonl"
BEGUN = (METRICS_FILE, HEALTH_FILE)
"""What a stage's directory holds from its first step on: any of them. Before, its lock names it."""
STAGES_FILE = ".pipeline.stages"
"""In the directory of a run: the stages that the last `run_all.sh` was asked for, a name a line."""
PIPELINE_LOCK = ".pipeline.lock"
"""In the directory of a run: held by `run_all.sh` as long as it lives."""


@dataclass(frozen=True)
class RunState:
    """How far a stage is. `result` is its `result.json`, {} without one; `reason` says why it counts as incomplete, and
    `advice` what to do about that."""

    kind: Literal["finished", "running", "waiting", "incomplete", "not started"]
    result: Mapping[str, Any] = field(default_factory=dict)
    reason: str = ""
    advice: str = ""


def begun(directory: Path) -> bool:
    """Whether a stage has written into `directory`, or runs or died there before it did. An empty lock is what one
    leaves that ended in good order: alone, of a run that was refused, or that another has removed."""
    lock = directory / ".lock"
    return any((directory / name).is_file() for name in BEGUN) or (lock.is_file() and lock.stat().st_size > 0)


def run_state(directory: Path) -> RunState:
    """The state of the stage that has `directory` in that of its run.

    Finished: there is a `result.json` (one that is no JSON counts as none, as it does for --resume auto). Running: a
    process that lives holds `.lock`. Waiting: it was begun, and a `run_all.sh` that was asked for it lives: before its
    turn, or between restarts. Incomplete: neither, though the stage was begun, or the last `run_all.sh` was asked for
    it. What nobody asked for, or will be begun yet, is not started.
    """
    directory = directory.resolve()  # its name tells which stage it is
    was_begun, asked_for = begun(directory), directory.name in _asked_for(directory.parent)
    # before the result, which is written while the locks are held
    runs = was_begun and _runs(directory)
    pipeline_runs = asked_for and _pipeline_runs(directory)
    result = _result(directory / "result.json")
    if result:
        return RunState("finished", result)
    if runs:
        return RunState("running")
    if pipeline_runs:
        return RunState("waiting" if was_begun else "not started")
    if was_begun:
        return RunState("incomplete", reason=_how_it_ended(directory), advice=_how_to_go_on(directory))
    if asked_for:
        return RunState(
            "incomplete",
            reason="never begun: run_all.sh was asked for it, and has ended before",
            advice="the same run_all.sh command with --resume auto (in place of --overwrite): it skips the stages that "
            "are finished, and begins this one.",
        )
    return RunState("not started")


def _result(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _asked_for(run_dir: Path) -> list[str]:
    try:
        return (run_dir / STAGES_FILE).read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError):
        return []


def _runs(directory: Path) -> bool:
    """The lock says so; where it cannot be told from here, a rank's sign of life that is fresh."""
    held = is_held(directory / ".lock")
    if held is not None:
        return held
    return _fresh((directory / ".ranks").glob("rank_*.json"))


def _pipeline_runs(directory: Path) -> bool:
    """Whether a `run_all.sh` lives that is to run the stage: it holds its lock, or an earlier stage of it runs."""
    run_dir, stages = directory.parent, _asked_for(directory.parent)
    if any(_runs(run_dir / stage) for stage in stages[: stages.index(directory.name)]):
        return True
    held = is_held(run_dir / PIPELINE_LOCK)
    # one of another machine, between two stages: the last has just left its result
    return _fresh([run_dir / PIPELINE_LOCK, *run_dir.glob("*/result.json")]) if held is None else held


def _fresh(paths: Iterable[Path]) -> bool:
    """Whether one of the files was written as lately as a process that lives would have."""
    ages = []
    for path in paths:
        with suppress(FileNotFoundError):  # removed since it was listed
            ages.append(time.time() - path.stat().st_mtime)
    return min(ages, default=GONE_MACHINE_SECONDS) < GONE_MACHINE_SECONDS


def _how_to_go_on(directory: Path) -> str:
    if any(directory.glob("states/step-*")):
        return "the same command with --resume auto (in place of --overwrite): it goes on from the last training state."
    return "the same command with --resume auto (in place of --overwrite): no state was saved, so it begins at step 0."


def _how_it_ended(directory: Path) -> str:
    if (directory / "result.json").is_file():
        return "result.json cannot be read"
    steps = sorted(directory.glob("states/step-*"))
    saved = f"the last training state is {steps[-1].name}" if steps else "no training state is there"
    try:
        stop = json.loads((directory / "stopped.json").read_text(encoding="utf-8"))
        ended = f"stopped in good order by {stop['signal']} at step {stop['step']}"
    except (OSError, ValueError, KeyError, TypeError):
        died = last_holder(directory / ".lock")
        ended = f"{died}, is gone" if died else "nobody holds the directory"
    return f"no result.json; {ended}; {saved}"
