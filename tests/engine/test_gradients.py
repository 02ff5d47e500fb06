"""Gradients of 16-bit engines: summed in float32, measured, and looked at where they are not finite.

The oracle is exact: each micro-batch's gradient is a product of small integers, which bf16 holds, and so is their sum
in float32. What differs is the accumulation's and the communication's doing.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.utils import safe_get_full_grad
from torch import nn

from rlhf.config import EngineConfig, OptimizerConfig
from rlhf.distributed.place import is_main, rank, world_size
from rlhf.distributed.world import close_world, init_world
from rlhf.engine import BatchPlan, compute_dtype, training_engine
from rlhf.training.metrics import MeanMeter
from rlhf.training.nonfinite import NonFiniteError
from rlhf.training.step import accumulate_step
from tests.support.engine_state_worker import allow_fp16

MICRO_BATCHES = 32
"""On each rank; one row each."""


SIXTEEN_BIT_SUM = 4e-3
"""Relative error of the sum that bf16 makes of so many micro-batches, at the least."""


STAGES = (0, 1, 2, 3)


class Products(nn.Module):
    """loss = sum of t * (W x) + b t: the gradients of W and b are outer products and t."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 6)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return (self.linear(x) * t).sum()


def rows(world: int) -> tuple[torch.Tensor, torch.Tensor]:
    """x [N, 8] and t [N, 6], whole numbers below 16."""
    generator = torch.Generator().manual_seed(3)
    number = MICRO_BATCHES * world
    return tuple(torch.randint(1, 16, (number, width), generator=generator).float() for width in (8, 6))  # type: ignore[return-value]


def make_engine(zero_stage: int, precision: str, *, offload: str = "none", directory: Path | None = None) -> Any:
    settings = None
    if directory is not None:
        settings = str(directory / f"settings{rank()}.json")
        Path(settings).write_text(json.dumps({"fp16": {"initial_scale_power": 2}}))
    config = EngineConfig(
        zero_stage=zero_stage, precision=precision, offload=offload, max_grad_norm=0.0, deepspeed_config=settings
    )  # type: ignore[arg-type]
    torch.manual_seed(1)
    model = Products().to(compute_dtype(precision))
    plan = BatchPlan(MICRO_BATCHES * world_size(), 1, world_size())
    return training_engine(model, engine=config, optimizer=OptimizerConfig(), plan=plan, total_steps=4)


def step(engine: Any, *, spoil_last: bool = False) -> tuple[dict[str, torch.Tensor], float]:
    """One optimizer step over all rows: the gradients that the step took, and the norm that it logged."""
    x, t = rows(world_size())
    x, t = (tensor.to(next(engine.module.parameters()).dtype) for tensor in (x, t))
    found: dict[str, torch.Tensor] = {}
    take_step = engine.step

    def look_and_step() -> None:
        scale = engine.optimizer.loss_scaler.cur_scale if engine.fp16_enabled() else 1.0
        for name, parameter in engine.module.named_parameters():
            found[name] = safe_get_full_grad(parameter).double() / scale
        take_step()

    def loss_sum(row: int) -> torch.Tensor:
        loss = engine(x[row : row + 1], t[row : row + 1])
        if spoil_last and row == MICRO_BATCHES - 1:
            loss.register_hook(lambda gradient: gradient * float("inf"))
        return loss.float()

    engine.step = look_and_step
    meter = MeanMeter()
    mine = range(rank() * MICRO_BATCHES, (rank() + 1) * MICRO_BATCHES)
    try:
        accumulate_step(engine, mine, count=lambda _: 1.0, loss_sum=loss_sum, step=1, meter=meter)
    finally:
        del engine.step
    return found, meter.means(engine.device).get("gradient_norm", 0.0)


def expected(world: int) -> dict[str, torch.Tensor]:
    """The gradients of the mean over all rows, in one pass in float64."""
    x, t = (tensor.double() for tensor in rows(world))
    return {"linear.weight": t.T @ x / len(x), "linear.bias": t.mean(0)}


def relative_errors(found: dict[str, torch.Tensor], world: int) -> dict[str, float]:
    return {name: float((found[name] - exact).norm() / exact.norm()) for name, exact in expected(world).items()}


def norm_of(gradients: dict[str, torch.Tensor]) -> float:
    return float(torch.cat([gradient.flatten() for gradient in gradients.values()]).norm())


def test_the_oracle_tells_16_bit_sums_apart():
    x, t = (tensor.bfloat16() for tensor in rows(1))
    total = torch.zeros(6, 8, dtype=torch.bfloat16)
    for row in range(len(x)):
        product = torch.outer(t[row].float(), x[row].float())
        assert torch.equal(product.bfloat16().float(), product)  # exact in one micro-batch
        total += product.bfloat16() / len(x)
    assert relative_errors({"linear.weight": total.double(), "linear.bias": t.double().mean(0)}, 1)["linear.weight"] > (
        SIXTEEN_BIT_SUM
    )


@pytest.mark.parametrize("zero_stage", STAGES)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_micro_batches_are_summed_in_float32(zero_stage, precision, tmp_path):
    with allow_fp16():
        found, norm = step(make_engine(zero_stage, precision, directory=tmp_path if precision == "fp16" else None))
    assert max(relative_errors(found, 1).values()) < 1e-6
    if precision != "fp16":  # there the norm may carry the loss scale and is not logged
        assert norm == pytest.approx(norm_of(expected(1)), rel=1e-5)


@pytest.mark.parametrize(("zero_stage", "offload"), [(1, "optimizer"), (2, "optimizer"), (3, "optimizer"), (3, "all")])
def test_offloaded_engines_sum_in_float32_too(zero_stage, offload):
    found, _ = step(make_engine(zero_stage, "bf16", offload=offload))
    assert max(relative_errors(found, 1).values()) < 1e-6


@pytest.mark.parametrize("zero_stage", STAGES)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_gradient_that_is_not_finite_stops_before_a_weight_changes(zero_stage, precision):
    engine = make_engine(zero_stage, precision)
    step(engine)
    before = weights(engine)
    with pytest.raises(NonFiniteError, match="first that of linear.weight; the loss is finite, no weight has changed"):
        step(engine, spoil_last=True)
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(engine).items())


def weights(engine: Any) -> dict[str, torch.Tensor]:
    from rlhf.checkpoint.export import full_state_dict

    return {name: tensor.clone() for name, tensor in full_state_dict(engine).items()}


def on_two_ranks() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for zero_stage in STAGES:
        engine = make_engine(zero_stage, "bf16")
        found[f"gradients {zero_stage}"] = step(engine)
        try:
            step(engine, spoil_last=True)
        except NonFiniteError as error:
            found[f"stopped {zero_stage}"] = str(error)
    return found


if __name__ == "__main__":
    init_world()
    results = on_two_ranks()
    if is_main():
        torch.save(results, Path(sys.argv[-1]) / "found.pt")
    close_world()
