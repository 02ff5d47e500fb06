"""Two real ranks under the deepspeed launcher give what one rank gives, for every ZeRO stage and every training stage.

float32 on CPU (gloo). Adam's epsilon is 1e-3 here: with the usual 1e-8 a gradient of rounding noise becomes a whole
step of the learning rate, and the comparison would measure Adam, not the arithmetic of ranks. Tolerance on weights
and metrics: 2e-4 absolute, at learning rates of 1e-3.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.support.launch import run_ranks
from tests.support.samples import write_sample

WORKER = Path(__file__).parents[1] / "support" / "pipeline_worker.py"
TOLERANCE = 2e-4
STAGES = ("sft", "reward", "ppo", "offline", "also/offline")
MODELS = ("sft/model", "reward/model", "ppo/actor", "ppo/critic", "offline/actor", "also/offline/actor")


@pytest.fixture(scope="module")
def inputs(micro_base, tmp_path_factory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("two_ranks")
    for name in ("sft", "preference", "prompts"):
        write_sample(f"{name}_train", root / f"{name}.jsonl", 33)
        # 2 ranks x micro-batches of 2 do not divide it: the last evaluation batches are ragged
        write_sample(f"{name}_heldout", root / f"{name}_eval.jsonl", 11)
    return micro_base, root


def run_pipeline(inputs: tuple[Path, Path], output: Path, *, world: int, zero_stage: int) -> Path:
    base, data = inputs
    result = run_ranks(
        WORKER, world, output, [str(base), str(data), str(output), str(zero_stage), "--also_offline", "kto"]
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    return output


@pytest.fixture(scope="module")
def one_rank(inputs, tmp_path_factory) -> Path:
    return run_pipeline(inputs, tmp_path_factory.mktemp("one_rank"), world=1, zero_stage=0)


def weights(directory: Path) -> dict[str, torch.Tensor]:
    merged: dict[str, torch.Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        merged.update({f"{file.name}:{name}": tensor for name, tensor in load_file(str(file)).items()})
    assert merged, f"no weights in {directory}"
    return merged


def metrics(directory: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if not name.startswith("seconds")} for row in rows]


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_two_ranks_equal_one(inputs, one_rank, tmp_path, zero_stage):
    two_ranks = run_pipeline(inputs, tmp_path / "out", world=2, zero_stage=zero_stage)
    for stage in STAGES:
        expected, found = metrics(one_rank / stage), metrics(two_ranks / stage)
        assert len(expected) == len(found)
        for first, second in zip(expected, found, strict=True):
            assert first.keys() == second.keys()
            for name, value in first.items():
                close = math.isclose(value, second[name], rel_tol=1e-3, abs_tol=TOLERANCE)
                assert close, f"{stage} step {first['step']} {name}: one rank {value}, two ranks {second[name]}"
    for name in MODELS:
        expected, found = weights(one_rank / name), weights(two_ranks / name)
        assert expected.keys() == found.keys()
        for key, tensor in expected.items():
            difference = (tensor - found[key]).abs().max().item()
            assert difference < TOLERANCE, f"{name} {key}: {difference}"


def test_training_moved_the_weights(inputs, one_rank):
    """The comparison would be empty if nothing had been learnt."""
    base = weights(inputs[0])
    sft = weights(one_rank / "sft/model")
    actor = weights(one_rank / "ppo/actor")
    assert max((base[name] - sft[name]).abs().max().item() for name in base) > 5 * TOLERANCE
    assert max((sft[name] - actor[name]).abs().max().item() for name in sft) > 5 * TOLERANCE
