"""Which examples an optimizer step takes, and in which micro-batches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch

from rlhf.config import BatchConfig
from rlhf.distributed.place import rank


class Plan(Protocol):
    """The arithmetic of a batch (see `rlhf.engine.BatchPlan`)."""

    @property
    def global_batch_size(self) -> int: ...
    @property
    def world_size(self) -> int: ...
    def token_budget(self, lengths: Sequence[int]) -> int: ...
    def micro_batches(self, lengths: Sequence[int], *, sharers: int = 1) -> list[list[int]]: ...


class DataOrder:
    """The order of examples: an endless stream of shuffled epochs, the same on every rank.

    Step s takes examples s*G to (s+1)*G of the stream, so no batch is ever partial; G is `size`, or unset the global
    batch of `plan`. Within a step examples go into
    micro-batches by length, which changes no gradient: losses are normalised over the whole global batch.
    """

    def __init__(self, lengths: Sequence[int], plan: Plan, seed: int, *, size: int | None = None) -> None:
        if not lengths:
            raise ValueError("no training example: the data set is empty")
        self._lengths = lengths
        self._plan = plan
        self._seed = seed
        self._size = size or plan.global_batch_size

    def indices(self, step: int) -> list[int]:
        """Examples of the global batch of `step`, longest first."""
        size, total = self._size, len(self._lengths)
        chosen = []
        for position in range(step * size, (step + 1) * size):
            epoch, offset = divmod(position, total)
            chosen.append(int(self._permutation(epoch)[offset]))
        return sorted(chosen, key=lambda index: (-self._lengths[index], index))

    def micro_batches(self, step: int, *, sharers: int = 1) -> list[list[int]]:
        """This rank's micro-batches of `step`, equally many on every rank (see `BatchPlan.micro_batches`)."""
        chosen = self.indices(step)
        parts = self._plan.micro_batches([self._lengths[index] for index in chosen], sharers=sharers)
        return [[chosen[place] for place in part] for part in parts[rank() :: self._plan.world_size]]

    def _permutation(self, epoch: int) -> torch.Tensor:
        if getattr(self, "_epoch", None) != epoch:
            generator = torch.Generator().manual_seed(self._seed * 1_000_003 + epoch)
            self._order = torch.randperm(len(self._lengths), generator=generator)
            self._epoch = epoch
        return self._order


def visited(examples: int, plan: Plan, seed: int, *, steps: int) -> list[int]:
    """Which of the examples a run of so many steps takes, in order: all of them in a whole pass."""
    if steps * plan.global_batch_size >= examples:
        return list(range(examples))
    order = DataOrder([1] * examples, plan, seed)
    return sorted({index for step in range(steps) for index in order.indices(step)})


def planned_steps(examples: int, batch: BatchConfig, size: int) -> int:
    """Steps of `size` examples in a run: `max_steps`, or as many as `epochs` passes take.

    The last step runs on into the next pass.
    """
    return batch.max_steps or max(1, math.ceil(round(batch.epochs * examples, 6) / size))
