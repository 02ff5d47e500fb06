"""The fast decoder against the model's own forward: every architecture it knows, rows joining, leaving and growing."""

import copy
import functools

import pytest
import torch
import transformers
from torch import nn

from rlhf.config import ModelConfig
from rlhf.engine import BatchPlan
from rlhf.generation import continuous_batching
from rlhf.generation.architectures import take_apart
from rlhf.generation.continuous_batching import generate
from rlhf.generation.decoders import HuggingFaceDecoder, make_decoder
from rlhf.generation.fast_decoder import FastDecoder, make_fast_decoder
from rlhf.generation.token_sampling import Sampling
from rlhf.models.loading import load_causal_lm
from rlhf.models.lora import adapter_disabled, apply_lora
from rlhf.numerics.cpu import LaidOut, has_onednn
from rlhf.types import PromptBatch
from tests.support.local_engine import LocalEngine
from tests.support.tiny_models import ROWS, save_tiny_model, tiny_config

NEVER = 95
GROUPED = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6}


def rope(kind, **settings):
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **settings}}


LLAMA3 = rope("llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16)
YARN = rope("yarn", factor=4.0, original_max_position_embeddings=16)
KNOWN = {
    "gpt_neox": {},
    "gpt_neox, blocks in sequence": {"use_parallel_residual": False},
    "gpt_neox, half rotated, no bias": {
        "attention_bias": False, "hidden_act": "relu", **rope("default", partial_rotary_factor=0.5)
    },
    "gpt_neox, tied": {"tie_word_embeddings": True, **rope("linear", factor=2.0)},
    "llama": {},
    "llama, grouped, tied, llama3 rope": {**GROUPED, **LLAMA3, "tie_word_embeddings": True},
    "llama, biased, yarn": {"attention_bias": True, "mlp_bias": True, **YARN},
    "llama, eager": {"attn_implementation": "eager"},
    "mistral, no window": {**GROUPED, "sliding_window": None},
    "mistral, a window beyond every row": {"sliding_window": 64},
    "qwen2": {},
    "qwen2, grouped": GROUPED,
    "qwen3, one key head": {"num_key_value_heads": 1, "head_dim": 8},
}  # fmt: skip
OTHERS = {
    "gpt2": {},
    "opt": {},
    "gemma": {},
    "gemma2": {"attn_implementation": "eager"},
    "bloom": {"attn_implementation": "eager"},
    "mistral, a window of 6": {"sliding_window": 6},
    "qwen2, windows in the second layer": {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    "llama, rope by length": rope("dynamic", factor=2.0),
}
FURTHER = {"mistral": "MistralConfig", "qwen3": "Qwen3Config", "gemma2": "Gemma2Config", "bloom": "BloomConfig"}


def config_of(name, changes):
    architecture = name.split(",")[0]
    if architecture not in FURTHER:
        return tiny_config(architecture, **changes)
    if architecture == "bloom":
        return transformers.BloomConfig(vocab_size=ROWS, hidden_size=16, n_layer=2, n_head=2, pad_token_id=0)
    sizes = {
        "vocab_size": ROWS, "pad_token_id": 0, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
    }  # fmt: skip
    return getattr(transformers, FURTHER[architecture])(**{**sizes, **changes})


@functools.cache
def build(name, seed=0):
    """A random model whose outputs do differ; tests must not change it."""
    changes = dict({**KNOWN, **OTHERS}[name])
    attention = changes.pop("attn_implementation", "sdpa")
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config_of(name, changes), attn_implementation=attention)
    with torch.no_grad():
        for part, parameter in model.named_parameters():
            scale = parameter.dim() < 2 and part.endswith("weight")  # of a norm
            parameter.normal_(float(scale), 1.0 if "emb" in part or "wte" in part else 0.3)
    model.generation_config.eos_token_id = None
    return model.eval()


def prompt_batch(lengths, row_ids=None, seed=3):
    width = max(lengths)
    ids = torch.randint(1, 90, (len(lengths), width), generator=torch.Generator().manual_seed(seed))
    mask = torch.arange(width) >= width - torch.tensor(lengths).unsqueeze(1)
    return PromptBatch(ids * mask, mask, torch.arange(len(lengths)) if row_ids is None else torch.tensor(row_ids))


RAGGED = (4, 9, 1, 6, 9, 2, 3)


def theirs(model, prompts, tokens, eos=NEVER):
    return model.generate(
        input_ids=prompts.input_ids, attention_mask=prompts.attention_mask.long(), do_sample=False,
        max_new_tokens=tokens, eos_token_id=eos, pad_token_id=0,
    )[:, prompts.input_ids.shape[1] :]  # fmt: skip


def ours(model, prompts, tokens, eos=NEVER, **options):
    options = {"sampling": Sampling(tokens, greedy=True), **options}
    return generate(model, prompts, eos_token_ids=eos if isinstance(eos, list) else [eos], pad_token_id=0, **options)


def ends(ids, eos):
    """After how many tokens each row ends."""
    return [row.index(eos) + 1 if eos in row else len(row) for row in ids.tolist()]


# --------------------------------------------------------------------------------- against transformers


@pytest.mark.parametrize("name", [*KNOWN, *OTHERS])
def test_greedy_equals_transformers_generate(name):
    """Rows of 1 to 9 prompt tokens that end at different times, all side by side and in a few slots."""
    model, prompts, tokens = build(name), prompt_batch(RAGGED), 14
    known = take_apart(model, capacity=max(RAGGED) + tokens) is not None
    assert known == (name in KNOWN)
    free = theirs(model, prompts, tokens)
    eos = max(free.flatten().tolist(), key=lambda token: len(set(ends(free, token))))
    expected = theirs(model, prompts, tokens, eos)
    assert len(set(ends(expected, eos))) > 1 and len(set(map(tuple, expected.tolist()))) > 3
    for slots in (0, 1, 3):
        assert torch.equal(ours(model, prompts, tokens, eos, slots=slots).response_ids, expected)


@pytest.mark.parametrize("name", KNOWN)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_captured_logprobs_are_those_of_a_full_forward(name, temperature):
    model, prompts = build(name), prompt_batch(RAGGED)
    sampling = Sampling(12, temperature=temperature)
    rollout = ours(model, prompts, 12, eos=7, sampling=sampling, slots=3, seed=5)
    for row, length in enumerate(RAGGED):
        response = rollout.response_ids[row][rollout.response_mask[row]]
        whole = torch.cat([prompts.input_ids[row, -length:], response])
        logits = model(whole.unsqueeze(0)).logits[0, length - 1 : -1]
        expected = (logits / temperature).log_softmax(-1).gather(-1, response.unsqueeze(-1)).squeeze(-1)
        found = rollout.logprobs[row][rollout.response_mask[row]]
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
        assert (found < -0.01).any()


def oracle(model, rows):
    """Logits of the next token of each row, from a forward of its own without a cache."""
    return torch.stack([model(torch.tensor([row])).logits[0, -1] for row in rows])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", KNOWN)
def test_every_logit_while_rows_join_leave_and_grow(name, dtype):
    """By hand: two prefills, a cache that has to grow, rows that change slots, a third prefill into what fell free."""
    model = copy.deepcopy(build(name)).to(dtype)
    generator = torch.Generator().manual_seed(0)
    rough = dtype == torch.float32 or "eager" in name  # whose own softmax is in float32
    tolerance = {"atol": 2e-5, "rtol": 1e-4} if rough else {"atol": 1e-11, "rtol": 1e-9}
    decoder = make_fast_decoder(model, slots=5, capacity=60)
    rows: list[list[int]] = []

    def join(*lengths):
        fresh = [torch.randint(1, 90, (length,), generator=generator).tolist() for length in lengths]
        ids = nn.utils.rnn.pad_sequence([torch.tensor(row) for row in fresh], batch_first=True, padding_value=17)
        rows.extend(fresh)
        torch.testing.assert_close(decoder.prefill(ids, lengths), oracle(model, fresh), **tolerance)

    def grow(steps):
        for _ in range(steps):
            tokens = torch.randint(1, 90, (len(rows),), generator=generator)
            logits = decoder.step(tokens)
            for row, token in zip(rows, tokens.tolist(), strict=True):
                row.append(token)
            torch.testing.assert_close(logits, oracle(model, rows), **tolerance)

    def leave(keep, *, final=False):
        decoder.compact(keep, final=final)
        rows[:] = [list(rows[slot]) for slot in keep]

    with torch.no_grad():
        join(3, 1)
        join(5, 5, 2)
        grow(2)
        leave([0, 4, 2])
        grow(1)
        join(7)
        columns = decoder.columns
        grow(3)
        leave([3, 1, 2])  # two rows swap, so that copying one over the other would show
        join(4, 1)
        grow(columns - 8)
        assert decoder.columns > columns
        leave([4, 1], final=True)
        grow(1)
        decoder._reserve(decoder.columns + 1, decoder.cache[0])
        assert decoder.cache[0].shape[1] == 2  # no prefill comes: what grows now holds only the rows there are
        grow(2)
        leave([1])
        grow(1)


def test_prompts_beyond_one_forward_pass_are_split(monkeypatch):
    model = build("llama")
    whole = ours(model, prompt_batch(RAGGED), 6)
    calls = []
    monkeypatch.setattr("rlhf.generation.fast_decoder.PREFILL_TOKENS_ON_CPU", 10)
    original = FastDecoder._prefill
    monkeypatch.setattr(
        FastDecoder, "_prefill", lambda self, ids, lengths: calls.append(lengths) or original(self, ids, lengths)
    )
    assert torch.equal(ours(model, prompt_batch(RAGGED), 6).response_ids, whole.response_ids)
    assert calls == [[9], [9], [6, 4], [3, 2, 1]]  # the longest first


# --------------------------------------------------------------------------------- what stands in for a leaf


def adapted(model):
    model = apply_lora(copy.deepcopy(model), ModelConfig(lora_rank=4, lora_alpha=8))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora" in name:
                parameter.normal_(0.0, 0.5, generator=torch.Generator().manual_seed(1))
    return model.eval()


@pytest.mark.parametrize("name", ["gpt_neox", "llama, grouped, tied, llama3 rope", "qwen3, one key head"])
def test_adapters_are_heard_and_can_be_switched_off(name):
    base, prompts = build(name), prompt_batch(RAGGED)
    model = adapted(base)
    assert take_apart(model, capacity=30) is not None
    expected, plain = theirs(model, prompts, 10), theirs(base, prompts, 10)
    assert not torch.equal(expected, plain)
    assert torch.equal(ours(model, prompts, 10, slots=4).response_ids, expected)
    with adapter_disabled(model):
        assert torch.equal(ours(model, prompts, 10, slots=4).response_ids, plain)
    assert torch.equal(ours(model, prompts, 10).response_ids, expected)


@pytest.mark.parametrize("architecture", ["gpt_neox", "llama"])
def test_a_4_bit_base(architecture, tokenizer, tmp_path):
    path = save_tiny_model(tmp_path / "base", architecture, tokenizer, hidden_size=64, intermediate_size=64)
    model = load_causal_lm(path, ModelConfig(quantization="4bit", lora_rank=1), dtype=torch.float32).eval()
    assert type(next(iter(model.base_model.layers)).mlp.get_submodule(
        "dense_h_to_4h" if architecture == "gpt_neox" else "up_proj"
    )).__name__ == "Linear4bit"  # fmt: skip
    prompts = prompt_batch(RAGGED)
    assert take_apart(model, capacity=30) is not None
    assert torch.equal(ours(model, prompts, 8, slots=4).response_ids, theirs(model, prompts, 8))


def scaled_block(model):
    model.model.layers[1].register_forward_hook(lambda module, inputs, output: output * 0.5)


def other_attention(model):
    attention = model.model.layers[0].self_attn
    attention.__class__ = type("Mine", (type(attention),), {"__module__": __name__})


def replaced_forward(model):
    block = model.model.layers[1]
    original = block.forward
    block.forward = lambda *arguments, **named: original(*arguments, **named) * 0.5


@pytest.mark.parametrize("change", [scaled_block, other_attention, replaced_forward])
def test_glue_that_is_not_the_librarys_own_is_left_to_the_model(change):
    model, prompts = copy.deepcopy(build("llama")), prompt_batch(RAGGED)
    change(model)
    assert isinstance(make_decoder(model, slots=7, capacity=30, pad_token_id=0), HuggingFaceDecoder)
    assert torch.equal(ours(model, prompts, 8).response_ids, theirs(model, prompts, 8))


def test_prompt_tuning_is_left_to_the_model():
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    settings = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = peft.get_peft_model(copy.deepcopy(build("llama")), settings).eval()
    assert take_apart(model, capacity=30) is None
    assert take_apart(LocalEngine(model, BatchPlan(1, 1, 1)), capacity=30) is None  # nor inside an engine


# -------------------------------------------------------------------------------------- slots and neighbours


OFTEN = list(range(1, 13))
"""So many ends of a sequence that a sampled response is short, now and then long."""


def sampled(model, prompts, tokens=16, **options):
    rollout = ours(model, prompts, tokens, eos=OFTEN, sampling=Sampling(tokens), seed=9, **options)
    return [
        (ids[mask].tolist(), logprobs[mask])
        for ids, mask, logprobs in zip(
            rollout.response_ids, rollout.response_mask, rollout.logprobs, strict=True
        )
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["gpt_neox", "qwen2, grouped", "gpt2"])
def test_samples_depend_neither_on_slots_nor_on_neighbours(name, monkeypatch):
    model = build(name)
    lengths = [1 + (5 * row) % 11 for row in range(20)]
    prompts = prompt_batch(lengths)
    alone = [sampled(model, prompts.rows(slice(row, row + 1)))[0] for row in range(20)]
    assert len({tuple(tokens) for tokens, _ in alone}) > 17
    assert len({len(tokens) for tokens, _ in alone}) > 4  # they end at different times
    for slots in (0, 1, 2, 7, 19, 50):
        for (tokens, logprobs), (found, captured) in zip(alone, sampled(model, prompts, slots=slots), strict=True):
            assert found == tokens
            torch.testing.assert_close(captured, logprobs, atol=1e-5, rtol=0)
    monkeypatch.setattr(continuous_batching, "_steps_per_check", lambda device: 4)  # as on an accelerator
    for slots in (0, 7):
        assert [found for found, _ in sampled(model, prompts, slots=slots)] == [tokens for tokens, _ in alone]


def count_tokens(model, run):
    """How many tokens pass through the model's embedding, and in how many calls."""
    calls = []
    handle = model.get_input_embeddings().register_forward_hook(lambda _, inputs, __: calls.append(inputs[0].numel()))
    result = run()
    handle.remove()
    return result, calls


@pytest.mark.parametrize("slots", [0, 6])
def test_a_skewed_batch_costs_what_its_tokens_cost(slots):
    """Each prompt token once, each response token but the last once; nothing for padding or rows that have ended."""
    model = build("gpt_neox")
    lengths = [1 + (5 * row) % 11 for row in range(20)]
    rollout, calls = count_tokens(
        model, lambda: ours(model, prompt_batch(lengths), 30, OFTEN, sampling=Sampling(30), slots=slots)
    )
    produced = int(rollout.response_mask.sum())
    assert produced < 0.7 * rollout.response_mask.numel()
    assert sum(calls) == sum(lengths) + produced - 20
    if slots == 0:
        assert calls[0] == sum(lengths) and len(calls) == rollout.response_mask.shape[1]


# -------------------------------------------------------------------------------------------------- edges


@pytest.mark.parametrize("name", ["gpt_neox", "gpt2"])
def test_one_new_token_and_prompts_of_one_token(name):
    model, prompts = build(name), prompt_batch((1, 1, 1))
    assert torch.equal(ours(model, prompts, 1).response_ids, theirs(model, prompts, 1))
    assert torch.equal(ours(model, prompts, 5, slots=2).response_ids, theirs(model, prompts, 5))


@pytest.mark.parametrize("name", ["gpt_neox", "llama, biased, yarn"])
def test_rotary_models_go_on_beyond_their_position_embeddings(name):
    model, prompts = build(name), prompt_batch((60, 50))
    assert model.config.max_position_embeddings == 64
    assert torch.equal(ours(model, prompts, 12).response_ids, theirs(model, prompts, 12))


def test_learned_positions_end_where_they_end():
    model = build("gpt2")
    assert ours(model, prompt_batch((60,)), 5).response_ids.shape == (1, 5)  # the fifth is never fed back
    with pytest.raises(IndexError):
        ours(model, prompt_batch((60,)), 6)


def test_holes_in_a_prompts_mask_are_not_part_of_it():
    model, prompts = build("llama"), prompt_batch((6, 6))
    mask = prompts.attention_mask.clone()
    mask[0, 2] = False
    kept = prompts.input_ids[0][mask[0]]
    expected = theirs(model, PromptBatch(kept.unsqueeze(0), torch.ones(1, 5, dtype=torch.bool), torch.zeros(1)), 6)
    found = ours(model, PromptBatch(prompts.input_ids, mask, prompts.row_ids), 6)
    assert torch.equal(found.response_ids[:1], expected)


def test_what_cannot_be_decoded_is_refused():
    model, prompts = build("llama"), prompt_batch((3, 2))
    with pytest.raises(ValueError, match="slots=-1 must be >= 0"):
        ours(model, prompts, 2, slots=-1)
    empty = PromptBatch(prompts.input_ids, prompts.attention_mask & torch.tensor([[True], [False]]), prompts.row_ids)
    with pytest.raises(ValueError, match="prompt 1 of the batch has no token"):
        ours(model, empty, 2)


# ------------------------------------------------------------------------------------------- laid-out weights


def test_laid_out_weights_give_the_same_products_up_to_the_bytes_allowed(monkeypatch):
    torch.manual_seed(0)
    layers = [nn.Linear(24, 40), nn.Linear(24, 40, bias=False), nn.Linear(24, 40)]
    monkeypatch.setattr("rlhf.numerics.cpu.LARGEST_COPIED_BYTES", 2 * 4 * 24 * 40)
    if not has_onednn():
        pytest.skip("this build of PyTorch has no oneDNN operators")
    lay_out = LaidOut()
    found = [lay_out(layer) for layer in layers]
    assert found[0] is not layers[0] and found[1] is not layers[1] and found[2] is layers[2]
    with torch.no_grad():
        for layer, linear in zip(layers[:2], found, strict=False):
            for rows in (1, 3, 32, 65):
                x = torch.randn(rows, 24)
                torch.testing.assert_close(linear(x), layer(x), atol=1e-6, rtol=1e-5)


def test_only_plain_float32_layers_are_laid_out():
    class Mine(nn.Linear):
        pass

    hooked = nn.Linear(4, 4)
    hooked.register_forward_hook(lambda module, inputs, output: output + 1)
    for layer in (Mine(4, 4), hooked, nn.Linear(4, 4).double(), nn.Identity()):
        assert LaidOut()(layer) is layer
