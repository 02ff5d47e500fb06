"""Every generation backend against `generate` of transformers and a fresh forward: a new one is a row of BACKENDS."""

import pytest
import torch
import transformers

from rlhf.config import ConfigError
from rlhf.engine import BatchPlan
from rlhf.generation.backend import BACKENDS, make_backend
from rlhf.generation.token_sampling import Sampling
from rlhf.models.forward import forward_logits
from rlhf.training.scoring import response_logprobs
from rlhf.types import PromptBatch
from tests.support.local_engine import LocalEngine

NEVER = 95
ROWS, NEW_TOKENS = 7, 12


@pytest.fixture(params=["gpt_neox", "llama", "gpt2"])
def model(request, tiny_models):
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_models[request.param], dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    return model


def prompts(rows=ROWS):
    lengths = torch.tensor([4, 9, 1, 6, 9, 2, 3])[:rows]
    ids = torch.randint(1, 90, (rows, 9), generator=torch.Generator().manual_seed(3))
    mask = torch.arange(9) >= 9 - lengths.unsqueeze(1)
    return PromptBatch(ids * mask, mask, torch.arange(rows) + 20)


def made(name, model, *, eos_ids=(NEVER,), seed=4, slots=0):
    engine = LocalEngine(model, BatchPlan(1, 1, 1))
    return make_backend(name, engine, eos_ids=eos_ids, pad_token_id=0, seed=seed, slots=slots)


def responses(rollout):
    return [ids[mask].tolist() for ids, mask in zip(rollout.response_ids, rollout.response_mask, strict=True)]


@pytest.mark.parametrize("slots", [0, 3])
@pytest.mark.parametrize("name", BACKENDS)
def test_greedy_tokens_are_those_of_transformers(name, model, slots):
    """Rows that end at different times, one of two ends each, and rows that never do."""
    batch = prompts()
    theirs = model.generate(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask.long(), do_sample=False, pad_token_id=0,
        max_new_tokens=NEW_TOKENS,
    )[:, 9:].tolist()  # fmt: skip
    eos_ids = [theirs[0][3], theirs[3][6]]
    ends = [next((step + 1 for step, token in enumerate(row) if token in eos_ids), NEW_TOKENS) for row in theirs]
    assert len(set(ends)) > 2 and len(set(map(tuple, theirs))) > 3
    backend = made(name, model, eos_ids=eos_ids, slots=slots)
    backend.sync()
    rollout = backend.generate(batch, Sampling(NEW_TOKENS, greedy=True), iteration=1)
    assert responses(rollout) == [row[:end] for row, end in zip(theirs, ends, strict=True)]
    assert (rollout.response_ids[~rollout.response_mask] == 0).all()
    assert torch.equal(rollout.prompt_ids, batch.input_ids) and torch.equal(rollout.prompt_mask, batch.attention_mask)
    assert rollout.response_ids.shape == rollout.logprobs.shape == (ROWS, max(ends))


@pytest.mark.parametrize("name", BACKENDS)
def test_seed_iteration_and_row_choose_the_sample_and_the_process_does_not(name, model):
    def sampled(batch, seed=4, iteration=1):
        return responses(made(name, model, seed=seed).generate(batch, Sampling(NEW_TOKENS), iteration=iteration))

    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first = sampled(prompts())
    assert torch.equal(torch.random.get_rng_state(), before)  # the process's own stream is as it was
    torch.rand(3)
    assert sampled(prompts()) == first and len(set(map(tuple, first))) == ROWS
    assert sampled(prompts(), seed=5) != first and sampled(prompts(), iteration=2) != first
    same = PromptBatch(prompts().input_ids, prompts().attention_mask, torch.arange(ROWS) + 40)
    assert sampled(same) != first


@pytest.mark.parametrize("name", BACKENDS)
def test_neighbouring_seeds_iterations_and_rows_share_no_sample(name, model):
    batch = prompts(1)
    places = [(seed, iteration, row) for seed in (4, 5) for iteration in (1, 2) for row in (20, 21)]
    drawn = []
    for seed, iteration, row in places:
        one = PromptBatch(batch.input_ids, batch.attention_mask, torch.tensor([row]))
        drawn += responses(made(name, model, seed=seed).generate(one, Sampling(NEW_TOKENS), iteration=iteration))
    assert len(set(map(tuple, drawn))) == len(places)


@pytest.mark.parametrize("name", BACKENDS)
def test_filters_reach_the_backend(name, model):
    greedy = made(name, model).generate(prompts(), Sampling(NEW_TOKENS, greedy=True), iteration=1)
    for sampling in (Sampling(NEW_TOKENS, top_k=1), Sampling(NEW_TOKENS, top_p=1e-6)):
        found = made(name, model).generate(prompts(), sampling, iteration=1)
        assert torch.equal(found.response_ids, greedy.response_ids)


@pytest.mark.parametrize("name", BACKENDS)
def test_an_update_of_the_actor_is_heard(name, model):
    backend = made(name, model)
    before = backend.generate(prompts(), Sampling(NEW_TOKENS, greedy=True), iteration=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.7)
    backend.sync()
    after = backend.generate(prompts(), Sampling(NEW_TOKENS, greedy=True), iteration=2)
    fresh = made(name, model).generate(prompts(), Sampling(NEW_TOKENS, greedy=True), iteration=2)
    assert responses(after) == responses(fresh) != responses(before)


# --------------------------------------------------------------------- rows of the embedding without a token


SPARE = 20
"""From this id on the tokenizer is said to have no token: most of what these models would say."""


@pytest.mark.parametrize("name", BACKENDS)
def test_ids_without_a_token_are_never_sampled(name, model):
    backend = made(name, model, slots=4)
    drawn = []
    for iteration in range(12):
        found = backend.generate(prompts(), Sampling(NEW_TOKENS, vocabulary_size=SPARE), iteration=iteration)
        drawn += found.response_ids.flatten().tolist()
    free = backend.generate(prompts(), Sampling(NEW_TOKENS), iteration=1).response_ids
    assert len(drawn) >= 1000 and set(drawn) <= set(range(SPARE)) and len(set(drawn)) > SPARE / 2
    assert (free >= SPARE).float().mean() > 0.4  # without a limit they are, also after one
    batch = prompts()
    expected = model.generate(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask.long(), do_sample=False, pad_token_id=0,
        max_new_tokens=NEW_TOKENS, suppress_tokens=list(range(SPARE, 96)),
    )[:, 9:]  # fmt: skip
    greedy = made(name, model).generate(batch, Sampling(NEW_TOKENS, greedy=True, vocabulary_size=SPARE), iteration=1)
    assert torch.equal(greedy.response_ids, expected)


@torch.no_grad()
@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("vocabulary_size", [None, 1, SPARE, 96, 200])
def test_what_samples_is_what_scores(name, model, vocabulary_size):
    backend = made(name, model, eos_ids=[7, 11], slots=3)
    sampling = Sampling(NEW_TOKENS, temperature=0.7, vocabulary_size=vocabulary_size)
    rollout = backend.generate(prompts(), sampling, iteration=1)
    mask = rollout.response_mask
    scored = response_logprobs(model, rollout, sampling)
    logits = forward_logits(model, *rollout.sequences())[:, 8:-1, :vocabulary_size].double() / 0.7
    expected = logits.log_softmax(-1).gather(-1, rollout.response_ids.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(scored[mask], expected[mask].float(), atol=1e-5, rtol=0)
    if backend.captures_logprobs:
        torch.testing.assert_close(rollout.logprobs[mask], scored[mask], atol=1e-5, rtol=0)


def test_the_models_settings_are_as_they_were_after_sampling(model):
    model.generation_config.suppress_tokens = [3]
    backend = made("deepspeed", model)
    found = backend.generate(prompts(), Sampling(NEW_TOKENS, top_k=1, vocabulary_size=96), iteration=1)
    assert model.generation_config.suppress_tokens == [3] and not (found.response_ids == 3).any()


# ------------------------------------------------------------------------------------------------------ the table


def test_an_unknown_name_lists_the_known_ones(model):
    with pytest.raises(ConfigError, match="generation_backend='vllm' is not one of own, deepspeed"):
        made("vllm", model)
