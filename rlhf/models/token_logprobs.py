"""Log-probabilities of given tokens under a causal language model, its head run only where it is needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from rlhf.models.forward import forward_logits, model_arguments
from rlhf.models.inner_model import innermost
from rlhf.numerics.cpu import CPULinear
from rlhf.numerics.logprobs import entropy_from_logits, logprobs_from_logits
from rlhf.numerics.packed_rows import pack, packed_arguments, prepare_for_packed_rows
from rlhf.numerics.vocabulary_head import linear_logprobs

PLAIN_HEADS = frozenset(
    {"gpt_neox", "llama", "mistral", "qwen2", "qwen3", "gemma", "gpt2", "opt", "gptj", "gpt_bigcode", "phi3", "mixtral"}
)
"""Architectures (`model_type`) whose logits are the output of the head and nothing else (no cap, no scale)."""


def token_logprobs(
    model: nn.Module,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    scored: torch.Tensor,
    *,
    temperature: float = 1.0,
    with_entropy: bool = False,
    vocabulary_size: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """log pi(token t | all before it) wherever `scored`, and the entropy in nats of that distribution if asked for.

    All arguments [B, L], padded on either side; returns two float32 tensors [B, L], 0 outside `scored`. The entropy
    is 0 everywhere unless `with_entropy`. Ids at or beyond `vocabulary_size` (None: none are) have probability 0, and
    no scored token may be one of them. For the architectures in PLAIN_HEADS the head runs over the scored positions
    only, in pieces; for those that take packed rows (PACKABLE) padding costs nothing. Raises ValueError when the
    first token of a row is scored: nothing comes before it.
    """
    mask = attention_mask.bool()
    target = scored & mask
    before = torch.zeros_like(target)
    before[:, :-1] = target[:, 1:] & mask[:, :-1]
    if bool(before.sum() != target.sum()):
        raise ValueError("the first token of a row cannot be scored: no token comes before it")
    inner: Any = innermost(model)
    config = getattr(inner, "config", None)
    if config is None or not _plain_head(inner, config):
        logits = forward_logits(model, input_ids, mask)[before][:, :vocabulary_size]
        logprobs = logprobs_from_logits(logits, input_ids[target], temperature)
        entropies = entropy_from_logits(logits, temperature) if with_entropy else torch.zeros_like(logprobs)
    else:
        targets = input_ids[target]
        if prepare_for_packed_rows(config):
            rows = pack(input_ids, mask)
            arguments, places = packed_arguments(rows, config), before.flatten()[rows.where].nonzero().squeeze(1)
        else:
            arguments = {"input_ids": input_ids, **model_arguments(model, mask, use_cache=False)}
            places = before.flatten().nonzero().squeeze(1)

        def head(module: Any, hidden: torch.Tensor) -> torch.Tensor:
            chosen = hidden.flatten(0, 1)[places]
            found = linear_logprobs(chosen, module.weight, module.bias, targets, temperature=temperature,
                                    with_entropy=with_entropy, vocabulary_size=vocabulary_size)  # fmt: skip
            return torch.stack(found, dim=-1).unsqueeze(0)

        with _head_computes(inner.get_output_embeddings(), head):
            logprobs, entropies = model(**arguments).logits[0].unbind(-1)
    empty = torch.zeros(mask.shape, dtype=torch.float32, device=mask.device)
    return empty.masked_scatter(target, logprobs), empty.masked_scatter(target, entropies)


def _plain_head(model: Any, config: Any) -> bool:
    """Whether log-probabilities can be computed inside the head's own call."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return config.model_type in PLAIN_HEADS and type(head) in (nn.Linear, CPULinear)


@contextmanager
def _head_computes(head: Any, function: Callable[[Any, torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """Within the block the module `head` returns function(head, its input).

    The module is still called by the model, so that hooks which gather or offload its weights run as ever.
    """
    before = vars(head).get("forward")  # set by a library that loads or offloads weights
    head.forward = lambda hidden: function(head, hidden)
    try:
        yield
    finally:
        del head.forward
        if before is not None:
            head.forward = before
