"""Published data sets that some tests read: files in the folder that $RLHF_DATA_DIR names."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def published(name: str) -> Path:
    """The file or folder `name` of the published data; the test that asks is skipped where it is not there."""
    folder = os.environ.get("RLHF_DATA_DIR")
    if not folder:
        pytest.skip(f"published data: RLHF_DATA_DIR is not set, {name} would be read there")
    path = Path(folder) / name
    if not path.exists():
        pytest.skip(f"published data not there: {path}")
    return path
