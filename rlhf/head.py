"""The language-modelling head as log-probabilities: logits live in pieces and never for a whole batch."""

from __future__ import annotations

from typing import Any

import torch

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
    piece_elements: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of each target, and the entropy, under softmax((hidden @ weight.T + bias) / temperature).

    `hidden` [R, H], `weight` [V, H], `bias` [V] or None, `targets` [R] -> two float32 tensors [R]; the entropy in
    nats is 0 unless `with_entropy`. At most `piece_elements` logits (PIECE_ELEMENTS) exist at once, in float32. When
    all of them fit in one piece their softmax is kept for the backward pass, else each piece is computed again there.
    """
    result: tuple[torch.Tensor, torch.Tensor] = _LinearLogprobs.apply(
        hidden, weight, bias, targets, temperature, with_entropy, piece_elements or PIECE_ELEMENTS
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
        piece_elements: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        rows = max(1, piece_elements // weight.shape[0])
        logprobs = torch.empty(hidden.shape[0], dtype=torch.float32, device=hidden.device)
        normalisers, entropies = torch.empty_like(logprobs), torch.zeros_like(logprobs)
        in_one_piece = hidden.shape[0] <= rows
        probabilities = None
        for start in range(0, hidden.shape[0], rows):
            part = slice(start, start + rows)
            logits = _logits(hidden[part], weight, bias, temperature)
            normaliser = logits.logsumexp(-1)
            normalisers[part] = normaliser
            logprobs[part] = logits.gather(-1, targets[part].unsqueeze(-1)).squeeze(-1) - normaliser
            if with_entropy or (in_one_piece and any(ctx.needs_input_grad)):
                found = logits.sub(normaliser.unsqueeze(-1)).exp_() if with_entropy else logits.sub_(
                    normaliser.unsqueeze(-1)
                ).exp_()  # fmt: skip
                if with_entropy:
                    entropies[part] = normaliser - (found * logits).sum(-1)
                if in_one_piece:
                    probabilities = found
        saved = probabilities if any(ctx.needs_input_grad) else None
        ctx.save_for_backward(hidden, weight, bias, targets, normalisers, entropies, saved)
        ctx.temperature, ctx.with_entropy, ctx.rows = temperature, with_entropy, rows
        return logprobs, entropies

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad_logprobs, grad_entropies = gradients
        hidden, weight, bias, targets, normalisers, entropies, kept = ctx.saved_tensors
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        grad_weight = torch.zeros_like(weight) if wants_weight else None
        grad_bias = torch.zeros_like(bias) if wants_bias and bias is not None else None
        for start in range(0, hidden.shape[0], ctx.rows):
            part = slice(start, start + ctx.rows)
            normaliser = normalisers[part].unsqueeze(-1)
            if kept is not None:
                probabilities = kept
            else:
                probabilities = _logits(hidden[part], weight, bias, ctx.temperature).sub_(normaliser).exp_()
            grad = grad_logprobs[part].float().unsqueeze(-1)
            if ctx.with_entropy:
                # dH / dz_v = -p_v (log p_v + H)
                surprise = probabilities.clamp(min=torch.finfo(torch.float32).tiny).log()
                weighted = surprise.add_(entropies[part].unsqueeze(-1)).mul_(grad_entropies[part].unsqueeze(-1))
                grad_logits = weighted.add_(grad).mul_(probabilities).neg_()
            else:
                grad_logits = probabilities * -grad
            grad_logits.scatter_add_(1, targets[part].unsqueeze(-1), grad)
            grad_logits = grad_logits.div_(ctx.temperature).to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[part] = grad_logits @ weight
            if grad_weight is not None:
                grad_weight.addmm_(grad_logits.t(), hidden[part])
            if grad_bias is not None:
                grad_bias += grad_logits.sum(0)
        return grad_hidden, grad_weight, grad_bias, None, None, None, None


def _logits(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, temperature: float) -> torch.Tensor:
    logits = torch.nn.functional.linear(hidden, weight, bias).float()
    return logits if temperature == 1.0 else logits.div_(temperature)
