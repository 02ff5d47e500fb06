"""What only a CPU needs: products by oneDNN, weights copied into its blocked order, jobs on half of the threads each.

- Linear layers in float32 through oneDNN are a tenth to a fifth faster than the BLAS that PyTorch calls. The operators
  are those of PyTorch's compiler and no part of its public interface: where they are missing nothing is faster.
- A product of 8 to 32 rows takes two to three times as long with weights as a model stores them as with weights in
  oneDNN's blocked order (`LaidOut`), which costs a copy of them while it is kept.
- OpenMP threads meet at the end of every operation; at the sizes of a few million weights that costs about a fifth of
  the time, so two independent jobs run on half of the threads each (`side_by_side`). On a GPU, under ZeRO-3 or with
  several ranks, whose collectives must keep one order, they run one after the other.

Figures are in docs/performance.md.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

LARGEST_COPIED_BYTES = 128 * 2**20
"""Bytes of the copies that one `LaidOut` makes, at most."""
LAID_OUT_ROWS = 32
"""oneDNN chooses the blocks of a copy for products of this many rows; for 1 to 64 rows they are as good as any."""
WORKERS = 2
"""Jobs that `side_by_side` runs at a time."""

LinearCall = Callable[[torch.Tensor], torch.Tensor]
"""What a linear layer is to its caller: x [..., I] -> [..., O]."""
Result = TypeVar("Result")


# ------------------------------------------------------------------------------------------- products by oneDNN


def has_onednn() -> bool:
    """Whether this build of PyTorch has oneDNN's operators."""
    if not torch.backends.mkldnn.is_available():
        return False
    return hasattr(torch.ops.mkldnn, "_linear_pointwise") and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")


def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [..., I] @ weight [O, I].T + bias [O]: [..., O], without a gradient; by oneDNN where it applies."""
    return _onednn_product(x, weight, bias) if _applies(x, weight) else F.linear(x, weight, bias)


def weight_gradient(grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Gradient of a linear layer's weight: grad [N, O].T @ x [N, I] -> [O, I]."""
    if grad.shape[1] > x.shape[1] and _applies(x, grad):
        return product(x.t(), grad.t()).t()  # oneDNN wants the longer side there; the other way round BLAS is faster
    return grad.t() @ x


def speed_up_linears(model: nn.Module) -> None:
    """Let the plain linear layers of a float32 model on a CPU compute with `CPULinear`, in place.

    Weights, names and saved state are the same; layers that stand in for a linear one (LoRA, 8-bit) are left alone,
    and so is everything when the operators are not there.
    """
    for module in model.modules():
        if type(module) is nn.Linear and _applies(module.weight):
            module.__class__ = CPULinear


class CPULinear(nn.Linear):
    """`nn.Linear` with the products of forward and backward pass by oneDNN."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if not _applies(input, self.weight):
            return F.linear(input, self.weight, self.bias)
        if not torch.is_grad_enabled():
            return _onednn_product(input, self.weight, self.bias)
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


class LaidOut:
    """Copies weights into oneDNN's blocked order, until `LARGEST_COPIED_BYTES` bytes of copies are held.

    Called with a layer it gives what to call in its place: a product with the copy, or the layer itself where it is
    not exactly an `nn.Linear` in float32 on a CPU and without hooks (an adapter or a quantised layer computes more
    than a product), or where its copy would be one too many. A copy does not follow later changes of the weights.
    """

    def __init__(self) -> None:
        self.free = LARGEST_COPIED_BYTES

    def __call__(self, module: nn.Module) -> LinearCall:
        if not isinstance(module, nn.Linear) or not _only_multiplies(module) or module.weight.nbytes > self.free:
            return module
        self.free -= module.weight.nbytes
        bias = None if module.bias is None else module.bias.detach()
        weight = torch.ops.mkldnn._reorder_linear_weight(module.weight.detach(), LAID_OUT_ROWS)
        return lambda x: _onednn_product(x, weight, bias)


def _onednn_product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    result: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return result


def _applies(*tensors: torch.Tensor) -> bool:
    """Whether oneDNN's operators may multiply these: float32 on a CPU, outside autocast, and the operators there."""
    return (
        all(tensor.dtype == torch.float32 and tensor.device.type == "cpu" for tensor in tensors)
        and has_onednn()
        and not torch.is_autocast_enabled("cpu")
    )


def _only_multiplies(module: nn.Linear) -> bool:
    """Whether a call of the layer is one product by oneDNN and nothing else."""
    return (
        type(module) in (nn.Linear, CPULinear)
        and _applies(module.weight)
        and "forward" not in vars(module)
        and not module._forward_hooks
        and not module._forward_pre_hooks
    )


# ------------------------------------------------------------------------------------------- jobs side by side


def can_run_side_by_side(device: torch.device | str, *, ranks: int) -> bool:
    """True where jobs run side by side: one process on a CPU that may use several threads."""
    return torch.device(device).type == "cpu" and ranks == 1 and torch.get_num_threads() >= WORKERS


def side_by_side(jobs: Sequence[Callable[[], Result]], *, together: bool) -> list[Result]:
    """Results of all jobs in their order; `together` runs WORKERS of them at a time, the first ones first.

    Jobs must not change what another one reads. They see the caller's gradient mode. Each keeps its half of the
    threads to its end, so that results do not depend on timing. An exception of one is raised when all have ended.
    """
    if not together or len(jobs) < 2:
        return [job() for job in jobs]
    group = _Group(iter(enumerate(jobs)), torch.get_num_threads(), torch.is_grad_enabled())
    helper = threading.Thread(target=group.work)
    helper.start()
    try:
        group.work()  # the caller is one of the workers: a second new thread would hold memory of its own
    finally:
        helper.join()
        torch.set_num_threads(group.threads)  # a part of the setting is the process's
    for error in group.errors:
        raise error
    return [group.results[index] for index in range(len(jobs))]


@dataclass
class _Group:
    """Jobs that are run side by side; `waiting` gives each to one worker."""

    waiting: Iterator[tuple[int, Callable[[], Any]]]
    threads: int
    gradients: bool
    results: dict[int, Any] = field(default_factory=dict)
    errors: list[Exception] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def work(self) -> None:
        torch.set_num_threads(self.threads // WORKERS)
        while True:
            with self.lock:
                index, job = next(self.waiting, (0, None))
            if job is None:
                return
            try:
                with torch.set_grad_enabled(self.gradients):
                    self.results[index] = job()
            except Exception as error:  # raised by the caller when all have ended
                self.errors.append(error)
