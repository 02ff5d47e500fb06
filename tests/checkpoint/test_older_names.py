"""Exports that transformers 4 reads as the models that they are."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoTokenizer, GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, PreTrainedConfig

from rlhf.checkpoint.export import export_causal_lm, export_scalar_model
from rlhf.checkpoint.older_names import add_older_names, name_older_tokenizer
from rlhf.models.loading import load_causal_lm
from rlhf.models.scalar import ScalarModel

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def written(config: PreTrainedConfig, directory: Any) -> dict[str, Any]:
    config.save_pretrained(directory)
    add_older_names(directory)
    return json.loads((directory / "config.json").read_text(encoding="utf-8"))


def test_gpt_neox_says_its_rotary_share_and_base_under_both_names(tmp_path):
    rotary = {"rope_type": "default", "rope_theta": 20000.0, "partial_rotary_factor": 0.5}
    settings = written(GPTNeoXConfig(rope_parameters=dict(rotary), dtype="bfloat16"), tmp_path)
    assert (settings["rotary_pct"], settings["rotary_emb_base"]) == (0.5, 20000.0)
    assert settings["dtype"] == settings["torch_dtype"] == "bfloat16"
    assert "rope_theta" not in settings and "partial_rotary_factor" not in settings and "rope_scaling" not in settings
    assert settings["rope_parameters"] == rotary == AutoConfig.from_pretrained(tmp_path).rope_parameters


def test_llama_says_its_base_and_its_scaling_under_both_names(tmp_path):
    rotary = {**LLAMA3, "rope_theta": 5e5}
    config = LlamaConfig(rope_parameters=dict(rotary), max_position_embeddings=512)
    settings = written(config, tmp_path)
    assert settings["rope_theta"] == 5e5 and settings["rope_scaling"] == LLAMA3
    assert "partial_rotary_factor" not in settings and "rotary_pct" not in settings
    again = AutoConfig.from_pretrained(tmp_path)
    assert again.rope_parameters == rotary
    assert again.to_diff_dict() == config.to_diff_dict()


def test_a_name_that_stands_there_is_kept_and_writing_twice_changes_nothing(tmp_path):
    rotary = {"rope_type": "default", "rope_theta": 4.0}
    settings = {"model_type": "llama", "rope_theta": 3.0, "rope_parameters": rotary}
    (tmp_path / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    add_older_names(tmp_path)
    first = (tmp_path / "config.json").read_bytes()
    assert json.loads(first)["rope_theta"] == 3.0
    add_older_names(tmp_path)
    assert (tmp_path / "config.json").read_bytes() == first


@pytest.mark.parametrize(
    "settings",
    [
        {"model_type": "gpt2", "n_positions": 8},
        {
            "model_type": "gemma3_text",
            "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1.0}},
        },
        {"model_type": "llama", "rope_parameters": None},
    ],
)
def test_what_has_no_older_form_is_left(settings, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    add_older_names(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text(encoding="utf-8")) == settings


def test_the_language_part_of_a_model_of_several(tmp_path):
    inner = {"model_type": "llama", "dtype": "float16", "rope_parameters": {"rope_type": "default", "rope_theta": 7.0}}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llava", "text_config": inner}), encoding="utf-8")
    add_older_names(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert settings["text_config"] == {**inner, "torch_dtype": "float16", "rope_theta": 7.0}
    assert "rope_theta" not in settings


def test_every_export_carries_them(tokenizer, tmp_path):
    config = GPTNeoXConfig(
        vocab_size=512, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}, eos_token_id=0,
    )  # fmt: skip
    GPTNeoXForCausalLM(config).save_pretrained(tmp_path / "base")
    model = load_causal_lm(tmp_path / "base", dtype=torch.float32)
    export_causal_lm(model, tokenizer, tmp_path / "actor")
    export_scalar_model(ScalarModel(model), tokenizer, tmp_path / "reward")
    for name in ("actor", "reward"):
        settings = json.loads((tmp_path / name / "config.json").read_text(encoding="utf-8"))
        assert settings["rotary_pct"] == 0.5, name
        settings = json.loads((tmp_path / name / "tokenizer_config.json").read_text(encoding="utf-8"))
        assert settings["tokenizer_class"] == "PreTrainedTokenizerFast", name
        assert settings["model_input_names"] == ["input_ids", "attention_mask"], name
        again = AutoTokenizer.from_pretrained(tmp_path / name)
        assert again("무엇인가요 3")["input_ids"] == tokenizer("무엇인가요 3")["input_ids"]


def test_a_tokenizer_with_a_class_of_its_own_keeps_it(tmp_path):
    path = tmp_path / "tokenizer_config.json"
    path.write_text('{"tokenizer_class": "GPT2Tokenizer"}', encoding="utf-8")
    name_older_tokenizer(tmp_path, ["input_ids"])
    assert path.read_text(encoding="utf-8") == '{"tokenizer_class": "GPT2Tokenizer"}'
