"""LoRA and QLoRA adapters: where they sit, what trains, the reference with the adapter off, merge and export."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from rlhf.checkpoint.export import export_causal_lm, export_scalar_model
from rlhf.config import ConfigError, ModelConfig
from rlhf.models.forward import forward_logits
from rlhf.models.loading import load_causal_lm, load_tokenizer
from rlhf.models.lora import adapter_disabled, apply_lora, has_adapter
from rlhf.models.merge import main as merge_command
from rlhf.models.merge import merge_adapter
from rlhf.models.scalar import ScalarModel
from tests.support.tiny_models import ARCHITECTURES, save_tiny_model

FP32 = torch.float32
ROOT = Path(__file__).resolve().parents[2]


def with_lora(model: nn.Module, **changes) -> nn.Module:
    return apply_lora(model, ModelConfig(**{"lora_rank": 4, "lora_alpha": 8, **changes}))


def shake(model: nn.Module, seed: int = 1) -> None:
    """Give the adapter (whose second half starts at 0) and a head visible weights, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)


def logits(model: nn.Module, ragged) -> torch.Tensor:
    with torch.no_grad():
        return forward_logits(model, ragged[0], ragged[1])[ragged[1]]


def test_an_adapter_without_a_rank_is_refused(tiny_models):
    base = load_causal_lm(tiny_models["gpt2"], dtype=FP32)
    with pytest.raises(ConfigError, match="lora_rank=0 must be at least 1"):
        apply_lora(base, ModelConfig())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_attention_projections_by_default(architecture, tiny_models, ragged):
    base = load_causal_lm(tiny_models[architecture], dtype=FP32).eval()
    before = logits(base, ragged)
    model = with_lora(base).eval()
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    modules = {name.split(".lora_")[0].rsplit(".", 1)[-1] for name in names}
    expected = {"gpt_neox": {"query_key_value"}, "gpt2": {"c_attn"}}
    opt = {"q_proj", "k_proj", "v_proj", "out_proj"}
    usual = opt if architecture == "opt" else {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert modules == expected.get(architecture, usual)
    assert all(".lora_A." in name or ".lora_B." in name for name in names)
    assert torch.equal(logits(model, ragged), before)  # an adapter starts as the identity
    shake(model)
    assert (logits(model, ragged) - before).abs().max() > 1e-3
    with adapter_disabled(model):
        assert torch.equal(logits(model, ragged), before)
    assert (logits(model, ragged) - before).abs().max() > 1e-3
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == names


def test_a_target_that_matches_nothing_lists_the_names(tiny_models):
    base = load_causal_lm(tiny_models["gpt_neox"], dtype=FP32)
    with pytest.raises(ConfigError) as raised:
        with_lora(base, lora_targets=["query_key_value", "decoder.layers."])
    assert "'decoder.layers.' matches no linear module" in str(raised.value)
    assert "dense, dense_4h_to_h, dense_h_to_4h, query_key_value" in str(raised.value)


def test_an_unknown_architecture_lists_the_names(tiny_models):
    base = load_causal_lm(tiny_models["gpt_neox"], dtype=FP32)
    base.config.model_type = "brand_new"
    with pytest.raises(ConfigError, match="no default lora_targets for a brand_new model.*query_key_value"):
        with_lora(base)


def test_named_targets(tiny_models):
    model = with_lora(
        load_causal_lm(tiny_models["gpt_neox"], dtype=FP32), lora_targets=["dense_h_to_4h", "attention.dense"]
    )
    adapted = {name.split(".lora_")[0].split("layers.")[1] for name, p in model.named_parameters() if p.requires_grad}
    assert adapted == {f"{layer}.{name}" for layer in (0, 1) for name in ("mlp.dense_h_to_4h", "attention.dense")}


def test_a_model_without_an_adapter(tiny_models):
    base = load_causal_lm(tiny_models["gpt_neox"], dtype=FP32)
    assert not has_adapter(base) and not has_adapter(ScalarModel.from_base(tiny_models["gpt_neox"], dtype=FP32))
    with pytest.raises(ValueError, match="has none"), adapter_disabled(base):
        pass


@pytest.mark.parametrize("architecture", ["gpt_neox", "llama", "gpt2"])
def test_of_a_scalar_model_adapter_and_whole_head_train(architecture, tiny_models, ragged):
    model = with_lora(ScalarModel.from_base(tiny_models[architecture], dtype=FP32, seed=1))
    assert isinstance(model, ScalarModel) and has_adapter(model)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {"scalar_head.weight", "scalar_head.bias"} <= trainable
    assert all(name.startswith("scalar_head.") or ".lora_" in name for name in trainable)
    shake(model)
    model(ragged[0], ragged[1]).pow(2).sum().backward()
    gradients = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert gradients == trainable
    assert all(p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", ["causal", "scalar"])
def test_gradient_checkpointing_gives_the_same_gradients(kind, reentrant, tiny_models, ragged):
    ids, mask = ragged[0], ragged[1]
    gradients = []
    for checkpointing in (False, True):
        if kind == "causal":
            base = load_causal_lm(tiny_models["gpt_neox"], dtype=FP32)
        else:
            base = ScalarModel.from_base(tiny_models["gpt_neox"], dtype=FP32)
        torch.manual_seed(0)  # of the adapter's first half
        model = with_lora(base, gradient_checkpointing=checkpointing).train()
        calls = []
        layers = [module for module in model.modules() if type(module).__name__ == "GPTNeoXLayer"]
        layers[0].attention.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        shake(model)
        out = forward_logits(model, ids, mask) if kind == "causal" else model(ids, mask)
        out.pow(2).mean().backward()
        assert len(calls) == 1 + checkpointing  # recomputed in the backward pass
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert all(gradient.abs().sum() > 0 for gradient in gradients[0].values())
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


@pytest.mark.parametrize("quantization", ["8bit", "4bit"])
@pytest.mark.parametrize("kind", ["causal", "scalar"])
def test_adapters_train_on_a_quantised_base(kind, quantization, tokenizer, tmp_path, ragged):
    pytest.importorskip("bitsandbytes")
    path = save_tiny_model(tmp_path / "base", "gpt_neox", tokenizer, hidden_size=64, intermediate_size=128)
    load = load_causal_lm if kind == "causal" else ScalarModel.from_base
    config = ModelConfig(quantization=quantization, lora_rank=4, lora_alpha=8, gradient_checkpointing=True)
    model = apply_lora(load(path, config, dtype=FP32), config)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    ids, mask = ragged[0], ragged[1]

    def loss() -> torch.Tensor:
        if kind == "causal":
            return forward_logits(model, ids, mask)[mask][:, 5].float().log_softmax(0).mean().neg()
        return (model(ids, mask)[mask] - 1.0).pow(2).mean()

    def gradients() -> dict[str, torch.Tensor]:
        optimizer.zero_grad()
        loss().backward()
        found = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
        optimizer.zero_grad()
        return found

    before = gradients()
    with torch.no_grad():  # scoring, as PPO does before it trains, must leave no trace in the weights
        model.eval()
        loss()
        model.train()
    after = gradients()
    assert any(gradient.abs().sum() > 0 for gradient in before.values())
    for name, gradient in before.items():
        torch.testing.assert_close(after[name], gradient)
    losses = []
    for _ in range(8):
        value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(value.item())
    assert losses[-1] < losses[0] - 1e-3
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if name in frozen)
    assert all(p.dtype == FP32 for p in model.parameters() if p.requires_grad)


@pytest.fixture()
def adapter(tiny_models, tokenizer, tmp_path):
    """A causal LM with a trained-looking adapter, and the directory it was exported to."""
    model = with_lora(load_causal_lm(tiny_models["gpt_neox"], dtype=FP32)).eval()
    shake(model)
    export_causal_lm(model, tokenizer, tmp_path / "adapter")
    return model, tmp_path / "adapter"


def test_peft_alone_loads_the_saved_adapter(adapter, tiny_models, ragged, tmp_path):
    model, directory = adapter
    config = json.loads((directory / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tiny_models["gpt_neox"])
    assert not (directory / "model.safetensors").exists()  # the base is named, not copied
    ids = ragged[0][:1]
    code = f"""
import sys, torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer
model = AutoPeftModelForCausalLM.from_pretrained({str(directory)!r}).eval()
AutoTokenizer.from_pretrained({str(directory)!r})
torch.save(model(torch.tensor({ids.tolist()})).logits.detach(), {str(tmp_path / "logits.pt")!r})
assert "rlhf" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, capture_output=True, timeout=180)
    with torch.no_grad():
        mine = forward_logits(model, ids, torch.ones_like(ids))
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), mine, atol=1e-6, rtol=1e-6)


def test_an_empty_adapter_is_never_saved(adapter, tokenizer, tmp_path):
    model, _ = adapter
    with pytest.raises(ValueError, match="adapter to be saved has no weights"):
        export_causal_lm(model, tokenizer, tmp_path / "empty", state_dict={})
    assert not (tmp_path / "empty").exists()


def test_loading_an_adapter_merges_it(adapter, ragged):
    model, directory = adapter
    merged = load_causal_lm(directory, dtype=FP32).eval()
    assert not has_adapter(merged)
    torch.testing.assert_close(logits(merged, ragged), logits(model, ragged), atol=1e-5, rtol=1e-4)
    made = list((directory / "merged").iterdir())
    stamp = made[0].stat().st_mtime_ns
    load_causal_lm(directory, dtype=FP32)
    assert list((directory / "merged").iterdir()) == made and made[0].stat().st_mtime_ns == stamp  # merged once


def test_a_changed_adapter_is_merged_anew(adapter, tokenizer, ragged):
    model, directory = adapter
    load_causal_lm(directory, dtype=FP32)
    shake(model, seed=2)
    model.save_pretrained(directory)  # over the files that are there, beside the earlier merge
    torch.testing.assert_close(
        logits(load_causal_lm(directory, dtype=FP32).eval(), ragged), logits(model, ragged), atol=1e-5, rtol=1e-4
    )


def test_an_adapter_on_an_adapter_names_a_base_that_holds_the_first(adapter, tokenizer, ragged, tmp_path):
    """The usual pipeline: SFT with LoRA, then PPO with LoRA on its result."""
    _, first = adapter
    second = with_lora(load_causal_lm(first, dtype=FP32)).eval()
    shake(second, seed=3)
    export_causal_lm(second, tokenizer, tmp_path / "second")
    from peft import AutoPeftModelForCausalLM

    again = AutoPeftModelForCausalLM.from_pretrained(str(tmp_path / "second")).eval()
    torch.testing.assert_close(logits(again, ragged), logits(second, ragged), atol=1e-6, rtol=1e-5)


def test_merging_adds_in_float32(tokenizer, tmp_path, ragged):
    """The sum is rounded to bf16 once: adding an already rounded product would differ."""
    path = save_tiny_model(tmp_path / "base", "llama", tokenizer)
    model = with_lora(load_causal_lm(path, dtype=FP32))
    shake(model)
    export_causal_lm(model, tokenizer, tmp_path / "adapter")
    loaded = load_causal_lm(tmp_path / "adapter", dtype=torch.bfloat16)
    exact = model.merge_and_unload().model.layers[0].self_attn.q_proj.weight
    assert torch.equal(loaded.model.layers[0].self_attn.q_proj.weight, exact.to(torch.bfloat16))
    assert loaded.model.rotary_emb.inv_freq.dtype == FP32


@pytest.mark.parametrize("quantization", ["8bit", "4bit"])
def test_a_quantised_adapter_directory_is_the_merged_model_quantised(quantization, tokenizer, tmp_path, ragged):
    pytest.importorskip("bitsandbytes")
    path = save_tiny_model(tmp_path / "base", "gpt_neox", tokenizer, hidden_size=64, intermediate_size=128)
    model = with_lora(load_causal_lm(path, dtype=FP32)).eval()
    shake(model)
    export_causal_lm(model, tokenizer, tmp_path / "adapter")
    export_causal_lm(model.merge_and_unload(), tokenizer, tmp_path / "plain")
    config = ModelConfig(quantization=quantization, lora_rank=1)
    found = load_causal_lm(tmp_path / "adapter", config, dtype=torch.bfloat16).eval()
    wanted = load_causal_lm(tmp_path / "plain", config, dtype=torch.bfloat16).eval()
    difference = (logits(found, ragged) - logits(wanted, ragged)).abs().max()
    base = load_causal_lm(path, config, dtype=torch.bfloat16).eval()
    assert difference < 0.1 * (logits(base, ragged) - logits(wanted, ragged)).abs().max()


def test_a_reward_model_with_an_adapter_comes_back(tiny_models, tokenizer, ragged, tmp_path):
    ids, mask = ragged[0], ragged[1]
    model = with_lora(ScalarModel.from_base(tiny_models["llama"], dtype=FP32, seed=2)).eval()
    shake(model)
    model.set_normalisation(1.5, 0.5)
    export_scalar_model(model, tokenizer, tmp_path / "reward")
    assert {"adapter_config.json", "adapter_model.safetensors", "classifier_config.json", "tokenizer.json"} <= {
        file.name for file in (tmp_path / "reward").iterdir()
    }
    again = ScalarModel.from_pretrained(tmp_path / "reward", dtype=FP32).eval()
    once_more = ScalarModel.from_pretrained(tmp_path / "reward", dtype=FP32).eval()
    with torch.no_grad():
        wanted = (model(ids, mask)[mask] - 1.5) / 0.5
        torch.testing.assert_close(again(ids, mask)[mask], wanted, atol=1e-5, rtol=1e-4)
        assert torch.equal(once_more(ids, mask), again(ids, mask))
    assert torch.equal(again.scalar_head.weight, model.scalar_head.weight / 0.5)


def test_merge_command(adapter, ragged, tmp_path, capsys):
    model, directory = adapter
    merge_command([str(directory), str(tmp_path / "plain")])
    assert "merged" in capsys.readouterr().out
    merged = load_causal_lm(tmp_path / "plain", dtype=FP32).eval()
    torch.testing.assert_close(logits(merged, ragged), logits(model, ragged), atol=1e-5, rtol=1e-4)
    assert load_tokenizer(tmp_path / "plain").eos_token_id == 0
    with pytest.raises(SystemExit, match="is there already"):
        merge_command([str(directory), str(tmp_path / "plain")])
    with pytest.raises(ConfigError, match="is not an adapter directory"):
        merge_adapter(tmp_path / "plain", tmp_path / "other", FP32)


def test_merge_command_starts_as_a_module():
    done = subprocess.run(
        [sys.executable, "-m", "rlhf.models.merge", "nowhere", "out"],
        cwd=ROOT, capture_output=True, text=True, timeout=180,
    )  # fmt: skip
    assert done.returncode == 1 and "error: nowhere is not an adapter directory" in done.stderr


def test_a_failed_merge_leaves_nothing(adapter, tmp_path, monkeypatch):
    _, directory = adapter
    monkeypatch.setattr("rlhf.models.merge.AutoTokenizer.from_pretrained", lambda *a, **k: 1 / 0)
    (tmp_path / "out").mkdir()
    with pytest.raises(ZeroDivisionError):
        merge_adapter(directory, tmp_path / "out" / "plain", FP32)
    assert list((tmp_path / "out").iterdir()) == []
