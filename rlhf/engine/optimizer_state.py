"""The optimizer's part of a training state: step counts and moments, read and restored.

An optimizer has one state for each master (see `rlhf.engine.master_weights`), which may hold many weights.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from rlhf.config import ConfigError
from rlhf.engine.master_weights import Weight, by_master

OPTIMIZERS = {"DeepSpeedCPUAdam": "AdamW", "PagedAdamW8bit": "AdamW8bit"}
"""Optimizers whose state is that of another one."""

Moments = dict[str, torch.Tensor]


def optimizer_kind(optimizer: torch.optim.Optimizer) -> str:
    """The optimizer's class, or that of another one with the same state."""
    kind = type(optimizer).__name__
    return OPTIMIZERS.get(kind, kind)


def step_of(optimizer: torch.optim.Optimizer, master: torch.Tensor) -> int | None:
    """Steps that `master` has taken; None before the first."""
    state = optimizer.state.get(master)
    return int(state["step"]) if state else None


def moments_of(optimizer: torch.optim.Optimizer, master: torch.Tensor) -> tuple[Moments, Moments]:
    """The moments of `master`: those with one number for each of its weights, or else the packed ones."""
    moments = {key: value for key, value in optimizer.state.get(master, {}).items() if key != "step"}
    plain = all(value.is_floating_point() and value.numel() == master.numel() for value in moments.values())
    return (moments, {}) if plain else ({}, moments)


def layout_of(weights: Sequence[Weight]) -> str:
    """Where the weights are in this rank's masters; packed moments fit no other layout."""
    return json.dumps([(weight.name, weight.offset, weight.spans) for weight in weights])


def set_moments(
    optimizer: torch.optim.Optimizer,
    weights: Sequence[Weight],
    saved: Mapping[str, Mapping[str, Any]],
    read: Callable[[str], torch.Tensor],
) -> None:
    """Restore each master's state from `saved` ("step" and "moments" by weight) and `read` ("moment/weight")."""
    optimizer.state.clear()
    for members in by_master(weights):
        master = members[0].master
        steps = [saved[weight.name]["step"] for weight in members if saved[weight.name]["step"] is not None]
        if not steps:
            continue
        state: dict[str, Any] = {"step": _step_count(optimizer, master, steps[0])}
        for weight in members:
            for key in saved[weight.name]["moments"]:
                whole = read(f"{key}/{weight.name}")
                if key not in state:
                    state[key] = _zeros_for(optimizer, master, whole.dtype)
                weight.part(state[key]).copy_(weight.part_of(whole))
        optimizer.state[master] = state


def set_packed_moments(optimizer: torch.optim.Optimizer, weights: Sequence[Weight], path: Path) -> None:
    """Add the packed moments of this rank ("master's number/moment") to the states that `set_moments` made."""
    masters = [members[0].master for members in by_master(weights)]
    with safe_open(path, "pt") as file:
        if file.metadata().get("layout") != layout_of(weights):
            raise ConfigError(
                f"{path} holds packed moments of weights that have another order here; resume with the "
                "deepspeed_config that they were saved with"
            )
        for name in file.keys():  # noqa: SIM118 - not a dictionary
            number, key = name.split("/")
            master, value = masters[int(number)], file.get_tensor(name)
            like_master = value.shape == master.shape
            room = (
                _zeros_for(optimizer, master, value.dtype)
                if like_master
                else torch.empty_like(value, device=master.device)
            )
            optimizer.state[master][key] = room.copy_(value)


def restore_beta_powers(optimizer: Any) -> None:
    """Restore the powers of the betas that DeepSpeedCPUAdam keeps internally.

    It multiplies them step by step in float32; computed at once they differ by a rounding, and so would the weights.
    """
    if not hasattr(optimizer, "ds_opt_adam"):
        return
    group = optimizer.param_groups[0]
    last = max((state["step"] for state in optimizer.state.values()), default=0)
    zeros = [torch.zeros(1) for _ in range(4)]  # weights, gradients, moments
    for step in range(1, last + 1):
        optimizer.ds_opt_adam.adam_update(
            optimizer.opt_id, step, 0.0, *group["betas"], group["eps"], 0.0, group["bias_correction"], *zeros
        )


def _step_count(optimizer: torch.optim.Optimizer, master: torch.Tensor, step: int) -> Any:
    """A step count as the optimizer keeps it."""
    if not isinstance(optimizer, torch.optim.AdamW):
        return step
    on_device = any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups)
    return torch.tensor(float(step), device=master.device if on_device else "cpu")


def _zeros_for(optimizer: torch.optim.Optimizer, master: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Zeros for a moment of `master`, in the memory where the optimizer keeps it."""
    paged: Any = getattr(optimizer, "get_state_buffer", None)  # bitsandbytes
    if paged is None:
        return torch.zeros_like(master, dtype=dtype)
    from deepspeed.accelerator import get_accelerator

    zeros: torch.Tensor = paged(master, dtype=dtype)
    get_accelerator().synchronize()  # the device may still be filling memory that the CPU writes next
    return zeros
