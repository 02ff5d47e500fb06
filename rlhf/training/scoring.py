"""Score rollouts: log-probabilities, values and reward-model scores of whole sequences."""

from __future__ import annotations

import torch
from torch import nn

from rlhf.generation.token_sampling import Sampling
from rlhf.models.token_logprobs import token_logprobs
from rlhf.types import IGNORE_INDEX, Rollout, TokenBatch


def response_logprobs(model: nn.Module, rollout: Rollout, sampling: Sampling) -> torch.Tensor:
    """log pi(response_t | all before it): [B, T] float32, 0 outside the response.

    pi has the temperature and vocabulary of `sampling`, with which the rollout was sampled. Its filters (top-k, top-p,
    greedy) are not applied.
    """
    return response_logprobs_and_entropy(model, rollout, sampling, with_entropy=False)[0]


def response_logprobs_and_entropy(
    model: nn.Module, rollout: Rollout, sampling: Sampling, *, with_entropy: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `response_logprobs` gives, and the entropies of pi in nats: [B, T] each, float32, 0 outside the response."""
    ids, mask = rollout.sequences()
    prompt_tokens = rollout.prompt_ids.shape[1]
    scored = mask.clone()
    scored[:, :prompt_tokens] = False
    logprobs, entropies = token_logprobs(
        model,
        ids,
        mask,
        scored,
        temperature=sampling.temperature,
        with_entropy=with_entropy,
        vocabulary_size=sampling.vocabulary_size,
    )
    return logprobs[:, prompt_tokens:], entropies[:, prompt_tokens:]


def label_loss(model: nn.Module, batch: TokenBatch) -> torch.Tensor:
    """Summed cross-entropy in nats of the labels that are not -100: the loss of SFT and of the ptx mixture."""
    scored = batch.labels != IGNORE_INDEX
    scored[:, 0] = False  # nothing comes before it
    return -token_logprobs(model, batch.input_ids, batch.attention_mask, scored)[0].sum()


def response_values(critic: nn.Module, rollout: Rollout) -> torch.Tensor:
    """V of the state before emitting response_t: [B, T] float32."""
    ids, mask = rollout.sequences()
    values = critic(ids, mask)
    prompt_tokens = rollout.prompt_ids.shape[1]
    return values[:, prompt_tokens - 1 : -1]
