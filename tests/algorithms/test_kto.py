"""KTO: its loss against TRL's, tables worked by hand, what its rows are matched with, and its trainer."""

from __future__ import annotations

import math
from collections import defaultdict
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from rlhf.algorithms.config import OfflineConfig
from rlhf.algorithms.kto import KTOTrainer, kto_loss, kto_margins, reference_point, with_mismatches
from rlhf.data.spec import DataError
from rlhf.engine import BatchPlan
from rlhf.training.reference_logprobs import response_log_likelihoods, with_reference, without_reference
from rlhf.types import TokenizedLabel, TokenizedResponse
from tests.algorithms.test_ppo_checklist import load
from tests.support.local_engine import LocalEngine
from tests.support.on_policy import context, stage_data


def labelled(row: int) -> TokenizedLabel:
    """Responses of different lengths to four prompts; the good ones say other tokens than the bad ones."""
    prompt, good = (3 + row % 4, 4, 5)[: 2 + row % 2], row % 3 != 0
    said = tuple(6 + 3 * good + place % 3 for place in range(1 + row % 4)) + (0,)
    return TokenizedLabel(TokenizedResponse(f"{row}", prompt + said, len(prompt), "ab"[row % 2]), good)


ROWS = [labelled(row) for row in range(10)]


def trl_loss(actor, reference, actor_other, reference_other, good, **constants) -> float:
    """The loss of TRL's KTOTrainer, which is given a model that says `actor` [B, T] of the responses."""
    from trl.experimental.kto import KTOTrainer as TRLTrainer

    rows, width = actor.shape
    outputs = SimpleNamespace(log_probs=actor, entropy=torch.zeros_like(actor), mean_logits=torch.zeros_like(actor))
    said = actor_other.sum(1)
    accelerator = SimpleNamespace(device="cpu", gather_for_metrics=lambda value: value)
    stub = SimpleNamespace(
        model=SimpleNamespace(training=False), accelerator=accelerator, aux_loss_enabled=False,
        _compute_kl_logps=lambda model, batch: said, precompute_ref_logps=True, calculate_KL=True, loss_type="kto",
        _metrics={"eval": defaultdict(list)}, _total_train_tokens=0, **constants,
    )  # fmt: skip
    inputs = {
        "input_ids": torch.zeros(rows, width + 1, dtype=torch.long), "label": good,
        "attention_mask": torch.ones(rows, width + 1), "completion_mask": torch.ones(rows, width + 1),
        "ref_logps": reference.sum(1), "ref_KL_logps": reference_other.sum(1),
    }  # fmt: skip
    return float(TRLTrainer._compute_loss(stub, lambda **_: outputs, inputs, return_outputs=False))


@pytest.mark.parametrize("drift", [-1.0, 1.0])  # below 0 the estimate of the KL divergence is clamped
@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.5, 0.5)])
def test_the_loss_is_that_of_trl(drift, weights):
    generator = torch.Generator().manual_seed(3)
    actor, reference, other, reference_other = (
        -3 * torch.rand(6, 4, generator=generator, dtype=torch.float64) for _ in range(4)
    )
    other = reference_other + drift * torch.rand(6, 4, generator=generator, dtype=torch.float64)
    good = torch.tensor([True, False, True, True, False, True])
    constants = {"beta": 0.3, "desirable_weight": weights[0], "undesirable_weight": weights[1]}
    expected = trl_loss(actor, reference, other, reference_other, good, **constants)
    kl = reference_point((other - reference_other).sum(1))
    assert (float(kl) > 0) == (drift > 0)
    margins = kto_margins((actor - reference).sum(1), good, kl, 0.3)
    ours = kto_loss(margins, good, desirable_weight=weights[0], undesirable_weight=weights[1]) / 6
    assert float(ours) == pytest.approx(expected, abs=1e-6) and expected > 0.1


def test_a_table_by_hand():
    """z_0 = (0.5 + 0.1) / 2 = 0.3; rewards 0.8 (good) and -0.2 (bad) lie 0.5 on their right sides, beta 2: 1 each."""
    kl = reference_point(torch.tensor([0.5, 0.1]))
    good = torch.tensor([True, False])
    margins = kto_margins(torch.tensor([0.8, -0.2]), good, kl, 2.0)
    assert margins.tolist() == pytest.approx([1.0, 1.0])
    expected = (3 + 1) * (1 - 1 / (1 + math.exp(-1)))
    assert float(kto_loss(margins, good, desirable_weight=3.0, undesirable_weight=1.0)) == pytest.approx(expected)


def test_no_gradient_goes_through_the_reference_point():
    ratios = torch.tensor([0.5, 0.7], requires_grad=True)
    assert not reference_point(ratios).requires_grad
    assert float(reference_point(torch.tensor([-2.0, 1.0]))) == 0.0


def test_every_row_is_matched_with_a_response_to_another_prompt():
    rows = with_mismatches(ROWS, seed=1)
    assert [row.label for row in rows] == ROWS
    for row in rows:
        own, other = row.candidates
        prompt = own.input_ids[: own.prompt_tokens]
        assert other.input_ids[: other.prompt_tokens] == prompt
        said = other.input_ids[other.prompt_tokens :]
        sources = [each.response for each in ROWS if each.id == other.id]
        assert [source.input_ids[source.prompt_tokens :] for source in sources] == [said]
        assert sources[0].input_ids[: sources[0].prompt_tokens] != prompt
    assert with_mismatches(ROWS, seed=1) == rows != with_mismatches(ROWS, seed=2)
    assert with_mismatches([], seed=1) == []


def test_rows_of_one_prompt_are_refused():
    with pytest.raises(DataError, match="all 2 rows have the same one.*'0' is the first.*at least two prompts"):
        with_mismatches([ROWS[0], ROWS[4]], seed=1)


def kto_trainer(tiny_models, directory, *, micro=4, steps=1, lr=1e-2, live=False, rows=ROWS, **config) -> KTOTrainer:
    """A trainer over a plain torch model, evaluated on the rows that it learns from."""
    plan = BatchPlan(10, micro, 1)
    engine = LocalEngine(load(tiny_models["gpt_neox"]).eval(), plan, lr=lr)
    reference = load(tiny_models["gpt_neox"]).eval().requires_grad_(False)
    matched = with_mismatches(rows, seed=1)
    known = without_reference(matched) if live else with_reference(
        engine, matched, plan, pad_token_id=0, cache_dir=directory, identity={}
    )  # fmt: skip
    return KTOTrainer(
        engine, stage_data(known, known), OfflineConfig(algorithm="kto", **config), pad_token_id=0, plan=plan,
        live_reference=partial(response_log_likelihoods, reference) if live else None,
        total_steps=steps, export=lambda: None, context=context(directory / "run", "offline", log_every_steps=1),
    )  # fmt: skip


@pytest.fixture
def make(tiny_models, tmp_path):
    return partial(kto_trainer, tiny_models, tmp_path)


def test_at_the_start_the_actor_is_its_reference(make):
    found = make().evaluate()
    assert found["eval_loss"] == pytest.approx(0.5, abs=1e-6) and found["eval_kl"] == pytest.approx(0, abs=1e-6)
    assert found["eval_chosen_shift"] == pytest.approx(0, abs=1e-6) and found["eval_rows"] == 10


def test_it_learns_to_tell_good_from_bad(make):
    outcome = make(steps=15, lr=0.3).fit()
    before, after = outcome["before"], outcome["after"]
    assert after["eval_loss"] < before["eval_loss"] - 0.01 and after["eval_accuracy"] > 0.8
    gap = after["eval_chosen_logprob"] - after["eval_rejected_logprob"]
    assert gap > before["eval_chosen_logprob"] - before["eval_rejected_logprob"]


def moved(trainer: KTOTrainer) -> KTOTrainer:
    """The trainer with an actor that is no longer its reference, so that the reference point is above 0."""
    torch.manual_seed(5)
    with torch.no_grad():
        for weight in trainer.engine.module.parameters():
            weight.add_(0.05 * torch.randn_like(weight))
    return trainer


def test_micro_batches_change_no_gradient(make):
    """The reference point is one of the global batch, whatever it is split into."""
    found, points = [], []
    for micro in (1, 3, 10):
        trainer = moved(make(micro=micro))
        trainer.fit()
        (gradients,) = trainer.engine.gradients
        found.append(gradients)
        points.append(float(trainer.kl))
    assert points[0] > 0 and points == pytest.approx([points[0]] * 3, abs=1e-5)
    assert max(value.abs().max() for value in found[0].values()) > 1e-4
    for other in found[1:]:
        for name, value in found[0].items():
            torch.testing.assert_close(other[name], value, atol=2e-6, rtol=1e-3)


def test_the_loss_of_a_batch_is_that_of_its_responses(make):
    """Every response alone through the model, and the formula."""
    trainer = moved(make(undesirable_weight=0.5))
    model, reference = trainer.engine.module, trainer.train
    batch = trainer.collate(trainer.train)
    trainer.before_step([batch])

    def said(response: TokenizedResponse) -> float:
        ids = torch.tensor([response.input_ids])
        logprobs = model(input_ids=ids).logits[0].log_softmax(-1)
        places = range(response.prompt_tokens, ids.shape[1])
        return sum(float(logprobs[place - 1, ids[0, place]].detach()) for place in places)

    ratios = [[said(one) - known for one, known in zip(row.row.candidates, row.ref_logprobs, strict=True)]
              for row in reference]  # fmt: skip
    point = max(0.0, sum(other for _, other in ratios) / len(ratios))
    assert float(trainer.kl) == pytest.approx(point, abs=1e-4)
    expected = 0.0
    for (own, _), row in zip(ratios, reference, strict=True):
        sign, weight = (1, 1.0) if row.row.label.good else (-1, 0.5)
        expected += weight * (1 - 1 / (1 + math.exp(-0.1 * sign * (own - point))))
    assert float(trainer.loss_sum(batch)) == pytest.approx(expected, abs=1e-4)


def test_a_live_reference_says_what_is_kept(make):
    kept, live = moved(make()), moved(make(live=True))
    first, second = kept.evaluate(), live.evaluate()
    assert {name: pytest.approx(value, abs=1e-5) for name, value in first.items()} == second
    kept.fit(), live.fit()
    (one,), (other,) = kept.engine.gradients, live.engine.gradients
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, atol=2e-6, rtol=1e-3)


def test_unbalanced_labels_are_told(make, caplog):
    caplog.set_level("INFO")
    make()
    assert "6 good and 4 bad responses" in caplog.text and "its authors advise 1 to 4/3" in caplog.text
    caplog.clear()
    make(undesirable_weight=1.25)  # 6 to 5
    assert "advise" not in caplog.text
