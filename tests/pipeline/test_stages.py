"""The table of stages: what everything that runs, sums up or documents stages relies on."""

import dataclasses
from pathlib import Path

import pytest

from rlhf.algorithms.advantages import ESTIMATORS, Estimator
from rlhf.config import ConfigError
from rlhf.pipeline.stages import STAGES, config_files, find_stage_model, parse_stage, stage_fields

ROOT = Path(__file__).parents[2]
NAMES = list(STAGES)


@pytest.mark.parametrize("stage", STAGES.values(), ids=NAMES)
def test_a_row_is_sound(stage):
    assert STAGES[stage.name] is stage and stage.name.isidentifier()
    assert (ROOT / stage.script).is_file()
    assert stage.figures and stage.checks and stage.curves
    fields = [item.name for kind in stage.config_classes().values() for item in dataclasses.fields(kind)]
    assert len(fields) == len(set(fields)), "a field's name says which part of the configuration it belongs to"
    assert set(stage.short_run) <= set(fields)
    for field, earlier in stage.takes.items():
        assert field in fields and NAMES.index(earlier) < NAMES.index(stage.name)


@pytest.mark.parametrize("name", NAMES)
def test_a_configuration_has_its_parts_by_name(name):
    config = parse_stage(name, [])
    parts = config.parts()
    assert config.run in parts and getattr(config, name) in parts and len(parts) == 7
    assert [type(part) for part in parts] == list(STAGES[name].config_classes().values())


def test_a_model_of_an_earlier_stage_that_is_missing_says_which_script_makes_it(tmp_path):
    ppo = STAGES["ppo"]
    with pytest.raises(ConfigError, match=r"PPO needs the model that step2_reward/main.py saves.*--reward_model"):
        find_stage_model(ppo, "reward_model", None, str(tmp_path))
    (tmp_path / "reward" / "model").mkdir(parents=True)
    assert find_stage_model(ppo, "reward_model", None, str(tmp_path)) == str(tmp_path / "reward" / "model")
    assert find_stage_model(ppo, "reward_model", "elsewhere", str(tmp_path)) == "elsewhere"


def test_an_estimator_that_compares_responses_needs_as_many_to_a_prompt(monkeypatch):
    monkeypatch.setitem(ESTIMATORS, "of_three", Estimator(lambda given: None, True, samples_per_prompt=3))
    words = ["--advantage", "of_three", "--samples_per_prompt"]
    with pytest.raises(ConfigError, match="advantage=of_three .* needs samples_per_prompt of at least 3, got 2"):
        parse_stage("ppo", [*words, "2"])
    assert parse_stage("ppo", [*words, "3"]).batch.samples_per_prompt == 3


def test_an_overlong_buffer_that_means_nothing_is_refused():
    words = ["--max_response_tokens", "32", "--overlong_buffer_tokens"]
    with pytest.raises(ConfigError, match="overlong_buffer_tokens=8 is given and overlong_penalty is 0"):
        parse_stage("ppo", [*words, "8"])
    with pytest.raises(ConfigError, match="overlong_buffer_tokens=33 is more than max_response_tokens=32"):
        parse_stage("ppo", [*words, "33", "--overlong_penalty", "1"])
    assert parse_stage("ppo", [*words, "32", "--overlong_penalty", "1"]).ppo.overlong_buffer(32) == 32


def test_without_words_those_behind_the_scripts_name_are_read(tmp_path, monkeypatch):
    (tmp_path / "mine.yaml").write_text("learning_rate: 0.25\n")
    words = ["--config", str(tmp_path / "mine.yaml"), "--seed", "5"]
    monkeypatch.setattr("sys.argv", ["main.py", *words])
    config = parse_stage("sft")
    assert (config.optimizer.learning_rate, config.run.seed) == (0.25, 5)
    assert stage_fields("sft").values == stage_fields("sft", words).values != stage_fields("sft", []).values
    assert config_files("sft") == {tmp_path / "mine.yaml"} != config_files("sft", [])
