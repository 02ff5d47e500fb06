"""The DeepSpeed configuration as a pure function of what the user chose."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from rlhf.config import ConfigError
from rlhf.engine.batch_plan import BatchPlan

ENGINE_OWNED = {
    "train_batch_size": "global_batch_size",
    "train_micro_batch_size_per_gpu": "micro_batch_size",
    "gradient_accumulation_steps": "micro_batch_size",
    "gradient_clipping": "max_grad_norm",
    "zero_optimization.stage": "zero_stage",
    "zero_optimization.offload_optimizer.device": "offload",
    "zero_optimization.offload_param.device": "offload",
    "bf16.enabled": "precision",
    "fp16.enabled": "precision",
}
"""DeepSpeed keys with a configuration field of their own, and its name."""
SAME_TRAINING = {
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "zero_optimization.stage",
    "zero_optimization.offload_optimizer.device",
    "zero_optimization.offload_param.device",
}
"""Those of them that change memory and speed, not what is learnt."""
REFUSED = {
    "optimizer": "the fields of the optimizer (learning_rate, weight_decay, adam_betas, ...)",
    "scheduler": "lr_schedule, warmup_steps and warmup_ratio",
    "amp": "precision",
    "torch_autocast": "precision",
    "zero_optimization.cpu_offload": "offload",
    "zero_optimization.cpu_offload_param": "offload",
}
"""DeepSpeed keys that contradict the engine, and what to set in their place."""
ALIASES = {"bfloat16": "bf16", "zero_optimization.stage3_gather_fp16_weights_on_model_save":
           "zero_optimization.stage3_gather_16bit_weights_on_model_save"}  # fmt: skip
AUTO = "auto"
"""What the Hugging Face trainer's DeepSpeed files hold where the program is to fill in the value."""
DEFAULT_BUCKET = 20_000_000
"""Elements of a communication bucket when the hidden size is not known."""


def compute_dtype(precision: str) -> torch.dtype:
    """The dtype of weights and activations; `auto` is bf16 where an accelerator other than the CPU has it, else fp32.

    Raises ConfigError for an unknown precision or one the accelerator does not have.
    """
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    if precision == "auto":
        on_device = accelerator.device_name() != "cpu" and accelerator.is_bf16_supported()
        return torch.bfloat16 if on_device else torch.float32
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    if precision not in dtypes:
        raise ConfigError(f"precision={precision!r} is not one of auto, {', '.join(dtypes)}")
    missing = (precision == "bf16" and not accelerator.is_bf16_supported()) or (
        precision == "fp16" and not accelerator.is_fp16_supported()
    )
    if missing:
        raise ConfigError(
            f"precision={precision}: the accelerator {accelerator.device_name()!r} cannot compute in it; "
            f"use auto or fp32"
        )
    return dtypes[precision]


def deepspeed_settings(
    *,
    zero_stage: int,
    offload: str,
    dtype: torch.dtype,
    plan: BatchPlan,
    max_grad_norm: float,
    hidden_size: int | None = None,
    user_config: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The dict for DeepSpeed: generated settings with a user's merged in.

    Gradients of a 16-bit engine accumulate in float32: a sum of 32 micro-batches in bf16 is off by half a percent. For
    each trainable weight that takes 4 bytes in place of 2, divided over the ranks under stages 2 and 3. Stage 0 cannot
    in DeepSpeed: in 16 bit it runs as stage 1, which computes the same.

    A user's batch sizes are compared with those of `plan`; DeepSpeed gets `plan.deepspeed_numbers`. `hidden_size`
    sizes the communication buckets. Raises ConfigError, with both values, for settings that contradict each other.
    """
    _check_choices(zero_stage, offload, max_grad_norm)
    sixteen_bit = dtype != torch.float32
    runs_as = max(zero_stage, 1) if sixteen_bit else zero_stage
    zero: dict[str, Any] = {"stage": zero_stage}
    if runs_as > 0:
        # DeepSpeed's own 5e8 elements are allocated up front for each engine, whatever the size of the model
        bucket = DEFAULT_BUCKET if hidden_size is None else min(max(12 * hidden_size**2, 1_000_000), 200_000_000)
        zero.update(reduce_bucket_size=bucket, allgather_bucket_size=bucket, contiguous_gradients=True)
    if zero_stage == 3:
        zero.update(
            stage3_prefetch_bucket_size=bucket,
            stage3_param_persistence_threshold=10 * (hidden_size or 1000),
            stage3_gather_16bit_weights_on_model_save=True,
        )
    if offload in ("optimizer", "all"):
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    if offload == "all":
        zero["offload_param"] = {"device": "cpu", "pin_memory": True}
    generated: dict[str, Any] = {
        "train_batch_size": plan.global_batch_size,
        "train_micro_batch_size_per_gpu": plan.micro_batch_size,
        "gradient_accumulation_steps": plan.accumulation_steps,
        "gradient_clipping": max_grad_norm,
        "zero_optimization": zero,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "fp16": {"enabled": dtype == torch.float16},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1_000_000_000,
        "wall_clock_breakdown": False,
    }
    if sixteen_bit:
        generated["data_types"] = {"grad_accum_dtype": "fp32"}
        if runs_as == 1:
            generated["communication_data_type"] = "fp32"  # once a step: nothing beside what it spoils
    if dtype == torch.bfloat16:
        generated["bf16"]["immediate_grad_update"] = True  # stage 1: no gradient in both precisions at a time
    if user_config:
        _merge(generated, user_config)
    generated["zero_optimization"]["stage"] = runs_as
    return {**generated, **plan.deepspeed_numbers}


def _check_choices(zero_stage: int, offload: str, max_grad_norm: float) -> None:
    if zero_stage not in (0, 1, 2, 3):
        raise ConfigError(f"zero_stage={zero_stage} is not one of 0, 1, 2, 3")
    if offload not in ("none", "optimizer", "all"):
        raise ConfigError(f"offload={offload!r} is not one of none, optimizer, all")
    if offload == "optimizer" and zero_stage < 1:
        raise ConfigError(f"offload=optimizer needs zero_stage 1, 2 or 3, got {zero_stage}")
    if offload == "all" and zero_stage != 3:
        raise ConfigError(f"offload=all needs zero_stage 3, got {zero_stage}; use zero_stage=3 or offload=optimizer")
    if max_grad_norm < 0:
        raise ConfigError(f"max_grad_norm={max_grad_norm} must be at least 0 (0 turns clipping off)")


def _merge(generated: dict[str, Any], user_config: Mapping[str, Any]) -> None:
    """Overlay a user's settings on the generated ones, key by key; a contradiction raises."""
    for key, value in _leaves(user_config):
        for refused, fields in REFUSED.items():
            if key == refused or key.startswith(refused + "."):
                raise ConfigError(f"deepspeed_config: `{key}` does not go with this engine; set {fields} instead")
        if value == AUTO:
            continue
        *sections, name = key.split(".")
        place = generated
        for section in sections:
            place = place.setdefault(section, {})
            if not isinstance(place, dict):
                raise ConfigError(f"deepspeed_config: `{key}` is not a DeepSpeed setting; see its configuration json")
        if key in ENGINE_OWNED:
            ours = place.get(name, "none" if name == "device" else None)
            theirs = value or "none" if name == "device" else value
            if ours != theirs:
                learns = "learns the same" if key in SAME_TRAINING else "changes the training"
                raise ConfigError(
                    f"deepspeed_config says {key}={value} and {ENGINE_OWNED[key]} makes it {ours}; leave `{key}` out "
                    f"of the file, which changes nothing, or set {ENGINE_OWNED[key]} to make it {value}, which {learns}"
                )
        place[name] = value


def _leaves(mapping: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in mapping.items():
        key = ALIASES.get(prefix + name, prefix + name)
        if isinstance(value, Mapping):
            yield from _leaves(value, key + ".")
        else:
            yield key, value
