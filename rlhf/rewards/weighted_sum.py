"""Several rewards as one: the weighted sum of their scores."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from rlhf.rewards.reward import Reward, prefetch, prefetches
from rlhf.types import Responses, RewardOutput


class WeightedSum:
    """sum_i weight_i * score_i, per-token rewards alike; each score stands among the parts under its name."""

    def __init__(self, rewards: Mapping[str, tuple[float, Reward]]) -> None:
        self.rewards = rewards

    @property
    def training_range(self) -> dict[str, Any] | None:
        """Unknown: a sum was never trained."""
        return None

    @property
    def prefetches(self) -> bool:
        """See `rlhf.rewards.reward.prefetches`."""
        return any(prefetches(reward) for _, reward in self.rewards.values())

    def prefetch(self, responses: Responses, *, more: bool) -> None:
        """See `Reward`."""
        for _, reward in self.rewards.values():
            prefetch(reward, responses, more=more)

    def score(self, responses: Responses) -> RewardOutput:
        """See `Reward.score`."""
        total = torch.zeros(len(responses), device=responses.rollout.response_ids.device)
        per_token: torch.Tensor | None = None
        parts: dict[str, torch.Tensor] = {}
        for name, (weight, reward) in self.rewards.items():
            output = reward.score(responses)
            total = total + weight * output.scores
            parts[name] = output.scores
            parts.update({f"{name}/{part}": scores for part, scores in output.parts.items()})
            if output.per_token is not None:
                share = weight * output.per_token
                per_token = share if per_token is None else per_token + share
        return RewardOutput(total, per_token, parts)
