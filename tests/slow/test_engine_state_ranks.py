"""An engine's state saved and loaded on one and two ranks, under any ZeRO stage."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from rlhf.config import ConfigError
from rlhf.engine import load_engine_state
from tests.engine import test_engine_state
from tests.engine.test_engine_state import copied_state
from tests.support.engine_state_worker import (
    LAST,
    SAVED_AFTER,
    Case,
    assert_same_bytes,
    build,
    save,
    saved_tensors,
    train,
)
from tests.support.launch import ROOT, run_ranks

models, one_rank = test_engine_state.models, test_engine_state.one_rank  # fixtures
WORKER = ROOT / "tests" / "support" / "engine_state_worker.py"


TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def two_ranks(models, one_rank, tmp_path_factory) -> tuple[Path, dict[str, list[float]]]:
    out = tmp_path_factory.mktemp("two_ranks")
    done = run_ranks(WORKER, 2, out, [str(models), str(out), str(one_rank[0])])
    assert done.returncode == 0 and done.stdout.count("a rank is done") == 2, done.stdout[-6000:]
    return out, json.loads((out / "losses.json").read_text())


def test_two_ranks_go_on_exactly(two_ranks):
    """The comparisons are made on the ranks; here, that all cases were there and are about the same training."""
    _, losses = two_ranks
    assert losses["fp32-0"] == pytest.approx(losses["fp32-3"], rel=TOLERANCE)
    assert len(losses) >= 9 and all(math.isfinite(loss) for each in losses.values() for loss in each)


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_one_rank_without_zero_becomes_two_with_it(zero_stage, one_rank, two_ranks):
    """DeepSpeed's own helpers are asked on the ranks for every weight and moment."""
    saved, expected, _ = one_rank
    out, losses = two_ranks
    assert_same_bytes(saved_tensors(saved), saved_tensors(out / f"from-one-{zero_stage}"))
    assert losses[f"from-one-{zero_stage}"] == pytest.approx(expected, rel=TOLERANCE)


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_one_rank_in_bf16_becomes_two(zero_stage, one_rank, two_ranks):
    saved = one_rank[0].with_name(one_rank[0].name + "-bf16")
    assert_same_bytes(saved_tensors(saved), saved_tensors(two_ranks[0] / f"bf16-from-one-{zero_stage}"))


@pytest.mark.parametrize(
    ("saved_as", "case", "tolerance"),
    [
        ("fp32-3", Case("three-to-one", 1), TOLERANCE),
        ("fp32-2", Case("two-to-three", 3), TOLERANCE),
        ("fp32-1", Case("one-to-none"), TOLERANCE),
        ("fp32-0", Case("none-to-two", 2), TOLERANCE),
        ("bf16-3-offload", Case("tied-two", 2, "bf16", model="gpt2"), 2e-2),
        ("bf16-1", Case("bf16-none", 0, "bf16"), 2e-2),
        ("bf16-0", Case("bf16-two", 2, "bf16"), 2e-2),
        ("bf16-2", Case("bf16-three", 3, "bf16"), 2e-2),
        ("bf16-2", Case("bf16-one", 1, "bf16"), 2e-2),
        ("bf16-1-bf16-gradients", Case("bf16-earlier", 0, "bf16"), 2e-2),
        ("bf16-3-lora", Case("lora-one", 1, "bf16", lora=True), 2e-2),
        ("bf16-1", Case("bf16-to-fp32", 3), 2e-2),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_two_ranks_become_one(saved_as, case, tolerance, models, two_ranks, tmp_path):
    """Micro-batches of 2 in place of 1 on top; the tolerance in bf16 is what one rounding of the weights makes."""
    out, losses = two_ranks
    saved = saved_tensors(out / saved_as / "saved")
    engine = build(case, models, micro_batch_size=2, seed=1)
    load_engine_state(engine, out / saved_as / "saved", "actor")
    save(engine, tmp_path / "again")
    assert_same_bytes(saved, saved_tensors(tmp_path / "again"))
    if case.zero_stage == 0 and case.precision == "fp32":
        for name, parameter in engine.module.named_parameters():  # plain torch: nothing of ours in between
            moments = engine.optimizer.state[parameter]
            assert moments["step"] == SAVED_AFTER
            for key, tensor in {"weight": parameter, **moments}.items():
                assert key == "step" or torch.equal(tensor, saved[f"{key}/{name}"])
    assert train(case, engine, SAVED_AFTER, LAST, micro_batch_size=2) == pytest.approx(losses[saved_as], rel=tolerance)
    assert engine.global_steps == engine.lr_scheduler.last_epoch == LAST


def test_packed_moments_stay_where_they_are(models, two_ranks, tmp_path):
    pytest.importorskip("bitsandbytes")
    saved = two_ranks[0] / "bf16-0-8bit-adam" / "saved"
    assert len(list(saved.glob("actor.rank*.safetensors"))) == 2
    engine = build(Case("8bit-two", 2, "bf16", model="wide", optimizer="adamw_8bit"), models)
    with pytest.raises(ConfigError, match="zero_stage=1 on 2 ranks and cannot be loaded with zero_stage=2 on 1 rank;"):
        load_engine_state(engine, saved, "actor")
    earlier, index = copied_state(saved, tmp_path / "earlier")  # stage 0 in 16 bit was not stage 1 then
    (earlier / "actor.json").write_text(json.dumps({**index, "zero_stage": 0, "world_size": 1}))
    engine = build(Case("8bit-none", 0, "bf16", model="wide", optimizer="adamw_8bit"), models)
    with pytest.raises(ConfigError, match="zero_stage=0 on 1 rank and cannot .* and the release that saved it"):
        load_engine_state(engine, earlier, "actor")
