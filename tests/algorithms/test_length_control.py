"""Weights that balance lengths, ODIN's losses and cross-prompt pairs against tables worked by hand and plain loops."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import pytest
import torch

import rlhf.algorithms.odin
from rlhf.algorithms.config import RewardConfig
from rlhf.algorithms.cross_prompt import cross_prompt_pairs
from rlhf.algorithms.odin import LengthPull, length_loss, orthogonality_loss, pearson
from rlhf.algorithms.ranking_losses import LengthBalance, ranking_loss
from rlhf.config import ConfigError
from rlhf.types import TokenizedRanking, TokenizedResponse

# ------------------------------------------------------------------------------------------------------ balance


def test_balanced_weights_worked_by_hand():
    """One bucket: 3 pairs of the longer one chosen, 1 of the shorter one; a pair of equal length is left alone."""
    balance = LengthBalance.of(torch.tensor([2, 2, 2, -2, 0]), torch.ones(5))
    assert balance.counts == ((3, 1),) and balance.equal == 1
    weights = balance.weights(torch.tensor([2, 2, 2, -2, 0]))
    assert weights.tolist() == pytest.approx([4 / 6, 4 / 6, 4 / 6, 4 / 2, 1.0])
    assert balance.weights(torch.tensor([900, -900])).tolist() == pytest.approx([4 / 6, 2.0]), "beyond what was seen"


def made_up_pairs(share_longer, seed=0, pairs=400):
    generator = torch.Generator().manual_seed(seed)
    size = torch.randint(0, 60, (pairs,), generator=generator)
    longer = torch.rand(pairs, generator=generator) < share_longer
    return torch.where(longer, size, -size), torch.rand(pairs, generator=generator).double() + 0.1


@pytest.mark.parametrize("share_longer", [0.1, 0.5, 0.8, 0.97])
def test_in_every_bucket_both_sides_have_half_of_what_the_bucket_had(share_longer):
    differences, shares = made_up_pairs(share_longer)
    balance = LengthBalance.of(differences, shares)
    weighted = balance.weights(differences).double() * shares
    start = 0.0
    for edge, counts in zip(balance.edges, balance.counts, strict=True):
        inside = (differences.abs() > start) & (differences.abs() <= edge)
        sides = [float(weighted[inside & (differences.sign() == sign)].sum()) for sign in (1, -1)]
        assert sides[0] == pytest.approx(sides[1], rel=1e-5)
        assert sum(sides) == pytest.approx(float(shares[inside].sum()), rel=1e-5)
        assert counts == tuple(int((inside & (differences.sign() == sign)).sum()) for sign in (1, -1))
        start = edge
    assert sum(map(sum, balance.counts)) + balance.equal == len(differences), "no pair is left out"
    assert (len(balance.edges) > 3) == (share_longer != 0.97)
    assert min(*balance.longer, *balance.shorter) > 0
    assert max(*balance.longer, *balance.shorter) <= 10 or len(balance.edges) == 1


def test_a_bucket_that_lacks_a_side_is_joined_to_its_neighbour():
    """Small differences have the longer one chosen only, and so have the largest."""
    differences = torch.tensor([1] * 30 + [5, -5] * 30 + [9] * 30)
    balance = LengthBalance.of(differences, torch.ones(120))
    assert balance.counts == ((90, 30),) and balance.edges == (math.inf,)


def test_what_was_counted_is_told():
    lines = LengthBalance.of(torch.tensor([3] * 30 + [-3] * 10 + [20] * 10 + [-20] * 30 + [0]), torch.ones(81)).lines()
    assert lines[0].startswith("length_control=balance: 80 pairs differ in length and 1 do not; the longer response is")
    assert "chosen in 40 and the shorter one in 40; weighted they tell as much as 60 pairs" in lines[0]
    assert lines[1:] == [
        "  1 to 3 tokens apart: 30 longer x 0.67, 10 shorter x 2.00",
        "  4 to more tokens apart: 10 longer x 2.00, 30 shorter x 0.67",
    ]


@pytest.mark.parametrize(("sign", "side"), [(1, "longer"), (-1, "shorter")])
def test_one_side_alone_cannot_be_balanced(sign, side):
    with pytest.raises(ConfigError, match=f"the {side} response is the chosen one in all 3 pairs that differ"):
        LengthBalance.of(sign * torch.tensor([0, 4, 5, 6]), torch.ones(4))


def test_pairs_of_equal_length_alone_are_nothing_to_balance():
    with pytest.raises(ConfigError, match="all 3 training pairs are of equal length"):
        LengthBalance.of(torch.zeros(3, dtype=torch.long), torch.ones(3))


def test_weights_of_pairs_in_the_loss_of_rankings_against_a_double_loop():
    generator = torch.Generator().manual_seed(2)
    groups, ranks = torch.tensor([0, 0, 0, 1, 1]), torch.tensor([2, 0, 1, 0, 1])
    scores = torch.randn(5, generator=generator)
    pairs = [(i, j) for i, j in itertools.product(range(5), range(5)) if groups[i] == groups[j] and ranks[i] < ranks[j]]
    weights = torch.rand(len(pairs), generator=generator)
    expected = sum(
        float(weight) * math.log1p(math.exp(float(scores[j] - scores[i]))) / (3 if groups[i] == 0 else 1)
        for (i, j), weight in zip(pairs, weights, strict=True)
    )
    found = ranking_loss(scores, groups, ranks, torch.zeros(5), weights=weights)
    assert found.item() == pytest.approx(expected, rel=1e-5)


# --------------------------------------------------------------------------------------------------------- odin


def test_pearson_and_its_edges():
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(2, 30, generator=generator)
    assert pearson(first, second).item() == pytest.approx(
        torch.corrcoef(torch.stack([first, second]))[0, 1].item(), abs=1e-6
    )
    constant = torch.ones(4, requires_grad=True)
    value = pearson(constant, torch.arange(4.0))
    value.backward()
    assert value.item() == 0.0 and constant.grad.isfinite().all()


def test_the_length_loss_worked_by_hand():
    """rho of (1, 2, 3) with lengths (10, 20, 30) is 1, that of (1, 3, 2) is 0.5, whatever the quality head's sign."""
    tokens = torch.tensor([10.0, 20.0, 30.0])
    quality, length = torch.tensor([1.0, 3.0, 2.0]), torch.tensor([1.0, 2.0, 3.0])
    assert length_loss(quality, length, tokens).item() == pytest.approx(0.5 - 1.0)
    assert length_loss(-quality, length, tokens).item() == pytest.approx(0.5 - 1.0)
    assert length_loss(quality, -length, tokens).item() == pytest.approx(0.5 + 1.0)


def test_the_orthogonality_loss_is_the_size_of_a_cosine():
    rows = torch.nn.functional.normalize(torch.tensor([[3.0, 4.0], [-4.0, -3.0]]), dim=1)
    assert orthogonality_loss(rows).item() == pytest.approx(24 / 25)
    assert orthogonality_loss(torch.eye(2)).item() == 0.0


def test_the_pull_of_micro_batches_is_the_gradient_of_the_global_batch():
    generator = torch.Generator().manual_seed(5)
    heads = torch.randn(2, 9, generator=generator, dtype=torch.float64, requires_grad=True)
    tokens = torch.randint(3, 40, (9,), generator=generator)
    whole = length_loss(heads[0], heads[1], tokens.double())
    (expected,) = torch.autograd.grad(whole, heads)
    pull = LengthPull.of(*heads.detach(), tokens)
    assert pull.value.item() == pytest.approx(whole.item())
    places, start = [4, 2, 3], 0
    for part, rows in zip(pull.split(places), places, strict=True):
        surrogate = part.surrogate(*heads[:, start : start + rows])
        assert surrogate.item() == 0.0
        surrogate.backward()
        start += rows
    torch.testing.assert_close(heads.grad, expected)


def test_the_pull_of_a_rank_is_that_of_its_own_rows(monkeypatch):
    generator = torch.Generator().manual_seed(6)
    rows = torch.randn(7, 3, generator=generator, dtype=torch.float64)
    whole = LengthPull.of(*rows.T)
    monkeypatch.setattr(
        rlhf.algorithms.odin, "all_gather_rows", lambda mine: torch.tensor([4, 3]) if mine.dim() == 1 else rows
    )
    monkeypatch.setattr(rlhf.algorithms.odin, "rank", lambda: 1)
    second = LengthPull.of(*rows[4:].T)
    torch.testing.assert_close(second.gradient, whole.gradient[4:])
    assert second.value == whole.value and second.correlations == whole.correlations


# ------------------------------------------------------------------------------------------------- cross-prompt


def rankings(count=30, size=2):
    def response(index, place):
        return TokenizedResponse(f"r{index}", (index, 1000, *range(10 * index + 100, 10 * index + 101 + place)), 2, "c")

    return [
        TokenizedRanking(
            f"r{i}", tuple(response(i, place) for place in range(size)), tuple(range(size)), 0.5, f"c{i % 3}"
        )
        for i in range(count)
    ]


@pytest.mark.parametrize(("share", "count"), [(0.0, 0), (0.5, 15), (1.0, 30), (2.0, 60)])
def test_cross_prompt_pairs_have_a_response_of_their_own_and_one_of_another_prompt(share, count):
    rows = rankings()
    made = cross_prompt_pairs(rows, share, seed=3)
    assert len(made) == count
    own = {row.id: {each.input_ids for each in row.candidates} for row in rows}
    places = Counter()
    for pair in made:
        mine, other = pair.id.split("+")
        assert mine != other and pair.ranks == (0, 1) and pair.margin == 0.0
        first, second = pair.candidates
        assert first.input_ids in own[mine] and second.input_ids[:2] == first.input_ids[:2]
        assert second.prompt_tokens == 2
        assert (int(other[1:]), 1000, *second.input_ids[2:]) in own[other]
        assert pair.category == second.category == next(row.category for row in rows if row.id == mine)
        places[len(first.input_ids), len(second.input_ids)] += 1
    turns = Counter(pair.id.split("+")[0] for pair in made)
    assert set(turns.values()) <= {math.ceil(share)}, "each ranking comes once before any comes again"
    if share == 2.0:
        assert len(places) == 4, "the chosen and the rejected response of either"


def test_cross_prompt_pairs_are_drawn_by_seed_and_from_rankings_too():
    rows = rankings(size=4)
    assert cross_prompt_pairs(rows, 1.0, seed=3) == cross_prompt_pairs(rows, 1.0, seed=3)
    assert cross_prompt_pairs(rows, 1.0, seed=3) != cross_prompt_pairs(rows, 1.0, seed=4)


def test_cross_prompt_pairs_need_other_prompts_and_other_responses():
    one = rankings(1) * 5
    with pytest.raises(ConfigError, match="responses to more than one prompt"):
        cross_prompt_pairs(one, 1.0, seed=1)
    same = [
        TokenizedRanking(str(i), (TokenizedResponse("", (i, 7), 1), TokenizedResponse("", (i, 7), 1)), (0, 1))
        for i in range(5)
    ]
    with pytest.raises(ConfigError, match="prompts that have other responses"):
        cross_prompt_pairs(same, 1.0, seed=1)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("odin_length_coef", -1.0),
        ("odin_orthogonality_coef", -0.1),
        ("cross_prompt_share", -1.0),
        ("length_curve_span", 0.0),
        ("length_curve_span", 1.1),
    ],
)
def test_numbers_that_mean_nothing_are_refused(field, value):
    with pytest.raises(ConfigError, match=f"{field}={value}"):
        RewardConfig(**{field: value})
