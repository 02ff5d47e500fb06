"""The one place where batch sizes are multiplied."""

from __future__ import annotations

from dataclasses import dataclass

from rlhf.config import ConfigError


@dataclass(frozen=True)
class BatchPlan:
    """How the sequences of one optimizer step are spread over devices and forward passes.

    Raises ConfigError, with sizes that work, when the arithmetic does not come out even.
    """

    global_batch_size: int
    micro_batch_size: int
    world_size: int

    def __post_init__(self) -> None:
        for name in ("global_batch_size", "micro_batch_size", "world_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1")
        unit = self.micro_batch_size * self.world_size
        below, rest = divmod(self.global_batch_size, unit)
        if rest:
            fitting = [below * unit] if below else []
            raise ConfigError(
                f"global_batch_size={self.global_batch_size} must be a multiple of micro_batch_size * world_size = "
                f"{self.micro_batch_size} * {self.world_size} = {unit}; use "
                f"{' or '.join(str(size) for size in [*fitting, (below + 1) * unit])}"
            )

    @property
    def per_rank(self) -> int:
        """Sequences of one optimizer step on one device."""
        return self.global_batch_size // self.world_size

    @property
    def accumulation_steps(self) -> int:
        """Forward and backward passes of one optimizer step on one device."""
        return self.per_rank // self.micro_batch_size
