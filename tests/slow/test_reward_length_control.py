"""Length control on two real ranks gives what one rank gives: correlations and curves are those of all rows.

float32 over gloo, Adam's epsilon 1e-3 and tolerances as in test_two_ranks.py.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.support.launch import run_ranks
from tests.support.pipeline_worker import SMALL
from tests.support.samples import write_sample

SCRIPT = Path(__file__).parents[2] / "step2_reward" / "main.py"
TOLERANCE = 2e-4


@pytest.fixture(scope="module")
def train(micro_base, tmp_path_factory):
    """Runs the reward stage on so many ranks, once for the same settings; gives its directory."""
    root = tmp_path_factory.mktemp("length_control")
    write_sample("preference_train", root / "train.jsonl", 33)
    write_sample("preference_heldout", root / "heldout.jsonl", 11)
    done: dict[tuple[str, int, int], Path] = {}

    def run(control: str, world: int, zero_stage: int) -> Path:
        key = (control, world, zero_stage)
        if key not in done:
            output = root / f"{control}-{world}-{zero_stage}"
            words = ["--output_dir", output, "--cache_dir", root / "cache", "--base_model", micro_base, *SMALL.split()]
            words += ["--max_response_tokens", 64]  # lengths that differ
            words += ["--preference_data", root / "train.jsonl", "--preference_eval_data", root / "heldout.jsonl"]
            words += [
                "--zero_stage",
                zero_stage,
                "--length_control",
                control,
                "--cross_prompt_share",
                0.5,
                "--max_steps",
                3,
            ]
            result = run_ranks(SCRIPT, world, output, [str(word) for word in words])
            assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
            done[key] = output / "reward"
        return done[key]

    return run


@pytest.mark.parametrize(("control", "zero_stage"), [("odin", 0), ("odin", 3), ("balance", 2), ("calibrate", 2)])
def test_two_ranks_equal_one(train, control, zero_stage):
    one, two = train(control, 1, 0), train(control, 2, zero_stage)
    lines = [[json.loads(line) for line in (each / "metrics.jsonl").read_text().splitlines()] for each in (one, two)]
    assert len(lines[0]) == len(lines[1]) and any("loss" in line for line in lines[0])
    assert any("quality_length_correlation" in line for line in lines[0]) == (control == "odin")
    for first, second in zip(*lines, strict=True):
        assert first.keys() == second.keys()
        for name, value in first.items():
            close = math.isclose(value, second[name], rel_tol=1e-3, abs_tol=TOLERANCE)
            assert close or name.startswith("seconds"), f"step {first['step']} {name}: {value} and {second[name]}"
    weights = [load_file(each / "model" / "model.safetensors") for each in (one, two)]
    for name, tensor in weights[0].items():
        assert (tensor - weights[1][name]).abs().max() < TOLERANCE, name
    if control == "calibrate":
        curves = [json.loads((each / "model" / "length_curve.json").read_text()) for each in (one, two)]
        assert curves[0]["places"] == curves[1]["places"]
        assert curves[0]["values"] == pytest.approx(curves[1]["values"], abs=1e-3)
