"""PPO on two ranks is PPO on one: whitening, steps, the ptx mixture, the sampling of equal prompts, and evaluation.

See `test_ppo_checklist.py`.
"""

from __future__ import annotations

import pytest
import torch

from rlhf.models.scalar import ScalarModel
from tests.support.launch import run_ranks

RANKS = '''
"""Experience and the weights after one update of PPO, on as many ranks as are started."""
import sys
from pathlib import Path
import torch
from rlhf.algorithms.config import PPOBatchConfig, PPOConfig, PPOOptimizerConfig
from rlhf.config import EngineConfig, ModelConfig
from rlhf.distributed.place import rank, world_size
from rlhf.distributed.world import init_world
from rlhf.engine import BatchPlan, RLHFEngine
from rlhf.models.loading import load_tokenizer
from rlhf.types import TokenizedPrompt, TokenizedResponse
from tests.support.on_policy import FunctionReward, ppo_trainer, reward_of

actor, reward, out, advantage = [item for item in sys.argv[1:] if not item.startswith("--local_rank")]
init_world()
plan = BatchPlan(8, 2, world_size())
engine = RLHFEngine.build(
    actor, critic_model=reward if advantage == "gae" else None, reward_model=reward, held_out_reward_model=reward,
    model=ModelConfig(), engine=EngineConfig(precision="fp32", max_grad_norm=0.0),
    optimizer=PPOOptimizerConfig(learning_rate=1e-2, adam_eps=1e-2, lr_schedule="constant"),
    critic_learning_rate=1e-2, plan=plan, total_steps=4,
)
same = (5, 6, 7)
rows = [same, same, (8,), (9, 10), (11, 12, 13, 14), same, (15, 16), (17,)]
trainer = ppo_trainer(
    engine, FunctionReward(lambda rollout, texts: (rollout.response_ids * rollout.response_mask).sum(1).float() / 50),
    [TokenizedPrompt(id=str(i), input_ids=row, text="") for i, row in enumerate(rows)],
    [TokenizedPrompt(id="held out", input_ids=(20, 21), text="")],  # fewer than ranks
    tokenizer=load_tokenizer(actor), plan=plan, directory=Path(out) / "ppo", new_tokens=5,
    batch=PPOBatchConfig(rollout_batch_size=8, max_steps=1, ppo_epochs=2, samples_per_prompt=1 + (advantage != "gae")),
    config=PPOConfig(advantage=advantage, ptx_coef=5.0, eval_samples_per_prompt=1, length_calibration_prompts=8),
    # rows of 1 to 29 labels: the ranks' shares of them are far from equal
    ptx=[TokenizedResponse(id="", input_ids=(1, *range(2, 3 + n)), prompt_tokens=1) for n in range(0, 32, 4)],
)
trainer.rollouts.held_out_reward = reward_of(engine.held_out_reward, load_tokenizer(actor))
mine, share = None, None
with engine.scoring():
    mine, share = trainer.rollouts.sample([trainer.prompts.train[i] for i in trainer.order.indices(0)], 1)
trainer.prepare()
experience = trainer.make_experience(1)
metrics = trainer.update(experience, 1)
torch.save(
    {
        "share": share, "mine": mine.response_ids, "prompts": experience.rollout.prompt_ids,
        "responses": experience.rollout.response_ids, "advantages": experience.advantages, "metrics": metrics,
        "returns": experience.returns, "actor": engine.actor.module.state_dict(),
        "critic": engine.critic.module.state_dict() if engine.critic else {}, "evaluation": trainer.evaluate(1),
        "curve": trainer.rollouts.length_curves.last.content(),
    },
    Path(out) / f"rank{rank()}.pt",
)
'''


@pytest.fixture(scope="module")
def reward_directory(tiny_models, tokenizer, tmp_path_factory):
    from rlhf.checkpoint.export import export_scalar_model

    path = tmp_path_factory.mktemp("reward") / "model"
    export_scalar_model(ScalarModel.from_base(tiny_models["gpt2"], dtype=torch.float32, seed=5), tokenizer, path)
    return path


@pytest.fixture(scope="module")
def one_and_two_ranks(tiny_models, reward_directory, tmp_path_factory):
    return on_one_and_two_ranks("gae", tiny_models, reward_directory, tmp_path_factory)


def on_one_and_two_ranks(advantage, tiny_models, reward_directory, tmp_path_factory):
    """What every rank saved: {1: [rank 0], 2: [rank 0, rank 1]}."""
    found = {}
    for world in (1, 2):
        directory = tmp_path_factory.mktemp(f"world{world}")
        arguments = [str(tiny_models["gpt2"]), str(reward_directory), str(directory), advantage]
        done = run_ranks(RANKS, world, directory, arguments)
        assert done.returncode == 0, done.stdout[-4000:]
        found[world] = [torch.load(directory / f"rank{index}.pt", weights_only=False) for index in range(world)]
    return found


def test_14_two_ranks_whiten_as_one(one_and_two_ranks):
    one = one_and_two_ranks[1][0]
    for two in one_and_two_ranks[2]:
        assert torch.equal(one["responses"], two["responses"])
        torch.testing.assert_close(one["advantages"], two["advantages"], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(one["returns"], two["returns"], atol=1e-5, rtol=1e-4)


def test_two_ranks_fit_the_length_curve_of_one(one_and_two_ranks):
    curve = one_and_two_ranks[1][0]["curve"]
    assert any(curve["values"]), "it takes nothing off"
    first, second = (rank["curve"] for rank in one_and_two_ranks[2])
    assert first == second and first["places"] == curve["places"]
    assert first["values"] == pytest.approx(curve["values"], abs=1e-4)


def test_15_two_ranks_take_the_same_steps_as_one(one_and_two_ranks):
    one = one_and_two_ranks[1][0]
    for two in one_and_two_ranks[2]:
        for model in ("actor", "critic"):
            for name, weight in one[model].items():
                torch.testing.assert_close(two[model][name], weight, atol=1e-4, rtol=1e-3)
        for name in ("policy_loss", "ptx_loss", "value_loss", "ratio", "clip_fraction", "score", "kl_per_token"):
            assert two["metrics"][name] == pytest.approx(one["metrics"][name], abs=1e-4), name
    assert one["metrics"]["ratio_first"] == pytest.approx(1, abs=1e-5)


def test_groups_that_are_split_over_two_ranks_learn_as_on_one(tiny_models, reward_directory, tmp_path_factory):
    """GRPO, whose two responses to a prompt are sampled on two ranks."""
    found = on_one_and_two_ranks("grpo", tiny_models, reward_directory, tmp_path_factory)
    one = found[1][0]
    for two in found[2]:
        assert torch.equal(one["responses"], two["responses"]) and len(two["responses"]) == 16
        torch.testing.assert_close(one["advantages"], two["advantages"], atol=1e-4, rtol=1e-3)
        for name, weight in one["actor"].items():
            torch.testing.assert_close(two["actor"][name], weight, atol=1e-4, rtol=1e-3)
        for name in ("policy_loss", "ptx_loss", "kl_loss", "ratio", "equal_groups"):
            assert two["metrics"][name] == pytest.approx(one["metrics"][name], abs=1e-4), name
    assert one["advantages"].abs().max() > 0.5


def test_an_evaluation_of_fewer_prompts_than_ranks_counts_each_of_them_once(one_and_two_ranks):
    one = one_and_two_ranks[1][0]["evaluation"]
    assert [sample["id"] for sample in one["samples"]] == ["held out"] and one["response_tokens"] > 0
    assert one["prompt_measures"]["held_out_score"] == [one["held_out_score"]] != one["prompt_scores"]
    for two in one_and_two_ranks[2]:
        assert two["evaluation"].keys() == one.keys()
        for name in one.keys() - {"samples", "prompt_measures"}:
            assert two["evaluation"][name] == pytest.approx(one[name], abs=1e-3), name


def test_21_two_ranks_sample_different_responses_to_the_same_prompt(one_and_two_ranks):
    first, second = one_and_two_ranks[2]
    assert sorted(first["share"] + second["share"]) == list(range(8))
    prompts = [tuple(row) for row in first["prompts"].tolist()]
    same = [index for index, prompt in enumerate(prompts) if prompts.count(prompt) == 3]
    assert len(same) == 3
    answers = [tuple(first["responses"][index].tolist()) for index in same]
    assert len(set(answers)) == 3
    # and they do come from two ranks
    assert {index % 2 for index in same} == {0, 1}
