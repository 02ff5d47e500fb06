"""Linear layers for a handful of rows on a CPU: weights laid out anew, once, for the products of every step.

A float32 product of 8 to 32 rows takes two to three times as long with weights as a model stores them as with weights
in the blocked order of oneDNN, which PyTorch's compiler uses too. It costs a copy of the weights while it is kept.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from rlhf.linear import CPULinear, has_onednn

Linear = Callable[[torch.Tensor], torch.Tensor]

LARGEST_COPY = 128 * 2**20
"""Bytes of all copied weights at most; the layers beyond it are called as they are."""
ROWS_IN_MIND = 32
"""oneDNN chooses the blocks for this many rows; for 1 to 64 rows they are as good as any."""


class LaidOut:
    """Lays out weights until `LARGEST_COPY` bytes of them are held; calls the module itself where it cannot.

    Only a module that is exactly `nn.Linear` is replaced, in float32 on a CPU and without hooks: what stands in for
    one (an adapter, a quantised layer) computes more than a product.
    """

    def __init__(self) -> None:
        self.free = LARGEST_COPY if has_onednn() and not torch.is_autocast_enabled("cpu") else 0

    def __call__(self, module: nn.Module) -> Linear:
        if not isinstance(module, nn.Linear) or not _is_plain(module) or module.weight.nbytes > self.free:
            return module
        self.free -= module.weight.nbytes
        bias = None if module.bias is None else module.bias.detach()
        weight = torch.ops.mkldnn._reorder_linear_weight(module.weight.detach(), ROWS_IN_MIND)
        product = torch.ops.mkldnn._linear_pointwise

        def linear(x: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = product(x, weight, bias, "none", [], "")
            return result

        return linear


def as_it_is(module: nn.Module) -> Linear:
    """The module itself."""
    return module


def _is_plain(module: nn.Linear) -> bool:
    return (
        type(module) in (nn.Linear, CPULinear)
        and module.weight.dtype == torch.float32
        and module.weight.device.type == "cpu"
        and "forward" not in vars(module)
        and not module._forward_hooks
        and not module._forward_pre_hooks
    )
