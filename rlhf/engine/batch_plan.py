"""The one place where batch sizes are multiplied."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from rlhf.config import ConfigError


@dataclass(frozen=True)
class BatchPlan:
    """How the sequences of one optimizer step are spread over devices and forward passes.

    A forward pass holds at most `micro_batch_tokens` tokens (0: as many as `micro_batch_size` sequences of the step's
    longest length), so short sequences go through together. Any number of devices up to the number of sequences will
    do: where it does not divide them some devices have one more, and the gradient is the same, since losses are sums
    over the token count of the global batch. Raises ConfigError for fewer sequences than devices.
    """

    global_batch_size: int
    micro_batch_size: int
    world_size: int
    micro_batch_tokens: int = 0

    def __post_init__(self) -> None:
        for name in ("global_batch_size", "micro_batch_size", "world_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1")
        if self.global_batch_size < self.world_size:
            raise ConfigError(
                f"global_batch_size={self.global_batch_size} leaves {self.world_size - self.global_batch_size} of "
                f"{self.world_size} devices without a sequence: start on {self.global_batch_size} or fewer (run_all.sh "
                f"--num_devices {self.global_batch_size}, deepspeed --num_gpus {self.global_batch_size}), which learns "
                f"the same; or set global_batch_size={self.world_size} or more, which changes the training (in PPO the "
                "responses of a rollout must be a multiple of it)"
            )

    @property
    def most_per_device(self) -> int:
        """Sequences of one optimizer step on the device that has most of them."""
        return -(-self.global_batch_size // self.world_size)

    @property
    def accumulation_steps(self) -> int:
        """Forward and backward passes of one optimizer step on each device, were all sequences of one length."""
        return -(-self.most_per_device // self.micro_batch_size)

    @property
    def deepspeed_numbers(self) -> dict[str, int]:
        """Batch sizes that satisfy DeepSpeed's equation, total = micro x accumulation x devices.

        They train nothing: what is in a micro-batch and which one ends a step are said at every call. Where the
        devices do not divide the sequences the total is larger than the global batch.
        """
        micro = -(-self.most_per_device // self.accumulation_steps)
        return {
            "train_batch_size": micro * self.accumulation_steps * self.world_size,
            "train_micro_batch_size_per_gpu": micro,
            "gradient_accumulation_steps": self.accumulation_steps,
        }

    def token_budget(self, lengths: Sequence[int]) -> int:
        """Tokens of one forward and backward pass over sequences of these lengths."""
        return self.micro_batch_tokens or self.micro_batch_size * max(lengths)

    def micro_batches(self, lengths: Sequence[int], *, sharers: int = 1) -> list[list[int]]:
        """The micro-batches of all devices: indices of sequences of like length, equally many parts per device.

        Parts hold about equally many tokens and not more than the budget allows, unless one sequence is longer than
        it or, with micro-batches of one sequence, the devices do not divide the sequences: some of the shortest then
        go through in twos. `sharers` models that train at the same time share the budget. Device r takes every
        world_size-th part from r. With fewer sequences than devices each is one part.
        """
        budget = max(1, self.token_budget(lengths) // sharers)
        parts = -(-sum(lengths) // budget)
        parts += -parts % self.world_size
        most = len(lengths) - len(lengths) % self.world_size or len(lengths)
        while True:
            split = partition(lengths, min(parts, most))
            if parts >= most or all(
                len(part) == 1 or sum(lengths[index] for index in part) <= budget for part in split
            ):
                return split
            parts += max(1, parts // (32 * self.world_size)) * self.world_size  # long lists: a few parts more, not slow


def partition(lengths: Sequence[int], parts: int) -> list[list[int]]:
    """`parts` groups of indices, none empty, longest sequences first, with about equally many tokens each.

    Raises ValueError when there are fewer sequences than parts.
    """
    if not 1 <= parts <= len(lengths):
        raise ValueError(f"{len(lengths)} sequences cannot make {parts} parts")
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    ends = list(accumulate(lengths[index] for index in order))
    cuts = [0]
    for part in range(1, parts):
        wanted = ends[-1] * part / parts
        cut = bisect_left(ends, wanted)
        cut += abs(ends[cut] - wanted) <= abs((ends[cut - 1] if cut else 0) - wanted)
        cuts.append(min(max(cut, cuts[-1] + 1), len(order) - (parts - part)))
    cuts.append(len(order))
    return [order[start:end] for start, end in zip(cuts, cuts[1:], strict=False)]
