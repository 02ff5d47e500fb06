"""A learned reward model as a reward."""

from __future__ import annotations

import copy
import sys
from collections.abc import Sequence
from typing import Any

import torch

from rlhf.data.token_cache import tokenizer_fingerprint
from rlhf.data.tokenize import TextEncoder
from rlhf.numerics.statistics import score_last
from rlhf.types import Rollout


class RewardScorer:
    """Normalised reward-model scores of rollouts, also where the reward model has another tokenizer.

    With the actor's tokenizer the ids go in as they are. With another one the text is decoded and encoded again,
    the reward model's own end-of-sequence token stands for the actor's, and a prompt too long for the reward model's
    positions loses its beginning. `eos_ids` are the ids that end the actor's responses (default: its tokenizer's).
    """

    def __init__(
        self, reward: Any, reward_tokenizer: Any, actor_tokenizer: Any, *, eos_ids: Sequence[int] | None = None
    ) -> None:
        self.reward = reward
        self.reward_tokenizer = reward_tokenizer
        self.actor_tokenizer = actor_tokenizer
        self.eos_ids = frozenset([actor_tokenizer.eos_token_id] if eos_ids is None else eos_ids)
        self.same_tokenizer = same_tokenizer(reward_tokenizer, actor_tokenizer)
        self.encoder = TextEncoder(reward_tokenizer)
        module = getattr(reward, "module", reward)
        self.max_tokens = getattr(getattr(module, "config", None), "max_position_embeddings", None)
        self.score_range: dict[str, Any] | None = getattr(module, "score_range", None)

    @torch.no_grad()
    def __call__(self, rollout: Rollout, prompt_texts: list[str]) -> torch.Tensor:
        """Scores [B] float32, mean 0 and variance 1 on the reward model's reference responses.

        `prompt_texts` are the prompts as they were before tokenisation.
        """
        ids, mask = rollout.sequences() if self.same_tokenizer else self._encode_again(rollout, prompt_texts)
        return score_last(self.reward(ids, mask), mask).float()

    def _encode_again(self, rollout: Rollout, prompt_texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        rows = []
        prompts = self.encoder.prompts(prompt_texts)
        for prompt, ids, mask in zip(prompts, rollout.response_ids, rollout.response_mask, strict=True):
            tokens = ids[mask.bool()].tolist()
            ended = bool(tokens) and tokens[-1] in self.eos_ids
            text = self.actor_tokenizer.decode(tokens, skip_special_tokens=True)
            response = self.encoder.responses([text], append_eos=ended)[0].ids
            start = self.encoder.start_ids
            room = (self.max_tokens or sys.maxsize) - len(start) - len(response)
            rows.append([*start, *prompt.ids[len(start) :][-max(room, 1) :], *response])
        longest = max(len(row) for row in rows)
        device = rollout.response_ids.device
        ids = torch.full((len(rows), longest), self.reward_tokenizer.pad_token_id, device=device)
        mask = torch.zeros(len(rows), longest, dtype=torch.bool, device=device)
        for index, row in enumerate(rows):
            ids[index, : len(row)] = torch.tensor(row, device=device)
            mask[index, : len(row)] = True
        return ids, mask


def same_tokenizer(first: Any, second: Any) -> bool:
    """True when two tokenizers give the same ids for every text: vocabulary, merges, normaliser, special tokens.

    What they pad with plays no part: a saved reward model pads with a token of its own (`rlhf.models.padding`).
    """
    padding = {tokenizer.pad_token for tokenizer in (first, second)}
    padding -= {text for tokenizer in (first, second) for text in (tokenizer.eos_token, tokenizer.bos_token)}
    fingerprints = set()
    for tokenizer in (first, second):
        own = copy.deepcopy(tokenizer)
        own.pad_token = None
        fingerprints.add(tokenizer_fingerprint(own, without=padding))
    return len(fingerprints) == 1
