"""Linear layers in float32 on a CPU through oneDNN: a tenth to a fifth faster than the BLAS that PyTorch calls.

The operators are those PyTorch's compiler calls; they are not part of its public interface, so their absence only
means that nothing is faster. Figures are in docs/performance.md.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable


def has_onednn() -> bool:
    """Whether this build of PyTorch has oneDNN's operators."""
    if not torch.backends.mkldnn.is_available():
        return False
    return hasattr(torch.ops.mkldnn, "_linear_pointwise") and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")


def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [..., I] @ weight [O, I].T + bias [O]: [..., O], without a gradient; oneDNN where it applies."""
    if _applies(x, weight):
        result: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return result
    return F.linear(x, weight, bias)


def weight_gradient(grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """grad [N, O].T @ x [N, I]: [O, I]."""
    if grad.shape[1] > x.shape[1] and _applies(x, grad):
        return product(x.t(), grad.t()).t()  # oneDNN wants the longer side there; the other way round BLAS is faster
    return grad.t() @ x


def speed_up_linears(model: nn.Module) -> None:
    """Let the plain linear layers of a float32 model on a CPU compute with `CPULinear`, in place.

    Weights, names and saved state are the same; layers that stand in for a linear one (LoRA, 8-bit) are left alone,
    and so is everything when the operators are not there.
    """
    if not has_onednn():
        return
    for module in model.modules():
        if type(module) is nn.Linear and _applies(module.weight, module.weight):
            module.__class__ = CPULinear


class CPULinear(nn.Linear):
    """`nn.Linear` with the products of forward and backward pass in oneDNN."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if not _applies(input, self.weight):
            return F.linear(input, self.weight, self.bias)
        if not torch.is_grad_enabled():
            return product(input, self.weight, self.bias)
        result: torch.Tensor = _Linear.apply(input, self.weight, self.bias)
        return result


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        return product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        (grad,) = gradients
        flat = grad.reshape(-1, grad.shape[-1])
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad
        return (
            product(grad.contiguous(), weight.t()) if wants_x else None,
            weight_gradient(flat, x.reshape(-1, x.shape[-1])) if wants_weight else None,
            flat.sum(0) if wants_bias else None,
        )


def _applies(*tensors: torch.Tensor) -> bool:
    return (
        all(tensor.dtype == torch.float32 and tensor.device.type == "cpu" for tensor in tensors)
        and has_onednn()
        and not torch.is_autocast_enabled("cpu")
    )
