"""Groups of responses to one prompt: which are all alike, and how others take their place."""

from __future__ import annotations

import pytest
import torch

from rlhf.config import ConfigError
from rlhf.pipeline.stages import parse_stage
from rlhf.training.groups import all_alike, with_groups_replaced
from rlhf.training.rollouts import ScoredRollout
from rlhf.types import Rollout
from tests.algorithms.test_advantages import group_trainer
from tests.algorithms.test_ppo_checklist import make_trainer  # noqa: F401  (a fixture)


def scored(rows: int, prompt_tokens: int, response_tokens: int, first: int) -> ScoredRollout:
    """Rows whose every number tells the row (from `first`) and the place."""

    def numbers(columns: int) -> torch.Tensor:
        return (first + torch.arange(rows)).unsqueeze(1) * 100 + torch.arange(columns)

    prompts, responses = numbers(prompt_tokens), numbers(response_tokens)
    rollout = Rollout(
        prompts, torch.ones_like(prompts).bool(), responses, torch.ones_like(responses).bool(), responses + 0.1
    )
    per_token = [responses + share for share in (0.2, 0.3, 0.4, 0.5)]
    alone = torch.arange(rows) + first + 0.0
    return ScoredRollout(rollout, *per_token, alone, alone.unsqueeze(1), alone > first)


def test_which_groups_hold_one_number_only():
    assert all_alike(torch.tensor([0.5, 0.5, 2.0, 1.0, 3.0, 3.0]), 2).tolist() == [True, False, True]
    assert all_alike(torch.tensor([1.0, 1.0, 2.0, 4.0, 4.0, 4.0]), 3).tolist() == [False, True]


@pytest.mark.parametrize(("prompt_tokens", "response_tokens"), [(3, 2), (2, 4), (5, 5)])
def test_chosen_groups_take_the_places_in_order_with_everything_that_is_said_of_them(prompt_tokens, response_tokens):
    old, new = scored(6, 3, 4, 0), scored(8, prompt_tokens, response_tokens, 50)
    places, chosen = torch.tensor([True, False, True]), torch.tensor([False, True, True, True])
    found = with_groups_replaced(old, places, new, chosen, samples=2, pad=-7)
    assert found.scores.tolist() == [52, 53, 2, 3, 54, 55] == found.part_scores.flatten().tolist()
    for row, number in enumerate((52, 53, 2, 3, 54, 55)):
        is_new = number > 50
        prompt, response = (prompt_tokens, response_tokens) if is_new else (3, 4)
        rollout = found.rollout
        before = rollout.prompt_ids.shape[1] - prompt
        assert before == max(prompt_tokens, 3) - prompt
        assert rollout.prompt_ids[row].tolist() == [-7] * before + [number * 100 + place for place in range(prompt)]
        assert rollout.prompt_mask[row].tolist() == [False] * before + [True] * prompt
        after = rollout.response_ids.shape[1] - response
        said = [number * 100 + place for place in range(response)]
        assert rollout.response_ids[row].tolist() == said + [-7] * after
        assert rollout.response_mask[row].tolist() == [True] * response + [False] * after
        for share, tensor in ((0.1, rollout.logprobs), (0.2, found.logprobs), (0.3, found.ref_logprobs),
                              (0.4, found.values), (0.5, found.token_rewards)):  # fmt: skip
            assert tensor[row].tolist() == pytest.approx([place + share for place in said] + [0.0] * after)
        assert bool(found.ended[row]) == (number not in (0, 50))


def test_what_finds_no_place_is_left_out_and_nothing_is_lost():
    old, new = scored(4, 3, 4, 0), scored(4, 3, 4, 50)
    none, both = torch.tensor([False, False]), torch.tensor([True, True])
    one = torch.tensor([False, True])
    assert with_groups_replaced(old, none, new, both, samples=2, pad=0) is old
    assert with_groups_replaced(old, both, new, none, samples=2, pad=0) is old
    assert with_groups_replaced(old, one, new, both, samples=2, pad=0).scores.tolist() == [0, 1, 50, 51]
    assert with_groups_replaced(old, both, new, one, samples=2, pad=0).scores.tolist() == [52, 53, 2, 3]


# ------------------------------------------------------------------------------------------------------ the run


def rarely_unlike(rollout, texts):
    """1 for few first tokens, else 0: most prompts have two equal responses."""
    return (rollout.response_ids[:, 0] % 8 == 0).float()


def test_equal_prompts_are_replaced_by_others_until_none_is_left(make_trainer, tiny_models):  # noqa: F811
    settings = {"advantage": "grpo", "scorer": rarely_unlike, "prompts": 64, "iterations": 1}
    plain = group_trainer(make_trainer, tiny_models, **settings)
    plain.make_experience(1)
    assert plain.experience_metrics["equal_groups"] >= 0.5 and "resampled_prompts" not in plain.experience_metrics
    seen = []
    trainer = group_trainer(make_trainer, tiny_models, resample_equal_groups=20, **settings)
    run = trainer.rollouts.run
    trainer.rollouts.run = lambda examples, number: (
        seen.append((number, [one.id for one in examples])) or run(examples, number)
    )
    experience = trainer.make_experience(1)
    metrics = trainer.experience_metrics
    assert metrics["equal_groups"] == plain.experience_metrics["equal_groups"]
    assert metrics["equal_groups_left"] == 0 and not all_alike(experience.scores, 2).any()
    assert len(experience.rollout) == 8 and (experience.advantages.abs().sum(1) > 0).all()
    asked = [one for _, ids in seen for one in ids[::2]]
    assert len(asked) == len(set(asked)) == 4 + metrics["resampled_prompts"], "no prompt is drawn twice"
    assert len({number for number, _ in seen}) == len(seen), "every round has random numbers of its own"
    again = group_trainer(make_trainer, tiny_models, resample_equal_groups=20, **settings)
    assert torch.equal(again.make_experience(1).rollout.response_ids, experience.rollout.response_ids)


def test_prompts_that_stay_equal_stay(make_trainer, tiny_models):  # noqa: F811
    trainer = group_trainer(
        make_trainer, tiny_models, advantage="dr_grpo", scorer=lambda rollout, _: torch.zeros(len(rollout)), prompts=10,
        resample_equal_groups=5,
    )  # fmt: skip
    experience = trainer.make_experience(1)
    metrics = trainer.experience_metrics
    assert metrics["equal_groups"] == metrics["equal_groups_left"] == 1 and metrics["resampled_prompts"] == 6
    assert not experience.advantages.any() and len(experience.rollout) == 8


def test_without_a_second_response_there_is_nothing_to_replace():
    with pytest.raises(ConfigError, match="resample_equal_groups=2 .* samples_per_prompt=1 has nothing to compare"):
        parse_stage("ppo", ["--resample_equal_groups", "2"])
