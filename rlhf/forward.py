"""How any Hugging Face model is called here: explicit position ids, no cache, logits only where needed."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn


def position_ids(attention_mask: torch.Tensor) -> torch.Tensor:
    """Positions that do not count padding: [B, L] mask -> cumsum - 1, clamped at 0.

    Many models number positions with `arange`, which is wrong for left-padded rows (TRL#469, OpenRLHF#217).
    """
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


def innermost(model: nn.Module) -> nn.Module:
    """The Hugging Face model under a DeepSpeed engine and a peft wrapper."""
    model = getattr(model, "module", model)
    get_base_model = getattr(model, "get_base_model", None)
    return get_base_model() if callable(get_base_model) else model


def eos_token_ids(model: nn.Module, tokenizer: Any) -> list[int]:
    """Every id that ends a response: the tokenizer's, and those of the model's generation settings (chat models)."""
    settings = getattr(innermost(model), "generation_config", None)
    more = getattr(settings, "eos_token_id", None)
    ids = {tokenizer.eos_token_id, *(more if isinstance(more, list | tuple) else [more])}
    return sorted(int(number) for number in ids if number is not None)


def model_arguments(model: nn.Module, attention_mask: torch.Tensor, **wanted: Any) -> dict[str, Any]:
    """Keyword arguments for a forward over `attention_mask` [B, L]: the mask, position ids where the model
    takes them, and those of `wanted` that its `forward` names."""
    accepted = inspect.signature(innermost(model).forward).parameters
    arguments: dict[str, Any] = {"attention_mask": attention_mask.long()}
    if "position_ids" in accepted:
        arguments["position_ids"] = position_ids(attention_mask)
    arguments.update({name: value for name, value in wanted.items() if name in accepted})
    return arguments


def forward_logits(
    model: nn.Module, input_ids: torch.Tensor, attention_mask: torch.Tensor, *, last: int | None = None
) -> torch.Tensor:
    """Logits [B, last or L, V] of a causal LM, a peft model or a DeepSpeed engine around one.

    `last` limits the language-modelling head to that many final positions. `logits[:, t]` predicts token t + 1.
    """
    wanted: dict[str, Any] = {"use_cache": False}
    if last is not None:
        wanted["logits_to_keep"] = last
    logits = model(input_ids=input_ids, **model_arguments(model, attention_mask, **wanted)).logits
    return logits if last is None else logits[:, -last:]
