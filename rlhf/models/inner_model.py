"""The Hugging Face model inside its wrappers, and the ids that end its responses."""

from __future__ import annotations

from typing import Any

from torch import nn


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
