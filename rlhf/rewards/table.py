"""The rewards by name, and the list of a run built from its configuration.

A new reward is a file beside this one and a row of `REWARDS`, which loads it on use.
"""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rlhf.config import ConfigError
from rlhf.rewards.classifier import ClassifierReward
from rlhf.rewards.function import FunctionReward
from rlhf.rewards.reward import Reward, RewardSources
from rlhf.rewards.rules import (
    Ends,
    ForbiddenWords,
    HangulShare,
    Keywords,
    LengthWindow,
    Matches,
    Overlong,
    Repetition,
)

if TYPE_CHECKING:
    from rlhf.types import TokenizedPrompt


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
    "classifier": RewardKind(ClassifierReward),
    "function": RewardKind(FunctionReward),
    "length_window": RewardKind(LengthWindow),
    "overlong": RewardKind(Overlong),
    "repetition": RewardKind(Repetition),
    "ends": RewardKind(Ends),
    "hangul_share": RewardKind(HangulShare),
    "matches": RewardKind(Matches),
    "keywords": RewardKind(Keywords),
    "forbidden_words": RewardKind(ForbiddenWords),
}
"""What builds each reward from its options; read before torch is loaded, which none of them needs for that."""


NO_SOURCES = RewardSources(tokenizer=None, eos_ids=())
"""For rewards that look at the responses alone."""


@dataclass(frozen=True)
class RewardSpec:
    """One entry of `rewards`: a name of `REWARDS`, the weight of its scores, and options of its own."""

    name: str
    weight: float
    options: Mapping[str, Any]

    @property
    def label(self) -> str:
        """What it is called in the log: its name, or that of its function."""
        return str(self.options["path"]).rpartition(":")[2] if self.name == "function" else self.name

    @classmethod
    def parse(cls, text: str) -> RewardSpec:
        """From a name, a function (`file.py:function`, `module:function`) or a mapping {name, weight, ...} as JSON.

        ConfigError for an unknown name or option.
        """
        try:
            entry = json.loads(text) if text.lstrip().startswith("{") else _short(text)
        except ValueError as error:
            raise ConfigError(f"rewards: {text!r} is neither a name nor a mapping: {error}") from error
        name, weight = entry.pop("name", None), entry.pop("weight", 1.0)
        if not isinstance(name, str) or name not in REWARDS:
            raise ConfigError(
                f"rewards: {name!r} is not a reward; the rewards are {', '.join(REWARDS)}, or a function of your "
                "own as file.py:function"
            )
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
            raise ConfigError(f"rewards: the weight of {name} is {weight!r}; give a finite number")
        try:
            inspect.signature(REWARDS[name].build).bind(None, **entry)
        except TypeError as error:
            raise ConfigError(f"rewards: {name} does not take these options: {error}") from error
        return cls(name, float(weight), entry)


def _short(text: str) -> dict[str, Any]:
    """A mapping from an entry that is a single word."""
    is_function = text not in REWARDS and text.rpartition(":")[0] != ""
    return {"name": "function", "path": text} if is_function else {"name": text}


def check_rewards(specs: Sequence[RewardSpec], prompts: Sequence[TokenizedPrompt]) -> None:
    """ConfigError for a reward without a model that cannot be made, or could not score one of the prompts."""
    for spec in specs:
        if not REWARDS[spec.name].needs_model:
            check = getattr(REWARDS[spec.name].build(NO_SOURCES, **spec.options), "check", None)
            if check is not None:
                check(prompts)


def reward_fingerprints(specs: Sequence[RewardSpec]) -> list[str | None]:
    """What tells each reward from one with the same options: the file of a function; None where nothing else could."""
    built = (
        None if REWARDS[spec.name].needs_model else REWARDS[spec.name].build(NO_SOURCES, **spec.options)
        for spec in specs
    )  # fmt: skip
    return [getattr(reward, "fingerprint", None) for reward in built]


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
    """What a reward is called in the log, numbered where there are several of that name."""
    name = specs[index].label
    earlier = sum(spec.label == name for spec in specs[:index])
    return f"{name}_{earlier + 1}" if earlier else name
