"""A ZeRO-3 engine's weights, gathered once for a block instead of at every forward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def whole_weights_of(engine: nn.Module) -> Iterator[None]:
    """Within the block every rank holds all of the engine's weights, and calling its modules is no collective.

    For sampling under ZeRO-3: a token then needs no all-gather, and ranks may take different numbers of steps. Weights
    are for reading, without gradients. Entering and leaving are collectives. Takes the memory of one whole copy of the
    weights on each device. For any other engine or module nothing changes.
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
    """The part of DeepSpeed that fetches and releases an engine's weights by hooks; None without ZeRO-3."""
    optimizer = getattr(engine, "optimizer", None)
    offload = getattr(optimizer, "parameter_offload", optimizer)
    return offload if hasattr(offload, "partition_all_parameters") else None


Hooks = list[tuple[dict[int, Any], dict[int, Any]]]
"""Each dictionary of hooks that was changed, and a copy of it from before."""


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
