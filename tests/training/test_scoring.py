"""Scoring of rollouts against one plain forward per unpadded row."""

import dataclasses

import pytest
import torch
import transformers

from rlhf.generation.token_sampling import Sampling
from rlhf.models.forward import forward_logits
from rlhf.models.scalar import ScalarModel
from rlhf.models.token_logprobs import PLAIN_HEADS
from rlhf.rewards.reward_model import same_tokenizer
from rlhf.training.scoring import label_loss, response_logprobs, response_logprobs_and_entropy, response_values
from rlhf.types import Rollout, TokenBatch
from tests.support.on_policy import responses_to, reward_of
from tests.support.tiny_models import ROWS

PROMPTS = ([5, 9, 3], [7], [4, 4, 8, 2, 6])
RESPONSES = ([11, 12, 13, 0], [14], [15, 16, 0])


def rollout_of(prompts=PROMPTS, responses=RESPONSES, *, more_left=0, more_right=0, pad=0):
    """A rollout whose padding is `pad`, with so many columns of nothing but padding added on either side."""
    rows, width, length = len(prompts), max(map(len, prompts)) + more_left, max(map(len, responses)) + more_right
    prompt_ids, response_ids = torch.full((rows, width), pad), torch.full((rows, length), pad)
    prompt_mask = torch.zeros(rows, width, dtype=torch.bool)
    response_mask = torch.zeros(rows, length, dtype=torch.bool)
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        prompt_ids[row, width - len(prompt) :] = torch.tensor(prompt)
        prompt_mask[row, width - len(prompt) :] = True
        response_ids[row, : len(response)] = torch.tensor(response)
        response_mask[row, : len(response)] = True
    return Rollout(prompt_ids, prompt_mask, response_ids, response_mask, torch.zeros(rows, length))


def load(path):
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def tiny_bloom():
    torch.manual_seed(2)
    config = transformers.BloomConfig(vocab_size=ROWS, hidden_size=16, n_layer=2, n_head=2, pad_token_id=0)
    return transformers.BloomForCausalLM(config).eval()


@pytest.fixture(scope="module")
def critic(tiny_models):
    return ScalarModel.from_base(tiny_models["gpt_neox"], dtype=torch.float32, seed=3).eval()


@pytest.fixture
def fresh_critic(tiny_models):
    return ScalarModel.from_base(tiny_models["gpt2"], dtype=torch.float32, seed=3).eval()


@torch.no_grad()
@pytest.mark.parametrize("vocabulary_size", [None, 17, ROWS + 5])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("architecture", ["gpt_neox", "bloom"])  # whose head is known to be plain, and not
def test_logprobs_and_entropies_of_each_row_alone_in_float64(tiny_models, architecture, temperature, vocabulary_size):
    model = load(tiny_models[architecture]) if architecture in tiny_models else tiny_bloom()
    assert (architecture in PLAIN_HEADS) == (architecture == "gpt_neox")
    rollout = rollout_of(more_left=2, more_right=1)
    sampling = Sampling(1, temperature=temperature, vocabulary_size=vocabulary_size)
    logprobs, entropies = response_logprobs_and_entropy(model, rollout, sampling)
    assert torch.equal(logprobs, response_logprobs(model, rollout, sampling))
    assert logprobs.dtype == entropies.dtype == torch.float32
    for row, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        logits = model(torch.tensor([prompt + response])).logits[0].double()
        distributions = (logits[:, :vocabulary_size] / temperature).softmax(-1)
        for t, token in enumerate(response):
            distribution = distributions[len(prompt) - 1 + t]
            assert logprobs[row, t].item() == pytest.approx(distribution[token].log().item(), abs=1e-4)
            entropy = -(distribution * distribution.log()).sum().item()
            assert entropies[row, t].item() == pytest.approx(entropy, abs=1e-4)


def test_label_loss_agrees_with_transformers():
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=13, n_embd=8, n_layer=1, n_head=2, n_positions=16)
    model = transformers.GPT2LMHeadModel(config).eval()
    ids = torch.randint(0, 13, (2, 7))
    labels = ids.clone()
    labels[0, :3] = -100
    labels[1, 5:] = -100  # the label of a row's first token has no prediction before it and does not count
    output = model(input_ids=ids, labels=labels)
    counted = (labels[:, 1:] != -100).sum()
    batch = TokenBatch(input_ids=ids, attention_mask=torch.ones_like(ids, dtype=torch.bool), labels=labels)
    torch.testing.assert_close(label_loss(model, batch) / counted, output.loss)


@torch.no_grad()
def test_limiting_the_head_to_the_response_changes_no_logit(tiny_models):
    for architecture in ("gpt2", "opt"):  # with and without `logits_to_keep`, whichever this release has
        model = load(tiny_models[architecture])
        rollout = rollout_of()
        ids, mask = rollout.sequences()
        position_ids = (mask.long().cumsum(1) - 1).clamp(min=0)
        everything = model(input_ids=ids, attention_mask=mask.long(), position_ids=position_ids).logits
        prompt_tokens = rollout.prompt_ids.shape[1]
        last = forward_logits(model, ids, mask, last=rollout.response_ids.shape[1] + 1)[:, :-1]
        torch.testing.assert_close(last, everything[:, prompt_tokens - 1 : -1])


@torch.no_grad()
def test_values_are_of_the_state_before_each_response_token(critic):
    rollout = rollout_of(more_left=1, more_right=2)
    values = response_values(critic, rollout)
    assert values.shape == rollout.response_ids.shape and values.dtype == torch.float32
    for row, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        for t in range(len(response)):
            before = torch.tensor([prompt + response[:t]])  # the response token itself is not seen
            alone = critic(before, torch.ones_like(before))[0, -1]
            assert values[row, t].item() == pytest.approx(alone.item(), abs=1e-5)


def test_sequences_are_prompt_then_response():
    rollout = rollout_of(((1, 2), (3,)), ((4,), (5, 6)), pad=9)
    ids, mask = rollout.sequences()
    assert ids.tolist() == [[1, 2, 4, 9], [9, 3, 5, 6]]
    assert mask.tolist() == [[True, True, True, False], [False, True, True, True]]


def test_trim_undoes_columns_of_padding_and_nothing_else():
    plain = rollout_of()
    small, columns = rollout_of(more_left=3, more_right=2).trimmed()
    assert columns == slice(0, 4)
    for item in dataclasses.fields(Rollout):
        assert torch.equal(getattr(small, item.name), getattr(plain, item.name)), item.name


def test_widened_pads_ids_with_pad_and_the_rest_with_nothing():
    wide = rollout_of(pad=1).widened(6, pad_token_id=1)
    assert wide.response_ids[1].tolist() == [14, 1, 1, 1, 1, 1]
    assert wide.response_mask.sum(1).tolist() == [4, 1, 3]
    assert wide.logprobs.shape == (3, 6) and not wide.logprobs.any()
    assert torch.equal(wide.prompt_ids, rollout_of(pad=1).prompt_ids)


@torch.no_grad()
def test_scorer_gives_the_value_at_each_rows_last_token(fresh_critic, tokenizer):
    rollout = rollout_of(more_left=1, more_right=2)
    scores = reward_of(fresh_critic, tokenizer).score(responses_to(rollout, tokenizer)).scores
    assert scores.dtype == torch.float32
    for row, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        ids = torch.tensor([prompt + response])
        raw = fresh_critic(ids, torch.ones_like(ids))[0, -1].item()
        assert scores[row].item() == pytest.approx(raw, abs=1e-4)


def test_same_tokenizer_tells_tokenizers_apart(tokenizer):
    import copy

    other = copy.deepcopy(tokenizer)
    assert same_tokenizer(tokenizer, other)
    other.eos_token = "a"
    assert not same_tokenizer(tokenizer, other)
    longer = copy.deepcopy(tokenizer)
    longer.add_tokens(["ab"])
    assert not same_tokenizer(tokenizer, longer)
