"""Engines under ZeRO 0 to 3 on two ranks: gradients and exports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf.models.forward import forward_logits
from rlhf.models.loading import load_causal_lm
from rlhf.models.scalar import ScalarModel
from tests.engine import test_engine
from tests.engine.test_engine import FP32, batch, each_stage, reference_gradients
from tests.support.launch import run_ranks

reward_model = test_engine.reward_model  # a fixture
RANK_SCRIPT = """
import sys
from pathlib import Path
import torch
from rlhf.checkpoint.export import export_causal_lm, export_scalar_model, full_state_dict
from rlhf.config import EngineConfig, ModelConfig
from rlhf.distributed.place import is_main, rank, world_size
from rlhf.distributed.world import init_world
from rlhf.engine import BatchPlan, RLHFEngine
from rlhf.models.loading import load_tokenizer
from tests.engine import test_engine
from tests.engine.test_engine import (
    OPTIMIZER, backward_in_micro_batches, batch, forward_logits, full_gradients, make_engine, token_sum)
arguments = [item for item in sys.argv[1:] if not item.startswith("--local_rank")]
path, reward, out = arguments
init_world()
assert world_size() == 2
plan = BatchPlan(6, 1, 2)
ids, mask = batch()
tokenizer = load_tokenizer(path)
results = {}
for stage in (0, 1, 2, 3):
    engine = make_engine(Path(path), stage, plan=plan)
    if stage == 3:
        assert any(parameter.numel() == 0 for parameter in engine.module.parameters()), "not partitioned at load"
    backward_in_micro_batches(engine, plan, rank())
    gradients = full_gradients(engine)
    engine.step()
    state = full_state_dict(engine)
    assert bool(state) == is_main()
    export_causal_lm(engine, tokenizer, Path(out) / f"stage{stage}")
    results[stage] = (gradients, state)
for stage, rank_of_lora in ((3, 0), (3, 2), (1, 2)):
    four = RLHFEngine.build(
        path, critic_model=reward, reward_model=reward, model=ModelConfig(lora_rank=rank_of_lora),
        engine=EngineConfig(zero_stage=stage, precision="fp32"), optimizer=OPTIMIZER,
        critic_learning_rate=1e-2, plan=plan, total_steps=4, ema_decay=0.5)
    four.eval()
    with torch.no_grad():
        before = forward_logits(four.actor, ids, mask)
        start = four.critic(ids, mask)
        assert torch.equal(start, four.reward(ids, mask))
    for _ in range(3):  # an adapter's second half starts at 0: it moves the output from the second step on
        backward_in_micro_batches(four.actor, plan, rank())
        four.actor.step()
    for _ in range(plan.accumulation_steps):
        four.critic.backward(four.critic(ids, mask).pow(2).mean())
        four.critic.step()
    four.averaged_actor.update()
    with torch.no_grad(), four.reference_model() as reference:
        torch.testing.assert_close(forward_logits(reference, ids, mask), before)
    with torch.no_grad():
        assert (forward_logits(four.actor, ids, mask) - before).abs().max() > 1e-3
        values = four.critic(ids, mask)
        assert (values - start).abs().max() > 1e-3
    name = f"rlhf{stage}-{rank_of_lora}"
    export_causal_lm(four.actor, tokenizer, Path(out) / name / "actor")
    export_causal_lm(four.actor, tokenizer, Path(out) / name / "ema", state_dict=four.averaged_actor.state_dict())
    export_scalar_model(four.critic, tokenizer, Path(out) / name / "critic")
    with torch.no_grad():
        results[name] = (forward_logits(four.actor, ids, mask), values, four.averaged_actor.state_dict(), before)
refused = False
try:
    export_causal_lm(four.actor, tokenizer, Path(path) / "config.json" / "below-a-file")
except OSError as error:
    refused = "below-a-file" in str(error)
assert refused, f"rank {rank()} was not told that rank 0 could not write"
if is_main():
    torch.save(results, Path(out) / "results.pt")
    print("both ranks done")
"""


@pytest.fixture(scope="module")
def two_ranks(tiny_models, reward_model, tmp_path_factory) -> tuple[Path, dict[Any, Any]]:
    out = tmp_path_factory.mktemp("ranks")
    done = run_ranks(RANK_SCRIPT, 2, out, [str(tiny_models["gpt_neox"]), str(reward_model), str(out)])
    assert done.returncode == 0 and "both ranks done" in done.stdout, done.stdout[-4000:]
    return out, torch.load(out / "results.pt", weights_only=True)


@each_stage
def test_two_ranks_give_the_gradient_of_one(zero_stage, two_ranks, tiny_models):
    found, _ = two_ranks[1][zero_stage]
    for name, gradient in reference_gradients(tiny_models["gpt_neox"]).items():
        torch.testing.assert_close(found[name], gradient, atol=2e-6, rtol=1e-4)


@each_stage
def test_two_ranks_export_what_they_hold(zero_stage, two_ranks, tiny_models):
    out, results = two_ranks
    saved = load_causal_lm(out / f"stage{zero_stage}", dtype=FP32).state_dict()
    start = load_causal_lm(tiny_models["gpt_neox"], dtype=FP32).state_dict()
    assert saved.keys() == start.keys()
    state = results[zero_stage][1]
    assert state.keys() == saved.keys()
    for name, tensor in state.items():
        assert torch.equal(saved[name], tensor) and not torch.equal(saved[name], start[name])
        torch.testing.assert_close(tensor, results[0][1][name], atol=2e-3, rtol=0)  # a fifth of Adam's first step


@pytest.mark.parametrize("name", ["rlhf3-0", "rlhf3-2", "rlhf1-2"])
def test_two_ranks_export_actor_critic_and_average(name, two_ranks):
    out, results = two_ranks
    logits, values, ema, before = results[name]
    ids, mask = batch()
    with torch.no_grad():
        actor = load_causal_lm(out / name / "actor", dtype=FP32).eval()
        torch.testing.assert_close(forward_logits(actor, ids, mask)[mask], logits[mask], atol=1e-5, rtol=1e-4)
        critic = ScalarModel.from_pretrained(out / name / "critic", dtype=FP32).eval()
        torch.testing.assert_close(critic(ids, mask)[mask], values[mask], atol=1e-5, rtol=1e-4)
        average = forward_logits(load_causal_lm(out / name / "ema", dtype=FP32).eval(), ids, mask)
    assert ema and all(tensor.dtype == FP32 for tensor in ema.values())
    moved = (logits - before)[mask].norm()
    assert 0 < (average - before)[mask].norm() < 0.9 * moved  # decay 0.5: half-way from start to actor
