"""Whole weights for a while: a ZeRO-3 engine's parameters gathered once instead of at every forward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def gathered_weights(engine: nn.Module) -> Iterator[None]:
    """Within the block every rank holds all of the engine's weights, and calls of its modules are no collectives.

    For sampling under ZeRO-3: a token then costs no all-gather, and ranks may take different numbers of steps. Weights
    are for reading, without gradients. Entering and leaving are collectives: every rank must do both. It takes the
    memory of one whole copy of the weights on each device. For any other engine or module nothing changes.
    """
    offload = _partitioner(engine)
    if offload is None:
        yield
        return
    import deepspeed

    offload.partition_all_parameters()  # also waits for weights that an earlier forward began to fetch
    with deepspeed.zero.GatheredParameters(list(offload.module.parameters()), modifier_rank=None):
        removed = _take_hooks_off(offload)
        try:
            yield
        finally:
            _put_hooks_back(removed)


def _partitioner(engine: nn.Module) -> Any | None:
    """What hooks fetching and releasing of weights into an engine's modules: with an optimizer its part, else alone."""
    optimizer = getattr(engine, "optimizer", None)
    offload = getattr(optimizer, "parameter_offload", optimizer)
    return offload if hasattr(offload, "partition_all_parameters") else None


Hooks = list[tuple[dict[int, Any], dict[int, Any]]]
"""For each dictionary of hooks that was changed: the dictionary, and all it held before."""


def _take_hooks_off(offload: Any) -> Hooks:
    """Remove the partitioner's hooks from their modules, without telling their handles, so that they can return.

    Registering them anew would number them anew, forget the recorded order of modules and, done at every
    iteration, wrap functions in functions.
    """
    handles = [*offload.forward_hooks, *offload.backward_hooks, offload.fwd_pre_hook]
    before: dict[int, tuple[dict[int, Any], dict[int, Any]]] = {}
    for handle in handles:
        hooks = handle.hooks_dict_ref()
        if hooks is not None and handle.id in hooks:
            before.setdefault(id(hooks), (hooks, dict(hooks)))
            del hooks[handle.id]
    return list(before.values())


def _put_hooks_back(removed: Hooks) -> None:
    """Every hook in the place it had, those added meanwhile behind them."""
    for hooks, before in removed:
        added = {number: hook for number, hook in hooks.items() if number not in before}
        hooks.clear()
        hooks.update({**before, **added})
