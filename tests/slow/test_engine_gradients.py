"""Gradients of 16-bit engines on two ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine import test_gradients
from tests.engine.test_gradients import SIXTEEN_BIT_SUM, STAGES, expected, norm_of, relative_errors
from tests.support.launch import run_ranks


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("ranks")
    done = run_ranks(Path(test_gradients.__file__), 2, out, [str(out)])
    assert done.returncode == 0, done.stdout[-4000:]
    return torch.load(out / "found.pt", weights_only=True)


@pytest.mark.parametrize("zero_stage", STAGES)
def test_two_ranks_sum_in_float32(zero_stage, two_ranks):
    """Stages 2 and 3 reduce every micro-batch in bf16, whose roundings do not add up."""
    found, norm = two_ranks[f"gradients {zero_stage}"]
    limit = 1e-6 if zero_stage < 2 else SIXTEEN_BIT_SUM / 4
    assert max(relative_errors(found, 2).values()) < limit
    assert norm == pytest.approx(norm_of(expected(2)), rel=1e-3)


@pytest.mark.parametrize("zero_stage", STAGES)
def test_two_ranks_find_what_is_not_finite_on_one(zero_stage, two_ranks):
    assert "first that of linear.weight" in two_ranks[f"stopped {zero_stage}"]
