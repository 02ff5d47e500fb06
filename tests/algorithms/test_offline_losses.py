"""The offline losses against TRL's own, tables worked by hand, and the published formulas written out again."""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from types import SimpleNamespace
from typing import get_args, get_type_hints

import pytest
import torch

from rlhf.algorithms.candidates import Candidates
from rlhf.algorithms.config import OFFLINE_CONSTANTS, OfflineConfig
from rlhf.algorithms.offline_losses import OFFLINE_LOSSES
from rlhf.config import ConfigError


def pairs(count: int = 5, seed: int = 0) -> tuple[Candidates, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`count` pairs, the better response first, and their log-probabilities by token [2 count, T] as TRL is given them
    (all better ones, then all worse ones), of the actor and of the reference, with the mask."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 7, (2 * count,), generator=generator)
    mask = torch.arange(6) < lengths.unsqueeze(1)
    actor, reference = (
        -3 * torch.rand(2 * count, 6, generator=generator, dtype=torch.float64) * mask for _ in range(2)
    )
    order = torch.arange(2 * count).view(2, count).T.flatten()  # better and worse of a prompt side by side
    given = Candidates(
        actor.sum(1)[order], reference.sum(1)[order], lengths[order], torch.arange(2 * count) // 2,
        torch.arange(2 * count) % 2,
    )  # fmt: skip
    return given, actor, reference, mask


def ours(given: Candidates, **config) -> float:
    made = OfflineConfig(**config)
    return float(OFFLINE_LOSSES[made.algorithm].loss(given, made)) / given.prompts


def trl_dpo(actor: torch.Tensor, reference: torch.Tensor, mask: torch.Tensor, loss_type: str, **constants) -> float:
    """The loss of DPOTrainer, which is given a model that says `actor`."""
    from trl import DPOTrainer

    columns = torch.zeros(len(mask), 1)
    outputs = SimpleNamespace(
        log_probs=actor, entropy=torch.zeros_like(actor), mean_logits=torch.zeros_like(actor), is_top1=mask
    )
    accelerator = SimpleNamespace(device="cpu", gather=lambda value: value, gather_for_metrics=lambda value: value)
    stub = SimpleNamespace(
        model=SimpleNamespace(training=False), accelerator=accelerator, aux_loss_enabled=False, ld_alpha=None,
        precompute_ref_logps=True, f_divergence_type="reverse_kl", use_weighting=False, loss_types=[loss_type],
        loss_weights=[1.0], _metrics={"eval": defaultdict(list)}, _total_train_tokens=0, **constants,
    )  # fmt: skip
    chosen, rejected = reference.sum(1).chunk(2)
    inputs = {
        "input_ids": torch.cat([columns.long(), mask.long()], dim=1), "attention_mask": torch.ones(len(mask), 7),
        "completion_mask": torch.cat([columns, mask.double()], dim=1), "ref_chosen_logps": chosen,
        "ref_rejected_logps": rejected,
    }  # fmt: skip
    return float(DPOTrainer._compute_loss(stub, lambda **_: outputs, inputs, return_outputs=False))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("config", "loss_type", "constants"),
    [
        ({"algorithm": "dpo"}, "sigmoid", {"beta": 0.1, "label_smoothing": 0.0}),
        ({"algorithm": "dpo", "beta": 0.7}, "sigmoid", {"beta": 0.7, "label_smoothing": 0.0}),
        ({"algorithm": "dpo", "beta": 0.5, "label_smoothing": 0.2, "robust": True}, "robust",
         {"beta": 0.5, "label_smoothing": 0.2}),
        ({"algorithm": "ipo"}, "ipo", {"beta": 0.1, "label_smoothing": 0.0}),
        ({"algorithm": "ipo", "beta": 0.3}, "ipo", {"beta": 0.3, "label_smoothing": 0.0}),
    ],
)  # fmt: skip
def test_the_loss_is_that_of_trl(config, loss_type, constants, seed):
    given, actor, reference, mask = pairs(seed=seed)
    expected = trl_dpo(actor, reference, mask, loss_type, **constants)
    assert ours(given, **config) == pytest.approx(expected, abs=1e-6) and expected > 0.05


@pytest.mark.parametrize(("beta", "gamma"), [(2.0, 1.0), (0.5, 0.3)])
def test_simpo_is_that_of_trl(beta, gamma):
    from trl.experimental.cpo import CPOTrainer

    given, actor, _, mask = pairs()
    stub = SimpleNamespace(
        alpha=0.0, loss_type="simpo", simpo_gamma=gamma, beta=beta, label_smoothing=0.0,
        accelerator=SimpleNamespace(device="cpu"),
    )  # fmt: skip
    losses, *_ = CPOTrainer.cpo_loss(stub, *(actor.sum(1) / mask.sum(1)).chunk(2))
    assert ours(given, algorithm="simpo", beta=beta, target_margin=gamma) == pytest.approx(
        float(losses.mean()), abs=1e-6
    )


def test_orpo_is_that_of_trl_and_imitation():
    """TRL imitates the prompt too; the part that is ours alone is counted by hand."""
    from trl.experimental.orpo import ORPOTrainer

    given, actor, _, mask = pairs()
    means = (actor.sum(1) / mask.sum(1)).chunk(2)
    stub = SimpleNamespace(beta=0.25, accelerator=SimpleNamespace(device="cpu"))
    losses, *_ = ORPOTrainer.odds_ratio_loss(stub, *means)
    expected = float(-means[0].mean() * 0.5 - losses.mean())
    assert ours(given, algorithm="orpo", beta=0.25, sft_coef=0.5) == pytest.approx(expected, abs=1e-6)


def test_conservative_dpo_by_hand():
    """One pair, log-ratios 0.3 and -0.1: m = 2 (0.3 + 0.1) = 0.8."""
    given = Candidates(
        torch.tensor([-1.0, -2.0]), torch.tensor([-1.3, -1.9]), torch.tensor([2, 2]), torch.tensor([0, 0]),
        torch.tensor([0, 1]),
    )  # fmt: skip
    sigmoid = 1 / (1 + math.exp(-0.8))
    expected = -0.9 * math.log(sigmoid) - 0.1 * math.log(1 - sigmoid)
    assert ours(given, algorithm="dpo", beta=2.0, label_smoothing=0.1) == pytest.approx(expected, abs=1e-6)


def test_a_longer_winner_is_raised_less_far():
    """The same pair with 7 and 2 tokens: m = 0.8 + 0.05 * 5."""
    given = Candidates(
        torch.tensor([-1.0, -2.0]), torch.tensor([-1.3, -1.9]), torch.tensor([7, 2]), torch.tensor([0, 0]),
        torch.tensor([0, 1]),
    )  # fmt: skip
    found = ours(given, algorithm="dpo", beta=2.0, length_coef=0.05)
    assert found == pytest.approx(math.log(1 + math.exp(-1.05)), abs=1e-6)
    turned = dataclasses.replace(given, tokens=torch.tensor([2, 7]))
    assert ours(turned, algorithm="dpo", beta=2.0, length_coef=0.05) == pytest.approx(
        math.log(1 + math.exp(-0.55)), abs=1e-6
    )


def test_rrhf_by_hand_over_ragged_candidates_with_ties():
    """Prompt 0: a > b = c, p = -2 / 2, -3 / 6, -1 / 4: b and c beat a by 0.5 and 0.75;
    imitating a costs 1. Prompt 1: d > e, p = -4 / 4, -6 / 3: in order; imitating d costs 1. Prompt 2 is all ties and
    says nothing."""
    given = Candidates(
        torch.tensor([-2.0, -3.0, -1.0, -4.0, -6.0, -9.0, -1.0]), torch.zeros(7), torch.tensor([2, 6, 4, 4, 3, 1, 1]),
        torch.tensor([0, 0, 0, 1, 1, 2, 2]), torch.tensor([0, 1, 1, 0, 1, 0, 0]),
    )  # fmt: skip
    assert given.prompts == 2 and given.best.tolist() == [0, 3]
    assert ours(given, algorithm="rrhf") == pytest.approx((0.5 + 0.75 + 1 + 1) / 2)
    assert ours(given, algorithm="rrhf", rank_coef=2.0, sft_coef=0.0) == pytest.approx(1.25)
    # without the length: b is beaten, c beats a by 1; e is beaten
    assert ours(given, algorithm="rrhf", length_penalty=0.0, sft_coef=0.0) == pytest.approx(0.5)


def test_every_prompt_weighs_the_same_however_many_pairs_it_has():
    def given(rows):
        return Candidates(
            torch.tensor([-1.0, -2.0, -3.0, -1.5, -4.0])[rows], torch.zeros(len(rows)),
            torch.tensor([2, 2, 3, 1, 2])[rows], torch.tensor([0, 0, 0, 1, 1])[rows],
            torch.tensor([0, 1, 2, 0, 1])[rows],
        )  # fmt: skip

    for algorithm in ("dpo", "ipo", "simpo"):
        both = ours(given([0, 1, 2, 3, 4]), algorithm=algorithm)
        of_three = [ours(given(rows), algorithm=algorithm) for rows in ([0, 1], [0, 2], [1, 2])]
        alone = Candidates(*(getattr(given([3, 4]), item.name) for item in dataclasses.fields(Candidates)))
        alone = dataclasses.replace(alone, groups=torch.tensor([0, 0]))
        assert both == pytest.approx((sum(of_three) / 3 + ours(alone, algorithm=algorithm)) / 2, rel=1e-5)


@pytest.mark.parametrize("algorithm", OFFLINE_LOSSES)
def test_a_step_down_the_loss_prefers_the_better_response(algorithm):
    given, *_ = pairs(8, seed=4)
    config = OfflineConfig(algorithm=algorithm)
    row = OFFLINE_LOSSES[algorithm]
    logprobs = given.logprobs.clone().requires_grad_()
    start = dataclasses.replace(given, logprobs=logprobs)
    row.loss(start, config).backward()
    moved = dataclasses.replace(given, logprobs=logprobs.detach() - 1e-3 * logprobs.grad)
    assert row.margin(moved, config).sum() > row.margin(start, config).sum()
    assert float(row.loss(moved, config)) < float(row.loss(start, config))


def test_odds_are_exact_where_probabilities_are_near_0_and_1():
    from rlhf.algorithms.orpo import log_odds

    means = torch.tensor([-1e-4, -1.0, -40.0])
    expected = [math.log(math.exp(-1e-4) / -math.expm1(-1e-4)), math.log(math.exp(-1) / (1 - math.exp(-1))), -40.0]
    assert log_odds(means).tolist() == pytest.approx(expected, rel=1e-5)
    assert torch.isfinite(log_odds(torch.zeros(1))).all()


# ----------------------------------------------------------------------------------------------- configuration


def test_constants_that_are_unset_are_those_of_the_source():
    assert (
        {*OFFLINE_LOSSES, "kto"} == set(OFFLINE_CONSTANTS) == set(get_args(get_type_hints(OfflineConfig)["algorithm"]))
    )
    assert OfflineConfig(algorithm="simpo").of("beta") == 2.0 and OfflineConfig().of("beta") == 0.1
    assert OfflineConfig(algorithm="simpo", beta=1.5).of("beta") == 1.5


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"algorithm": "kahneman"}, "is not one of dpo, ipo, kto, rrhf, orpo, simpo"),
        (
            {"algorithm": "ipo", "label_smoothing": 0.1},
            "label_smoothing=0.1 is a constant of dpo, not of algorithm=ipo",
        ),
        ({"algorithm": "dpo", "target_margin": 1.0}, "target_margin=1.0 is a constant of simpo"),
        ({"beta": 0.0}, "beta=0.0 must be above 0"),
        ({"beta": -1.0}, "beta=-1.0 must be at least 0"),
        ({"label_smoothing": 0.5}, r"must lie in \[0, 0.5\)"),
        ({"keep_best": "gold"}, "keep_best=gold chooses between evaluations, and eval_every_steps=0 makes none"),
        ({"algorithm": "orpo", "reference": "live"}, "reference=live with algorithm=orpo, which has no reference"),
        ({"robust": True}, "robust=true with algorithm=dpo, label_smoothing=None"),
        ({"algorithm": "rrhf", "robust": True}, "robust=true with algorithm=rrhf"),
    ],
)
def test_constants_of_another_loss_are_refused(config, told):
    with pytest.raises(ConfigError, match=told):
        OfflineConfig(**config)


def test_of_several_best_responses_the_first_is_imitated():
    given = Candidates(
        torch.tensor([-2.0, -4.0, -6.0]), torch.zeros(3), torch.tensor([2, 2, 2]), torch.tensor([0, 0, 0]),
        torch.tensor([0, 0, 1]),
    )  # fmt: skip
    assert given.best.tolist() == [0] and float(given.imitation()) == 1.0
