"""Diverse beams against a search by hand: one whole forward for every token of every group, no cache, no padding."""

from __future__ import annotations

import pytest
import torch

from rlhf.generation.diverse_beams import DiverseBeams
from rlhf.generation.token_sampling import Sampling
from rlhf.models.loading import load_causal_lm
from rlhf.types import PromptBatch

PROMPTS = ([5, 6, 7, 8, 9], [11, 12], [20])
GROUPS, TOKENS, VOCABULARY = 3, 6, 60


def batch(prompts, groups=GROUPS) -> PromptBatch:
    """Left-padded rows, `groups` for each prompt."""
    width = max(map(len, prompts))
    rows = [[0] * (width - len(prompt)) + prompt for prompt in prompts for _ in range(groups)]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts for _ in range(groups)]
    return PromptBatch(torch.tensor(rows), torch.tensor(mask), torch.arange(len(rows)))


@torch.no_grad()
def by_hand(model, prompt, penalty, eos, groups=GROUPS):
    """The responses of the groups, and the log-probability of each of their tokens."""
    said, likely = [[] for _ in range(groups)], [[] for _ in range(groups)]
    for _ in range(TOKENS):
        chosen: list[int] = []
        for group in range(groups):
            if said[group] and said[group][-1] == eos:
                continue
            logits = model(input_ids=torch.tensor([prompt + said[group]])).logits[0, -1, :VOCABULARY]
            logprobs = logits.log_softmax(-1)
            scores = [float(logprobs[token]) - penalty * chosen.count(token) for token in range(VOCABULARY)]
            token = scores.index(max(scores))
            chosen.append(token)
            said[group].append(token)
            likely[group].append(float(logprobs[token]))
    return said, likely


@pytest.mark.parametrize("name", ["gpt_neox", "llama", "gpt2"])  # the last learns its positions one by one
@pytest.mark.parametrize("penalty", [0.05, 3.0])
def test_the_groups_choose_as_by_hand(tiny_models, name, penalty):
    model = load_causal_lm(str(tiny_models[name]), dtype=torch.float32).eval()
    free, _ = by_hand(model, PROMPTS[0], penalty, eos=-1)
    eos = free[1][2]  # a token that some group will say: it must end there and no longer count
    search = DiverseBeams(model, eos_ids=[eos], pad_token_id=0, groups=GROUPS, penalty=penalty)
    found = search.generate(batch(PROMPTS), Sampling(TOKENS, vocabulary_size=VOCABULARY))
    ended = 0
    for number, prompt in enumerate(PROMPTS):
        expected, likely = by_hand(model, prompt, penalty, eos)
        for group in range(GROUPS):
            row = number * GROUPS + group
            mask = found.response_mask[row]
            assert found.response_ids[row][mask].tolist() == expected[group]
            assert found.logprobs[row][mask].tolist() == pytest.approx(likely[group], abs=1e-4)
            assert not found.logprobs[row][~mask].any() and not mask.int().diff().gt(0).any()
            ended += expected[group][-1] == eos
    assert ended, "no group has ended: the test looks elsewhere"


def test_a_group_that_has_ended_is_no_longer_kept_clear_of():
    """The first group likes token 0 best and so does the second, which stays with it once the first has ended."""
    search = DiverseBeams(torch.nn.Identity(), eos_ids=[2], pad_token_id=0, groups=2, penalty=1.0)
    likely = torch.tensor([[0.0, -5.0, -5.0], [-1.0, -1.5, -9.0]])
    assert search._choose(likely, torch.tensor([False, False])).tolist() == [0, 1]
    assert search._choose(likely, torch.tensor([True, False])).tolist()[1] == 0


def test_without_a_penalty_worth_the_name_all_groups_say_the_same(tiny_models):
    model = load_causal_lm(str(tiny_models["gpt_neox"]), dtype=torch.float32).eval()
    alike, apart = (
        DiverseBeams(model, eos_ids=[-1], pad_token_id=0, groups=GROUPS, penalty=penalty)
        .generate(batch(PROMPTS[:1]), Sampling(TOKENS))
        .response_ids
        for penalty in (1e-9, 50.0)
    )
    assert (alike == alike[0]).all()
    assert all(len(set(column)) == GROUPS for column in apart.T.tolist())
