"""The rewards by name, and the list of a run built from its configuration.

A new reward is a file beside this one and a row of `REWARDS`, which loads it on use.
"""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf.config import ConfigError
from rlhf.rewards.reward import Reward, RewardSources


@dataclass(frozen=True)
class RewardKind:
    """`build(sources, **options)` makes the reward; `needs_model` says that it scores with the reward model."""

    build: Callable[..., Reward]
    needs_model: bool = False


def _reward_model(sources: RewardSources) -> Reward:
    from rlhf.rewards.reward_model import RewardModel

    return RewardModel(sources)


REWARDS: dict[str, RewardKind] = {
    "reward_model": RewardKind(_reward_model, needs_model=True),
}


@dataclass(frozen=True)
class RewardSpec:
    """One entry of `rewards`: a name of `REWARDS`, the weight of its scores, and options of its own."""

    name: str
    weight: float
    options: Mapping[str, Any]

    @classmethod
    def parse(cls, text: str) -> RewardSpec:
        """From a name, or a mapping {name, weight, ...} as JSON text. ConfigError for an unknown name or option."""
        try:
            entry = json.loads(text) if text.lstrip().startswith("{") else {"name": text}
        except ValueError as error:
            raise ConfigError(f"rewards: {text!r} is neither a name nor a mapping: {error}") from error
        name, weight = entry.pop("name", None), entry.pop("weight", 1.0)
        if not isinstance(name, str) or name not in REWARDS:
            raise ConfigError(f"rewards: {name!r} is not a reward; the rewards are {', '.join(REWARDS)}")
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
            raise ConfigError(f"rewards: the weight of {name} is {weight!r}; give a finite number")
        try:
            inspect.signature(REWARDS[name].build).bind(None, **entry)
        except TypeError as error:
            raise ConfigError(f"rewards: {name} does not take these options: {error}") from error
        return cls(name, float(weight), entry)


def needs_reward_model(specs: Sequence[RewardSpec]) -> bool:
    """Whether one of the rewards scores with the reward model."""
    return any(REWARDS[spec.name].needs_model for spec in specs)


def build_reward(specs: Sequence[RewardSpec], sources: RewardSources) -> Reward:
    """The reward of a run: the one there is, or the weighted sum of several."""
    built = [REWARDS[spec.name].build(sources, **spec.options) for spec in specs]
    if len(specs) == 1 and specs[0].weight == 1.0:
        return built[0]
    from rlhf.rewards.weighted_sum import WeightedSum

    return WeightedSum({_unique(index, specs): (specs[index].weight, reward) for index, reward in enumerate(built)})


def _unique(index: int, specs: Sequence[RewardSpec]) -> str:
    """The name of a reward, numbered where there are several of one kind."""
    name = specs[index].name
    earlier = sum(spec.name == name for spec in specs[:index])
    return f"{name}_{earlier + 1}" if earlier else name
