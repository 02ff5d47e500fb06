"""Facts at the fields of the configuration, and what is made of them."""

import dataclasses
from pathlib import Path

import pytest

from rlhf.checkpoint.fingerprint import check_identity
from rlhf.config import ConfigError, EngineConfig, RunConfig, facts_of, setting
from rlhf.pipeline.arguments import sort_arguments
from rlhf.pipeline.stages import STAGES, parse_stage
from rlhf.training.resume import run_identity

FIELDS = {
    item.name: facts_of(item)
    for stage in STAGES.values()
    for kind in stage.config_classes().values()
    for item in dataclasses.fields(kind)
}


def test_a_setting_is_a_field_with_a_default_of_its_own():
    @dataclasses.dataclass
    class Made:
        names: list[str] = setting(["a"], path="read")
        number: int = setting(3, may_change_on_resume=True)
        plain: int = 4

    first, second = Made(), Made()
    first.names.append("b")
    assert second == Made(["a"], 3, 4)
    found = {item.name: facts_of(item) for item in dataclasses.fields(Made)}
    assert found["names"].path == "read" and not found["names"].may_change_on_resume
    assert found["number"].may_change_on_resume and found["number"].path is None
    assert not found["plain"].may_change_on_resume and not found["plain"].names_model


def test_every_field_that_names_data_or_a_model_is_a_path_compared_by_content():
    named = {name for name in FIELDS if name.endswith(("_data", "_model"))}
    assert {"sft_data", "prompt_eval_data", "ptx_data", "base_model", "critic_model"} <= named
    for name in named:
        assert FIELDS[name].path == "read" and FIELDS[name].may_change_on_resume, name
    assert {name for name, facts in FIELDS.items() if facts.names_model} == {
        "base_model", "actor_model", "reward_model", "critic_model"
    }  # fmt: skip


def test_what_changes_what_is_learnt_may_not_change_on_resume():
    fixed = {name for name, facts in FIELDS.items() if not facts.may_change_on_resume}
    assert {"seed", "learning_rate", "global_batch_size", "lora_rank", "kl_coef", "rewards", "template"} <= fixed
    free = {"zero_stage", "micro_batch_size", "output_dir", "resume", "offload", "sample_table_rows"}
    assert free.isdisjoint(fixed)
    assert fixed & {item.name for item in dataclasses.fields(RunConfig)} == {"seed"}, "where and how often, not what"


def test_a_run_is_known_by_its_fixed_fields(tmp_path: Path):
    identity = run_identity([RunConfig(seed=3, output_dir="a"), EngineConfig(zero_stage=1)], data="x")
    check_identity(identity, run_identity([RunConfig(seed=3, output_dir="b"), EngineConfig(zero_stage=3)], data="x"),
                   tmp_path)  # fmt: skip
    other = run_identity([RunConfig(seed=4), EngineConfig()], data="x")
    with pytest.raises(ConfigError, match="seed was 3 and is 4"):
        check_identity(identity, other, tmp_path)


def test_paths_on_a_pipelines_command_line_are_taken_from_where_the_user_is(tmp_path: Path):
    (tmp_path / "mine.jsonl").touch()
    words = ["--output_dir", "out", "--sft_data", "mine.jsonl", "hub/name", "--ppo.critic_model", "gpt2"]
    sorted_words = sort_arguments(words, user_dir=tmp_path).stage_arguments
    assert sorted_words["sft"] == ["--output_dir", str(tmp_path / "out"), "--sft_data", str(tmp_path / "mine.jsonl"),
                                   "hub/name"]  # fmt: skip
    assert sorted_words["ppo"][-2:] == ["--critic_model", "gpt2"]  # nothing of that name is here: a hub's


def test_metadata_of_fields_does_not_reach_the_command_line():
    assert parse_stage("sft", ["--zero_stage", "2", "--output_dir", "x"]).engine.zero_stage == 2


MODELS = {"base_model", "actor_model", "reward_model", "critic_model"}
HELD_OUT = {"held_out_reward_model"}
"""A model that says nothing of what the run trains, so that the default's other settings stay."""
DATA = {
    "sft_data", "sft_eval_data", "preference_data", "preference_eval_data", "prompt_data", "prompt_eval_data",
    "ptx_data",
}  # fmt: skip
"""Compared by what is in them: the same model or data may lie elsewhere when a run is resumed."""
HOW_IT_RUNS = {
    "output_dir", "cache_dir", "overwrite", "resume", "save_every_steps", "keep_last", "keep_every", "log_every_steps",
    "tensorboard", "wandb_project", "rank_timeout_minutes", "sample_table_rows", "keep_samples", "on_bad_row",
    "trust_remote_code", "zero_stage", "offload", "deepspeed_config", "share_base", "side_by_side",
    "attn_implementation",
    "gradient_checkpointing", "micro_batch_size", "micro_batch_tokens", "generation_batch_size", "scoring_batch_tokens",
}  # fmt: skip
"""What changes where and how fast a run is computed, and what it leaves: not what is learnt."""


def test_the_facts_of_every_field():
    def having(fact):
        return {name for name, facts in FIELDS.items() if getattr(facts, fact)}

    assert having("may_change_on_resume") == MODELS | HELD_OUT | DATA | HOW_IT_RUNS
    assert having("names_model") == MODELS and having("may_be_infinite") == {
        "clip_range",
        "clip_range_high",
        "value_clip_range",
    }
    assert {name: facts.path for name, facts in FIELDS.items() if facts.path} == {
        **dict.fromkeys(("output_dir", "cache_dir"), "written"),
        **dict.fromkeys(MODELS | HELD_OUT | DATA | {"deepspeed_config", "template"}, "read"),
    }
