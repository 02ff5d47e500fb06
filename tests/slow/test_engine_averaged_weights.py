"""The averaged actor on two ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine import test_averaged_weights
from tests.engine.test_averaged_weights import assert_close_in_movement
from tests.support.launch import run_ranks


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("ranks")
    done = run_ranks(Path(test_averaged_weights.__file__), 2, out, [str(out)])
    assert done.returncode == 0, done.stdout[-4000:]
    return torch.load(out / "found.pt", weights_only=True)


@pytest.mark.parametrize("zero_stage", [0, 2, 3])
def test_two_ranks_average_the_parts_that_they_hold(zero_stage, two_ranks):
    for precision in ("fp32", "bf16"):
        assert_close_in_movement(*two_ranks[f"{precision} {zero_stage}"])
