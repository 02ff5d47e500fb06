"""Generation against transformers' own generate, exact distributions, and transformers' logit warpers."""

import itertools
import math

import pytest
import torch
import transformers

from rlhf.generation.continuous_batching import generate
from rlhf.generation.token_sampling import Sampling, filter_logits, row_uniforms, sample_tokens
from rlhf.types import PromptBatch
from tests.support.tiny_models import ARCHITECTURES

NEVER = 95
"""An embedding row that no tokenizer id uses; as eos it is as good as absent where a test wants full lengths."""


def load(path):
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def prompts_of(ids, mask, row_ids=None):
    return PromptBatch(ids, mask, torch.arange(len(ids)) if row_ids is None else torch.tensor(row_ids))


def tiny_vocabulary_model(tokens=6):
    torch.manual_seed(1)
    config = transformers.GPT2Config(vocab_size=tokens, n_embd=16, n_layer=1, n_head=2, n_positions=32)
    model = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0.0, 0.3)
    return model


# ------------------------------------------------------------------------------------- against transformers


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_greedy_equals_transformers_generate_on_ragged_left_padded_prompts(architecture, tiny_models, ragged):
    model = load(tiny_models[architecture])
    _, _, ids, mask = ragged
    greedy = Sampling(12, greedy=True)
    free = generate(model, prompts_of(ids, mask), greedy, eos_token_ids=[NEVER], pad_token_id=0)
    # a token that greedy decoding comes across early in one row and not in every row: now it ends responses
    eos = int(free.response_ids[0, 4])
    ours = generate(model, prompts_of(ids, mask), greedy, eos_token_ids=[eos], pad_token_id=0)
    theirs = model.generate(
        input_ids=ids, attention_mask=mask.long(), do_sample=False, max_new_tokens=12, eos_token_id=eos, pad_token_id=0
    )[:, ids.shape[1] :]
    assert torch.equal(ours.response_ids, theirs)
    assert len(set(map(tuple, theirs.tolist()))) > 1  # the rows do differ, so a mix-up of rows would show
    for row, row_mask in zip(theirs.tolist(), ours.response_mask.tolist(), strict=True):
        length = row.index(eos) + 1 if eos in row else len(row)
        assert row_mask == [index < length for index in range(len(row))]


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (1, 1.0), (4, 1.0), (50, 1.0), (0, 0.3), (0, 0.9), (5, 0.7)])
def test_filters_agree_with_the_warpers_of_transformers(top_k, top_p):
    logits = torch.randn(64, 20, generator=torch.Generator().manual_seed(0)) * 3
    expected = logits
    if top_k:
        expected = transformers.TopKLogitsWarper(top_k)(None, expected)
    if top_p < 1:
        expected = transformers.TopPLogitsWarper(top_p)(None, expected)
    assert torch.equal(filter_logits(logits, top_k=top_k, top_p=top_p), expected)


def test_the_nucleus_worked_by_hand():
    logits = torch.tensor([[0.1, 0.5, 0.25, 0.15]]).log()
    kept = {0.3: [1], 0.6: [1, 2], 0.8: [1, 2, 3], 0.95: [0, 1, 2, 3]}
    for top_p, tokens in kept.items():
        found = filter_logits(logits, top_k=0, top_p=top_p)[0]
        assert (found > -math.inf).nonzero().flatten().tolist() == tokens


# ----------------------------------------------------------------------------------- exact distributions


def chi_square_z(observed, expected):
    """How many standard deviations the chi-square statistic lies above its mean; rare cells are pooled."""
    rare = expected < 5
    if rare.any():
        observed = torch.cat([observed[~rare], observed[rare].sum().reshape(1)])
        expected = torch.cat([expected[~rare], expected[rare].sum().reshape(1)])
    freedom = len(expected) - 1
    return float(((observed - expected) ** 2 / expected.clamp(min=1e-9)).sum() - freedom) / math.sqrt(2 * freedom)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(2),
        Sampling(2, temperature=0.6),
        Sampling(2, top_k=3),
        Sampling(2, temperature=1.4, top_p=0.7),
        Sampling(2, vocabulary_size=4),
        Sampling(2, temperature=0.6, top_k=3, vocabulary_size=4),
    ],
)
def test_sampled_pairs_follow_the_exact_distribution(sampling):
    """All 6 x 6 continuations of a prompt have a known probability; 6000 samples are compared with them."""
    model, tokens, rows = tiny_vocabulary_model(), 6, 6000
    prompt = torch.tensor([[2, 4, 1]])
    rollout = generate(
        model,
        prompts_of(prompt.expand(rows, -1), torch.ones(rows, 3, dtype=torch.bool)),
        sampling,
        eos_token_ids=[NEVER],
        pad_token_id=0,
        seed=11,
    )
    with torch.no_grad():
        following = torch.cat([prompt.expand(tokens, -1), torch.arange(tokens).unsqueeze(1)], dim=1)
        logits = model(following).logits.double()[:, 2:] / sampling.temperature
    probabilities = [[exact_filtered(row, sampling) for row in rows_] for rows_ in logits]
    expected = torch.tensor(
        [
            float(probabilities[first][0][first] * probabilities[first][1][second])
            for first, second in itertools.product(range(tokens), repeat=2)
        ]
    )
    pairs = rollout.response_ids[:, 0] * tokens + rollout.response_ids[:, 1]
    observed = torch.bincount(pairs, minlength=tokens**2).double()
    assert observed[expected == 0].sum() == 0
    assert chi_square_z(observed, expected.double() * rows) < 4
    assert chi_square_z(observed, torch.full((36,), rows / 36).double()) > 20  # the test does tell distributions apart
    captured = rollout.logprobs.sum(1)
    torch.testing.assert_close(captured, expected[pairs].log(), atol=1e-4, rtol=0)


def exact_filtered(logits, sampling):
    """Probabilities [V] by sorting in plain Python."""
    ordered = sorted(range(len(logits))[: sampling.vocabulary_size], key=lambda token: -float(logits[token]))
    kept = ordered[: sampling.top_k] if sampling.top_k else ordered
    weights = {token: math.exp(float(logits[token])) for token in kept}
    total, nucleus, mass = sum(weights.values()), [], 0.0
    for token in kept:
        if mass < sampling.top_p:
            nucleus.append(token)
        mass += weights[token] / total
    total = sum(weights[token] for token in nucleus)
    return torch.tensor([weights[t] / total if t in nucleus else 0.0 for t in range(len(logits))]).double()


def test_a_token_is_the_inverse_of_the_cumulative_distribution():
    logprobs = torch.tensor([0.0, 0.25, 0.5, 0.25, 0.0]).log().expand(7, -1)
    uniforms = torch.tensor([0.0, 0.2499, 0.2501, 0.7499, 0.7501, 0.9999, 1.0], dtype=torch.float64)
    tokens, captured = sample_tokens(logprobs, Sampling(1), uniforms)
    assert tokens.tolist() == [1, 1, 2, 2, 3, 3, 3]  # never an impossible token, 0 or 4
    torch.testing.assert_close(captured, logprobs.gather(1, tokens[:, None])[:, 0])


@pytest.mark.parametrize("tokens", [5, 127, 128, 129, 300, 1024])
def test_sampling_searches_in_blocks_what_a_plain_search_finds(tokens):
    """Tokens without probability at either end and in the middle, some of them filling whole blocks."""
    generator = torch.Generator().manual_seed(tokens)
    logits = torch.randn(400, tokens, generator=generator, dtype=torch.float64) * 3
    for start, stop in ((0, tokens // 8), (tokens // 3, tokens // 2), (tokens - tokens // 6, tokens)):
        logits[:, start:stop] = -math.inf
    logprobs = logits.log_softmax(-1)
    uniforms = torch.rand(400, generator=generator, dtype=torch.float64)
    uniforms[:2] = torch.tensor([0.0, 1.0])
    found, _ = sample_tokens(logprobs, Sampling(1), uniforms)
    possible = (logits[0] > -math.inf).nonzero().flatten()
    assert found[:2].tolist() == [int(possible[0]), int(possible[-1])]
    for row in range(2, 400):
        masses = itertools.accumulate(logprobs[row].exp().tolist())
        assert int(found[row]) == next(token for token, mass in enumerate(masses) if mass > uniforms[row])


# ------------------------------------------------------------------------------------------- row streams


def sample_rows(model, ids, mask, row_ids, *, seed=3, iteration=1):
    sampling = Sampling(8)
    rollout = generate(
        model,
        prompts_of(ids, mask, row_ids),
        sampling,
        eos_token_ids=[7],
        pad_token_id=0,
        seed=seed,
        iteration=iteration,
    )
    return [ids[mask].tolist() for ids, mask in zip(rollout.response_ids, rollout.response_mask, strict=True)]


@pytest.mark.parametrize("architecture", ["gpt2", "gpt_neox"])
def test_a_rows_response_does_not_depend_on_the_rows_beside_it(architecture, tiny_models, ragged):
    model = load(tiny_models[architecture])
    _, _, ids, mask = ragged
    together = sample_rows(model, ids, mask, [10, 11, 12, 13])
    shuffled = [2, 0, 3, 1]
    again = sample_rows(model, ids[shuffled], mask[shuffled], [10 + index for index in shuffled])
    assert [again[shuffled.index(row)] for row in range(4)] == together
    for row in range(4):
        width = int(mask[row].sum())
        alone = sample_rows(model, ids[row : row + 1, -width:], mask[row : row + 1, -width:], [10 + row])
        assert alone == [together[row]]


def test_one_prompt_in_several_rows_iterations_and_seeds_is_answered_differently(tiny_models, ragged):
    model = load(tiny_models["gpt_neox"])
    _, _, ids, mask = ragged
    ids, mask = ids[:1].expand(4, -1), mask[:1].expand(4, -1)
    first = sample_rows(model, ids, mask, [0, 1, 2, 3])
    assert len(set(map(tuple, first))) == 4
    assert sample_rows(model, ids, mask, [0, 1, 2, 3]) == first
    for other in ({"seed": 4}, {"iteration": 2}):
        assert not set(map(tuple, sample_rows(model, ids, mask, [0, 1, 2, 3], **other))) & set(map(tuple, first))


def test_streams_are_uniform_and_uncorrelated_between_neighbouring_keys():
    streams = row_uniforms(0, 1, range(200), 100)
    assert ((streams >= 0) & (streams < 1)).all()
    assert abs(float(streams.mean()) - 0.5) < 4 * math.sqrt(1 / 12 / streams.numel())
    for neighbour in (row_uniforms(0, 2, range(200), 100), row_uniforms(1, 1, range(200), 100), streams.roll(1, 0)):
        correlation = torch.corrcoef(torch.stack([streams.flatten(), neighbour.flatten()]))[0, 1]
        assert abs(float(correlation)) < 4 / math.sqrt(streams.numel())


@pytest.mark.parametrize("iteration", [1, 2**31, 2**32 - 1])
@pytest.mark.parametrize("seed", [0, 2**63 + 1, -1])
def test_rows_have_streams_of_their_own_also_for_the_largest_keys(seed, iteration):
    """The evaluation is iteration 2**32 - 1; keys that numpy reads as floating point would lose the row."""
    streams = row_uniforms(seed, iteration, [0, 1, 2, 500], 4)
    assert len(set(map(tuple, streams.tolist()))) == 4
    assert not torch.equal(streams, row_uniforms(seed + 1, iteration, [0, 1, 2, 500], 4))
    assert not torch.equal(streams, row_uniforms(seed, iteration - 1, [0, 1, 2, 500], 4))


def test_a_stream_is_the_same_however_many_steps_are_drawn():
    assert torch.equal(row_uniforms(5, 2, [3, 4], 10)[:, :4], row_uniforms(5, 2, [3, 4], 4))


# ------------------------------------------------------------------------------------------------- shapes


def test_generation_stops_when_every_row_has_ended_and_pads_behind_eos(tiny_models, ragged):
    model = load(tiny_models["llama"])
    _, _, ids, mask = ragged
    free = generate(model, prompts_of(ids, mask), Sampling(6, greedy=True), eos_token_ids=[NEVER], pad_token_id=0)
    ends = free.response_ids[:, 1].unique().tolist()  # whatever each row says second ends it, at the latest
    rollout = generate(model, prompts_of(ids, mask), Sampling(6, greedy=True), eos_token_ids=ends, pad_token_id=93)
    assert rollout.response_ids.shape[1] == 2
    padding = ~rollout.response_mask
    assert (rollout.response_ids[padding] == 93).all() and (rollout.logprobs[padding] == 0).all()
    last = rollout.response_ids.gather(1, rollout.response_mask.sum(1, keepdim=True) - 1).flatten()
    assert set(last.tolist()) <= set(ends)
    assert (rollout.logprobs[rollout.response_mask] < 0).all()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"temperature": 0.0}, "temperature=0.0 must be above 0.*greedy=True"),
        ({"top_k": -1}, "top_k=-1"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"top_p": 1.1}, "top_p=1.1"),
        ({"vocabulary_size": 0}, "vocabulary_size=0"),
    ],
)
def test_sampling_that_cannot_be_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**{"max_new_tokens": 4, **wrong})
