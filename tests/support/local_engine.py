"""A training engine in plain torch with DeepSpeed's contract, so that the loops can be tested without DeepSpeed.

`step` updates at the boundary that was set only, gradients are clipped by nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from rlhf.engine import BatchPlan, RLHFEngine


def skip_without_cpu_adam() -> None:
    """Skip the test where DeepSpeed's own builder cannot compile its Adam, whatever ours says of it."""
    from deepspeed.ops.op_builder import CPUAdamBuilder

    try:
        CPUAdamBuilder().load(verbose=False)
    except Exception as error:  # the builder lets through whatever its compiler and loader raise
        pytest.skip(f"DeepSpeedCPUAdam cannot be compiled here: {error}")


class LocalEngine(nn.Module):
    """Keeps the gradients of every optimizer step in `gradients`: one dict of name -> tensor per step."""

    def __init__(self, module: nn.Module, plan: BatchPlan, *, lr: float = 1e-2) -> None:
        super().__init__()
        self.module = module
        self.plan = plan
        self.device = torch.device("cpu")
        self.optimizer = torch.optim.SGD(module.parameters(), lr=lr)
        self.gradients: list[dict[str, torch.Tensor]] = []
        self._boundary = True

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)

    def set_gradient_accumulation_boundary(self, is_boundary: bool) -> None:
        self._boundary = is_boundary

    def backward(self, loss: torch.Tensor, scale_wrt_gas: bool = True) -> None:
        (loss / (self.plan.accumulation_steps if scale_wrt_gas else 1)).backward()

    def step(self) -> None:
        if not self._boundary:
            return
        named = self.module.named_parameters()
        self.gradients.append({name: item.grad.clone() for name, item in named if item.grad is not None})
        self.optimizer.step()
        self.optimizer.zero_grad()


class LocalModels(RLHFEngine):
    """Actor, critic and reference of an RLHFEngine in plain torch, in evaluation mode also while they train."""

    def __init__(
        self,
        actor: nn.Module,
        critic: nn.Module | None,
        reference: nn.Module,
        plan: BatchPlan,
        *,
        side_by_side: bool = False,
    ) -> None:
        super().__init__(
            LocalEngine(actor.eval(), plan),
            critic=None if critic is None else LocalEngine(critic.eval(), plan),
            reference=reference.eval(),
            side_by_side=side_by_side,
        )

    @contextmanager
    def updating(self, engine: nn.Module) -> Iterator[None]:
        yield
