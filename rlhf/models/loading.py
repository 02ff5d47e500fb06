"""Tokenizers, causal language models and backbones from a directory or a hub name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import MODEL_MAPPING, AutoModel, AutoModelForCausalLM, AutoTokenizer

from rlhf.config import ConfigError, ModelConfig
from rlhf.models.directories import check_causal_directory, check_model_path, explain_read_errors
from rlhf.models.inner_model import innermost
from rlhf.models.merge import merged_path
from rlhf.models.pretrained import PLAIN, from_pretrained


def load_tokenizer(path: str | Path, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a model; padding falls back to the end-of-sequence token, so the vocabulary never grows.

    Raises ConfigError when it cannot be read or has no end-of-sequence token.
    """
    check_model_path(path)
    with explain_read_errors(path, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            f"the tokenizer of {path} has no end-of-sequence token, without which a model cannot learn to stop; "
            f"set `eos_token` in its tokenizer_config.json"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_causal_lm(path: str | Path, config: ModelConfig = PLAIN, *, dtype: torch.dtype) -> Any:
    """A causal language model with its language-modelling head, its embedding exactly as long as it was saved.

    Of `config` count attention, quantisation, dropout and trust in remote code. A LoRA adapter directory is merged in
    float32 once, into `<path>/merged/`, and read from there, so that it can be quantised, partitioned, or be the base
    of another adapter. Raises ConfigError for a path that holds no such model.
    """
    check_causal_directory(path)
    return _load(AutoModelForCausalLM, path, config, dtype)


def load_backbone(path: str | Path, config: ModelConfig = PLAIN, *, dtype: torch.dtype) -> Any:
    """The base model without its language-modelling head, from a causal LM or a scalar model directory.

    Otherwise as `load_causal_lm`.
    """
    check_model_path(path)
    return _load(AutoModel, path, config, dtype)


def backbone_of(causal_lm: Any) -> Any:
    """The module under the language-modelling head, or None where `load_backbone` would give another kind of module.

    It carries the marks of quantisation that `transformers` sets on the outer model.
    """
    inner = causal_lm.base_model
    known = MODEL_MAPPING.get(type(causal_lm.config), ())
    if inner is causal_lm or type(inner) not in (known if isinstance(known, tuple) else (known,)):
        return None
    for name in ("is_loaded_in_8bit", "is_loaded_in_4bit", "is_quantized", "quantization_method", "hf_quantizer"):
        if name in vars(causal_lm):
            setattr(inner, name, getattr(causal_lm, name))
    return inner


def check_vocabulary(model: nn.Module, tokenizer: Any) -> None:
    """ConfigError when the tokenizer has ids that the embedding has no row for; spare rows are fine.

    Polyglot-ko has 30,003 tokens in 30,080 rows.
    """
    inner: Any = innermost(model)
    weight = inner.get_input_embeddings().weight
    rows = int(getattr(weight, "ds_shape", weight.shape)[0])
    if rows < len(tokenizer):
        raise ConfigError(
            f"the tokenizer has {len(tokenizer)} tokens and the model's embedding {rows} rows; "
            f"use the tokenizer that was saved with the model"
        )


def _load(auto_class: Any, path: str | Path, config: ModelConfig, dtype: torch.dtype) -> Any:
    whole = merged_path(path, dtype=dtype, trust_remote_code=config.trust_remote_code)
    return from_pretrained(auto_class, whole, config, dtype=dtype)
