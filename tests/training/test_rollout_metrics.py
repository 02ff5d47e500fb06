"""What is said of a rollout and of an evaluation, against numbers worked out by hand."""

import math

import pytest
import torch

from rlhf.training.rollouts import ScoredRollout
from rlhf.types import RewardOutput, Rollout, TokenizedPrompt
from tests.algorithms.test_ppo_checklist import make_trainer  # noqa: F401  (a fixture)

EOS = 0


def scored_rollout(responses, logprobs, ref_logprobs, scores, parts=()):
    """A rollout of prompts of one token, whose log-probabilities are those of all tokens of a row alike."""
    rows, length = len(responses), max(map(len, responses))
    ids = torch.tensor([[*row, *[EOS] * (length - len(row))] for row in responses])
    mask = torch.tensor([[column < len(row) for column in range(length)] for row in responses])
    spread = [torch.tensor(values).unsqueeze(1).expand(rows, length) * mask for values in (logprobs, ref_logprobs)]
    prompt = torch.ones(rows, 1, dtype=torch.long)
    ended = torch.tensor([row[-1] == EOS for row in responses])
    zeros = torch.zeros(rows, length)
    return ScoredRollout(Rollout(prompt, prompt.bool(), ids, mask, zeros), *spread, zeros, zeros, torch.tensor(scores),
                         torch.tensor(parts).view(rows, -1), ended)  # fmt: skip


def test_a_rollout_is_described_by_means_over_tokens_and_over_responses(make_trainer):  # noqa: F811
    """KL per token 0.5, 0.25, -1 and 0 nats on 5, 2, 1 and 1 tokens."""
    worker = make_trainer().rollouts
    worker.part_names = ("first", "second")
    parts = [[1.0, 8.0], [3.0, 8.0], [2.0, 4.0], [2.0, 0.0]]
    scored = scored_rollout(
        [[5, 5, 5, 5, 5], [7, EOS], [EOS], [9]], [-1.0, -2.0, -3.0, -4.0], [-1.5, -2.25, -2.0, -4.0],
        [3.0, 1.0, -1.0, 1.0], parts,
    )  # fmt: skip
    kl = [2.5, 0.5, -1.0, 0.0]
    spread = math.sqrt(sum((value - 0.5) ** 2 for value in kl) / 4)
    assert worker.describe(scored) == pytest.approx({
        "score": 1.0, "score_std": math.sqrt(2), "score_min": -1.0, "score_max": 3.0, "score/first": 2.0,
        "score/second": 5.0, "kl_per_token": 2 / 9, "kl_per_response": 0.5, "kl_error": spread / 2.25 / 2,
        "entropy_estimate": (5 + 4 + 3 + 4) / 9, "eos_rate": 0.5, "response_tokens": 2.25, "empty_responses": 0.25,
        "repeated_4grams": 0.5,
    })  # fmt: skip


@pytest.mark.parametrize(("rows", "expected"), [(7, None), (8, 1.0)])
def test_eight_responses_are_needed_for_a_correlation_of_score_and_length(make_trainer, rows, expected):  # noqa: F811
    responses = [[5] * (index + 1) for index in range(rows)]
    zeros = [0.0] * rows
    described = make_trainer().rollouts.describe(
        scored_rollout(responses, zeros, zeros, [2.0 * len(r) for r in responses])
    )
    assert described.get("score_length_correlation") == (None if expected is None else pytest.approx(expected))


@pytest.mark.parametrize(("known", "expected"), [
    (None, None),
    ({"minimum": -1.0, "maximum": 2.0, "responses": 100}, 0.5),
    ({"minimum": -1.0, "maximum": 2.0, "responses": 99}, None),
    ({"minimum": -1.0, "maximum": 2.0}, 0.5),
    ({"minimum": -2.0, "maximum": 3.0}, 0.0),
])  # fmt: skip
def test_scores_beyond_those_of_the_reward_models_training(make_trainer, known, expected):  # noqa: F811
    """Its lowest and its highest score lie inside; of fewer than 100 responses the range says nothing."""
    worker = make_trainer().rollouts
    worker.reward.training_range = known
    described = worker.describe(scored_rollout([[5]] * 4, [0.0] * 4, [0.0] * 4, [-2.0, -1.0, 2.0, 3.0]))
    assert described.get("scores_outside_range") == expected


class Lengths:
    """Scores of a response's length, in parts and token by token."""

    training_range = None

    def score(self, responses):
        mask = responses.rollout.response_mask
        lengths = mask.sum(1).float()
        return RewardOutput(2 * lengths, per_token=mask * 0.25, parts={"length": lengths, "same": lengths})


def test_an_evaluation_has_means_by_prompt_of_scores_and_of_what_is_measured(make_trainer):  # noqa: F811
    trainer = make_trainer(new_tokens=9, actor_eos=1)
    worker, seen = trainer.rollouts, []
    worker.reward = Lengths()

    def measure(responses):
        seen.append(responses)
        return {
            "gold": torch.arange(len(responses.texts)).float(),
            "tokens": responses.rollout.response_mask.sum(1) * 1.0,
        }

    worker.measure = measure
    prompts = [TokenizedPrompt(str(number), (5, 6 + number), f"<{number}>") for number in range(3)]
    found = worker.evaluate(prompts, copies=2, shown=0, further=lambda scored: {"rows_seen": float(len(scored.scores))})
    (responses,) = seen
    lengths = responses.rollout.response_mask.sum(1).tolist()
    assert [prompt.id for prompt in responses.prompts] == ["0", "0", "1", "1", "2", "2"]
    assert found["prompt_scores"] == [lengths[row] + lengths[row + 1] for row in (0, 2, 4)]
    assert found["prompt_measures"] == {
        "gold": [0.5, 2.5, 4.5], "tokens": [(lengths[row] + lengths[row + 1]) / 2 for row in (0, 2, 4)],
    }  # fmt: skip
    mean = sum(lengths) / 6
    expected = {"rows": 3.0, "responses": 6.0, "rows_seen": 6.0, "gold": 2.5, "tokens": mean, "response_tokens": mean,
                "score": 2 * mean, "score/length": mean, "score/same": mean}  # fmt: skip
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    assert found["samples"] == [
        {"id": str(row // 2), "prompt": f"<{row // 2}>", "rendered_prompt": f"<{row // 2}>",
         "response": responses.texts[row], "score": 2.0 * lengths[row],
         "parts": {"length": lengths[row], "same": lengths[row]},
         "measures": {"gold": float(row), "tokens": float(lengths[row])}}
        for row in (0, 2, 4)
    ]  # fmt: skip
    assert all(text == text.strip() for text in responses.texts)
    assert worker.evaluate([], copies=2, shown=0, further=lambda scored: {}) == {"rows": 0.0}


def test_rewards_of_tokens_and_of_parts_reach_their_rows_whatever_the_passes(make_trainer):  # noqa: F811
    trainer = make_trainer(new_tokens=9, actor_eos=1, rollout=8)
    trainer.rollouts.reward, trainer.rollouts.scoring_tokens = Lengths(), 20
    found = trainer.rollouts.run(trainer.prompts.train, 1)
    mask = found.rollout.response_mask
    lengths = mask.sum(1).float()
    assert len(set(lengths.tolist())) > 1
    assert torch.equal(found.token_rewards, 0.25 * mask) and torch.equal(found.scores, 2 * lengths)
    assert torch.equal(found.part_scores, torch.stack([lengths, lengths], dim=1))
    assert trainer.rollouts.part_names == ("length", "same")
    final = found.rollout.response_ids.gather(1, mask.sum(1, keepdim=True) - 1).squeeze(1)
    assert torch.equal(found.ended, final == 1)
    for name in ("logprobs", "ref_logprobs", "values"):
        assert not getattr(found, name)[~mask].any(), name


def test_what_a_rollout_took_and_how_exact_it_was_is_measured_and_saved(make_trainer):  # noqa: F811
    worker = make_trainer().rollouts
    assert worker.measured == {"seconds_generation": 0.0, "seconds_scoring": 0.0}
    worker.run(make_trainer().prompts.train, 1)
    assert set(worker.measured) == {
        "seconds_generation", "seconds_scoring", "sampling_logprob_error", "sampling_logprob_error_mean",
    }  # fmt: skip
    assert min(worker.measured.values()) > 0
    state = {"old_logprobs": "recomputed", "captured_error": 0.5, "captured_error_mean": 0.25,
             "length_curves": {"scores": [1.0], "tokens": [3.0], "first": None, "last": None},
             "normalization": {"first": {"a": [2, 0.5, 1.0]}, "all": {"a": [4, 0.25, 2.0]}}}  # fmt: skip
    worker.load_state(state)
    assert worker.state() == state and worker.measured["sampling_logprob_error_mean"] == 0.25
