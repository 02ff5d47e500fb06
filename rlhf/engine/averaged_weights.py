"""An exponential moving average of the weights that an engine trains."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from rlhf.config import ConfigError
from rlhf.distributed.collectives import raise_on_all
from rlhf.distributed.place import is_main, world_size
from rlhf.engine.master_weights import Weight, by_master, trained_weights


class AveragedWeights:
    """The average of `engine`'s float32 master weights, in float32 on the CPU: 4 bytes for each weight.

    It is divided over the ranks as the masters are (rank 0 holds all of it where they are not), so an update needs no
    communication. The 16-bit weights that the module computes with are too coarse: a small step does not move them.
    Raises ConfigError for a `decay` outside (0, 1).
    """

    def __init__(self, engine: Any, decay: float) -> None:
        if not 0.0 < decay < 1.0:
            raise ConfigError(f"ema_decay={decay} must lie between 0 and 1; at 0 no average is kept")
        self.decay = decay
        self._device: torch.device = engine.device
        self._weights = trained_weights(engine)
        self._averages = {
            id(members[0].master): members[0].master.detach().to("cpu", torch.float32, copy=True)
            for members in by_master(self._weights)
            if members[0].spans is not None or is_main()
        }

    @torch.no_grad()
    def update(self) -> None:
        """average = decay * average + (1 - decay) * weights. Not a collective."""
        for members in by_master(self._weights):
            master = members[0].master
            if id(master) in self._averages:
                self._averages[id(master)].lerp_(master.to("cpu", torch.float32), 1.0 - self.decay)

    @torch.no_grad()
    def state_dict(self) -> dict[str, torch.Tensor]:
        """The averaged weights in float32 by name, on rank 0 ({} on the others). A collective."""
        gathered = {weight.name: weight.gather(self._average_of(weight), self._device) for weight in self._weights}
        return {name: tensor.clone() for name, tensor in gathered.items() if tensor is not None}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Replace the average (rank 0 gives it; the others pass {}). A collective.

        Raises ValueError when the names differ (ConfigError on the other ranks).
        """
        names = {weight.name for weight in self._weights}
        differing = sorted(state.keys() ^ names) if is_main() else []
        message = f"the averaged actor has {len(names)} weights and the state {len(state)}; differing: "
        raise_on_all(ValueError(message + ", ".join(differing[:4])) if differing else None)
        for weight in self._weights:
            average = self._average_of(weight)
            if weight.spans is None or world_size() == 1:
                if is_main():
                    weight.part(average).copy_(weight.part_of(state[weight.name]))
                continue
            whole = torch.empty(weight.shape, device=self._device)
            if is_main():
                whole.copy_(state[weight.name])
            dist.broadcast(whole, src=0)
            weight.part(average).copy_(weight.part_of(whole))

    def _average_of(self, weight: Weight) -> torch.Tensor:
        """The tensor that holds the average of `weight` as its master holds the weight; its master where none does."""
        return self._averages.get(id(weight.master), weight.master)
