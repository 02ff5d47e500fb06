"""Every number that an error of batch arithmetic proposes works, and what changes no result is named first."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import product

import pytest
import torch

from rlhf.algorithms.advantages import ESTIMATORS
from rlhf.algorithms.ppo import PPOBatchConfig, planned_iterations
from rlhf.config import ConfigError, EngineConfig, ModelConfig, OptimizerConfig, check_together
from rlhf.distributed.failures import memory_failure
from rlhf.engine import BatchPlan, deepspeed_settings
from rlhf.engine.factory import build_optimizer
from rlhf.pipeline.stages import parse_stage

SIZES = (1, 2, 3, 5, 7, 8, 12, 16, 32, 33)


def numbers(message: str, pattern: str) -> list[int]:
    return [int(number) for found in re.findall(pattern, message) for number in re.findall(r"\d+", found)]


def test_sizes_proposed_for_too_many_devices_work():
    refused = 0
    for batch, micro, world in product(SIZES, (1, 4, 64), range(1, 17)):
        try:
            BatchPlan(batch, micro, world)
        except ConfigError as error:
            refused += 1
            same, _, other = str(error).partition("learns the same")
            (devices,) = set(numbers(same, r"--num_devices (\d+)") + numbers(same, r"--num_gpus (\d+)"))
            (larger,) = numbers(other, r"set global_batch_size=(\d+)")
            assert "changes the training" in other
            for plan in (BatchPlan(batch, micro, devices), BatchPlan(larger, micro, world), BatchPlan(batch, micro, 1)):
                parts = plan.micro_batches([3] * plan.global_batch_size)
                assert sorted(row for part in parts for row in part) == list(range(plan.global_batch_size))
            with pytest.raises(ConfigError):
                BatchPlan(batch, micro, devices + 1)
    assert refused > 100


def test_sizes_proposed_for_a_rollout_work():
    refused, both_ways = 0, 0
    for prompts, samples, batch, world in product(SIZES, (1, 2, 3, 4), SIZES, (1, 2, 3, 8)):
        if batch < world:
            continue
        config = PPOBatchConfig(rollout_batch_size=prompts, samples_per_prompt=samples, global_batch_size=batch)
        try:
            planned_iterations(config, BatchPlan(batch, 1, world), 48)
        except ConfigError as error:
            refused += 1
            message = str(error)
            _, _, hint = message.partition("which learns the same; else use ")
            rollouts = numbers(hint.partition("global_batch_size")[0], r"rollout_batch_size=(\d+(?: or \d+)?)")
            minibatches = numbers(hint, r"global_batch_size=(\d+(?: or \d+)?)")
            assert rollouts and all(size > 0 for size in rollouts)
            both_ways += len(rollouts) == len(minibatches) == 2
            for size in rollouts:
                changed = PPOBatchConfig(rollout_batch_size=size, samples_per_prompt=samples, global_batch_size=batch)
                assert planned_iterations(changed, BatchPlan(batch, 1, world), 48) >= 1
            for size in minibatches:
                assert planned_iterations(config, BatchPlan(size, 1, world), 48) >= 1
            between = [size for size in range(world, prompts * samples + 1) if prompts * samples % size == 0]
            assert bool(minibatches) == bool(between), "named where there is one"
            assert message.endswith("which changes the training")
    assert refused > 300 and both_ways > 50


def test_a_deepspeed_file_that_disagrees_is_first_told_to_leave_the_key_out():
    plan = BatchPlan(32, 8, 2)
    for user, field, learns in (
        ({"train_batch_size": 64}, "global_batch_size", "changes the training"),
        ({"train_micro_batch_size_per_gpu": 4}, "micro_batch_size", "learns the same"),
        ({"gradient_accumulation_steps": 4}, "micro_batch_size", "learns the same"),
        ({"zero_optimization": {"stage": 2}}, "zero_stage", "learns the same"),
        ({"gradient_clipping": 0.5}, "max_grad_norm", "changes the training"),
    ):
        with pytest.raises(ConfigError) as caught:
            settings(plan, user)
        said = str(caught.value)
        assert re.search(
            rf"leave `\S+` out of the file, which changes nothing, or set {field} .*, which {learns}$", said
        )
        for section in user.values():
            if isinstance(section, dict):
                section.clear()
        assert settings(plan, {key: value for key, value in user.items() if value == {}})
    assert settings(BatchPlan(32, 4, 2), {"gradient_accumulation_steps": 4})["gradient_accumulation_steps"] == 4


def settings(plan: BatchPlan, user: dict):
    return deepspeed_settings(
        zero_stage=1, offload="none", dtype=torch.float32, plan=plan, max_grad_norm=1.0, user_config=user
    )


def test_options_that_exclude_one_another_name_what_learns_the_same_first():
    with pytest.raises(ConfigError, match="use offload=none, which learns the same, or optimizer=adamw"):
        build_optimizer(torch.nn.Linear(2, 2), OptimizerConfig(optimizer="adamw_8bit"), offload="optimizer")
    with pytest.raises(
        ConfigError, match="use zero_stage 0, 1 or 2, which learns the same, or quantization=none, which"
    ):
        check_together(ModelConfig(quantization="4bit", lora_rank=1), EngineConfig(zero_stage=3))
    said = memory_failure(RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"))
    assert said is not None and said.endswith("all of these learn the same") and "micro_batch_size" in said


def test_the_number_of_samples_that_an_estimator_asks_for_works(tmp_path, monkeypatch):
    monkeypatch.setitem(ESTIMATORS, "hungry", replace(ESTIMATORS["gae"], samples_per_prompt=3))
    arguments = ["--advantage", "hungry", "--output_dir", str(tmp_path)]
    with pytest.raises(ConfigError) as caught:
        parse_stage("ppo", arguments)
    (samples,) = numbers(str(caught.value), r"set samples_per_prompt=(\d+)")
    assert parse_stage("ppo", [*arguments, "--samples_per_prompt", str(samples)]).batch.samples_per_prompt == 3
