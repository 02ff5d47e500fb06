"""Score rollouts: log-probabilities, values and reward-model scores of whole sequences."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from rlhf.data.token_cache import tokenizer_fingerprint
from rlhf.data.tokenize import TextEncoder
from rlhf.forward import token_logprobs
from rlhf.ops import score_last
from rlhf.types import IGNORE_INDEX, Rollout, TokenBatch


def full_sequence(rollout: Rollout) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompt and response side by side: ids and mask [B, P + T]."""
    ids = torch.cat([rollout.prompt_ids, rollout.response_ids], dim=1)
    mask = torch.cat([rollout.prompt_mask.bool(), rollout.response_mask.bool()], dim=1)
    return ids, mask


def response_logprobs(model: nn.Module, rollout: Rollout, temperature: float) -> torch.Tensor:
    """log pi(response_t | all before it) at `temperature`: [B, T] float32, 0 outside the response."""
    return response_logprobs_and_entropy(model, rollout, temperature, with_entropy=False)[0]


def response_logprobs_and_entropy(
    model: nn.Module, rollout: Rollout, temperature: float, *, with_entropy: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities and entropies of the response positions: [B, T] each, float32, 0 outside the response."""
    ids, mask = full_sequence(rollout)
    prompt_tokens = rollout.prompt_ids.shape[1]
    scored = mask.clone()
    scored[:, :prompt_tokens] = False
    logprobs, entropies = token_logprobs(model, ids, mask, scored, temperature=temperature, with_entropy=with_entropy)
    return logprobs[:, prompt_tokens:], entropies[:, prompt_tokens:]


def label_loss(model: nn.Module, batch: TokenBatch) -> torch.Tensor:
    """Summed cross-entropy in nats of the labels that are not -100: the loss of SFT and of the ptx mixture."""
    scored = batch.labels != IGNORE_INDEX
    scored[:, 0] = False  # nothing comes before it
    return -token_logprobs(model, batch.input_ids, batch.attention_mask, scored)[0].sum()


def response_values(critic: nn.Module, rollout: Rollout) -> torch.Tensor:
    """V of the state before emitting response_t: [B, T] float32."""
    ids, mask = full_sequence(rollout)
    values = critic(ids, mask)
    prompt_tokens = rollout.prompt_ids.shape[1]
    return values[:, prompt_tokens - 1 : -1]


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
        ids, mask = full_sequence(rollout) if self.same_tokenizer else self._encode_again(rollout, prompt_texts)
        scores = score_last(self.reward(ids, mask), mask)
        module = getattr(self.reward, "module", self.reward)
        return module.normalise(scores).float()

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
    """True when two tokenizers give the same ids for every text: vocabulary, merges, normaliser, special tokens."""
    return tokenizer_fingerprint(first) == tokenizer_fingerprint(second)


def trim(rollout: Rollout) -> tuple[Rollout, slice]:
    """Drop columns that are padding in every row; returns the slice of response columns that is left."""
    prompt_tokens = int(rollout.prompt_mask.sum(-1).max())
    response_tokens = max(1, int(rollout.response_mask.sum(-1).max()))
    columns = slice(0, response_tokens)
    start = rollout.prompt_ids.shape[1] - prompt_tokens
    return (
        Rollout(
            prompt_ids=rollout.prompt_ids[:, start:],
            prompt_mask=rollout.prompt_mask[:, start:],
            response_ids=rollout.response_ids[:, columns],
            response_mask=rollout.response_mask[:, columns],
            logprobs=rollout.logprobs[:, columns],
        ),
        columns,
    )


def pad_response(rollout: Rollout, tokens: int, pad_token_id: int) -> Rollout:
    """Right-pad the response fields to `tokens` columns (so that rollouts of several ranks fit together)."""
    missing = tokens - rollout.response_ids.shape[1]

    def widen(tensor: torch.Tensor, value: float) -> torch.Tensor:
        return torch.nn.functional.pad(tensor, (0, missing), value=value)

    return Rollout(
        prompt_ids=rollout.prompt_ids,
        prompt_mask=rollout.prompt_mask,
        response_ids=widen(rollout.response_ids, pad_token_id),
        response_mask=widen(rollout.response_mask, False),
        logprobs=widen(rollout.logprobs, 0.0),
    )
