"""Gradients of an engine after its backward passes: their norm, and the first one that is not finite."""

from __future__ import annotations

from typing import Any

import torch


def keeps_plain_gradients(engine: Any) -> bool:
    """True where gradients stay in `.grad` until the step and nothing checks them: float32 without ZeRO.

    DeepSpeed's other optimizers sum them elsewhere, measure the norm themselves and skip a step whose gradients are
    not finite.
    """
    measured = ("_global_grad_norm", "overflow")  # one of them sets the norm at its first step alone
    return not any(hasattr(engine.optimizer, name) for name in measured) and not scales_loss(engine)


def scales_loss(engine: Any) -> bool:
    """True in fp16, where a step that overflows is part of finding the loss scale."""
    fp16_enabled = getattr(engine, "fp16_enabled", None)
    return bool(fp16_enabled()) if callable(fp16_enabled) else False


def plain_gradient_norm(engine: Any) -> torch.Tensor:
    """Global L2 norm of the gradients of an engine that `keeps_plain_gradients`: a scalar tensor."""
    gradients = [parameter.grad for parameter in engine.module.parameters() if parameter.grad is not None]
    if not gradients:
        return torch.zeros((), device=engine.device)
    return torch.nn.utils.get_total_norm(gradients)


def first_nonfinite_gradient(engine: Any) -> str | None:
    """Name of the first parameter whose gradient, after the last backward pass of a step, is not finite.

    A collective under ZeRO: every rank must call it. None where none is found, or the optimizer does not show them.
    """
    from deepspeed.utils import safe_get_full_grad

    found: str | None = None
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            gradient = parameter.grad if keeps_plain_gradients(engine) else safe_get_full_grad(parameter)
            if found is None and gradient is not None and not bool(torch.isfinite(gradient).all()):
                found = name  # no early end: the others may gather the rest
    return found


def first_nonfinite_weight(engine: Any) -> str | None:
    """Name of the first parameter of which this rank's part is not finite, or None."""
    for name, parameter in engine.module.named_parameters():
        held = getattr(parameter, "ds_tensor", parameter)
        if held.is_floating_point() and held.numel() and not bool(torch.isfinite(held).all()):
            return str(name)
    return None
