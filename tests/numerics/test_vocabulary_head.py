"""The vocabulary head in pieces against autograd in float64."""

import pytest
import torch

import rlhf.numerics.vocabulary_head
from rlhf.numerics.vocabulary_head import linear_logprobs


@pytest.mark.parametrize("vocabulary_size", [None, 1, 8, 11, 20])
@pytest.mark.parametrize("rows", [1, 4, 7, 100])
@pytest.mark.parametrize("bias", [False, True])
def test_head_against_autograd_in_float64(rows, bias, vocabulary_size, monkeypatch):
    """`rows` at a time of 7, over a vocabulary of 11 rows of which some may be spare."""
    size = min(vocabulary_size or 11, 11)
    monkeypatch.setattr(rlhf.numerics.vocabulary_head, "PIECE_ELEMENTS", rows * size + size - 1)
    generator = torch.Generator().manual_seed(0)
    hidden, weight, offset = (torch.randn(*shape, generator=generator) for shape in ((7, 6), (11, 6), (11,)))
    targets = torch.randint(0, size, (7,), generator=generator)
    up, up_entropy = torch.randn(7, generator=generator), torch.randn(7, generator=generator)
    results = []
    for ours in (True, False):
        leaves = [item.clone().to(torch.float32 if ours else torch.float64) for item in (hidden, weight, offset)]
        for leaf in leaves:
            leaf.requires_grad_(True)
        arguments = (leaves[0], leaves[1], leaves[2] if bias else None)
        if ours:
            found = linear_logprobs(
                *arguments, targets, temperature=0.6, with_entropy=True, vocabulary_size=vocabulary_size
            )
        else:
            logits = torch.nn.functional.linear(*arguments)[:, :size] / 0.6
            logprobs = logits.log_softmax(-1)
            found = logprobs.gather(1, targets[:, None])[:, 0], -(logprobs.exp() * logprobs).sum(-1)
        (found[0] * up.to(found[0]) + found[1] * up_entropy.to(found[1])).sum().backward()
        results.append([*found, *(leaf.grad for leaf in leaves if leaf.grad is not None)])
    assert len(results[0]) == len(results[1]) == (5 if bias else 4)
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours.double(), expected, atol=1e-5, rtol=1e-5)
    for gradient in results[0][3:]:
        assert not gradient[size:].any()  # exactly 0, also where other rows' gradients are


@pytest.mark.parametrize("vocabulary_size", [None, 8])
def test_probabilities_of_the_real_ids_sum_to_1(vocabulary_size):
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(3, 6, generator=generator), torch.randn(11, 6, generator=generator)
    every = [torch.full((3,), token) for token in range(vocabulary_size or 11)]
    found = [linear_logprobs(hidden, weight, None, token, vocabulary_size=vocabulary_size)[0] for token in every]
    torch.testing.assert_close(torch.stack(found).exp().sum(0), torch.ones(3))


@pytest.mark.parametrize("rows", [1, 2])
def test_entropy_where_probabilities_underflow(rows, monkeypatch):
    """exp(-300) is 0 in float32 and its logarithm minus infinity: such a token has no part in entropy or gradient."""
    monkeypatch.setattr(rlhf.numerics.vocabulary_head, "PIECE_ELEMENTS", 4 * rows)
    hidden = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    weight = torch.tensor([[0.0, 3.0], [-1.0, 2.0], [-300.0, 0.0], [-100.0, -400.0]])
    results = []
    for dtype in (torch.float32, torch.float64):
        leaves = [item.clone().to(dtype).requires_grad_() for item in (hidden, weight)]
        if dtype == torch.float32:
            found = linear_logprobs(leaves[0], leaves[1], None, torch.tensor([1, 0]), with_entropy=True)
        else:
            logprobs = (leaves[0] @ leaves[1].T).log_softmax(-1)
            found = logprobs[torch.arange(2), torch.tensor([1, 0])], -(logprobs.exp() * logprobs).sum(-1)
        (found[0].sum() + 3 * found[1].sum()).backward()
        results.append([*found, *(leaf.grad for leaf in leaves)])
    assert results[1][1].min() > 0.5  # the entropy of two tokens that do count
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours.double(), expected, atol=1e-5, rtol=1e-5)


def test_head_without_entropy_and_with_a_frozen_weight():
    torch.manual_seed(0)
    hidden, weight = torch.randn(5, 4, requires_grad=True), torch.randn(9, 4)
    targets = torch.tensor([0, 8, 3, 3, 1])
    logprobs, entropies = linear_logprobs(hidden, weight, None, targets)
    assert entropies.tolist() == [0.0] * 5
    (logprobs * torch.arange(5.0)).sum().backward()
    expected = hidden.detach().clone().requires_grad_(True)
    ((expected @ weight.T).log_softmax(-1)[torch.arange(5), targets] * torch.arange(5.0)).sum().backward()
    torch.testing.assert_close(hidden.grad, expected.grad)
    assert weight.grad is None


def test_head_of_bfloat16_normalises_in_float32():
    torch.manual_seed(0)
    hidden, weight = torch.randn(3, 8).bfloat16(), torch.randn(500, 8).bfloat16()
    targets = torch.tensor([3, 499, 100])
    logprobs, _ = linear_logprobs(hidden, weight, None, targets)
    expected = (hidden @ weight.T).double().log_softmax(-1)[torch.arange(3), targets]
    assert logprobs.dtype == torch.float32
    torch.testing.assert_close(logprobs.double(), expected, atol=1e-5, rtol=1e-5)


def test_sums_of_many_pieces_keep_their_digits_in_16_bits(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(2000, 16, generator=generator), torch.randn(50, 16, generator=generator)
    values, targets = (
        (hidden, weight, torch.randn(50, generator=generator)),
        torch.randint(0, 50, (2000,), generator=generator),
    )
    exact = [value.bfloat16().double().requires_grad_() for value in values]
    logits = exact[0] @ exact[1].T + exact[2]
    logits.log_softmax(-1).gather(1, targets[:, None]).sum().backward()
    errors = []
    for rows in (2000, 20):
        leaves = [value.bfloat16().requires_grad_() for value in values]
        monkeypatch.setattr(rlhf.numerics.vocabulary_head, "PIECE_ELEMENTS", rows * 50)
        linear_logprobs(*leaves, targets)[0].sum().backward()
        errors.append([
            float((leaf.grad.double() - other.grad).norm() / other.grad.norm())
            for leaf, other in zip(leaves[1:], exact[1:], strict=True)
        ])  # fmt: skip
    for whole, in_pieces in zip(*errors, strict=True):  # of the weight, of the bias
        assert in_pieces < 1.5 * whole < 0.02
