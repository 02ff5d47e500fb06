"""Three ranks over eight rows learn and sample what one does."""

from __future__ import annotations

import pytest
import torch

from rlhf.checkpoint.export import export_scalar_model
from rlhf.models.scalar import ScalarModel
from tests.support.launch import run_ranks

WORKER = """
import sys
from pathlib import Path
import torch
from deepspeed.utils import safe_get_full_grad
from rlhf.config import EngineConfig, ModelConfig, OptimizerConfig
from rlhf.distributed.place import is_main, world_size
from rlhf.distributed.world import close_world, init_world
from rlhf.engine import BatchPlan, RLHFEngine
from rlhf.generation.backend import make_backend
from rlhf.generation.token_sampling import Sampling
from rlhf.models.forward import forward_logits
from rlhf.models.loading import load_tokenizer
from rlhf.training.data_order import DataOrder
from rlhf.training.rollouts import RolloutWorker
from rlhf.training.step import accumulate_step
from rlhf.types import TokenizedPrompt
from tests.support.on_policy import FunctionReward

actor, reward, out = [Path(item) for item in sys.argv[1:] if not item.startswith("--local_rank")]
init_world()
LENGTHS = [9, 3, 7, 2, 8, 4, 6, 5]
generator = torch.Generator().manual_seed(5)
ROWS = [torch.randint(1, 90, (length,), generator=generator).tolist() for length in LENGTHS]


def token_batch(rows):
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    return ids, torch.tensor([[True] * len(row) + [False] * (longest - len(row)) for row in rows])


def loss_sum(model, ids, mask):
    logprobs = forward_logits(model, ids, mask)[:, :-1].float().log_softmax(-1)
    return -(logprobs.gather(2, ids[:, 1:, None]).squeeze(2) * mask[:, 1:]).sum()


found = {}
for stage in (0, 2, 3):
    for micro in (1, 2, 8):
        plan = BatchPlan(8, micro, world_size())  # three devices do not divide eight rows
        engine = RLHFEngine.build(
            actor, critic_model=reward, reward_model=reward, model=ModelConfig(),
            engine=EngineConfig(zero_stage=stage, precision="fp32", max_grad_norm=0.0), plan=plan, total_steps=4,
            optimizer=OptimizerConfig(learning_rate=1e-2, adam_eps=1e-2),
        )
        gradients = {}
        take_step = engine.actor.step
        def step():
            for name, parameter in engine.actor.module.named_parameters():
                gradients[name] = safe_get_full_grad(parameter).clone()
            take_step()
        engine.actor.step = step
        order = DataOrder(LENGTHS, plan, seed=3)
        parts = order.micro_batches(0)
        loss = accumulate_step(
            engine.actor, [token_batch([ROWS[index] for index in part]) for part in parts], step=1,
            count=lambda batch: float(batch[1][:, 1:].sum()), loss_sum=lambda batch: loss_sum(engine.actor, *batch),
        )
        found[f"gradients {stage} {micro}"] = gradients
        found[f"loss {stage} {micro}"] = loss
    backend = make_backend("own", engine.actor, eos_ids=[1], pad_token_id=0, seed=2)
    reward_of_ids = FunctionReward(lambda rollout, texts: (rollout.response_ids * rollout.response_mask).sum(1).float())
    worker = RolloutWorker(
        engine, backend, reward_of_ids, Sampling(6),
        tokenizer=load_tokenizer(actor), eos_ids=[1], plan=BatchPlan(8, 2, world_size()), scoring_tokens=9,
    )
    prompts = [TokenizedPrompt(id=str(index), input_ids=tuple(row), text="") for index, row in enumerate(ROWS)]
    scored = worker.run(prompts, 1)
    found[f"rollout {stage}"] = {
        "ids": scored.rollout.response_ids, "mask": scored.rollout.response_mask, "logprobs": scored.logprobs,
        "ref_logprobs": scored.ref_logprobs, "values": scored.values, "scores": scored.scores,
    }
if is_main():
    torch.save(found, out / "found.pt")
close_world()
"""


@pytest.fixture(scope="module")
def one_and_three_ranks(tiny_models, tokenizer, tmp_path_factory):
    reward = tmp_path_factory.mktemp("reward") / "model"
    export_scalar_model(ScalarModel.from_base(tiny_models["gpt2"], dtype=torch.float32, seed=4), tokenizer, reward)
    found = []
    for world in (1, 3):
        out = tmp_path_factory.mktemp(f"world{world}")
        done = run_ranks(WORKER, world, out, [str(tiny_models["gpt2"]), str(reward), str(out)])
        assert done.returncode == 0, done.stdout[-4000:]
        found.append(torch.load(out / "found.pt", weights_only=True))
    return found


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_three_ranks_take_the_step_of_one_over_eight_rows(stage, one_and_three_ranks):
    one, three = one_and_three_ranks
    expected = one["gradients 0 8"]
    assert min(gradient.abs().max() for gradient in expected.values()) > 1e-4
    for micro in (1, 2, 8):
        for found in (one, three):
            assert found[f"loss {stage} {micro}"] == pytest.approx(one["loss 0 8"], rel=1e-5)
            assert found[f"gradients {stage} {micro}"].keys() == expected.keys()
            for name, gradient in found[f"gradients {stage} {micro}"].items():
                torch.testing.assert_close(gradient, expected[name], atol=2e-6, rtol=1e-4)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_three_ranks_sample_and_score_the_eight_rows_of_one(stage, one_and_three_ranks):
    one, three = (found[f"rollout {stage}"] for found in one_and_three_ranks)
    assert len({tuple(row) for row in one["ids"].tolist()}) == 8
    assert torch.equal(one["ids"], three["ids"]) and torch.equal(one["mask"], three["mask"])
    for name in ("logprobs", "ref_logprobs", "values", "scores"):
        assert one[name].abs().max() > 0.01
        torch.testing.assert_close(three[name], one[name], atol=1e-4, rtol=1e-4)
