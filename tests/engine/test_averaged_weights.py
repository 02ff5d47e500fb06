"""The averaged actor: of float32 masters, in whatever way the ranks hold them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.utils import safe_get_full_fp32_param

from rlhf.config import ConfigError, EngineConfig, OptimizerConfig
from rlhf.distributed.place import is_main, world_size
from rlhf.distributed.world import close_world, init_world
from rlhf.engine import AveragedWeights, BatchPlan, compute_dtype, training_engine
from tests.engine.test_gradients import Products

DECAY = 0.995


Tensors = dict[str, torch.Tensor]


def make_engine(zero_stage: int, precision: str) -> Any:
    torch.manual_seed(1)
    return training_engine(
        Products().to(compute_dtype(precision)),
        engine=EngineConfig(zero_stage=zero_stage, precision=precision),  # type: ignore[arg-type]
        optimizer=OptimizerConfig(learning_rate=1e-6, lr_schedule="constant"),
        plan=BatchPlan(world_size(), 1, world_size()),
        total_steps=2000,
    )


def masters(engine: Any) -> Tensors:
    """What the optimizer steps on, by DeepSpeed's own helper where there is one, in float64."""
    named = engine.module.named_parameters()
    if engine.optimizer is engine.basic_optimizer:
        return {name: parameter.detach().double() for name, parameter in named}
    return {name: safe_get_full_fp32_param(parameter).double() for name, parameter in named}


def many_tiny_updates(engine: Any, updates: int) -> tuple[Tensors, Tensors, Tensors]:
    """The weights at the start, the average after `updates` steps, and what float64 says it is. Steps of about 1e-6
    are a thousandth of what moves a bf16 weight of this size."""
    dtype = next(engine.module.parameters()).dtype
    start = masters(engine)
    exact = {name: tensor.clone() for name, tensor in start.items()}
    average = AveragedWeights(engine, DECAY)
    x, t = torch.arange(1.0, 9.0)[None].to(dtype), torch.arange(-3.0, 3.0)[None].to(dtype) + 0.5
    for _ in range(updates):
        engine.set_gradient_accumulation_boundary(True)
        engine.backward(engine(x, t), scale_wrt_gas=False)
        engine.step()
        average.update()
        for name, tensor in masters(engine).items():
            exact[name].lerp_(tensor, 1.0 - DECAY)
    found = average.state_dict()
    check_saving(average, found)
    return start, found, exact


def check_saving(average: AveragedWeights, found: Tensors) -> None:
    """An average that is loaded is the one that was saved, on every number of ranks; names that differ stop all."""
    average.load_state_dict({name: tensor + 1 for name, tensor in found.items()})
    shifted = average.state_dict()
    assert bool(shifted) == is_main()
    assert all(torch.equal(tensor, found[name] + 1) for name, tensor in shifted.items())
    before = {name: tensor.clone() for name, tensor in shifted.items()}
    average.update()
    updated = average.state_dict()
    assert not is_main() or any(not torch.equal(tensor, before[name]) for name, tensor in updated.items())
    assert all(torch.equal(tensor, before[name]) for name, tensor in shifted.items())  # a copy, not a view
    with pytest.raises((ValueError, ConfigError), match="differing: linear.bias" if is_main() else "rank 0"):
        average.load_state_dict({"linear.weight": shifted["linear.weight"]} if is_main() else {})


def assert_close_in_movement(start: Tensors, found: Tensors, exact: Tensors) -> None:
    assert found.keys() == exact.keys() and all(tensor.dtype == torch.float32 for tensor in found.values())
    for name, tensor in exact.items():
        moved = tensor - start[name]
        assert moved.abs().min() > 1e-5
        error = (found[name].double() - tensor).norm() / moved.norm()
        assert error < 0.01, f"{name}: the average is {error:.1%} of its way from where it should be"


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_thousand_tiny_updates_move_the_average_as_in_float64(zero_stage, precision):
    assert_close_in_movement(*many_tiny_updates(make_engine(zero_stage, precision), 1000))


@pytest.mark.parametrize("decay", [-0.1, 1.0, 1.5])
def test_a_decay_that_averages_nothing_is_refused(decay):
    with pytest.raises(ConfigError, match=f"ema_decay={decay} must lie between 0 and 1"):
        AveragedWeights(make_engine(0, "fp32"), decay)


if __name__ == "__main__":
    init_world()
    results = {
        f"{precision} {stage}": many_tiny_updates(make_engine(stage, precision), 150)
        for precision in ("fp32", "bf16")
        for stage in (0, 2, 3)
    }
    if is_main():
        torch.save(results, Path(sys.argv[-1]) / "found.pt")
    close_world()
