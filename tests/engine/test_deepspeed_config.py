"""The DeepSpeed configuration: what is generated, what a user may add, what contradicts."""

from __future__ import annotations

import json

import pytest
import torch

from rlhf.config import ConfigError, EngineConfig
from rlhf.engine import BatchPlan, compute_dtype, deepspeed_settings
from rlhf.engine.factory import read_deepspeed_config

PLAN = BatchPlan(96, 8, 4)


def config(**changes):
    arguments = {"zero_stage": 2, "offload": "none", "dtype": torch.bfloat16, "plan": PLAN, "max_grad_norm": 1.0}
    return deepspeed_settings(**{**arguments, **changes})


def test_generated_values():
    made = config()
    assert (made["train_batch_size"], made["train_micro_batch_size_per_gpu"], made["gradient_accumulation_steps"]) == (
        96,
        8,
        3,
    )  # noqa: E501
    assert made["gradient_clipping"] == 1.0
    assert made["bf16"]["enabled"] is True and made["fp16"] == {"enabled": False}
    assert made["zero_optimization"]["stage"] == 2
    assert "optimizer" not in made and "scheduler" not in made
    json.dumps(made)


def test_stage_0_has_nothing_of_the_others():
    made = config(zero_stage=0, dtype=torch.float32)
    assert made["zero_optimization"] == {"stage": 0}
    assert "data_types" not in made and "communication_data_type" not in made
    assert not any(key.startswith("stage3") for key in config(zero_stage=2)["zero_optimization"])
    assert config(zero_stage=3)["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] is True


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_gradients_are_summed_in_float32_and_stage_0_runs_as_the_stage_that_can(dtype):
    for stage in (0, 1, 2, 3):
        made = config(zero_stage=stage, dtype=dtype, user_config={"zero_optimization": {"stage": stage}})
        assert made["data_types"] == {"grad_accum_dtype": "fp32"}
        assert made["zero_optimization"]["stage"] == max(stage, 1)
    assert config(zero_stage=0, dtype=dtype)["zero_optimization"] == config(zero_stage=1)["zero_optimization"]
    with pytest.raises(ConfigError, match="stage=1 and zero_stage makes it 0"):
        config(zero_stage=0, dtype=dtype, user_config={"zero_optimization": {"stage": 1}})
    user = {"data_types": {"grad_accum_dtype": "bf16"}}  # a user may have the old sums and their memory
    assert config(user_config=user)["data_types"] == user["data_types"]


@pytest.mark.parametrize(("hidden", "bucket"), [(16, 1_000_000), (2048, 12 * 2048**2), (8192, 200_000_000)])
def test_buckets_follow_the_model(hidden, bucket):
    zero = config(zero_stage=3, hidden_size=hidden)["zero_optimization"]
    assert zero["reduce_bucket_size"] == zero["stage3_prefetch_bucket_size"] == bucket
    assert zero["stage3_param_persistence_threshold"] == 10 * hidden


def test_offload():
    assert config(offload="optimizer")["zero_optimization"]["offload_optimizer"]["device"] == "cpu"
    everything = config(zero_stage=3, offload="all")["zero_optimization"]
    assert everything["offload_optimizer"]["device"] == everything["offload_param"]["device"] == "cpu"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"zero_stage": 0, "offload": "optimizer"}, "offload=optimizer needs zero_stage 1, 2 or 3, got 0"),
        ({"zero_stage": 2, "offload": "all"}, "offload=all needs zero_stage 3, got 2"),
        ({"zero_stage": 4}, "zero_stage=4 is not one of 0, 1, 2, 3"),
        ({"offload": "disk"}, "'disk' is not one of none, optimizer, all"),
        ({"max_grad_norm": -1.0}, "max_grad_norm=-1.0"),
    ],
)
def test_choices_that_do_not_go_together(changes, message):
    with pytest.raises(ConfigError, match=message):
        config(**changes)


def test_a_users_settings_are_added():
    user = {"zero_optimization": {"reduce_bucket_size": 123, "overlap_comm": True}, "comms_logger": {"enabled": True}}
    made = config(user_config=user)
    assert made["zero_optimization"]["reduce_bucket_size"] == 123
    assert made["zero_optimization"]["overlap_comm"] is True and made["zero_optimization"]["stage"] == 2
    assert made["comms_logger"] == {"enabled": True}
    assert user == {
        "zero_optimization": {"reduce_bucket_size": 123, "overlap_comm": True},
        "comms_logger": {"enabled": True},
    }  # noqa: E501


def test_deepspeed_gets_numbers_that_agree_where_the_devices_do_not_divide_the_batch():
    plan = BatchPlan(16, 16, 3)
    user = {"train_batch_size": 16, "train_micro_batch_size_per_gpu": 16, "gradient_accumulation_steps": 1}
    for made in (config(plan=plan), config(plan=plan, user_config=user)):
        assert plan.deepspeed_numbers.items() <= made.items()
    with pytest.raises(ConfigError, match="train_batch_size=18 and global_batch_size makes it 16"):
        config(plan=plan, user_config={"train_batch_size": 18})


def test_equal_and_automatic_values_are_no_contradiction():
    user = {
        "train_batch_size": "auto", "gradient_accumulation_steps": 3, "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"}, "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "none"}},
    }  # fmt: skip
    made = config(user_config=user)
    assert made["train_batch_size"] == 96 and made["gradient_clipping"] == 1.0 and made["bf16"]["enabled"] is True


@pytest.mark.parametrize(
    ("user", "both"),
    [
        ({"zero_optimization": {"stage": 3}}, "zero_optimization.stage=3 and zero_stage makes it 2"),
        ({"train_batch_size": 64}, "train_batch_size=64 and global_batch_size makes it 96"),
        ({"train_micro_batch_size_per_gpu": 4}, "=4 and micro_batch_size makes it 8"),
        ({"gradient_accumulation_steps": 1}, "gradient_accumulation_steps=1 and .* makes it 3"),
        ({"gradient_clipping": 0.5}, "gradient_clipping=0.5 and max_grad_norm makes it 1.0"),
        ({"fp16": {"enabled": True}}, "fp16.enabled=True and precision makes it False"),
        ({"bfloat16": {"enabled": False}}, "bf16.enabled=False and precision makes it True"),
        ({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, "device=cpu and offload makes it none"),
        ({"zero_optimization": {"cpu_offload": True}}, "set offload instead"),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}}, "`optimizer.type` .*learning_rate"),
        ({"scheduler": {"type": "WarmupLR"}}, "`scheduler.type`.*warmup_steps"),
        ({"amp": {"enabled": True}}, "set precision instead"),
        ({"train_batch_size": {"a": 1}}, "is not a DeepSpeed setting"),
    ],
)
def test_contradictions_name_both_values(user, both):
    with pytest.raises(ConfigError, match=both):
        config(user_config=user)


def test_reading_a_users_file(tmp_path):
    assert read_deepspeed_config(None) is None
    with pytest.raises(ConfigError, match="missing.json cannot be read"):
        read_deepspeed_config(str(tmp_path / "missing.json"))
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ConfigError, match="is not json"):
        read_deepspeed_config(str(tmp_path / "broken.json"))
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(ConfigError, match="a json object, not a list"):
        read_deepspeed_config(str(tmp_path / "list.json"))
    (tmp_path / "good.json").write_text('{"comms_logger": {"enabled": true}}')
    assert read_deepspeed_config(str(tmp_path / "good.json")) == {"comms_logger": {"enabled": True}}


class Accelerator:
    def __init__(self, name: str, *, bf16: bool = True, fp16: bool = True) -> None:
        self.device_name = lambda: name
        self.is_bf16_supported = lambda: bf16
        self.is_fp16_supported = lambda: fp16


@pytest.mark.parametrize(
    ("accelerator", "precision", "dtype"),
    [
        (Accelerator("cpu"), "auto", torch.float32),
        (Accelerator("cuda"), "auto", torch.bfloat16),
        (Accelerator("cuda", bf16=False), "auto", torch.float32),
        (Accelerator("cpu"), "bf16", torch.bfloat16),
        (Accelerator("cuda"), "fp16", torch.float16),
        (Accelerator("cuda"), "fp32", torch.float32),
    ],
)
def test_compute_dtype(accelerator, precision, dtype, monkeypatch):
    monkeypatch.setattr("deepspeed.accelerator.get_accelerator", lambda: accelerator)
    assert compute_dtype(precision) == dtype


@pytest.mark.parametrize(
    ("accelerator", "precision"),
    [(Accelerator("cuda", bf16=False), "bf16"), (Accelerator("cpu", fp16=False), "fp16"), (Accelerator("cpu"), "int3")],
)
def test_a_precision_there_is_not(accelerator, precision, monkeypatch):
    monkeypatch.setattr("deepspeed.accelerator.get_accelerator", lambda: accelerator)
    with pytest.raises(ConfigError, match=f"precision='?{precision}"):
        compute_dtype(precision)


def test_the_engine_defaults_make_a_valid_configuration():
    defaults = EngineConfig()
    config(zero_stage=defaults.zero_stage, offload=defaults.offload, max_grad_norm=defaults.max_grad_norm)
