"""The bounds of an algorithm's settings: the last value that is allowed, and the first that is not."""

import pytest

from rlhf.algorithms.advantages import ESTIMATORS, Estimator
from rlhf.algorithms.config import PPOBatchConfig, PPOConfig
from rlhf.config import ConfigError
from rlhf.pipeline.stages import parse_stage

TINY = 1e-9
BOUNDS = [
    # class, field, allowed, refused, what is said
    *((PPOBatchConfig, name, 1, 0, f"{name}=0 must be at least 1")
      for name in ("rollout_batch_size", "samples_per_prompt", "ppo_epochs")),
    *((PPOBatchConfig, name, 0, -1, f"{name}=-1 must be at least 0")
      for name in ("generation_batch_size", "scoring_batch_tokens")),
    *((PPOConfig, name, TINY, 0.0, f"{name}=0.0 must be above 0")
      for name in ("clip_range", "value_clip_range", "temperature")),
    *((PPOConfig, name, 0.0, -TINY, f"{name}=-1e-09 must be at least 0")
      for name in ("kl_coef", "score_clip", "missing_eos_penalty", "entropy_coef", "ptx_coef")),
    *((PPOConfig, name, 0, -1, f"{name}=-1 must be at least 0")
      for name in ("eval_prompts", "critic_warmup_iterations")),
    *((PPOConfig, name, 1, 0, f"{name}=0 must be at least 1") 
      for name in ("eval_samples_per_prompt", "kl_horizon", "patience")),
    *((PPOConfig, name, 0.0, -TINY, f"{name}=-1e-09 must lie in [0, 1]") for name in ("gamma", "lam")),
    *((PPOConfig, name, 1.0, 1 + TINY, f"{name}=1.000000001 must lie in [0, 1]") for name in ("gamma", "lam")),
    (PPOConfig, "ema_decay", 0.0, -TINY, "ema_decay=-1e-09 must lie in [0, 1); 0 keeps no average"),
    (PPOConfig, "ema_decay", 1 - TINY, 1.0, "ema_decay=1.0 must lie in [0, 1); 0 keeps no average"),
    (PPOConfig, "kl_target", TINY, 0.0, "kl_target=0.0 must be above 0 nats, or unset for a fixed kl_coef"),
    (PPOConfig, "advantage", "gae", "gea", f"advantage='gea' is not one of {', '.join(ESTIMATORS)}"),
    (PPOConfig, "generation_backend", "deepspeed", "vllm", "generation_backend='vllm' is not one of own, deepspeed"),
    (PPOConfig, "rewards", ["reward_model"], [], "rewards is empty: name at least one, such as reward_model"),
]  # fmt: skip


@pytest.mark.parametrize(("config", "name", "allowed", "refused", "message"), BOUNDS)
def test_the_last_value_that_is_allowed_and_the_first_that_is_not(config, name, allowed, refused, message):
    assert getattr(config(**{name: allowed}), name) == allowed
    with pytest.raises(ConfigError) as error:
        config(**{name: refused})
    assert str(error.value) == message


@pytest.mark.parametrize("name", ["keep_best", "stop_when"])
def test_a_choice_between_evaluations_needs_some_and_what_it_is_made_by(name):
    assert PPOConfig(**{name: "gold"}, eval_every_steps=1)
    with pytest.raises(
        ConfigError, match=f"{name}=gold chooses between evaluations, and eval_every_steps=0 makes none"
    ):
        PPOConfig(**{name: "gold"})
    with pytest.raises(
        ConfigError, match=f"{name}=held_out_score needs a second reward model: .*held_out_reward_model"
    ):
        PPOConfig(**{name: "held_out_score"}, eval_every_steps=1)
    assert PPOConfig(**{name: "held_out_score"}, eval_every_steps=1, held_out_reward_model="runs/other/reward/model")


@pytest.mark.parametrize(("critic_init", "critic_model", "zero"), [
    (None, None, True), (None, "critic", False), ("zero", "critic", True), ("reward", None, False),
])  # fmt: skip
def test_a_critic_starts_from_a_head_of_zeros_unless_it_has_one_of_its_own(critic_init, critic_model, zero):
    assert PPOConfig(critic_init=critic_init, critic_model=critic_model).zero_critic_head is zero


@pytest.mark.parametrize(("words", "message"), [
    (["--ptx_coef", "0.5"], "ptx_coef=0.5 needs data: name it in `ptx_data`, or set ptx_coef to 0"),
    (["--ptx_data", "rows.jsonl"],
     "ptx_data is given and ptx_coef is 0: set ptx_coef (InstructGPT: 27.8) or leave ptx_data out"),
    (["--ptx_data", "rows.jsonl", "--ptx_coef", "0.5"], None),
    (["--advantage", "group", "--critic_model", "critic"], "advantage=group has no critic: leave critic_model out"),
    (["--advantage", "group"], None),
    (["--critic_model", "critic"], None),
])  # fmt: skip
def test_settings_that_are_right_each_and_do_not_go_together(monkeypatch, words, message):
    monkeypatch.setitem(ESTIMATORS, "group", Estimator(lambda given: None, needs_critic=False))
    said = None
    try:
        parse_stage("ppo", words)
    except ConfigError as error:
        said = str(error)
    assert said == message
