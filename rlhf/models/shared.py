"""The four models of PPO with LoRA on as few copies of their bases as possible.

Actor, critic, reference and reward model differ in adapters and heads alone. Each gets its own tree of modules, so
that wrappers, hooks and modes of one leave the others alone, over the same parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from rlhf.config import ModelConfig
from rlhf.distributed.log import logger
from rlhf.models.adapters import load_adapter
from rlhf.models.directories import adapter_base, base_key, check_causal_directory, is_scalar_directory
from rlhf.models.loading import backbone_of, load_backbone, load_causal_lm
from rlhf.models.lora import apply_lora, prepare_quantized
from rlhf.models.merge import merged_path
from rlhf.models.scalar import ScalarModel

Quantization = Literal["none", "8bit", "4bit"]


def share_modules(module: nn.Module) -> Any:
    """A second tree of modules over the parameters of `module`: every weight is still there once.

    Containers of parameters, buffers, submodules and hooks are new, hooks are empty, and other attributes (the
    configuration, the 8-bit state of a quantised layer) are the same objects. Functions that were set on a module in
    place of its methods, as `accelerate` does, call that one module and stay behind. Meant for a model as it was
    loaded: what is wrapped, hooked or switched on later belongs to one tree.
    """
    return _twin(module, {})


def _twin(module: nn.Module, made: dict[int, nn.Module]) -> nn.Module:
    if id(module) in made:  # a module used in two places stays one module
        return made[id(module)]
    kind = type(module)
    twin = made[id(module)] = kind.__new__(kind)
    for name, value in vars(module).items():
        shadows_a_method = callable(value) and callable(getattr(kind, name, None))
        if shadows_a_method or name in ("_hf_hook", "_old_forward"):
            continue
        if name in ("_parameters", "_buffers"):
            value = dict(value)
        elif name == "_non_persistent_buffers_set":
            value = set(value)
        elif name.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called")) and isinstance(value, dict):
            value = type(value)()
        if getattr(value, "__self__", None) is module:  # a method that is kept under another name
            value = value.__func__.__get__(twin)
        twin.__dict__[name] = value
    twin.__dict__["_modules"] = {
        name: None if child is None else _twin(child, made) for name, child in module._modules.items()
    }
    return twin


class Roles(NamedTuple):
    """The models before they go into engines; None is not wanted, or (`reference`) the actor with its adapter off."""

    actor: nn.Module
    critic: nn.Module | None
    reference: nn.Module | None
    reward: nn.Module | None


def adapted_roles(
    actor_model: str | Path,
    reward_model: str | Path | None,
    critic_model: str | Path | None,
    *,
    with_reference: bool = True,
    config: ModelConfig,
    dtype: torch.dtype,
    seed: int,
    loading: Callable[[], AbstractContextManager[None]],
) -> Roles:
    """Actor and critic with trainable adapters, the reward model frozen, over shared bases; None is not loaded.

    A reward model or critic that was saved as an adapter keeps it, unmerged, on the base it names; the critic goes on
    training its copy. Anything else gets a new adapter. Roles whose bases hold the same weights share one, quantised
    as the configuration says; only a reward model that is no adapter stays in full precision and scores as it was
    saved. With `share_base` off every role loads its own copy and computes the same, up to the dtype a merged base was
    written in. `loading` gives the context that weights are loaded in.
    """
    check_causal_directory(actor_model)
    bases = _Bases(config, dtype, loading)
    stands = {
        name: _standing(path, config, dtype)
        for name, path in (("actor", actor_model), ("critic", critic_model), ("reward", reward_model))
        if path is not None
    }
    quantization: dict[str, Quantization] = dict.fromkeys(stands, config.quantization)
    if "reward" in stands and stands["reward"].adapter is None:
        quantization["reward"] = "none"
    actor = bases.causal_lm(stands["actor"].base, config.quantization)
    own_reference = with_reference and not config.share_base
    reference = bases.causal_lm(stands["actor"].base, config.quantization) if own_reference else None
    backbones = {
        name: bases.backbone(stand.base, quantization[name]) for name, stand in stands.items() if name != "actor"
    }
    _report(stands, quantization, config.share_base, with_reference)

    def with_new_adapter(module: nn.Module, targets: list[str]) -> nn.Module:
        # bases are prepared for training as they are loaded: here none counts as quantised
        return apply_lora(module, replace(config, lora_targets=targets, quantization="none"), seed=seed)

    def scalar(name: str, *, trainable: bool) -> nn.Module:
        backbone, stand = backbones[name], stands[name]
        if stand.adapter is not None:
            checkpointing = trainable and config.gradient_checkpointing
            backbone = load_adapter(backbone, stand.adapter, trainable=trainable, gradient_checkpointing=checkpointing)
        head = stand.head
        if head is None:
            found = ScalarModel(backbone, seed=seed)
        else:
            found = ScalarModel.on_backbone(backbone, head, as_critic=trainable)
        if trainable and stand.adapter is None:  # another architecture has other names than lora_targets
            same_architecture = actor.config.model_type == backbone.config.model_type
            return with_new_adapter(found, config.lora_targets if same_architecture else [])
        return found

    return Roles(
        actor=with_new_adapter(actor, config.lora_targets),
        critic=scalar("critic", trainable=True) if "critic" in stands else None,
        reference=reference,
        reward=scalar("reward", trainable=False) if "reward" in stands else None,
    )


@dataclass(frozen=True)
class _Standing:
    """What a role is made of: the base it stands on, and the directories of its adapter and of its scalar head."""

    base: str
    adapter: str | None = None
    head: str | None = None


def _standing(path: str | Path, config: ModelConfig, dtype: torch.dtype) -> _Standing:
    chosen: dict[str, Any] = {"dtype": dtype, "trust_remote_code": config.trust_remote_code}
    if not is_scalar_directory(path):
        return _Standing(merged_path(path, **chosen))
    base = adapter_base(path)
    if base is None:
        return _Standing(merged_path(path, **chosen), head=str(path))
    return _Standing(merged_path(base, **chosen), adapter=str(path), head=str(path))


class _Bases:
    """Bases as they were loaded; every taker gets a tree of its own."""

    def __init__(
        self, config: ModelConfig, dtype: torch.dtype, loading: Callable[[], AbstractContextManager[None]]
    ) -> None:
        self.config = config
        self.dtype = dtype
        self.loading = loading
        self.causal: dict[tuple[str, str], Any] = {}
        self.inner: dict[tuple[str, str], Any] = {}

    def causal_lm(self, path: str, quantization: Quantization) -> Any:
        """The base with its language-modelling head."""
        return self._take(self.causal, load_causal_lm, path, quantization)

    def backbone(self, path: str, quantization: Quantization) -> Any:
        """The base without it: that of the actor where it is the same."""
        causal = self.causal.get((base_key(path), quantization))
        inner = None if causal is None else backbone_of(causal)
        if inner is not None:
            return share_modules(inner)
        return self._take(self.inner, load_backbone, path, quantization)

    def _take(self, kept: dict[tuple[str, str], Any], load: Any, path: str, quantization: Quantization) -> Any:
        key = (base_key(path), quantization)
        if key in kept:
            return share_modules(kept[key])
        with self.loading():
            base = load(path, replace(self.config, quantization=quantization), dtype=self.dtype)
        if quantization != "none":
            base = prepare_quantized(base)
        if not self.config.share_base:
            return base
        kept[key] = base
        return share_modules(base)


def _report(
    stands: dict[str, _Standing], quantization: dict[str, Quantization], share: bool, with_reference: bool
) -> None:
    if not share:
        logger.info("share_base is off: actor, critic, reference and reward model load a copy of their base each")
        return
    roles: dict[tuple[str, str], list[str]] = {}
    for name, stand in stands.items():
        held = roles.setdefault((base_key(stand.base), quantization[name]), [])
        held += ["actor", "reference"] if name == "actor" and with_reference else [name]
    for (base, kind), names in roles.items():
        logger.info("one base for %s: %s%s", ", ".join(names), base, "" if kind == "none" else f" in {kind}")
    critic = stands.get("critic")
    if critic is not None and critic.adapter is not None:
        logger.info("the critic trains the adapter it starts from, with its rank and targets: %s", critic.adapter)
