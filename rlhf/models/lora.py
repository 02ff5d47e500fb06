"""LoRA (Hu et al. 2021) and QLoRA (Dettmers et al. 2023) adapters through `peft`: add, switch off."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from rlhf.config import ConfigError, ModelConfig
from rlhf.models.adapters import name_base
from rlhf.models.experts import check_no_experts
from rlhf.models.scalar import ScalarModel

ATTENTION_PROJECTIONS: dict[str, tuple[str, ...]] = {
    "gpt_neox": ("query_key_value",),
    "bloom": ("query_key_value",),
    "falcon": ("query_key_value",),
    "gpt2": ("c_attn",),
    "gpt_bigcode": ("c_attn",),
    "gptj": ("q_proj", "k_proj", "v_proj", "out_proj"),
    "opt": ("q_proj", "k_proj", "v_proj", "out_proj"),
    "phi3": ("qkv_proj", "o_proj"),
    **{
        name: ("q_proj", "k_proj", "v_proj", "o_proj")
        for name in ("llama", "mistral", "mixtral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "exaone4")
    },
}
"""Modules adapted by default, by `model_type` (KULLM-RLHF: query_key_value of GPT-NeoX)."""


def apply_lora(model: nn.Module, config: ModelConfig, *, seed: int | None = None) -> nn.Module:
    """The model with its base frozen and a trainable adapter on the linear modules of `config.lora_targets`.

    A causal LM becomes a PeftModel; a ScalarModel keeps its class, its backbone is wrapped and its head trains in
    full. No targets: the attention projections. With a `seed` the adapter starts alike whatever was drawn from the
    global generator before (by a merge on first use, for one); without one it is drawn from that. Raises ConfigError
    when a target matches no linear module, `lora_rank` is 0, or the model is a mixture of experts.
    """
    with nullcontext() if seed is None else _seeded(seed):
        if isinstance(model, ScalarModel):
            model.backbone = _adapted(model.backbone, "FEATURE_EXTRACTION", config)
            return model
        return _adapted(model, "CAUSAL_LM", config)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """The global generators seeded within the block, and as they were after it."""
    with torch.random.fork_rng(devices=[torch.cuda.current_device()] if torch.cuda.is_available() else []):
        torch.manual_seed(seed)
        yield


def _adapted(base: Any, task: str, config: ModelConfig) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    if config.lora_rank < 1:
        raise ConfigError(f"lora_rank={config.lora_rank} must be at least 1")
    check_no_experts(base.config)
    targets = resolve_targets(base, config.lora_targets)
    if config.quantization != "none":
        base = prepare_quantized(base)
    if config.gradient_checkpointing:
        # with a frozen embedding no input of a checkpointed block would need a gradient, and the adapters get none
        base.enable_input_require_grads()
    settings = LoraConfig(
        task_type=task,
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=targets,
        bias="none",
    )
    adapted: Any = get_peft_model(base, settings)
    name_base(adapted, base)
    return adapted


def prepare_quantized(base: Any) -> Any:
    """A quantised model frozen, its other weights in float32, so that adapters on it train."""
    from peft import prepare_model_for_kbit_training

    # its own gradient checkpointing is left off: the training engine turns it on where it is wanted
    base = prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
    for module in base.modules():
        # on a CPU bitsandbytes packs 4-bit weights in the first forward in eval mode and never unpacks them;
        # packed weights pass no gradient on, so a model that is scored would not train any more
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return base


def resolve_targets(base: Any, targets: Sequence[str]) -> list[str]:
    """The names to give to peft: `targets`, or by architecture when empty.

    A name matches a module as peft matches it: the whole name, or its end after a dot. Raises ConfigError with the
    names of the linear modules there are when one matches none (`decoder.layers.` on GPT-NeoX).
    """
    linear = linear_module_names(base)
    there = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in linear}))
    chosen = list(targets) or list(ATTENTION_PROJECTIONS.get(base.config.model_type, ()))
    if not chosen:
        raise ConfigError(
            f"no default lora_targets for a {base.config.model_type} model; name some of its linear modules: {there}"
        )
    for target in chosen:
        if not any(name == target or name.endswith(f".{target}") for name in linear):
            raise ConfigError(
                f"lora_targets: {target!r} matches no linear module of this {base.config.model_type} model; "
                f"use one of: {there}"
            )
    return chosen


def linear_module_names(base: Any) -> list[str]:
    """Full names of the linear modules an adapter can sit on: all but the language-modelling head."""
    head = base.get_output_embeddings()
    return [
        name for name, module in base.named_modules() if isinstance(module, nn.Linear | Conv1D) and module is not head
    ]


def has_adapter(model: nn.Module) -> bool:
    """True when the model, a ScalarModel's backbone, or the module of an engine carries a LoRA adapter."""
    return _peft_model(model) is not None


@contextmanager
def adapter_disabled(model: nn.Module) -> Iterator[None]:
    """Within the block the model computes what its base computes. Raises ValueError when there is no adapter."""
    adapted = _peft_model(model)
    if adapted is None:
        raise ValueError("adapter_disabled needs a model with a LoRA adapter; this one has none")
    with adapted.disable_adapter():
        yield


def _peft_model(model: nn.Module) -> Any:
    module = getattr(model, "module", model)
    for candidate in (module, getattr(module, "backbone", None)):
        if hasattr(candidate, "peft_config") and hasattr(candidate, "disable_adapter"):
            return candidate
    return None
