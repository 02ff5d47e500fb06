"""Groups: the responses to one prompt, which stand side by side in a rollout, and those of which none is the better."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F

from rlhf.training.rollouts import ScoredRollout

PER_TOKEN = ("logprobs", "ref_logprobs", "values", "token_rewards")


def all_alike(worth: torch.Tensor, samples_per_prompt: int) -> torch.Tensor:
    """Which of the G groups of `worth` [B] hold one number only, so that comparing them teaches nothing: [G] bool."""
    by_prompt = worth.view(-1, samples_per_prompt)
    return (by_prompt == by_prompt[:, :1]).all(1)


def with_groups_replaced(
    scored: ScoredRollout, places: torch.Tensor, further: ScoredRollout, chosen: torch.Tensor, *, samples: int, pad: int
) -> ScoredRollout:
    """`scored` with the groups of `further` that are `chosen` in the place of its first groups at `places`.

    `places` [G] and `chosen` [H] are masks over the groups, of `samples` rows each; what finds no place is left out.
    """
    into, out = places.nonzero().flatten(), chosen.nonzero().flatten()
    count = min(len(into), len(out))
    if count == 0:
        return scored
    both = (scored, further)
    prompt_tokens = max(each.rollout.prompt_ids.shape[1] for each in both)
    response_tokens = max(each.rollout.response_ids.shape[1] for each in both)
    first, second = (_widened(each, prompt_tokens, response_tokens, pad) for each in both)
    offsets = torch.arange(samples, device=places.device)
    rows = torch.arange(len(first), device=places.device)
    rows[(into[:count, None] * samples + offsets).flatten()] = (
        len(first) + (out[:count, None] * samples + offsets).flatten()
    )
    return _both(first, second).rows(rows)


def _widened(scored: ScoredRollout, prompt_tokens: int, response_tokens: int, pad: int) -> ScoredRollout:
    """With so many columns: prompts padded on the left, responses and what is said of their tokens on the right."""
    missing = response_tokens - scored.rollout.response_ids.shape[1]
    before = prompt_tokens - scored.rollout.prompt_ids.shape[1]
    rollout = scored.rollout.widened(response_tokens, pad)
    rollout = replace(
        rollout,
        prompt_ids=F.pad(rollout.prompt_ids, (before, 0), value=pad),
        prompt_mask=F.pad(rollout.prompt_mask, (before, 0), value=False),
    )
    return replace(scored, rollout=rollout, **{name: F.pad(getattr(scored, name), (0, missing)) for name in PER_TOKEN})


def _both(first: ScoredRollout, second: ScoredRollout) -> ScoredRollout:
    rest = iter([*second._tensors()])
    return first._map(lambda tensor: torch.cat([tensor, next(rest)]))
