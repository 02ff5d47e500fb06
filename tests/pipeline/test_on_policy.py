"""What an on-policy stage is put together from, with engines of tiny models."""

from __future__ import annotations

import copy

import pytest
import torch

from rlhf.algorithms.config import PPOConfig
from rlhf.checkpoint.export import export_scalar_model
from rlhf.config import ConfigError
from rlhf.data.stage_data import StageData
from rlhf.data.world.datasets import default_rows
from rlhf.evaluation.gold import measure_gold
from rlhf.models.scalar import ScalarModel
from rlhf.numerics.statistics import score_last
from rlhf.pipeline.on_policy import OnPolicyModels, check_selection, load_ptx
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
    assert list(prints) == ["actor", "reward", "critic", "held_out"] and prints["held_out"] is None
    assert prints["reward"] == prints["critic"] != prints["actor"]
    alone = OnPolicyModels(actor, None, None, models.tokenizer, None)
    assert alone.fingerprints() == {"actor": prints["actor"], "reward": None, "critic": None, "held_out": None}
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


def test_the_sft_rows_beside_ppo_are_those_of_the_sft_stage(models, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f'{{"prompt": "q{n}", "response": "a{n}"}}\n' for n in range(80)), encoding="utf-8")
    words = [
        "--ptx_data",
        str(path),
        "--seed",
        "3",
        "--cache_dir",
        str(tmp_path / "cache"),
        "--stage_split",
        "3,1,2",
        "--eval_fraction",
        "0",
    ]
    stage = stage_run(tmp_path, *words, "--ptx_coef", "0.5")
    (tmp_path / "ppo").mkdir(exist_ok=True)
    found = load_ptx(stage, models.tokenizer)
    assert (found.coef, found.pad_token_id) == (0.5, models.tokenizer.pad_token_id)
    shares = {
        name: stage.load_data("response", [str(path)], [], models.tokenizer, stage=name)
        for name in ("sft", "reward", "ppo")
    }
    assert [row.id for row in found.rows] == [row.id for row in shares["sft"].train]
    assert sum(len(share.train) for share in shares.values()) == 80 > len(found.rows) > len(shares["ppo"].train)
    (micro,) = found.micro_batches(1, torch.device("cpu"), sharers=1)
    assert micro.input_ids.shape[0] == 4, "as many as a minibatch of PPO has"


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


@pytest.fixture(scope="module")
def other_reward(tiny_models, tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("on_policy") / "held_out"
    export_scalar_model(ScalarModel.from_base(tiny_models["gpt_neox"], dtype=torch.float32, seed=6), tokenizer, path)
    return str(path)


def test_a_held_out_reward_model_is_asked_of_evaluations_alone(models, other_reward, tmp_path):
    words = ["--actor_model", models.actor, "--reward_model", models.reward, "--held_out_reward_model", other_reward]
    stage = stage_run(tmp_path, *words)
    found = OnPolicyModels.find(stage)
    assert found.held_out_reward == other_reward and found.fingerprints()["held_out"] is not None
    engine = found.build(stage, optimizer_steps=(1, 1))
    assert not any(weight.requires_grad for weight in engine.held_out_reward.parameters())
    worker, calls = found.rollouts(stage, engine), []
    engine.held_out_reward.backbone.register_forward_pre_hook(lambda *_: calls.append(1))
    worker.run(PROMPTS, 1)
    assert not calls
    kept = []
    evaluation = worker.evaluate(PROMPTS, copies=2, shown=0, further=lambda scored: kept.append(scored) or {})
    ids, mask = kept[0].rollout.sequences()
    with torch.no_grad():
        expected = score_last(engine.held_out_reward(ids, mask), mask)
        assert not torch.allclose(expected, score_last(engine.reward(ids, mask), mask))
    assert evaluation["prompt_measures"]["held_out_score"] == pytest.approx(expected.view(4, 2).mean(1).tolist())
    assert evaluation["held_out_score"] == pytest.approx(float(expected.mean()))


def test_the_reward_model_that_is_optimised_cannot_be_the_held_out_one(models, tmp_path):
    words = ["--actor_model", models.actor, "--reward_model", models.reward, "--held_out_reward_model"]
    with pytest.raises(ConfigError, match="holds the same model as the reward model .* train another one"):
        OnPolicyModels.find(stage_run(tmp_path, *words, models.reward))
    with pytest.raises(ConfigError, match="is not a reward model"):
        OnPolicyModels.find(stage_run(tmp_path, *words, models.actor))


def test_a_figure_that_the_held_out_prompts_do_not_give_is_refused():
    of_world = [TokenizedPrompt(row["id"], (5,), row["prompt"]) for row in default_rows("prompts_heldout")[:3]]
    gold = PPOConfig(keep_best="gold", stop_when="gold", eval_every_steps=1)
    check_selection(gold, of_world)
    check_selection(PPOConfig(), [])
    with pytest.raises(ConfigError, match="keep_best=gold needs held-out prompts of the embedded world"):
        check_selection(gold, [*of_world, PROMPTS[0]])
    with pytest.raises(ConfigError, match="stop_when=reward needs held-out prompts: name some in prompt_eval_data"):
        check_selection(PPOConfig(stop_when="reward", eval_every_steps=1), [])
    check_selection(PPOConfig(stop_when="reward", eval_every_steps=1), PROMPTS)
