"""One optimizer step over all micro-batches of all ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from rlhf.distributed.collectives import all_reduce_sum, any_rank
from rlhf.distributed.place import world_size
from rlhf.training.metrics import MeanMeter
from rlhf.training.nonfinite import NonFiniteError as NonFiniteError
from rlhf.training.nonfinite import gradient_error, loss_error

Batch = TypeVar("Batch")


def accumulate_step(
    engine: Any,
    micro_batches: Sequence[Batch],
    *,
    count: Callable[[Batch], float],
    loss_sum: Callable[[Batch], torch.Tensor],
    step: int,
    name: str = "loss",
    engine_name: str = "model",
    directory: Path | None = None,
    meter: MeanMeter | None = None,
    norm_name: str = "gradient_norm",
) -> float:
    """One optimizer step over all micro-batches of all ranks; returns the loss of the global batch.

    `loss_sum(batch)` is a sum over `count(batch)` elements (tokens or prompts). It is divided by the count of the
    *global* batch, so neither the split into micro-batches nor the number of ranks changes the gradient
    (TRL#583). The gradient's norm before clipping goes to `meter` as `norm_name` (not in fp16, where it may carry the
    loss scale). Raises NonFiniteError on every rank, before a weight changes, when the loss of one of them or the
    gradient is not finite; the batch then lies in `directory`. In fp16 a gradient that overflows is DeepSpeed's to
    handle.
    """
    from rlhf.engine.gradients import keeps_plain_gradients, plain_gradient_norm, scales_loss

    device = engine.device
    total = all_reduce_sum(torch.tensor(float(sum(count(batch) for batch in micro_batches)), device=device))
    if total == 0:
        raise ValueError(f"step {step}: no element of the batch counts for {name}; check the data and the masks")
    parts: list[torch.Tensor] = []

    def backward() -> None:
        for left, batch in zip(reversed(range(len(micro_batches))), micro_batches, strict=True):
            engine.set_gradient_accumulation_boundary(left == 0)  # the number of micro-batches varies
            loss = loss_sum(batch) / total
            engine.backward(loss * world_size(), scale_wrt_gas=False)  # DeepSpeed takes the mean over ranks
            parts.append(loss.detach())

    backward()
    running = torch.zeros((), device=device)
    for part in parts:
        running += part
    norm = plain_gradient_norm(engine) if keeps_plain_gradients(engine) else None
    bad_loss = not bool(torch.isfinite(running))
    if any_rank(bad_loss or (norm is not None and not bool(torch.isfinite(norm))), device):
        if any_rank(bad_loss, device):
            raise loss_error(engine, engine_name, name, step, micro_batches, parts, directory)
        raise gradient_error(engine, engine_name, name, step, micro_batches, directory, None)
    engine.step()
    if not scales_loss(engine):
        if norm is None and getattr(engine.optimizer, "overflow", False):  # DeepSpeed has left the step out
            raise gradient_error(engine, engine_name, name, step, micro_batches, directory, backward)
        norm = engine.get_global_grad_norm() if norm is None else norm
        if meter is not None and norm is not None:
            meter.add({norm_name: norm}, 1)
    return float(all_reduce_sum(running))


def learning_rate(engine: Any) -> float:
    """The learning rate of the engine's next optimizer step."""
    return float(engine.optimizer.param_groups[0]["lr"])
