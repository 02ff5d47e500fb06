"""Sampling and scoring of a rollout: what is captured, what runs side by side, another engine that samples."""

import dataclasses
import threading

import pytest
import torch

import rlhf.generation.actor_backend
from rlhf.config import ConfigError, EngineConfig, ModelConfig, OptimizerConfig
from rlhf.engine import BatchPlan, RLHFEngine
from rlhf.generation.continuous_batching import generate
from rlhf.generation.deepspeed_backend import DeepSpeedBackend
from rlhf.numerics.cpu import WORKERS, can_run_side_by_side, side_by_side
from rlhf.types import RewardOutput, TokenizedResponse
from tests.algorithms.test_ppo_checklist import make_trainer  # noqa: F401  (a fixture)

TENSORS = ("logprobs", "ref_logprobs", "values", "scores")


def scored(trainer, iteration=1):
    return trainer.rollouts.run(trainer.prompts.train, iteration)


def side_by_side_where(trainer, together):
    """The trainer with its models' jobs in order, or two at a time: what an RLHFEngine decides for itself."""
    trainer.engine.jobs_at_a_time = WORKERS if together else 1
    trainer.engine.run_jobs = lambda jobs: side_by_side(jobs, together=together)
    return trainer


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


# ------------------------------------------------------------------------------------------ old log-probabilities


def test_the_first_rollout_decides_by_measurement_and_the_captured_ones_are_used_from_then_on(make_trainer):  # noqa: F811
    trainer = make_trainer(reference_noise=0.1)
    found = scored(trainer)
    assert trainer.rollouts.old_logprobs == "sampled"
    assert 0 < trainer.rollouts.captured_error < 1e-5
    assert torch.equal(found.logprobs, found.rollout.logprobs)
    calls = []
    trainer.engine.actor.module.gpt_neox.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    before = len(calls)
    trainer.rollouts.score(found.rollout, trainer.prompts.train)
    assert len(calls) == before  # the actor is not asked again


def test_captured_log_probabilities_that_are_not_exact_are_recomputed_for_good(make_trainer, monkeypatch):  # noqa: F811
    trainer = make_trainer(reference_noise=0.1)

    def off(*arguments, **named):
        rollout = generate(*arguments, **named)
        return dataclasses.replace(rollout, logprobs=rollout.logprobs + 2e-4 * rollout.response_mask)

    exact = scored(make_trainer(reference_noise=0.1, old_logprobs="recomputed")).logprobs
    monkeypatch.setattr(rlhf.generation.actor_backend, "generate", off)
    for _ in range(2):
        found = scored(trainer)
        assert trainer.rollouts.old_logprobs == "recomputed"
        assert trainer.rollouts.captured_error == pytest.approx(2e-4, rel=0.05)
        torch.testing.assert_close(found.logprobs, exact, atol=2e-6, rtol=0)


def test_one_token_that_is_off_is_enough_to_recompute(make_trainer, monkeypatch):  # noqa: F811
    """A shifted column shows in single tokens; the mean over all tokens would hide it."""
    trainer = make_trainer()

    def off(*arguments, **named):
        rollout = generate(*arguments, **named)
        logprobs = rollout.logprobs.clone()
        logprobs[3, 0] += 1e-3
        return dataclasses.replace(rollout, logprobs=logprobs)

    monkeypatch.setattr(rlhf.generation.actor_backend, "generate", off)
    scored(trainer)
    assert trainer.rollouts.captured_error == pytest.approx(1e-3, rel=0.05)
    assert trainer.rollouts.captured_error_mean < 1e-4
    assert trainer.rollouts.old_logprobs == "recomputed"


def test_sampled_and_recomputed_ones_train_alike(make_trainer):  # noqa: F811
    gradients = []
    for choice in ("sampled", "recomputed"):
        trainer = make_trainer(old_logprobs=choice, reference_noise=0.1, ppo_epochs=2, plan=BatchPlan(4, 2, 1))
        trainer.update(trainer.make_experience(1), 1)
        gradients.append(trainer.engine.actor.gradients)
    assert len(gradients[0]) == 4
    for first, second in zip(*gradients, strict=True):
        for name, gradient in first.items():
            torch.testing.assert_close(gradient, second[name], atol=2e-5, rtol=1e-3)


# --------------------------------------------------------------------------------------------------- metrics


def test_the_error_of_the_kl_is_its_spread_over_rollouts_of_as_many_responses(make_trainer):  # noqa: F811
    """Against the bootstrap: responses drawn anew with replacement, all of them equally long."""
    trainer = make_trainer(reference_noise=0.1, rollout=16, plan=BatchPlan(16, 16, 1))
    found = scored(trainer)
    assert found.rollout.response_mask.all()
    per_response = (found.logprobs - found.ref_logprobs).double().mean(1)
    drawn = torch.randint(0, 16, (20_000, 16), generator=torch.Generator().manual_seed(0))
    described = trainer.rollouts.describe(found)
    assert described["kl_error"] == pytest.approx(float(per_response[drawn].mean(1).std()), rel=0.03)
    assert described["kl_per_token"] == pytest.approx(float(per_response.mean()), rel=1e-4)


def test_every_part_of_a_reward_has_its_own_mean(make_trainer):  # noqa: F811
    """Scored in several passes, whose rows are in another order than the rollout's."""

    class Parts:
        training_range = None

        def score(self, responses):
            lengths = responses.rollout.response_mask.sum(1).float()
            numbers = torch.tensor([float(prompt.id) for prompt in responses.prompts])
            return RewardOutput(lengths + numbers, parts={"length": lengths, "by_number": numbers})

    trainer = make_trainer(rollout=16, plan=BatchPlan(16, 16, 1))
    trainer.rollouts.reward, trainer.rollouts.scoring_tokens = Parts(), 40
    found = scored(trainer)
    described = trainer.rollouts.describe(found)
    assert described["score/length"] == pytest.approx(described["response_tokens"])
    assert described["score/by_number"] == pytest.approx(sum(range(16)) / 16)
    assert found.scores.tolist() == (found.rollout.response_mask.sum(1) + torch.arange(16)).tolist()


def test_samples_of_an_evaluation_show_each_prompt_with_its_first_response_and_the_score_of_that(make_trainer):  # noqa: F811
    seen = {}

    def scorer(rollout, texts):
        scores = rollout.response_ids.float().square().sum(1).sqrt()
        seen.update(zip(scores.tolist(), zip(texts, rollout.response_ids, strict=True), strict=True))
        return scores

    trainer = make_trainer(scorer=scorer, eval_samples_per_prompt=3)
    prompts = trainer.prompts.evaluation
    samples = trainer.evaluate(0)["samples"]
    assert [(sample["id"], sample["prompt"]) for sample in samples] == [(row.id, row.text) for row in prompts]
    assert len(seen) == 3 * len(prompts)
    for sample in samples:
        prompt, response = seen[sample["score"]]
        assert prompt == sample["prompt"]
        assert trainer.rollouts.tokenizer.decode(response, skip_special_tokens=True).strip() == sample["response"]


# --------------------------------------------------------------------------------------------------- scoring


@pytest.mark.parametrize("tokens", [1, 13, 40, 10**6])
def test_the_size_of_scoring_passes_changes_no_number(make_trainer, tokens):  # noqa: F811
    expected = scored(make_trainer(reference_noise=0.1))
    rollout = expected.rollout
    trainer = make_trainer(reference_noise=0.1)
    trainer.rollouts.scoring_tokens = tokens
    passes = []
    trainer.engine.critic.module.backbone.register_forward_pre_hook(lambda *_: passes.append(1))
    found = trainer.rollouts.score(rollout, trainer.prompts.train)
    for name in TENSORS:
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), atol=3e-6, rtol=1e-5)
    total = int(rollout.prompt_mask.sum() + rollout.response_mask.sum())
    assert len(passes) == min(8, -(-total // tokens))


def test_side_by_side_gives_the_same_rollout_scores_and_updates(make_trainer, two_threads):  # noqa: F811
    results = []
    for together in (True, False):
        trainer = side_by_side_where(make_trainer(reference_noise=0.1, rollout=7, plan=BatchPlan(7, 7, 1)), together)
        experience = trainer.make_experience(1)
        metrics = trainer.update(experience, 1)
        results.append((experience, metrics, trainer.engine))
    first, second = results
    assert torch.equal(first[0].rollout.response_ids, second[0].rollout.response_ids)
    for name in ("rewards", "values", "scores", "advantages"):
        torch.testing.assert_close(getattr(first[0], name), getattr(second[0], name), atol=1e-5, rtol=1e-4)
    timing = {name for name in first[1] if name.startswith("seconds")} | {"sampling_logprob_error", "approx_kl"}
    for name in first[1].keys() - timing:
        assert first[1][name] == pytest.approx(second[1][name], rel=1e-3, abs=1e-5), name
    for engine in ("actor", "critic"):
        ours, theirs = (getattr(result[2], engine).gradients[0] for result in results)
        for name, gradient in ours.items():
            torch.testing.assert_close(gradient, theirs[name], atol=2e-5, rtol=1e-3)


@pytest.mark.parametrize("zero_stage", [0, 3])
def test_models_of_zero_3_never_run_at_the_same_time(zero_stage, tiny_models, two_threads):
    """Its hooks keep process-wide notes of the module that runs."""
    engine = RLHFEngine.build(
        tiny_models["gpt_neox"], model=ModelConfig(), engine=EngineConfig(zero_stage=zero_stage, precision="fp32"),
        optimizer=OptimizerConfig(), plan=BatchPlan(4, 4, 1), total_steps=1,
    )  # fmt: skip
    assert engine.jobs_at_a_time == (WORKERS if zero_stage == 0 else 1)


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("tokens", [3, 40])
def test_ptx_rows_may_be_much_shorter_or_longer_than_the_rollout(make_trainer, two_threads, together, tokens):  # noqa: F811
    rows = [
        TokenizedResponse(id=str(n), input_ids=tuple(range(1 + n, 1 + n + tokens)), prompt_tokens=1) for n in range(16)
    ]
    gradients = []
    for micro in (4, 16):
        trainer = make_trainer(ptx=rows, ptx_coef=2.0, rollout=16, plan=BatchPlan(16, micro, 1), reference_noise=0.1)
        side_by_side_where(trainer, together)
        metrics = trainer.update(trainer.make_experience(1), 1)
        gradients.append(trainer.engine.actor.gradients[0])
        assert metrics["ptx_loss"] > 0
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], atol=3e-5, rtol=1e-3)


def test_jobs_side_by_side_keep_order_threads_and_gradient_mode(two_threads):
    assert can_run_side_by_side("cpu", ranks=1) and not can_run_side_by_side("cuda", ranks=1)
    assert not can_run_side_by_side("cpu", ranks=2)
    seen, meet = [], threading.Barrier(2, timeout=20)

    def job(number):
        if number < 2:
            meet.wait()  # the first two run at the same time
        seen.append((torch.get_num_threads(), torch.is_grad_enabled()))
        return number * number

    with torch.no_grad():
        assert side_by_side([lambda n=n: job(n) for n in range(5)], together=True) == [0, 1, 4, 9, 16]
    assert seen == [(1, False)] * 5
    assert torch.get_num_threads() == 2

    def fails():
        raise ValueError("job 1")

    ended = []
    with pytest.raises(ValueError, match="job 1"):
        side_by_side([fails, lambda: ended.append(1)], together=True)
    assert ended == [1] and torch.get_num_threads() == 2
    torch.set_num_threads(1)
    assert not can_run_side_by_side("cpu", ranks=1)


# ------------------------------------------------------------------------------------- DeepSpeed's rollout engine


def test_deepspeeds_rollout_engine_samples_and_ppo_learns_from_it(make_trainer):  # noqa: F811
    trainer = make_trainer(generation_backend="deepspeed", reference_noise=0.1, rollout=16, plan=BatchPlan(16, 8, 1))
    assert isinstance(trainer.rollouts.backend, DeepSpeedBackend) and not trainer.rollouts.backend.trusted
    experience = trainer.make_experience(1)
    assert trainer.rollouts.backend.trusted and trainer.rollouts.old_logprobs == "recomputed"
    assert (experience.rollout.logprobs[experience.rollout.response_mask] < 0).all()
    assert trainer.update(experience, 1)["ratio_first"] == pytest.approx(1.0, abs=1e-5)
    again = make_trainer(generation_backend="deepspeed", reference_noise=0.1, rollout=16, plan=BatchPlan(16, 8, 1))
    assert torch.equal(again.make_experience(1).rollout.response_ids, experience.rollout.response_ids)
    other = again.make_experience(2).rollout.response_ids
    assert other.shape != experience.rollout.response_ids.shape or not torch.equal(
        other, experience.rollout.response_ids
    )


def test_it_samples_no_more_rows_side_by_side_than_asked(make_trainer, monkeypatch):  # noqa: F811
    trainer = make_trainer(generation_backend="deepspeed", rollout=16, plan=BatchPlan(16, 8, 1))
    trainer.rollouts.backend.slots = 5
    sizes = []
    plain = trainer.rollouts.backend.rollout.generate
    monkeypatch.setattr(
        trainer.rollouts.backend.rollout,
        "generate",
        lambda request, sampling: sizes.append(len(request.prompt_ids)) or plain(request, sampling),
    )
    rollout = trainer.make_experience(1).rollout
    assert sizes == [4, 5, 5, 5, 1] and len(rollout) == 16  # the first four are the check
    assert "sampling_logprob_error" not in trainer.experience_metrics


def test_it_is_refused_when_its_tokens_are_not_those_of_the_model(make_trainer, monkeypatch):  # noqa: F811
    trainer = make_trainer(generation_backend="deepspeed", new_tokens=12)
    backend = trainer.rollouts.backend
    plain = backend.rollout.generate

    def wrong(request, sampling):
        found = plain(request, sampling)
        found.input_ids[0, -3] = (found.input_ids[0, -3] + 1) % 90
        return found

    monkeypatch.setattr(backend.rollout, "generate", wrong)
    with pytest.raises(ConfigError, match="below the largest logit.*generation_backend=own"):
        trainer.make_experience(1)


def test_captured_log_probabilities_are_refused_where_none_are_captured(make_trainer):  # noqa: F811
    with pytest.raises(ConfigError, match="old_logprobs=sampled needs generation_backend=own"):
        make_trainer(generation_backend="deepspeed", old_logprobs="sampled")


# --------------------------------------------------------------------------------------- told of what has ended


class Told:
    """A reward that notes what it is told of while the actor samples."""

    training_range = None

    def __init__(self):
        self.calls = []

    def prefetch(self, responses, *, more):
        self.calls.append(
            ([prompt.id for prompt in responses.prompts], list(responses.texts), responses.ended.tolist(), more)
        )

    def score(self, responses):
        self.calls.append("score")
        return RewardOutput(torch.zeros(len(responses)))


@pytest.mark.parametrize("slots", [0, 3])
def test_a_reward_is_told_once_of_every_response_and_as_soon_as_it_is_whole(make_trainer, slots):  # noqa: F811
    trainer = make_trainer(prompts=8, new_tokens=40, actor_eos=7)
    trainer.rollouts.backend.slots = slots
    trainer.rollouts.reward = told = Told()
    prompts = trainer.prompts.train[:8]
    found = trainer.rollouts.run(prompts, 1)
    first_score = told.calls.index("score")
    early = told.calls[:first_score]
    assert "score" not in early and len(early) > 1, "in more than one piece, all before it is asked"
    assert [more for *_, more in early] == [True] * (len(early) - 1) + [False]
    by_prompt = {
        id: (text, end) for ids, texts, ended, _ in early for id, text, end in zip(ids, texts, ended, strict=True)
    }
    texts = trainer.rollouts.texts(found.rollout)
    expected = {one.id: (text, end) for one, text, end in zip(prompts, texts, found.ended.tolist(), strict=True)}
    assert by_prompt == expected and sum(len(ids) for ids, *_ in early) == 8


def test_a_slow_endpoint_works_while_the_actor_samples(make_trainer, monkeypatch):  # noqa: F811
    from rlhf.rewards.table import NO_SOURCES, RewardSpec, build_reward
    from tests.support.reward_endpoint import Endpoint, served

    trainer = make_trainer(prompts=8, new_tokens=40, actor_eos=7)
    endpoint = Endpoint()
    with served(endpoint) as url:
        entry = f'{{"name": "http", "url": "{url}", "batch_size": 2, "weight": 2}}'
        trainer.rollouts.reward = build_reward([RewardSpec.parse(entry)], NO_SOURCES)
        found = trainer.rollouts.run(trainer.prompts.train[:8], 1)
    assert found.scores.tolist() == [2.0 * len(text) for text in trainer.rollouts.texts(found.rollout)]
    assert len(endpoint.requests) == 4, "each response is asked for once"
