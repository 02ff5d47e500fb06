"""What a stage leaves for the summary."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlhf.checkpoint.atomic import write_json
from rlhf.training.nonfinite import NonFiniteError as NonFiniteError


def write_result(directory: Path, result: Mapping[str, Any], *, seed: int) -> None:
    """Write a stage's `result.json` (rank 0): what `summary.json` is put together from."""
    write_json(directory / "result.json", {**result, "seconds": round(result["seconds"], 1), "seed": seed})
