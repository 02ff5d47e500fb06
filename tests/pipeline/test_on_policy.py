"""What an on-policy stage is put together from, with engines of tiny models."""

from __future__ import annotations

import copy

import pytest
import torch

from rlhf.checkpoint.export import export_scalar_model
from rlhf.config import ConfigError
from rlhf.data.stage_data import StageData
from rlhf.evaluation.gold import measure_gold
from rlhf.models.scalar import ScalarModel
from rlhf.pipeline.on_policy import OnPolicyModels, load_ptx
from rlhf.pipeline.stage_run import StageRun
from rlhf.pipeline.stages import STAGES, parse_stage
from rlhf.types import TokenizedPrompt

PROMPTS = [TokenizedPrompt(str(number), (5, 6, 7 + number), "asked") for number in range(4)]
BATCH = ["--global_batch_size", "4", "--micro_batch_size", "4", "--rollout_batch_size", "4", "--precision", "fp32"]


def stage_run(directory, *words):
    argv = ["--output_dir", str(directory), "--max_prompt_tokens", "8", "--max_response_tokens", "9", *BATCH, *words]
    return StageRun(STAGES["ppo"], parse_stage("ppo", argv), directory / "ppo")


@pytest.fixture(scope="module")
def models(tiny_models, tokenizer, tmp_path_factory):
    reward = tmp_path_factory.mktemp("on_policy") / "reward"
    export_scalar_model(ScalarModel.from_base(tiny_models["gpt_neox"], dtype=torch.float32, seed=5), tokenizer, reward)
    return OnPolicyModels(str(tiny_models["gpt_neox"]), str(reward), str(reward), tokenizer, tokenizer)


def test_the_seed_and_the_limits_of_a_run_reach_what_samples(models, tmp_path):
    """The actor and the prompts are the same: only the seed chooses other responses."""
    drawn = []
    for seed in ("3", "3", "4"):
        stage = stage_run(tmp_path, "--seed", seed)
        engine = models.build(stage, optimizer_steps=(1, 1))
        found = models.rollouts(stage, engine).run(PROMPTS, 1)
        assert found.rollout.response_ids.shape[1] <= 9 and (found.rollout.response_mask.sum(1) == 9).any()
        drawn.append(found.rollout.response_ids[found.rollout.response_mask].tolist())
    assert drawn[0] == drawn[1] != drawn[2]


def test_what_samples_and_scores_is_what_the_configuration_says(models, tmp_path):
    words = ["--generation_batch_size", "3", "--scoring_batch_tokens", "50", "--old_logprobs", "recomputed",
             "--temperature", "0.5", "--ema_decay", "0.5"]  # fmt: skip
    stage = stage_run(tmp_path, *words)
    worker = models.rollouts(stage, models.build(stage, optimizer_steps=(1, 1)))
    assert (worker.backend.slots, worker.scoring_tokens, worker.old_logprobs) == (3, 50, "recomputed")
    sampling = worker.sampling
    assert (sampling.max_new_tokens, sampling.temperature, sampling.vocabulary_size) == (9, 0.5, len(models.tokenizer))
    assert worker.plan == stage.plan and worker.measure is measure_gold
    actor, critic = models.actor, models.critic
    assert models.trained(stage) == {"actor": actor, "critic": critic, "averaged actor": actor}
    assert models.trained(stage_run(tmp_path)) == {"actor": actor, "critic": critic}
    prints = models.fingerprints()
    assert list(prints) == ["actor", "reward", "critic"] and prints["reward"] == prints["critic"] != prints["actor"]
    alone = OnPolicyModels(actor, None, None, models.tokenizer, None)
    assert alone.fingerprints() == {"actor": prints["actor"], "reward": None, "critic": None}
    assert alone.trained(stage_run(tmp_path)) == {"actor": actor}


def test_a_critic_starts_from_the_reward_model_or_from_what_is_named(models, tmp_path):
    words = ["--actor_model", models.actor, "--reward_model", models.reward]
    found = OnPolicyModels.find(stage_run(tmp_path, *words))
    assert (found.actor, found.reward, found.critic) == (models.actor, models.reward, models.reward)
    named = OnPolicyModels.find(stage_run(tmp_path, *words, "--critic_model", models.actor))
    assert named.critic == models.actor
    with pytest.raises(ConfigError, match="is not a reward model"):
        OnPolicyModels.find(stage_run(tmp_path, "--actor_model", models.actor, "--reward_model", models.actor))
    assert load_ptx(stage_run(tmp_path), models.tokenizer) is None


def test_a_chat_that_the_reward_model_cannot_render_is_found_before_a_model_is_loaded(models, tokenizer, tmp_path):
    other = copy.deepcopy(tokenizer)
    other.add_tokens(["<|more|>"])
    apart = OnPolicyModels(models.actor, models.reward, models.reward, tokenizer, other)
    prompts = StageData(PROMPTS, [], {}, "")
    with pytest.raises(ConfigError, match="has no chat template.*template=kullm"):
        apart.check_prompts(stage_run(tmp_path, "--template", "chat"), prompts)
    apart.check_prompts(stage_run(tmp_path, "--template", "kullm"), prompts)
    models.check_prompts(stage_run(tmp_path, "--template", "chat"), prompts)
    other.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    with pytest.raises(ConfigError, match="prompt '0' came rendered already"):
        apart.check_prompts(stage_run(tmp_path, "--template", "chat"), prompts)
