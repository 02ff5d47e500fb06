"""A score in the place of one that a reward could not give."""

from __future__ import annotations

from typing import Any

import torch

from rlhf.distributed.log import logger
from rlhf.rewards.reward import Reward, RewardError, prefetch, prefetches
from rlhf.types import Responses, RewardOutput


class WithFallback:
    """A reward whose failures cost a response its score, which is then `fallback`, and not the run.

    The part `fallback` is 1 where that happened; its mean, the share of such responses, stands in the log, and the
    doctor looks at it. Further parts of the reward are not told: it has them only where it succeeds.
    """

    def __init__(self, reward: Reward, fallback: float) -> None:
        self.reward = reward
        self.fallback = fallback

    @property
    def training_range(self) -> dict[str, Any] | None:
        """That of the reward itself."""
        return self.reward.training_range

    @property
    def prefetches(self) -> bool:
        """See `rlhf.rewards.reward.prefetches`."""
        return prefetches(self.reward)

    def prefetch(self, responses: Responses, *, more: bool) -> None:
        """See `Reward`."""
        prefetch(self.reward, responses, more=more)

    def score(self, responses: Responses) -> RewardOutput:
        """See `Reward.score`."""
        missing = torch.zeros(len(responses), device=responses.rollout.response_ids.device)
        try:
            found = self.reward.score(responses)
        except RewardError as error:
            rows = range(len(responses)) if error.rows is None else error.rows
            logger.warning("%s; %d responses get the fallback, %g", error, len(rows), self.fallback)
            missing[list(rows)] = 1.0
            lost, output = missing.bool(), error.output
            if output is None:
                return RewardOutput(torch.full_like(missing, self.fallback), None, {"fallback": missing})
            tokens = None if output.per_token is None else output.per_token.masked_fill(lost[:, None], 0.0)
            return RewardOutput(output.scores.masked_fill(lost, self.fallback), tokens, {"fallback": missing})
        return RewardOutput(found.scores, found.per_token, {"fallback": missing})
