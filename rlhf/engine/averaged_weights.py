"""An exponential moving average of the weights that an engine trains."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from rlhf.config import ConfigError
from rlhf.distributed import is_main


class AveragedWeights:
    """The average of `engine`'s trainable weights, in float32 on the CPU of rank 0: 4 bytes for each weight.

    Raises ConfigError for a `decay` outside (0, 1).
    """

    def __init__(self, engine: Any, decay: float) -> None:
        if not 0.0 < decay < 1.0:
            raise ConfigError(f"ema_decay={decay} must lie between 0 and 1; at 0 no average is kept")
        self.engine = engine
        self.decay = decay
        self._weights = {name: weight.clone() for name, weight in self._current_weights()}

    def update(self) -> None:
        """average = decay * average + (1 - decay) * weights. A collective under ZeRO-3."""
        for name, weight in self._current_weights():
            self._weights[name].lerp_(weight, 1.0 - self.decay)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The averaged weights in float32 by name, on rank 0 ({} on the others)."""
        return dict(self._weights)

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Replace the average (rank 0; the others pass {}). Raises ValueError when the names differ."""
        if is_main() and state.keys() != self._weights.keys():
            raise ValueError(
                f"the averaged actor has {len(self._weights)} weights and the state {len(state)}; "
                f"differing: {', '.join(sorted(state.keys() ^ self._weights.keys())[:4])}"
            )
        self._weights = {name: tensor.float().clone() for name, tensor in state.items()} if is_main() else {}

    @torch.no_grad()
    def _current_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Name and float32 copy on the CPU of each trainable weight, on rank 0; the others gather with it."""
        import deepspeed

        for name, parameter in self.engine.module.named_parameters():
            if parameter.requires_grad:
                with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
                    weight = parameter.detach().to("cpu", torch.float32) if is_main() else None
                if weight is not None:
                    yield name, weight
