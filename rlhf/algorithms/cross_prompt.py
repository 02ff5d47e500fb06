"""Responses of other prompts as rejected ones: what a response looks like then says nothing of which is chosen."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

from rlhf.config import ConfigError
from rlhf.types import TokenizedRanking

DRAWS = 20
"""Other rankings that are drawn for one before it is passed over."""


def cross_prompt_pairs(rankings: Sequence[TokenizedRanking], share: float, seed: int) -> list[TokenizedRanking]:
    """round(share * N) pairs (response to the prompt, response to another prompt), the first one chosen.

    The "non-contextual" pairs of Robust Reward Model training (arXiv 2409.13156): one of a ranking's own responses,
    whichever rank it has, beats a response of another ranking, whichever rank that has there. So the longer response,
    or the better sounding one, is as often the rejected as the chosen one. The paper's ties (two responses
    of other prompts) make no pair here, and its filter by a first model's certainty is not applied. The other ranking
    has another prompt and the other response another text; category is that of the ranking, the margin 0. Drawn by
    `seed`: each ranking comes once before any comes again. Raises ConfigError where all rankings have one prompt, or
    all prompts the same responses.
    """
    count = round(share * len(rankings))
    if count == 0:
        return []
    prompts = [each.candidates[0].input_ids[: each.candidates[0].prompt_tokens] for each in rankings]
    if len(set(prompts)) < 2:
        raise ConfigError("cross_prompt_share needs responses to more than one prompt, and the training data has one")
    chance = random.Random(f"{seed}/cross-prompt")
    order: list[int] = []
    made: list[TokenizedRanking] = []
    before = -1
    while len(made) < count:
        if not order:
            if len(made) == before:
                raise ConfigError("cross_prompt_share needs prompts that have other responses than the others")
            order, before = chance.sample(range(len(rankings)), len(rankings)), len(made)
        index = order.pop()
        for _ in range(DRAWS):
            other = chance.randrange(len(rankings))
            if prompts[other] != prompts[index]:
                pair = _pair(rankings[index], rankings[other], prompts[index], chance)
                if pair is not None:
                    made.append(pair)
                    break
    return made


def _pair(
    ranking: TokenizedRanking, other: TokenizedRanking, prompt: tuple[int, ...], chance: random.Random
) -> TokenizedRanking | None:
    """One response of each; None where the two are the same text."""
    own, foreign = chance.choice(ranking.candidates), chance.choice(other.candidates)
    response = foreign.input_ids[foreign.prompt_tokens :]
    if response == own.input_ids[own.prompt_tokens :]:
        return None
    moved = replace(foreign, input_ids=prompt + response, prompt_tokens=len(prompt), category=ranking.category)
    return replace(ranking, id=f"{ranking.id}+{other.id}", candidates=(own, moved), ranks=(0, 1), margin=0.0)
