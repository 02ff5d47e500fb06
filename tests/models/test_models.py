"""Loading and scalar models, on tiny random models of six architectures."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from rlhf.checkpoint.export import export_causal_lm, export_scalar_model
from rlhf.config import ConfigError, ModelConfig
from rlhf.models.forward import forward_logits
from rlhf.models.loading import backbone_of, check_vocabulary, load_backbone, load_causal_lm, load_tokenizer
from rlhf.models.pretrained import return_freed_memory
from rlhf.models.scalar import ScalarHead, ScalarModel
from rlhf.numerics.statistics import score_last
from tests.support.tiny_models import ARCHITECTURES, ROWS, TOKENS, make_tokenizer, save_tiny_model, tiny_config

FP32 = torch.float32
each_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)


@each_architecture
def test_padding_on_either_side_changes_no_logit(architecture, tiny_models, ragged):
    right_ids, right_mask, left_ids, left_mask = ragged
    model = load_causal_lm(tiny_models[architecture], dtype=FP32).eval()
    with torch.no_grad():
        right = forward_logits(model, right_ids, right_mask)[right_mask]
        left = forward_logits(model, left_ids, left_mask)[left_mask]
        alone = torch.cat(
            [forward_logits(model, ids[mask][None], torch.ones(1, int(mask.sum())))[0]
             for ids, mask in zip(left_ids, left_mask, strict=True)]
        )  # fmt: skip
    assert alone.std() > 0.1  # the comparison is of something
    torch.testing.assert_close(right, alone, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(left, alone, atol=2e-5, rtol=1e-4)


def test_left_padding_without_position_ids_would_change_logits(tiny_models, ragged):
    """The model of the test above does depend on its positions: dropping them is seen."""
    _, _, left_ids, left_mask = ragged
    model = load_causal_lm(tiny_models["gpt2"], dtype=FP32).eval()
    with torch.no_grad():
        told = forward_logits(model, left_ids, left_mask)[left_mask]
        counted = model(input_ids=left_ids, attention_mask=left_mask.long(), use_cache=False).logits[left_mask]
    assert (told - counted).abs().max() > 1e-2


@each_architecture
def test_only_the_last_logits(architecture, tiny_models, ragged):
    _, _, ids, mask = ragged
    model = load_causal_lm(tiny_models[architecture], dtype=FP32).eval()
    with torch.no_grad():
        torch.testing.assert_close(forward_logits(model, ids, mask, last=3), forward_logits(model, ids, mask)[:, -3:])


@each_architecture
def test_a_padded_vocabulary_stays_as_it_is(architecture, tiny_models, tokenizer, tmp_path):
    model = load_causal_lm(tiny_models[architecture], dtype=FP32)
    check_vocabulary(model, tokenizer)
    export_causal_lm(model, tokenizer, tmp_path / "out")
    again = load_causal_lm(tmp_path / "out", dtype=FP32)
    assert again.get_input_embeddings().weight.shape[0] == ROWS > len(tokenizer) == TOKENS
    torch.testing.assert_close(again.get_input_embeddings().weight, model.get_input_embeddings().weight, rtol=0, atol=0)


def test_fewer_embedding_rows_than_tokens_is_an_error(tmp_path, tokenizer):
    path = save_tiny_model(tmp_path / "short", "gpt_neox", tokenizer, vocab_size=TOKENS - 1)
    with pytest.raises(ConfigError, match=rf"{TOKENS} tokens and the model's embedding {TOKENS - 1} rows"):
        check_vocabulary(load_causal_lm(path, dtype=FP32), tokenizer)


def test_token_type_ids_never_reach_the_model(tiny_models, ragged):
    """GPT-NeoX has no such argument; `forward_logits` takes ids and mask and passes on nothing else."""
    seen: dict[str, object] = {}
    model = load_causal_lm(tiny_models["gpt_neox"], dtype=FP32).eval()
    model.register_forward_pre_hook(lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True)
    forward_logits(model, ragged[0], ragged[1])
    assert set(seen) == {"input_ids", "attention_mask", "position_ids", "use_cache"}


def test_padding_falls_back_to_end_of_sequence(tmp_path):
    made = make_tokenizer()
    made._special_tokens_map["pad_token"] = None
    made.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path_with_config(tmp_path))
    assert loaded.pad_token_id == loaded.eos_token_id == 0
    assert len(loaded) == TOKENS


def test_tokenizer_without_end_of_sequence_is_an_error(tmp_path):
    made = make_tokenizer()
    made._special_tokens_map["pad_token"] = made._special_tokens_map["eos_token"] = None
    made.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="no end-of-sequence token.*eos_token"):
        load_tokenizer(tmp_path_with_config(tmp_path))


def tmp_path_with_config(path: Path) -> Path:
    tiny_config("gpt_neox").save_pretrained(path)
    return path


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/nowhere/at/all", "model directory /nowhere/at/all is not there"),
        ("./missing", "is not there"),
        ("missing/two/deep", "is not there"),
        ("some-owner/some-model", "no such directory .* or cannot be reached .*download it first"),
    ],
)
def test_a_model_that_cannot_be_found(path, message):
    with pytest.raises(ConfigError, match=message):
        load_causal_lm(path, dtype=FP32)
    with pytest.raises(ConfigError, match=message):
        load_tokenizer(path)


def test_a_directory_without_a_model(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ConfigError, match=r"neither config.json nor adapter_config.json \(it holds notes.txt\)"):
        load_causal_lm(tmp_path, dtype=FP32)


def test_a_checkpoint_with_missing_weights_is_an_error(tiny_models, tmp_path):
    backbone = transformers.AutoModel.from_pretrained(tiny_models["gpt_neox"])
    backbone.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="lacks 1 weights.*would start at random"):
        load_causal_lm(tmp_path, dtype=FP32)


@pytest.mark.parametrize(
    ("architecture", "fields"),
    [
        ("gpt_neox", ("attention_dropout", "hidden_dropout")),
        ("llama", ("attention_dropout",)),
        ("gpt2", ("attn_pdrop", "resid_pdrop", "embd_pdrop")),
        ("opt", ("dropout", "attention_dropout")),
    ],
)
def test_dropout_is_set_everywhere(architecture, fields, tiny_models, ragged):
    path = tiny_models[architecture]
    model = load_causal_lm(path, ModelConfig(model_dropout=0.25), dtype=FP32)
    assert [getattr(model.config, name) for name in fields] == [0.25] * len(fields)
    ids, mask = ragged[0], ragged[1]
    model.train()
    with torch.no_grad():
        assert not torch.equal(forward_logits(model, ids, mask), forward_logits(model, ids, mask))
        still = load_causal_lm(path, dtype=FP32).train()
        assert torch.equal(forward_logits(still, ids, mask), forward_logits(still, ids, mask))


@each_architecture
def test_values_are_the_head_of_the_last_hidden_state(architecture, tiny_models, ragged):
    right_ids, right_mask, left_ids, left_mask = ragged
    model = ScalarModel.from_base(tiny_models[architecture], dtype=FP32, seed=3).eval()
    with torch.no_grad():
        right, left = model(right_ids, right_mask), model(left_ids, left_mask)
        causal = transformers.AutoModelForCausalLM.from_pretrained(tiny_models[architecture]).eval()
        row = right_ids[1][right_mask[1]][None]
        hidden = causal(row, output_hidden_states=True).hidden_states[-1]
        expected = hidden @ model.scalar_head.weight.T + model.scalar_head.bias
    assert right.dtype == torch.float32 and right.shape == right_ids.shape
    torch.testing.assert_close(right[1][right_mask[1]], expected[0, :, 0], atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(left[left_mask], right[right_mask], atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(score_last(left, left_mask), score_last(right, right_mask), atol=2e-5, rtol=1e-4)


def test_score_is_read_at_the_last_real_token_where_padding_is_eos(tiny_models, ragged):
    ids, mask, left_ids, left_mask = ragged
    assert ids[1, 5] == 0 and not mask[1, 6]  # row 1 ends in a real eos, and 0 also pads
    values = torch.arange(36.0).reshape(4, 9)
    assert score_last(values, mask).tolist() == [8.0, 14.0, 20.0, 27.0]
    assert score_last(values, left_mask).tolist() == [8.0, 17.0, 26.0, 35.0]


def test_head_starts_small_with_zero_bias():
    head = ScalarHead(4095, seed=1)
    assert head.bias.item() == 0.0
    assert abs(head.weight.mean().item()) < 1e-3
    assert abs(head.weight.std().item() - 1 / 64) < 1e-3  # N(0, 1/sqrt(4095 + 1))
    assert torch.equal(head.weight, ScalarHead(4095, seed=1).weight)
    assert not torch.equal(head.weight, ScalarHead(4095, seed=2).weight)


def test_head_computes_in_float32_whatever_its_dtype():
    head = ScalarHead(64, seed=0).to(torch.bfloat16)
    hidden = torch.randn(2, 5, 64, dtype=torch.bfloat16)
    exact = hidden.double() @ head.weight.double().T
    torch.testing.assert_close(head(hidden).double(), exact, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@each_architecture
def test_saved_scores_come_back_bit_for_bit(architecture, dtype, tiny_models, tokenizer, ragged, tmp_path):
    ids, mask = ragged[0], ragged[1]
    model = ScalarModel.from_base(tiny_models[architecture], dtype=dtype, seed=7).eval()
    with torch.no_grad():
        model.scalar_head.bias.fill_(0.123)
    export_scalar_model(model, tokenizer, tmp_path / "reward")
    again = ScalarModel.from_pretrained(tmp_path / "reward", dtype=dtype).eval()
    with torch.no_grad():
        before, after = score_last(model(ids, mask), mask), score_last(again(ids, mask), mask)
    assert torch.equal(before, after) and before.std() > 0


def test_what_is_not_a_reward_model(tiny_models, tokenizer, tmp_path):
    with pytest.raises(ConfigError, match="is not a reward model.*make one with step2_reward"):
        ScalarModel.from_pretrained(tiny_models["gpt_neox"], dtype=FP32)
    model = ScalarModel.from_base(tiny_models["gpt_neox"], dtype=FP32)
    export_scalar_model(model, tokenizer, tmp_path / "reward")
    with pytest.raises(ConfigError, match="is a reward model or critic"):
        load_causal_lm(tmp_path / "reward", dtype=FP32)


def test_head_of_another_width_is_an_error(tiny_models, tokenizer, tmp_path):
    export_scalar_model(ScalarModel.from_base(tiny_models["gpt_neox"], dtype=FP32), tokenizer, tmp_path / "b")
    tensors = load_file(tmp_path / "b" / "model.safetensors")
    save_file({**tensors, "score.weight": torch.zeros(1, 32)}, tmp_path / "b" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match="hidden size 32 and the backbone has 16"):
        ScalarModel.from_pretrained(tmp_path / "b", dtype=FP32)


def test_normalisation_needs_a_spread(tiny_models):
    model = ScalarModel.from_base(tiny_models["gpt_neox"], dtype=FP32)
    with pytest.raises(ValueError, match="says the same of every response"):
        model.set_normalisation(0.0, 0.0)


def test_opt_with_projected_hidden_states(tokenizer, tmp_path, ragged):
    path = save_tiny_model(tmp_path / "opt", "opt", tokenizer, word_embed_proj_dim=8, do_layer_norm_before=False)
    values = ScalarModel.from_base(path, dtype=FP32)(ragged[0], ragged[1])
    assert values.std() > 0


@pytest.mark.parametrize("quantization", ["8bit", "4bit"])
def test_quantised_logits_are_near_the_full_ones(quantization, tokenizer, tmp_path, ragged):
    pytest.importorskip("bitsandbytes")
    path = save_tiny_model(tmp_path / "model", "gpt_neox", tokenizer, hidden_size=64, intermediate_size=128)
    ids, mask = ragged[0], ragged[1]
    full = load_causal_lm(path, dtype=torch.bfloat16).eval()
    small = load_causal_lm(path, ModelConfig(quantization=quantization, lora_rank=1), dtype=torch.bfloat16).eval()
    kinds = {parameter.dtype for parameter in small.gpt_neox.layers.parameters() if parameter.dim() == 2}
    assert kinds == {torch.int8 if quantization == "8bit" else torch.uint8}
    if quantization == "4bit":  # as QLoRA has it: NF4, its constants quantised once more
        states = [weight.quant_state for weight in small.gpt_neox.layers.parameters() if hasattr(weight, "quant_state")]
        assert {(state.quant_type, state.nested) for state in states} == {("nf4", True)}
    with torch.no_grad():
        wanted, found = forward_logits(full, ids, mask)[mask].float(), forward_logits(small, ids, mask)[mask].float()
    correlation = torch.corrcoef(torch.stack([wanted.flatten(), found.flatten()]))[0, 1]
    assert correlation > (0.99 if quantization == "8bit" else 0.9)
    assert not torch.equal(wanted, found)


@pytest.mark.parametrize("quantization", ["none", "8bit", "4bit"])
def test_a_backbone_within_a_causal_lm_is_marked_as_one_that_was_loaded_alone(quantization, tokenizer, tmp_path):
    """peft looks at the marks of quantisation, which transformers sets on the outer model alone."""
    if quantization != "none":
        pytest.importorskip("bitsandbytes")
    path = save_tiny_model(tmp_path / "model", "gpt_neox", tokenizer, hidden_size=64, intermediate_size=128)
    config = ModelConfig(quantization=quantization, lora_rank=1)
    alone, within = load_backbone(path, config, dtype=FP32), backbone_of(load_causal_lm(path, config, dtype=FP32))
    names = ("is_loaded_in_8bit", "is_loaded_in_4bit", "is_quantized", "quantization_method")
    marks = [{name: getattr(model, name, None) for name in names} for model in (alone, within)]
    assert marks[0] == marks[1] and bool(marks[0]["is_quantized"]) == (quantization != "none")
    assert type(getattr(alone, "hf_quantizer", None)) is type(getattr(within, "hf_quantizer", None))


def test_unknown_quantization_lists_the_choices(tiny_models):
    with pytest.raises(ConfigError, match="none, 8bit, 4bit"):
        load_causal_lm(tiny_models["gpt_neox"], ModelConfig(quantization="2bit", lora_rank=1), dtype=FP32)


def test_freed_memory_goes_back_to_the_system():
    """Every other small block is freed: the heap cannot shrink by itself."""

    def resident() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) // 1024

    blocks = [bytearray(100_000) for _ in range(2000)]
    del blocks[::2]
    before = resident()
    return_freed_memory()
    assert before - resident() > 80  # of 95
    assert len(blocks) == 1000
