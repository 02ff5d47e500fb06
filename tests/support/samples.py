"""Rows of the embedded data sets as lines of JSON."""

from __future__ import annotations

import json
from pathlib import Path

from rlhf.data.world.datasets import World


def sample_lines(name: str, rows: int) -> list[str]:
    """The first `rows` rows of `sample:NAME`, a line of JSON each."""
    return [json.dumps(row, ensure_ascii=False) for row in World().rows(name, rows)]


def write_sample(name: str, target: Path, rows: int) -> None:
    """Write the first `rows` rows of `sample:NAME` to `target`."""
    target.write_text("\n".join(sample_lines(name, rows)) + "\n", encoding="utf-8")
