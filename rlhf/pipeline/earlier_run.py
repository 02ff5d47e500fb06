"""What an earlier run left where a new one is to write: a finished one is kept unless the new one may overwrite it."""

from __future__ import annotations

import shutil
from datetime import datetime
from pathlib import Path

from rlhf.config import ConfigError, RunConfig

RESULT = "result.json"
"""Written last by a stage: where it lies, the stage is finished."""
SUMMARY = "summary.json"
"""Beside the stages' directories; it describes the models that lie in them."""
_IN_USE = (".lock", ".ranks")
"""What the run that overwrites holds itself: its lock, and its ranks' signs of life."""


def finished_refusal(directory: Path, run: RunConfig) -> ConfigError | None:
    """Why a stage must not start anew in `directory`: one is finished there, and `run` neither resumes nor overwrites.

    `resume=never` speaks of unfinished runs alone.
    """
    result = directory / RESULT
    if run.overwrite or run.resume == "auto" or not result.is_file():
        return None
    ended = datetime.fromtimestamp(result.stat().st_mtime)
    there = ", ".join(sorted(entry.name for entry in directory.iterdir() if not entry.name.startswith(".")))
    return ConfigError(
        f"{directory} holds a finished run, of {ended:%Y-%m-%d %H:%M} ({there}): remove it and start anew with "
        "--overwrite, keep it and skip the stage with --resume auto, or choose another --output_dir"
    )


def remove_earlier_run(directory: Path) -> None:
    """Empty the directory of a stage that is to be overwritten.

    The summary and the result go first: what describes models must not outlive them where a removal is interrupted.
    Raises OSError for what cannot be removed.
    """
    remove_summary(directory)
    found = [entry for entry in directory.iterdir() if entry.name not in _IN_USE]
    for entry in sorted(found, key=lambda entry: entry.name != RESULT):
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def remove_summary(directory: Path) -> None:
    """Remove the summary of the run that the stage's `directory` belongs to: it is about to be out of date."""
    (directory.parent / SUMMARY).unlink(missing_ok=True)
