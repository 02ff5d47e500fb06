"""Exports: what is written, that others load it, and that a directory is the old one or the whole new one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from rlhf.checkpoint.export import (
    check_writable,
    export_causal_lm,
    export_scalar_model,
    full_state_dict,
)
from rlhf.config import ConfigError, ModelConfig
from rlhf.models.forward import forward_logits
from rlhf.models.loading import load_causal_lm, load_tokenizer
from rlhf.models.lora import apply_lora
from rlhf.models.scalar import ScalarModel
from tests.support.tiny_models import ARCHITECTURES, ROWS

FP32 = torch.float32


def lora(model: nn.Module) -> nn.Module:
    return apply_lora(model, ModelConfig(lora_rank=2, lora_alpha=4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_exported_weights_come_back_bit_for_bit(architecture, dtype, tiny_models, tokenizer, ragged, tmp_path):
    model = load_causal_lm(tiny_models[architecture], dtype=dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.125)  # not what any file on the disk holds
    export_causal_lm(model, tokenizer, tmp_path / "out")
    again = load_causal_lm(tmp_path / "out", dtype=dtype).eval()
    theirs = dict(again.named_parameters())
    for name, parameter in model.named_parameters():
        assert parameter.dtype == dtype and torch.equal(theirs[name], parameter)
    with torch.no_grad():
        assert torch.equal(forward_logits(again, *ragged[:2]), forward_logits(model, *ragged[:2]))


def test_transformers_alone_loads_an_export_in_a_fresh_process(tiny_models, tokenizer, tmp_path):
    model = load_causal_lm(tiny_models["gpt_neox"], dtype=FP32).eval()
    export_causal_lm(model, tokenizer, tmp_path / "out")
    text = "What is it?"
    code = f"""
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained({str(tmp_path / "out")!r})
model, report = AutoModelForCausalLM.from_pretrained({str(tmp_path / "out")!r}, output_loading_info=True)
assert not report["missing_keys"] and not report["unexpected_keys"], report
assert model.get_input_embeddings().weight.shape[0] == {ROWS} and tokenizer.pad_token_id == tokenizer.eos_token_id
torch.save(model.eval()(**tokenizer({text!r}, return_tensors="pt")).logits.detach(), {str(tmp_path / "logits.pt")!r})
assert "rlhf" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, capture_output=True, timeout=300)
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    with torch.no_grad():
        mine = forward_logits(model, ids, torch.ones_like(ids))
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), mine, atol=1e-6, rtol=1e-6)


def test_another_state_is_exported_where_one_is_given(tiny_models, tokenizer, tmp_path):
    model = load_causal_lm(tiny_models["gpt2"], dtype=FP32)  # tied embeddings
    averaged = {name: parameter.detach() * 0.5 for name, parameter in model.named_parameters()}
    export_causal_lm(model, tokenizer, tmp_path / "out", state_dict=averaged)
    again = load_causal_lm(tmp_path / "out", dtype=FP32)
    for name, parameter in model.named_parameters():
        assert torch.equal(dict(again.named_parameters())[name], parameter * 0.5)
    assert again.lm_head.weight is again.transformer.wte.weight


def test_state_dict_has_tied_weights_once_and_only_trainable_ones_on_request(tiny_models):
    gpt2 = load_causal_lm(tiny_models["gpt2"], dtype=FP32)
    assert full_state_dict(gpt2).keys() == dict(gpt2.named_parameters()).keys()
    assert "lm_head.weight" not in full_state_dict(gpt2)
    model = lora(ScalarModel.from_base(tiny_models["llama"], dtype=FP32))
    trainable = full_state_dict(model, trainable_only=True)
    assert trainable.keys() == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    model.register_buffer("kept", torch.zeros(1))
    assert "kept" in full_state_dict(model)  # buffers that are saved
    assert not any("inv_freq" in name for name in full_state_dict(model))  # and those that are not
    trainable["scalar_head.bias"].add_(1.0)
    assert model.scalar_head.bias.item() == 0.0  # copies


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_scalar_model_is_complete_in_its_directory(kind, tiny_models, tokenizer, tmp_path):
    model = ScalarModel.from_base(tiny_models["gpt_neox"], dtype=FP32)
    export_scalar_model(lora(model) if kind == "lora" else model, tokenizer, tmp_path / "out")
    names = {file.name for file in (tmp_path / "out").iterdir()}
    adapter = {"adapter_config.json", "adapter_model.safetensors", "classifier_config.json"}
    weights = adapter if kind == "lora" else {"config.json", "model.safetensors"}
    assert weights | {"tokenizer.json", "tokenizer_config.json"} <= names and "scalar_head.safetensors" not in names
    assert load_tokenizer(tmp_path / "out").eos_token_id == tokenizer.eos_token_id


def test_an_old_checkpoint_is_replaced_whole(tiny_models, tokenizer, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "stale.bin").write_text("of an earlier model")
    export_causal_lm(load_causal_lm(tiny_models["gpt_neox"], dtype=FP32), tokenizer, out)
    assert not (out / "stale.bin").exists() and (out / "model.safetensors").exists()
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("fault", "raised"),
    [
        (OSError(28, "No space left on device"), OSError),
        (Exception("No space left on device (os error 28)"), OSError),  # so do safetensors and tokenizers say it
        (RuntimeError("broken tokenizer"), RuntimeError),
    ],
)
def test_a_failure_half_way_leaves_the_old_checkpoint(fault, raised, tiny_models, tokenizer, tmp_path):
    model = load_causal_lm(tiny_models["gpt_neox"], dtype=FP32)
    export_causal_lm(model, tokenizer, tmp_path / "out")
    before = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}

    class Broken:
        def save_pretrained(self, directory: Path) -> None:
            assert (Path(directory) / "model.safetensors").exists()  # the weights are written by now
            raise fault

    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    with pytest.raises(raised, match=r"No space left|broken tokenizer") as caught:
        export_causal_lm(model, Broken(), tmp_path / "out")
    assert getattr(caught.value, "errno", None) == (28 if raised is OSError else None)
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()} == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_check_writable_makes_the_directory_and_leaves_it_empty(tmp_path):
    check_writable(tmp_path / "deep" / "down")
    assert list((tmp_path / "deep" / "down").iterdir()) == []


def test_an_output_directory_that_cannot_be_written(tmp_path):
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(ConfigError, match=r"output directory .*file cannot be written: .*--output_dir"):
        check_writable(file)
    with pytest.raises(ConfigError, match="Not a directory"):
        check_writable(file / "below")
    with pytest.raises(ConfigError, match="cannot be written"):
        check_writable(Path("/proc/self/out"))  # refused to root, too
    if os.geteuid() != 0:
        closed = tmp_path / "closed"
        closed.mkdir(mode=0o500)
        with pytest.raises(ConfigError, match="Permission denied"):
            check_writable(closed)
