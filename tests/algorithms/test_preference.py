"""The trainer of the offline losses: what it starts from, what it learns, what micro-batches must not change."""

from __future__ import annotations

import dataclasses
import math
from functools import partial

import pytest
import torch

from rlhf.algorithms.config import OfflineConfig
from rlhf.algorithms.offline_losses import OFFLINE_LOSSES
from rlhf.algorithms.preference import PreferenceTrainer
from rlhf.data.collate import collate_rankings
from rlhf.engine import BatchPlan
from rlhf.training.data_order import DataOrder, visited
from rlhf.training.reference_logprobs import response_log_likelihoods, with_reference, without_reference
from rlhf.types import TokenizedRanking, TokenizedResponse
from tests.algorithms.test_ppo_checklist import load
from tests.support.local_engine import LocalEngine
from tests.support.on_policy import context, stage_data


def ranking(row: int, ranks: tuple[int, ...]) -> TokenizedRanking:
    """Candidates of different lengths; those with an even rank say other tokens than those with an odd one."""
    prompt = (3 + row, 4, 5)[: 1 + row % 3]
    said = [tuple(6 + (rank % 2) * 3 + place % 3 for place in range(2 + (row + rank) % 4)) + (0,) for rank in ranks]
    candidates = tuple(TokenizedResponse(f"{row}", prompt + each, len(prompt)) for each in said)
    return TokenizedRanking(f"{row}", candidates, ranks, category="ab"[row % 2])


ROWS = [ranking(row, (0, 1) if row % 3 else (1, 0, 1)) for row in range(8)] + [ranking(8, (0, 0))]


def preference_trainer(
    tiny_models, directory, algorithm: str, *, micro: int = 4, steps: int = 1, lr: float = 1e-2, **config
) -> PreferenceTrainer:
    """A trainer over a plain torch model, evaluated on the rows that it learns from."""
    plan = BatchPlan(8, micro, 1)
    engine = LocalEngine(load(tiny_models["gpt_neox"]).eval(), plan, lr=lr)
    rows = without_reference(ROWS)
    if OFFLINE_LOSSES[algorithm].needs_reference:
        rows = with_reference(engine, ROWS, plan, pad_token_id=0, cache_dir=directory, identity={})
    return PreferenceTrainer(
        engine, stage_data(rows, rows), OfflineConfig(algorithm=algorithm, **config), pad_token_id=0, plan=plan,
        total_steps=steps, export=lambda: None, context=context(directory / "run", "offline", log_every_steps=1),
    )  # fmt: skip


@pytest.fixture
def make(tiny_models, tmp_path):
    return partial(preference_trainer, tiny_models, tmp_path)


def test_a_sum_over_the_response_is_that_of_its_tokens(tiny_models):
    """Also where the prompt ends in the token that pads, and the end of the response counts."""
    model = load(tiny_models["gpt_neox"]).eval()
    batch = collate_rankings(ROWS[:3], 0, {"a": 0, "b": 1})
    found = response_log_likelihoods(model, batch)
    candidates = [candidate for row in ROWS[:3] for candidate in row.candidates]
    for row, candidate in enumerate(candidates):
        ids = torch.tensor([candidate.input_ids])
        logprobs = model(input_ids=ids).logits[0].log_softmax(-1)
        places = range(candidate.prompt_tokens, ids.shape[1])
        expected = sum(float(logprobs[place - 1, ids[0, place]]) for place in places)
        assert float(found[row]) == pytest.approx(expected, abs=1e-4)


def test_at_the_start_the_actor_is_its_reference(make):
    trainer = make("dpo")
    found = trainer.evaluate()
    assert found["eval_loss"] == pytest.approx(math.log(2), abs=1e-6) and found["eval_accuracy"] == 0.5
    assert found["eval_chosen_shift"] == pytest.approx(0, abs=1e-6) and found["eval_rows"] == 9
    assert make("ipo").evaluate()["eval_loss"] == pytest.approx(25, abs=1e-4)  # (0 - 1 / 0.2)^2


@pytest.mark.parametrize("algorithm", OFFLINE_LOSSES)
def test_it_learns_to_prefer_the_better_ones(make, algorithm):
    trainer = make(algorithm, steps=15, lr=0.002 if algorithm == "ipo" else 0.2)
    outcome = trainer.fit()
    before, after = outcome["before"], outcome["after"]
    assert after["eval_loss"] < before["eval_loss"] and after["eval_margin"] > before["eval_margin"]
    gap = after["eval_chosen_logprob"] - after["eval_rejected_logprob"]
    assert gap > before["eval_chosen_logprob"] - before["eval_rejected_logprob"]


@pytest.mark.parametrize("algorithm", OFFLINE_LOSSES)
def test_micro_batches_change_no_gradient(make, algorithm):
    found = []
    for micro in (1, 3, 8):
        trainer = make(algorithm, micro=micro)
        trainer.fit()
        (gradients,) = trainer.engine.gradients
        found.append(gradients)
    assert max(value.abs().max() for value in found[0].values()) > 1e-4
    for other in found[1:]:
        for name, value in found[0].items():
            torch.testing.assert_close(other[name], value, atol=2e-6, rtol=1e-3)


def test_padding_tells_nothing(make):
    trainer = make("dpo")
    batch = trainer.collate(trainer.train)
    wider = dataclasses.replace(
        batch,
        ranked=dataclasses.replace(
            batch.ranked,
            input_ids=torch.nn.functional.pad(batch.ranked.input_ids, (0, 3), value=0),
            attention_mask=torch.nn.functional.pad(batch.ranked.attention_mask, (0, 3), value=False),
        ),
    )
    torch.testing.assert_close(trainer.loss_sum(wider), trainer.loss_sum(batch), atol=1e-5, rtol=1e-5)


def test_the_reference_is_computed_once_for_the_same_rows_and_model(tiny_models, tmp_path, caplog):
    plan = BatchPlan(8, 2, 1)
    engine = LocalEngine(load(tiny_models["gpt_neox"]).eval(), plan)
    calls = []
    engine.module.gpt_neox.layers[0].register_forward_pre_hook(lambda *_: calls.append(1))

    def run(rows, **identity):
        before = len(calls)
        found = with_reference(engine, rows, plan, pad_token_id=0, cache_dir=tmp_path, identity=identity)
        return found, len(calls) > before

    first, computed = run(ROWS, model="a")
    again, computed_again = run(ROWS, model="a")
    assert (
        computed
        and not computed_again
        and [each.ref_logprobs for each in again] == [each.ref_logprobs for each in first]
    )
    assert run(ROWS, model="b")[1] and run(ROWS[1:], model="a")[1]
    assert run([], model="a") == ([], False)
    batch = collate_rankings(ROWS, 0, {"a": 0, "b": 1})
    expected = response_log_likelihoods(engine.module, batch)
    found = torch.tensor([value for each in first for value in each.ref_logprobs])
    torch.testing.assert_close(found, expected.detach(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_the_rows_that_a_run_visits_are_known_before_it(steps):
    plan = BatchPlan(4, 2, 1)
    order = DataOrder([3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5], plan, 7)
    expected = sorted({index for step in range(steps) for index in order.indices(step)})
    assert visited(11, plan, 7, steps=steps) == expected and len(expected) == min(11, 4 * steps)


def test_the_best_by_gold_is_kept_where_that_is_asked_for(make):
    """Gold falls after the second evaluation while the loss goes on falling."""
    golds = {False: [0.5, 0.8, 0.7, 0.6], True: [0.5, 0.8, 0.7, 0.6]}
    kept = {}
    for by_gold, values in golds.items():
        trainer = make("simpo", steps=3, lr=0.05, eval_every_steps=1, **({"keep_best": "gold"} if by_gold else {}))
        left = iter(values)
        trainer.sample = lambda left=left: {"gold": next(left), "prompt_measures": {"gold": [0.0]}}
        exported = []
        trainer._export = lambda exported=exported, trainer=trainer: exported.append(trainer.step + 1)
        outcome = trainer.fit()
        kept[by_gold] = (outcome["best_step"], outcome["after"]["eval_gold"], exported)
    assert kept == {False: (3, 0.6, [1, 2, 3]), True: (1, 0.8, [1])}


def test_sampled_responses_stand_beside_the_loss(make):
    said = {"eos_rate": 0.75, "gold": 0.5, "score": 9.0, "prompt_measures": {"gold": [0.5]}, "samples": []}
    trainer = make("simpo")
    trainer.sample = lambda: said
    found = trainer.evaluate()
    assert found["eval_eos_rate"] == 0.75 and found["eval_gold"] == 0.5 and found["sampled"] is said
    assert "eval_score" not in found and "eval_loss" in found
