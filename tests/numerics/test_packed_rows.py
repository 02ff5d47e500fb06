"""Rows without padding, scored over the head in pieces, against one plain forward per row."""

import pytest
import torch
import transformers

import rlhf.numerics.vocabulary_head
from rlhf.engine import BatchPlan, partition
from rlhf.models.forward import forward_logits
from rlhf.models.scalar import ScalarModel
from rlhf.models.token_logprobs import PLAIN_HEADS, token_logprobs
from rlhf.numerics.logprobs import entropy_from_logits, logprobs_from_logits
from rlhf.numerics.packed_rows import FLASH, PACKABLE, PACKED_SDPA, PackedRows, pack, packed_arguments, packed_sdpa

SHARED = {"vocab_size": 50, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
LLAMA_LIKE = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
NEOX = {**{name: value for name, value in LLAMA_LIKE.items() if name != "num_key_value_heads"}, "rotary_pct": 0.5}
CONFIGS = {
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**SHARED, **NEOX),
    "llama": lambda: transformers.LlamaConfig(**SHARED, **LLAMA_LIKE),
    "mistral": lambda: transformers.MistralConfig(**SHARED, **LLAMA_LIKE, sliding_window=3),
    "qwen2": lambda: transformers.Qwen2Config(**SHARED, **LLAMA_LIKE),
    "qwen3": lambda: transformers.Qwen3Config(
        **SHARED, **LLAMA_LIKE, head_dim=8, use_sliding_window=True, sliding_window=4, max_window_layers=1
    ),
    "gemma": lambda: transformers.GemmaConfig(**SHARED, **LLAMA_LIKE, head_dim=8),
    "gpt2": lambda: transformers.GPT2Config(**SHARED, n_embd=16, n_layer=2, n_head=2, n_positions=64),
    "opt": lambda: transformers.OPTConfig(
        **SHARED, hidden_size=16, word_embed_proj_dim=16, ffn_dim=32, num_hidden_layers=2, num_attention_heads=2
    ),
    "cohere": lambda: transformers.CohereConfig(**SHARED, **LLAMA_LIKE, logit_scale=0.25),
}
ROWS = ([5, 9, 3, 11, 12, 13, 7, 7, 2], [7, 14], [4, 4, 8, 2, 6, 15])


def build(name, attention="sdpa"):
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[name](), attn_implementation=attention)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0.0, 0.3)
    return model.eval()


def padded(side):
    """Ids, mask and the scored positions (all but each row's first two tokens), padded left, right or both."""
    width = max(map(len, ROWS)) + 3
    ids, mask = torch.zeros(len(ROWS), width, dtype=torch.long), torch.zeros(len(ROWS), width, dtype=torch.bool)
    scored = mask.clone()
    for row, tokens in enumerate(ROWS):
        start = {"left": width - len(tokens), "right": 0, "both": 2}[side]
        ids[row, start : start + len(tokens)] = torch.tensor(tokens)
        mask[row, start : start + len(tokens)] = True
        scored[row, start + 1 + (row == 0) : start + len(tokens)] = True
    return ids, mask, scored


@pytest.mark.parametrize("side", ["left", "right", "both"])
@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_log_probabilities_are_those_of_each_row_alone(name, side):
    model = build(name)
    assert (model.config.model_type in PACKABLE) is (name not in ("opt", "cohere"))
    ids, mask, scored = padded(side)
    with torch.no_grad():
        logprobs, entropies = token_logprobs(model, ids, mask, scored, temperature=0.7, with_entropy=True)
        for row, tokens in enumerate(ROWS):
            logits = build(name)(torch.tensor([tokens])).logits[0, :-1].double()
            alone = logprobs_from_logits(logits[None], torch.tensor([tokens[1:]]), 0.7)[0]
            chosen = scored[row]
            kept = slice(1, None) if row == 0 else slice(None)
            torch.testing.assert_close(logprobs[row][chosen], alone[kept], atol=2e-6, rtol=2e-6)
            expected = entropy_from_logits(logits[kept], 0.7)
            torch.testing.assert_close(entropies[row][chosen], expected, atol=1e-5, rtol=1e-5)
    assert (logprobs[~scored] == 0).all() and (entropies[~scored] == 0).all()
    assert (logprobs[scored] < 0).all()


@pytest.mark.parametrize(("name", "window"), [("mistral", 3), ("qwen3", 4)])
def test_rows_shorter_as_long_and_longer_than_the_sliding_window(name, window):
    lengths = (window - 1, window, window + 1)
    ids = torch.arange(1, 1 + 3 * (window + 1)).reshape(3, window + 1)
    mask = torch.arange(window + 1) < torch.tensor(lengths).unsqueeze(1)
    scored = mask & (torch.arange(window + 1) > 0)
    with torch.no_grad():
        logprobs, _ = token_logprobs(build(name), ids, mask, scored)
        for row, length in enumerate(lengths):
            logits = build(name)(ids[row : row + 1, :length]).logits[:, :-1]
            alone = logprobs_from_logits(logits, ids[row : row + 1, 1:length])[0]
            torch.testing.assert_close(logprobs[row, 1:length], alone, atol=2e-6, rtol=2e-6)


def test_every_architecture_that_packs_is_compared_above():
    assert set(CONFIGS) >= PACKABLE
    assert set(CONFIGS) - PLAIN_HEADS == {"cohere"}


@pytest.mark.parametrize("pieces", [False, True])
@pytest.mark.parametrize("name", ["gpt_neox", "llama", "mistral", "gpt2", "opt"])
def test_gradients_are_those_of_the_plain_path(name, pieces, monkeypatch):
    monkeypatch.setattr(rlhf.numerics.vocabulary_head, "PIECE_ELEMENTS", 3 * 50 if pieces else 10**6)
    ids, mask, scored = padded("left")
    weights = torch.rand(mask.shape, generator=torch.Generator().manual_seed(0))
    gradients = []
    for packed in (True, False):
        model = build(name)
        if packed:
            logprobs, entropies = token_logprobs(model, ids, mask, scored, temperature=1.3, with_entropy=True)
        else:
            logits = forward_logits(model, ids, mask)[:, :-1]
            found = logprobs_from_logits(logits, ids[:, 1:], 1.3), entropy_from_logits(logits, 1.3)
            logprobs, entropies = (torch.nn.functional.pad(item, (1, 0)) * scored for item in found)
        (weights * logprobs + 0.5 * weights.square() * entropies).sum().backward()
        gradients.append({key: value.grad for key, value in model.named_parameters()})
    assert gradients[0].keys() == gradients[1].keys()
    for key, expected in gradients[1].items():
        torch.testing.assert_close(gradients[0][key], expected, atol=2e-5, rtol=1e-4)


def test_a_row_does_not_see_its_neighbours():
    model = build("gpt_neox")
    ids, mask, scored = padded("right")
    changed = ids.clone()
    changed[0, :5] = torch.tensor([1, 2, 3, 4, 5])
    with torch.no_grad():
        before, after = (token_logprobs(model, x, mask, scored)[0] for x in (ids, changed))
    assert torch.equal(before[1:], after[1:])
    assert not torch.equal(before[0], after[0])


def test_what_is_computed_grows_with_real_tokens_and_not_with_padding():
    model = build("gpt_neox")
    seen = []
    model.gpt_neox.layers[0].mlp.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape))
    token_logprobs(model, *padded("both"))
    ScalarModel(model.gpt_neox)(*padded("both")[:2])
    assert seen == [(1, sum(map(len, ROWS)), 16)] * 2


def test_the_head_runs_over_scored_positions_only_and_in_pieces(monkeypatch):
    model = build("gpt_neox")
    ids, mask, scored = padded("left")
    shapes = []
    plain = rlhf.numerics.vocabulary_head._logits
    monkeypatch.setattr(
        rlhf.numerics.vocabulary_head,
        "_logits",
        lambda hidden, *rest: shapes.append(len(hidden)) or plain(hidden, *rest),
    )
    monkeypatch.setattr(rlhf.numerics.vocabulary_head, "PIECE_ELEMENTS", 5 * 50 + 49)
    loss = token_logprobs(model, ids, mask, scored)[0].sum()
    assert shapes == [5, 5, 3] and sum(shapes) == int(scored.sum())
    loss.backward()
    assert shapes == [5, 5, 3] * 2  # no logits are kept for the backward pass: they are computed again


@pytest.mark.parametrize("attention", [PACKED_SDPA, *FLASH])
def test_every_argument_lies_where_the_rows_lie(attention):
    """On another device than the default one, and with the bounds of each row where attention asks for them."""
    config = transformers.LlamaConfig(attn_implementation=attention if attention in FLASH else "sdpa")
    config._attn_implementation = attention
    ids = torch.arange(9, device="meta")
    given = packed_arguments(PackedRows(ids, ids, (4, 2, 3), (3, 4)), config)
    tensors = {name: value for name, value in given.items() if isinstance(value, torch.Tensor)}
    assert len(tensors) == (4 if attention in FLASH else 3) and {one.device.type for one in tensors.values()} == {
        "meta"
    }
    given = packed_arguments(PackedRows(torch.arange(9), torch.arange(9), (4, 2, 3), (3, 4)), config)
    assert given["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1, 0, 1, 2]] and given["use_cache"] is False
    if attention in FLASH:
        assert given["cu_seq_lens_q"].tolist() == given["cu_seq_lens_k"].tolist() == [0, 4, 6, 9]
        assert given["cu_seq_lens_q"].dtype == torch.int32 and given["attention_mask"] is None
        assert given["max_length_q"] == given["max_length_k"] == 4
    else:
        assert given["row_lengths"] == (4, 2, 3)


def test_eager_attention_gets_padded_rows_and_the_same_numbers():
    ids, mask, scored = padded("left")
    eager, ours = build("llama", "eager"), build("llama")
    with torch.no_grad():
        torch.testing.assert_close(token_logprobs(eager, ids, mask, scored), token_logprobs(ours, ids, mask, scored))
    assert eager.config._attn_implementation == "eager"
    assert ours.config._attn_implementation == PACKED_SDPA not in FLASH


def test_a_packed_model_still_computes_and_samples_padded_batches_as_sdpa():
    ids, mask, scored = padded("left")
    plain, ours = build("llama"), build("llama")
    with torch.no_grad():
        token_logprobs(ours, ids, mask, scored)
        assert ours.config._attn_implementation == PACKED_SDPA
        torch.testing.assert_close(forward_logits(ours, ids, mask), forward_logits(plain, ids, mask), atol=0, rtol=0)
        arguments = {"attention_mask": mask.long(), "do_sample": False, "max_new_tokens": 5, "eos_token_id": None}
        assert torch.equal(ours.generate(ids, **arguments), plain.generate(ids, **arguments))


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_computes_packed_rows_again(reentrant):
    ids, mask, scored = padded("left")
    gradients = []
    for checkpointing in (False, True):
        model = build("gpt_neox").train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            model.enable_input_require_grads()
        token_logprobs(model, ids, mask, scored)[0].sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for ours, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, expected)


def test_a_scored_first_token_is_refused():
    ids, mask, scored = padded("left")
    scored[1, -len(ROWS[1])] = True
    with pytest.raises(ValueError, match="first token of a row cannot be scored"):
        token_logprobs(build("gpt_neox"), ids, mask, scored)


def test_packing_and_padding_again():
    ids, mask, _ = padded("both")
    ids[~mask] = 49
    rows = pack(ids, mask)
    assert rows.lengths == (9, 2, 6)
    assert rows.input_ids.tolist() == [token for row in ROWS for token in row]
    assert rows.position_ids.tolist() == [*range(9), 0, 1, *range(6)]
    assert torch.equal(rows.padded(rows.input_ids), torch.where(mask, ids, 0))
    with pytest.raises(ValueError, match="3 rows has no token"):
        pack(ids, torch.zeros_like(mask))


# ------------------------------------------------------------------------------------------- micro-batches


@pytest.mark.parametrize("parts", [1, 2, 3, 7, 30])
def test_a_partition_is_complete_by_length_and_even(parts):
    lengths = torch.randint(1, 200, (30,), generator=torch.Generator().manual_seed(3)).tolist()
    found = partition(lengths, parts)
    assert len(found) == parts and all(found)
    flat = [index for part in found for index in part]
    assert sorted(flat) == list(range(30))
    assert [lengths[index] for index in flat] == sorted(lengths, reverse=True)
    if parts <= 7:
        sums = [sum(lengths[index] for index in part) for part in found]
        assert max(sums) - min(sums) <= 2 * max(lengths)
    with pytest.raises(ValueError, match="2 sequences cannot make 3 parts"):
        partition([5, 5], 3)


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("tokens", [0, 100, 250, 10**6])
def test_micro_batches_keep_the_budget_and_are_as_many_on_every_rank(world, tokens):
    for seed in range(20):
        lengths = torch.randint(1, 100, (32,), generator=torch.Generator().manual_seed(seed)).tolist()
        plan = BatchPlan(32, 4, world, micro_batch_tokens=tokens)
        parts = plan.micro_batches(lengths)
        assert len(parts) % world == 0
        assert sorted(index for part in parts for index in part) == list(range(32))
        assert max(sum(lengths[index] for index in part) for part in parts) <= (tokens or 4 * max(lengths))
    assert len(plan.micro_batches([1] * 32)) == (8 if tokens == 0 else world)


def test_a_long_list_is_split_as_well_and_in_a_moment():
    lengths = torch.randint(100, 513, (4500,), generator=torch.Generator().manual_seed(0)).tolist()
    split = BatchPlan(4500, 1, 1).micro_batches(lengths)
    assert max(sum(lengths[index] for index in part) for part in split) <= max(lengths)
    assert sum(lengths) / max(lengths) <= len(split) <= 1.5 * sum(lengths) / max(lengths) + 1


def test_a_sequence_beyond_the_budget_goes_alone_and_few_sequences_are_one_part_each():
    assert BatchPlan(4, 1, 1, micro_batch_tokens=20).micro_batches([30, 4, 4, 2]) == [[0], [1, 2, 3]]
    assert BatchPlan(4, 1, 4).micro_batches([5, 7]) == [[1], [0]]


def test_dropout_reaches_the_attention_of_every_row():
    """Among equal values dropout alone decides: each output is 1/keep times the weight that was kept."""
    query = torch.randn(1, 2, 40, 8, generator=torch.Generator().manual_seed(1))
    value = torch.ones(1, 2, 40, 8)
    torch.manual_seed(2)
    whole, _ = packed_sdpa(None, query, query, value, None, row_lengths=(25, 15))
    torch.testing.assert_close(whole, torch.ones(1, 40, 2, 8))
    drawn = torch.stack([packed_sdpa(None, query, query, value, None, dropout=0.5, row_lengths=(25, 15))[0]
                         for _ in range(400)])  # fmt: skip
    assert drawn.std(0).min() > 0.1 and drawn.mean(0).sub(1).abs().max() < 0.3
