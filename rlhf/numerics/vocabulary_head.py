"""The language-modelling head as log-probabilities: logits live in pieces and never for a whole batch."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from rlhf.numerics.cpu import product, weight_gradient

PIECE_ELEMENTS = 2**23
"""Logits computed at a time (32 MiB in float32)."""


def linear_logprobs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    *,
    temperature: float = 1.0,
    with_entropy: bool = False,
    vocabulary_size: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of each target, and the entropy, under softmax((hidden @ weight.T + bias) / temperature).

    `hidden` [R, H], `weight` [V, H], `bias` [V] or None, `targets` [R] -> two float32 tensors [R]; the entropy in
    nats is 0 unless `with_entropy`. Ids at or beyond `vocabulary_size` (None: V) have probability 0: their logits are
    not computed, their rows' gradient is 0, and no target may be one of them.
    The product runs in the dtype of `hidden`, and its result is rounded to that; all that follows is in float32. At
    most PIECE_ELEMENTS logits exist at once. When all of them fit in one piece their softmax is kept for the backward
    pass, else each piece is computed again there.
    """
    result: tuple[torch.Tensor, torch.Tensor] = _LinearLogprobs.apply(
        hidden, weight, bias, targets, temperature, with_entropy, vocabulary_size
    )
    return result


class _LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        temperature: float,
        with_entropy: bool,
        vocabulary_size: int | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        real = slice(vocabulary_size)  # the rows of the weight that count
        real_weight, real_bias = weight[real], None if bias is None else bias[real]
        rows = max(1, PIECE_ELEMENTS // real_weight.shape[0])
        logprobs = torch.empty(hidden.shape[0], dtype=torch.float32, device=hidden.device)
        normalisers, entropies = torch.empty_like(logprobs), torch.zeros_like(logprobs)
        keeps = hidden.shape[0] <= rows and any(ctx.needs_input_grad)
        weights = None
        for start in range(0, hidden.shape[0], rows):
            part = slice(start, start + rows)
            logits = _logits(hidden[part], real_weight, real_bias, temperature)
            chosen = logits.gather(-1, targets[part].unsqueeze(-1)).squeeze(-1)
            largest = logits.amax(-1, keepdim=True)
            shifted = logits.sub_(largest)
            exponentials = shifted.exp() if with_entropy else shifted.exp_()
            total = exponentials.sum(-1)
            normalisers[part] = total.log() + largest.squeeze(-1)
            logprobs[part] = chosen - normalisers[part]
            if with_entropy:
                entropies[part] = total.log() - (exponentials * shifted).sum(-1) / total
            if keeps:
                weights = exponentials.div_(total.unsqueeze(-1))
        ctx.save_for_backward(hidden, weight, bias, targets, normalisers, entropies, weights)
        ctx.temperature, ctx.with_entropy, ctx.rows, ctx.real = temperature, with_entropy, rows, real
        return logprobs, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad_logprobs, grad_entropies = gradients
        hidden, weight, bias, targets, normalisers, entropies, kept = ctx.saved_tensors
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        real_weight, real_bias = weight[ctx.real], None if bias is None else bias[ctx.real]
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        # sums over many pieces in 16 bits would lose what each piece adds
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if wants_weight else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if wants_bias and bias is not None else None
        for start in range(0, hidden.shape[0], ctx.rows):
            part = slice(start, start + ctx.rows)
            if kept is not None:
                probabilities = kept
            else:
                logits = _logits(hidden[part], real_weight, real_bias, ctx.temperature)
                probabilities = logits.sub_(normalisers[part].unsqueeze(-1)).exp_()
            grad = grad_logprobs[part].float().unsqueeze(-1) / ctx.temperature
            if ctx.with_entropy:
                # dH / dz_v = -p_v (log p_v + H)
                surprise = probabilities.clamp(min=torch.finfo(torch.float32).tiny).log()
                upstream = grad_entropies[part].unsqueeze(-1) / ctx.temperature
                weighted = surprise.add_(entropies[part].unsqueeze(-1)).mul_(upstream)
                grad_logits = weighted.add_(grad).mul_(probabilities).neg_()
            else:
                grad_logits = probabilities.mul_(-grad)  # nobody reads the softmax again
            grad_logits.scatter_add_(1, targets[part].unsqueeze(-1), grad)
            grad_logits = grad_logits.to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[part] = product(grad_logits, real_weight.t())
            if grad_weight is not None:
                grad_weight[ctx.real] += weight_gradient(grad_logits, hidden[part])
            if grad_bias is not None:
                grad_bias[ctx.real] += grad_logits.sum(0)
        grad_weight = None if grad_weight is None else grad_weight.to(weight.dtype)
        grad_bias = None if grad_bias is None else grad_bias.to(bias.dtype)
        return grad_hidden, grad_weight, grad_bias, None, None, None, None


def _logits(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, temperature: float) -> torch.Tensor:
    logits = product(hidden, weight, bias).float()
    return logits if temperature == 1.0 else logits.div_(temperature)
