"""Forward passes of any Hugging Face model: positions that skip padding, no cache, packed rows where it can."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from rlhf.models.inner_model import innermost
from rlhf.numerics.packed_rows import pack, packed_arguments, prepare_for_packed_rows


def position_ids(attention_mask: torch.Tensor) -> torch.Tensor:
    """Positions that do not count padding: [B, L] mask -> cumsum - 1, clamped at 0.

    Many models number positions with `arange`, which is wrong for left-padded rows (TRL#469, OpenRLHF#217).
    """
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


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


def hidden_states(backbone: nn.Module, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
    """Last hidden states of a model without a head and the function that puts values [S] back into [B, L].

    Packed they are [S, H] of the real tokens; padded rows give [B * L, H].
    """
    config: Any = innermost(backbone).config
    if prepare_for_packed_rows(config):
        rows = pack(input_ids, attention_mask)
        return backbone(**packed_arguments(rows, config)).last_hidden_state[0], rows.padded
    arguments = model_arguments(backbone, attention_mask, use_cache=False)
    hidden = backbone(input_ids=input_ids, **arguments).last_hidden_state
    return hidden.flatten(0, 1), lambda values: values.view(input_ids.shape)
