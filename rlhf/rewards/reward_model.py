"""A learned reward model as a reward, also one with another tokenizer than the actor's."""

from __future__ import annotations

import sys
from typing import Any

import torch

from rlhf.data.token_cache import tokenizer_fingerprint
from rlhf.data.tokenize import TextEncoder
from rlhf.numerics.statistics import score_last
from rlhf.rewards.reward import RewardSources
from rlhf.types import Responses, RewardOutput


class RewardModel:
    """The normalised scores of a reward model: mean 0 and variance 1 on its reference responses.

    With the actor's tokenizer the ids go in as they are. With another one the text is encoded again, the reward
    model's own end-of-sequence token stands for the actor's, and a prompt too long for the reward model's positions
    loses its beginning.
    """

    def __init__(self, sources: RewardSources) -> None:
        self.engine = sources.engine
        self.tokenizer = sources.reward_tokenizer
        self.same_tokenizer = same_tokenizer(sources.reward_tokenizer, sources.tokenizer)
        self.encoder = TextEncoder(sources.reward_tokenizer)
        self.max_tokens = getattr(getattr(self._module, "config", None), "max_position_embeddings", None)

    @property
    def _module(self) -> Any:
        return getattr(self.engine, "module", self.engine)

    @property
    def training_range(self) -> dict[str, Any] | None:
        """How far normalised scores reached in the training of the reward model, where it was saved with that."""
        found: dict[str, Any] | None = getattr(self._module, "score_range", None)
        return found

    @torch.no_grad()
    def score(self, responses: Responses) -> RewardOutput:
        """See `rlhf.rewards.reward.Reward`."""
        ids, mask = responses.rollout.sequences() if self.same_tokenizer else self._encode_again(responses)
        scores = score_last(self.engine(ids, mask), mask)
        return RewardOutput(self._module.normalise(scores).float())

    def _encode_again(self, responses: Responses) -> tuple[torch.Tensor, torch.Tensor]:
        prompts = self.encoder.prompts([prompt.text for prompt in responses.prompts])
        start, rows = self.encoder.start_ids, []
        for prompt, text, ended in zip(prompts, responses.texts, responses.ended.tolist(), strict=True):
            response = self.encoder.responses([text], append_eos=ended)[0].ids
            room = (self.max_tokens or sys.maxsize) - len(start) - len(response)
            rows.append([*start, *prompt.ids[len(start) :][-max(room, 1) :], *response])
        longest = max(len(row) for row in rows)
        device = responses.rollout.response_ids.device
        ids = torch.full((len(rows), longest), self.tokenizer.pad_token_id, device=device)
        mask = torch.zeros(len(rows), longest, dtype=torch.bool, device=device)
        for index, row in enumerate(rows):
            ids[index, : len(row)] = torch.tensor(row, device=device)
            mask[index, : len(row)] = True
        return ids, mask


def same_tokenizer(first: Any, second: Any) -> bool:
    """True when two tokenizers give the same ids for every text: vocabulary, merges, normaliser, special tokens."""
    return tokenizer_fingerprint(first) == tokenizer_fingerprint(second)
