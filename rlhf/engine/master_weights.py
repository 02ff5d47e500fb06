"""Where a DeepSpeed engine keeps its float32 master weights, and which part of each is on which rank.

Every wrapper that `deepspeed.initialize` puts around an optimizer keeps them in its own way; the optimizer's moments
are divided over the ranks in the same way. DeepSpeed's own `safe_get_full_*` sums fragments over the ranks (which turns
-0.0 into 0.0) and its `safe_set_full_*` cannot set a ZeRO-3 weight whose size the ranks do not divide; neither knows
engines without ZeRO.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from rlhf.config import ConfigError
from rlhf.distributed.place import is_main, rank, world_size

BROADCAST_ELEMENTS = 2**24
"""Elements that travel between ranks at a time: 64 MiB of float32 on each device."""

Span = tuple[int, int]
"""First element and the one after the last, of a weight flattened to one row."""


@dataclass(frozen=True)
class Weight:
    """A trainable weight of an engine. `master` holds its float32 values, or this rank's part of many weights' values.

    `spans` are the parts of the ranks, None where every rank has the whole weight; this rank's part begins at element
    `offset` of `master`.
    """

    name: str
    shape: tuple[int, ...]
    master: torch.Tensor
    offset: int = 0
    spans: tuple[Span, ...] | None = None

    def part(self, like_master: torch.Tensor) -> torch.Tensor:
        """This rank's part of the weight in `like_master`, the master or a moment of its layout; shares memory."""
        if self.spans is None:
            return like_master.detach()
        start, end = self.spans[rank()]
        return like_master.detach().view(-1)[self.offset : self.offset + end - start]

    def part_of(self, whole: torch.Tensor) -> torch.Tensor:
        """This rank's part of `whole`, a tensor of the weight's shape."""
        return whole if self.spans is None else whole.reshape(-1)[slice(*self.spans[rank()])]

    def gather(self, like_master: torch.Tensor, device: torch.device) -> torch.Tensor | None:
        """All parts of the weight in `like_master` on the CPU of rank 0 (None elsewhere), bit for bit. A collective.

        Parts travel over `device` by broadcasts of BROADCAST_ELEMENTS.
        """
        part = self.part(like_master)
        if self.spans is None:
            return part.cpu() if is_main() else None
        whole = torch.empty(math.prod(self.shape) if is_main() else 0, dtype=part.dtype)
        for owner, (start, end) in enumerate(self.spans):
            for first in range(start, end, BROADCAST_ELEMENTS):
                last = min(first + BROADCAST_ELEMENTS, end)
                if rank() == owner:
                    piece = part[first - start : last - start].to(device)
                else:
                    piece = part.new_empty(last - first if owner > 0 else 0, device=device)
                if owner > 0:
                    dist.broadcast(piece, src=owner)
                if is_main():
                    whole[first:last] = piece
        return whole.view(self.shape) if is_main() else None


def trained_weights(engine: Any) -> list[Weight]:
    """The trainable weights of an engine in the order of its module, tied ones once.

    Raises ConfigError for a form of DeepSpeed's engine that this does not know.
    """
    names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
    found = {names[id(parameter)]: weight for parameter, weight in _wrapper(engine).weights(engine.optimizer)}
    return [
        Weight(name, tuple(getattr(parameter, "ds_shape", parameter.shape)), *found[name])
        for name, parameter in engine.module.named_parameters()
        if name in found
    ]


def by_master(weights: Iterable[Weight]) -> list[list[Weight]]:
    """The weights grouped by the master that holds them."""
    groups: dict[int, list[Weight]] = {}
    for weight in weights:
        groups.setdefault(id(weight.master), []).append(weight)
    return list(groups.values())


def refresh_weights(engine: Any) -> None:
    """Copy the masters' values into the weights that the module computes with. A collective."""
    with torch.no_grad():
        _wrapper(engine).refresh(engine.optimizer)


Place = tuple[torch.Tensor, int, tuple[Span, ...] | None]
"""`Weight.master`, `offset` and `spans`."""


@dataclass(frozen=True)
class _Wrapper:
    weights: Callable[[Any], Iterator[tuple[nn.Parameter, Place]]]
    refresh: Callable[[Any], None]


def _wrapper(engine: Any) -> _Wrapper:
    optimizer = engine.optimizer
    kind = type(optimizer).__name__
    if optimizer is engine.basic_optimizer:
        return _Wrapper(_plain, lambda _: None)
    unknown = getattr(optimizer, "zenflow", False) or hasattr(optimizer, "backup_optimizer")
    if unknown or getattr(optimizer, "swap_optimizer", False) or kind not in _WRAPPERS:
        raise ConfigError(
            f"the state of DeepSpeed's {kind} in this form cannot be saved: deepspeed_config asks for something beyond "
            "ZeRO 0 to 3 with offloading of everything or nothing to the CPU; leave it out, or save nothing with "
            "keep_last=0"
        )
    return _WRAPPERS[kind]


def _plain(optimizer: torch.optim.Optimizer) -> Iterator[tuple[nn.Parameter, Place]]:
    """float32 without ZeRO: the weights are their own masters."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            yield parameter, (parameter, 0, None)


def _flat_groups(optimizer: Any) -> Iterator[tuple[nn.Parameter, Place]]:
    """ZeRO 1 and 2: the weights of a group form one row, which is cut into equal parts for the ranks."""
    for parameters, offsets, master in zip(
        optimizer.round_robin_bit16_groups,
        optimizer.round_robin_bit16_offsets,
        optimizer.single_partition_of_fp32_groups,
        strict=True,
    ):
        yield from _cut_row(parameters, offsets, master)


def _flat_bf16_groups(optimizer: Any) -> Iterator[tuple[nn.Parameter, Place]]:
    """bf16 under ZeRO-1, and without ZeRO, which runs as it: the same under other names."""
    for parameters, master in zip(optimizer.bf16_groups, optimizer.fp32_groups_flat_partition, strict=True):
        offsets = [0, *accumulate(parameter.numel() for parameter in parameters)][:-1]
        yield from _cut_row(parameters, offsets, master)


def _cut_row(
    parameters: Sequence[nn.Parameter], offsets: Sequence[int], master: torch.Tensor
) -> Iterator[tuple[nn.Parameter, Place]]:
    size = master.numel()  # of each rank's part, padding at the end of the row included
    for parameter, offset in zip(parameters, offsets, strict=True):
        count = parameter.numel()
        cuts = [min(max(number * size - offset, 0), count) for number in range(world_size() + 1)]
        spans = tuple(zip(cuts, cuts[1:], strict=False))
        yield parameter, (master, max(0, offset - rank() * size), spans)


def _refresh_flat(optimizer: Any) -> None:
    optimizer.update_lp_params()


def _partitioned(optimizer: Any) -> Iterator[tuple[nn.Parameter, Place]]:
    """ZeRO-3: each weight is cut into equal parts for the ranks; a rank's parts form one row for each group."""
    for parameters, master in zip(optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat, strict=True):
        sizes = [parameter.partition_numel() for parameter in parameters]
        for parameter, size, offset in zip(parameters, sizes, [0, *accumulate(sizes)], strict=False):
            cuts = [min(number * size, parameter.ds_numel) for number in range(world_size() + 1)]
            yield parameter, (master, offset, tuple(zip(cuts, cuts[1:], strict=False)))


def _refresh_partitioned(optimizer: Any) -> None:
    """As DeepSpeed does in a step. Weights that are gathered at the moment are released first."""
    optimizer._partition_all_parameters()
    for number in range(len(optimizer.fp16_groups)):
        optimizer._reassign_or_swap_out_partitioned_parameters(number)
    optimizer.invalidate_secondary_tensor()


_WRAPPERS = {
    "DeepSpeedZeroOptimizer": _Wrapper(_flat_groups, _refresh_flat),
    "BF16_Optimizer": _Wrapper(_flat_bf16_groups, _refresh_flat),
    "DeepSpeedZeroOptimizer_Stage3": _Wrapper(_partitioned, _refresh_partitioned),
}
"""By the exact name of the class: a subclass may keep its weights elsewhere."""
