"""What a configuration says before a weight is read, against the models that are then loaded."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import transformers

from rlhf.config import ConfigError, ModelConfig
from rlhf.models.architecture import ModelSize, check_packages, check_trainable, check_weights_there, model_size
from rlhf.models.loading import load_causal_lm
from rlhf.models.lora import apply_lora
from tests.support.tiny_models import ARCHITECTURES, save_tiny_model


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_sizes_are_those_of_the_model_that_is_loaded(architecture, tokenizer, tmp_path):
    path = save_tiny_model(tmp_path / "model", architecture, tokenizer)
    loaded = load_causal_lm(path, dtype=torch.float32)
    weights = sum(weight.numel() for weight in loaded.parameters())
    assert model_size(path, ModelConfig()) == ModelSize(weights, weights)
    config = ModelConfig(lora_rank=3)
    adapted = apply_lora(loaded, config)
    trains = sum(weight.numel() for weight in adapted.parameters() if weight.requires_grad)
    assert model_size(path, config) == ModelSize(weights, trains)


def test_targets_and_dropout_are_checked_without_weights(tokenizer, tmp_path):
    path = save_tiny_model(tmp_path / "model", "llama", tokenizer)
    with pytest.raises(ConfigError, match="'query_key_value' matches no linear module of this llama model"):
        check_trainable(path, ModelConfig(lora_rank=1, lora_targets=["query_key_value"]), what="base_model")
    check_trainable(path, ModelConfig(model_dropout=0.1), what="base_model")


def test_an_adapter_is_known_by_its_base(tokenizer, tmp_path):
    base = save_tiny_model(tmp_path / "base", "gpt_neox", tokenizer)
    adapted = apply_lora(load_causal_lm(base, dtype=torch.float32), ModelConfig(lora_rank=2))
    adapted.save_pretrained(tmp_path / "adapter")
    check_trainable(tmp_path / "adapter", ModelConfig(), what="actor_model")
    assert model_size(tmp_path / "adapter", ModelConfig()) == model_size(base, ModelConfig())


def test_a_model_that_generates_nothing_is_no_base(tmp_path):
    transformers.T5ForConditionalGeneration(
        transformers.T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, vocab_size=32)
    ).save_pretrained(tmp_path / "t5")
    with pytest.raises(ConfigError, match="base_model .*t5 is a t5 model, which transformers does not load as"):
        check_trainable(tmp_path / "t5", ModelConfig(), what="base_model")


def test_a_mixture_of_experts_is_refused_before_it_is_loaded(tmp_path):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.MixtralConfig(**sizes, num_key_value_heads=2, num_local_experts=4, vocab_size=32)
    transformers.MixtralForCausalLM(config).save_pretrained(tmp_path / "moe")
    with pytest.raises(ConfigError, match="4 experts"):
        check_trainable(tmp_path / "moe", ModelConfig(), what="base_model")


def test_a_directory_without_weights_is_told_from_one_with_them(tokenizer, tmp_path):
    path = save_tiny_model(tmp_path / "model", "gpt_neox", tokenizer)
    check_weights_there(path)
    (path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(ConfigError, match=r"model.safetensors is a git-lfs pointer .*git lfs pull"):
        check_weights_there(path)
    (path / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="has a configuration and no weights"):
        check_weights_there(path)
    with pytest.raises(ConfigError, match="is not there"):
        check_weights_there(tmp_path / "missing")
    check_weights_there("someone/some-model")  # a name of the hub


def test_packages_that_are_missing_are_named(tokenizer, tmp_path, monkeypatch):
    path = save_tiny_model(tmp_path / "model", "gpt_neox", tokenizer)
    with pytest.raises(ConfigError, match="flash_attention_2 needs the package flash-attn.*use sdpa"):
        check_trainable(path, ModelConfig(attn_implementation="flash_attention_2"), what="base_model")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"quantization=4bit needs bitsandbytes: pip install 'rlhf\[quantization\]'"):
        check_trainable(path, ModelConfig(quantization="4bit", lora_rank=1), what="base_model")
    check_trainable(path, ModelConfig(), what="base_model")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    for settings in ({"quantization": "4bit", "lora_rank": 1}, {"attn_implementation": "flash_attention_2"}):
        check_packages(ModelConfig(**settings))


def test_a_configuration_that_cannot_be_read_is_named(tokenizer, tmp_path):
    path = save_tiny_model(tmp_path / "model", "gpt_neox", tokenizer)
    shutil.copytree(path, tmp_path / "broken")
    (tmp_path / "broken" / "config.json").write_text(json.dumps({"model_type": "no-such-model"}))
    with pytest.raises(ConfigError, match="cannot read the model in .*broken"):
        check_trainable(tmp_path / "broken", ModelConfig(), what="base_model")


def test_a_shard_that_is_missing_is_named(tokenizer, tmp_path):
    path = save_tiny_model(tmp_path / "model", "gpt_neox", tokenizer)
    index = {
        "metadata": {},
        "weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"},
    }
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    (path / "model.safetensors").rename(path / "model-00001-of-00002.safetensors")
    with pytest.raises(ConfigError, match="lacks 1 of the 2 files that .*index.json names: model-00002-of-00002"):
        check_weights_there(path)
    (path / "model-00001-of-00002.safetensors").unlink()
    with pytest.raises(ConfigError, match="has a configuration and no weights"):
        check_weights_there(path)


def test_an_encoder_is_no_causal_language_model(tmp_path):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    for is_decoder in (False, True):
        config = transformers.BertConfig(**sizes, vocab_size=32, is_decoder=is_decoder)
        transformers.BertLMHeadModel(config).save_pretrained(tmp_path / str(is_decoder))
    with pytest.raises(ConfigError, match="is a bert model, which transformers does not load as a causal"):
        check_trainable(tmp_path / "False", ModelConfig(), what="base_model")
    check_trainable(tmp_path / "True", ModelConfig(), what="base_model")
