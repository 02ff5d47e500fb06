"""Builders of tiny random models of six architectures, and of their tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

ARCHITECTURES = ("gpt_neox", "llama", "gpt2", "opt", "qwen2", "gemma")
TOKENS = 90
ROWS = 96
"""Rows of the embedding: more than the tokenizer has tokens, as in Polyglot-ko."""


def tiny_config(architecture: str, **changes: Any) -> transformers.PretrainedConfig:
    """Two layers, hidden size 16, `ROWS` embedding rows."""
    shared = {"vocab_size": ROWS, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    llama_like = {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 2, "max_position_embeddings": 64,
    }  # fmt: skip
    makers: dict[str, Callable[[], transformers.PretrainedConfig]] = {
        "gpt_neox": lambda: transformers.GPTNeoXConfig(
            **{**shared, **{k: v for k, v in llama_like.items() if k != "num_key_value_heads"}, **changes}
        ),
        "llama": lambda: transformers.LlamaConfig(**{**shared, **llama_like, **changes}),
        "gpt2": lambda: transformers.GPT2Config(
            **{**shared, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, **changes}
        ),
        "opt": lambda: transformers.OPTConfig(
            **{
                **shared, "hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 32, "num_hidden_layers": 2,
                "num_attention_heads": 2, "max_position_embeddings": 64, **changes,
            }
        ),
        "qwen2": lambda: transformers.Qwen2Config(**{**shared, **llama_like, **changes}),
        "gemma": lambda: transformers.GemmaConfig(**{**shared, **llama_like, "head_dim": 8, **changes}),
    }  # fmt: skip
    return makers[architecture]()


def save_tiny_model(directory: Path, architecture: str, tokenizer: Any, *, seed: int = 0, **changes: Any) -> Path:
    """A random causal LM with visible weights, and the tokenizer, as a Hugging Face directory."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(tiny_config(architecture, **changes))
    with torch.no_grad():
        for parameter in model.parameters():  # the default 0.02 makes models whose outputs hardly differ
            if parameter.dim() >= 2:
                parameter.normal_(0.0, 0.3)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def make_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """A byte-level tokenizer of `TOKENS` tokens with an end-of-sequence token, which also pads."""
    kept = [letter for letter in sorted(pre_tokenizers.ByteLevel.alphabet()) if letter.isascii()] + ["Ġ"]
    vocabulary = {"<|endoftext|>": 0, **{letter: index + 1 for index, letter in enumerate(kept[: TOKENS - 1])}}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|endoftext|>")
    made.pad_token = made.eos_token
    return made
