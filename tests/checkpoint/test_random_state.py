"""Random generators continue exactly where they were saved."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
import torch
from safetensors import safe_open

from rlhf.checkpoint.random_state import load_rng, restore_rng_state, rng_state, save_rng


@pytest.fixture(autouse=True)
def generators_of_other_tests():
    before = rng_state()
    yield
    restore_rng_state(*before)


def draw() -> list[object]:
    """From every generator, with the normal deviates that Python and numpy make in pairs and keep one of."""
    return [
        *(random.random(), random.gauss(0, 1), random.getrandbits(70)),
        *(float(np.random.rand()), float(np.random.normal()), np.random.permutation(7).tolist()),
        *(torch.rand(3).tolist(), torch.randn(17).tolist(), torch.randperm(9).tolist()),
        torch.nn.functional.dropout(torch.ones(50)).tolist(),
    ]


@pytest.mark.parametrize("position", [0, 1, 700])
def test_the_same_numbers_follow(position, tmp_path):
    random.seed(3), np.random.seed(4), torch.manual_seed(5)
    for _ in range(position):
        random.random(), np.random.rand(), torch.rand(1)
    random.gauss(0, 1), np.random.normal()  # one deviate of a pair is waiting now
    save_rng(tmp_path, 2)
    expected = [draw(), draw()]
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    assert draw() != expected[0]
    assert load_rng(tmp_path, 2, seed=1, step=1)
    assert [draw(), draw()] == expected


def test_the_file_is_tensors_and_json(tmp_path):
    save_rng(tmp_path, 0)
    with safe_open(tmp_path / "rng-00000.safetensors", framework="pt") as file:
        assert {"python", "numpy", "torch"} <= set(file.keys())
        assert json.loads(file.metadata()["scalars"])["numpy"][0] == "MT19937"


def test_a_rank_that_was_not_there_is_seeded_by_seed_rank_and_step(tmp_path, caplog):
    save_rng(tmp_path, 0)

    def first(rank: int, seed: int, step: int) -> str:
        random.seed(9), np.random.seed(9), torch.manual_seed(9)
        assert not load_rng(tmp_path, rank, seed=seed, step=step)
        return json.dumps(draw())

    again = first(1, 7, 100)
    assert again == first(1, 7, 100)
    assert len({again, first(2, 7, 100), first(1, 8, 100), first(1, 7, 200)}) == 4
    assert "rank 1 has no random state of its own" in caplog.text
