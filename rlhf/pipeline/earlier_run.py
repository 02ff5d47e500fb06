"""What an earlier run left where a new one is to write: a finished one is kept unless the new one may overwrite it."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Collection
from datetime import datetime
from pathlib import Path
from typing import Any

from rlhf.config import ConfigError, RunConfig, facts_of
from rlhf.pipeline.stages import StageConfig
from rlhf.report.page import REPORT_FILE

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


def read_result(directory: Path) -> dict[str, Any]:
    """`result.json` of a finished stage; {} where there is none, or a broken one."""
    return read_json(directory / RESULT)


def read_json(path: Path) -> dict[str, Any]:
    """The json object of a file; {} where there is none, or a broken one."""
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content


def check_inputs_stay(config: StageConfig, files: Collection[Path], removed: Path) -> None:
    """ConfigError for a model, a data set or one of the configuration's `files` in the directory to be `removed`."""
    named = [("config", path) for path in files]
    for part in config.parts():
        for item in dataclasses.fields(part):
            value = getattr(part, item.name)
            if facts_of(item).path == "read" and value:
                named += [(item.name, _path_of(each)) for each in (value if isinstance(value, list) else [value])]
    for name, path in named:
        if path.expanduser().resolve().is_relative_to(removed.resolve()):
            raise ConfigError(
                f"--{name} {path} lies in {removed}, which this run overwrites: copy it elsewhere, or choose another "
                "--output_dir"
            )


def _path_of(value: str) -> Path:
    """The path of a model, of a file, or of a data set that may be a mapping."""
    return Path(json.loads(value)["path"] if value.lstrip().startswith("{") else value)


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
    """Remove summary and report of the run that the stage's `directory` belongs to: they will soon be out of date."""
    for name in (SUMMARY, REPORT_FILE):
        (directory.parent / name).unlink(missing_ok=True)
