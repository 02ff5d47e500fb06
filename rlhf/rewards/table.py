"""The rewards by name, and the list of a run built from its configuration.

A new reward is a file beside this one and a row of `REWARDS`, which loads it on use.
"""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

from rlhf.config import ConfigError
from rlhf.rewards.classifier import ClassifierReward
from rlhf.rewards.function import FunctionReward
from rlhf.rewards.http import HttpReward
from rlhf.rewards.reward import Normalize, Reward, RewardPart, RewardSources
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
    "http": RewardKind(HttpReward),
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
    """One entry of `rewards`: a name of `REWARDS`, the weight of its scores, and options of its own.

    `normalize`: its scores are brought to mean 0 and variance 1, see `Normalize`. `fallback`: the score of a response
    that it fails to score; None lets the run end with the failure.
    """

    name: str
    weight: float
    options: Mapping[str, Any]
    normalize: Normalize | None = None
    fallback: float | None = None

    @property
    def label(self) -> str:
        """What it is called in the log: its name, or that of its function."""
        return str(self.options["path"]).rpartition(":")[2] if self.name == "function" else self.name

    @classmethod
    def parse(cls, text: str) -> RewardSpec:
        """From a name, a function (`file.py:function`, `module:function`), an address (`http://...`) or a mapping
        {name, weight, ...} as JSON.

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
        if not _is_number(weight):
            raise ConfigError(f"rewards: the weight of {name} is {weight!r}; give a finite number")
        normalize, fallback = entry.pop("normalize", None), entry.pop("fallback", None)
        if normalize is not None and normalize not in get_args(Normalize):
            choices = " or ".join(get_args(Normalize))
            raise ConfigError(f"rewards: normalize of {name} is {normalize!r}; give {choices}, or leave it out")
        if fallback is not None and not _is_number(fallback):
            raise ConfigError(f"rewards: fallback of {name} is {fallback!r}; give a finite number, or leave it out")
        try:
            inspect.signature(REWARDS[name].build).bind(None, **entry)
        except TypeError as error:
            raise ConfigError(f"rewards: {name} does not take these options: {error}") from error
        return cls(name, float(weight), entry, normalize, None if fallback is None else float(fallback))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _short(text: str) -> dict[str, Any]:
    """A mapping from an entry that is a single word."""
    if text.startswith(("http://", "https://")):
        return {"name": "http", "url": text}
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
    from rlhf.rewards.fallback import WithFallback
    from rlhf.rewards.weighted_sum import WeightedSum

    built = [REWARDS[spec.name].build(sources, **spec.options) for spec in specs]
    built = [
        reward if spec.fallback is None else WithFallback(reward, spec.fallback)
        for spec, reward in zip(specs, built, strict=True)
    ]
    if not reward_parts(specs):
        return built[0]
    return WeightedSum({_unique(index, specs): (specs[index].weight, reward) for index, reward in enumerate(built)})


def reward_parts(specs: Sequence[RewardSpec]) -> list[RewardPart]:
    """What the reward of a run is the weighted sum of; nothing where it is a single one, as it is."""
    if len(specs) == 1 and specs[0].weight == 1.0 and specs[0].normalize is None:
        return []
    return [RewardPart(_unique(index, specs), spec.weight, spec.normalize) for index, spec in enumerate(specs)]


def _unique(index: int, specs: Sequence[RewardSpec]) -> str:
    """What a reward is called in the log, numbered where there are several of that name."""
    name = specs[index].label
    earlier = sum(spec.label == name for spec in specs[:index])
    return f"{name}_{earlier + 1}" if earlier else name
