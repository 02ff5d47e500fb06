"""`from_pretrained` of transformers, quantised where asked, dropout set, and no weight left to chance."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from rlhf.config import ConfigError, ModelConfig
from rlhf.distributed.log import logger
from rlhf.distributed.world import init_world
from rlhf.models.directories import explain_read_errors

PLAIN = ModelConfig()
"""How a model is loaded where nothing is said: not quantised, no dropout."""
DROPOUT_FIELDS = (
    "attention_dropout", "hidden_dropout", "activation_dropout", "dropout", "attn_pdrop", "resid_pdrop", "embd_pdrop",
    "attn_dropout", "resid_dropout", "residual_dropout", "embed_dropout", "embedding_dropout", "ffn_dropout",
    "layerdrop", "attention_probs_dropout_prob", "hidden_dropout_prob",
)  # fmt: skip
"""Names that model configurations of `transformers` give to their dropout probabilities."""


def from_pretrained(auto_class: Any, path: str | Path, config: ModelConfig = PLAIN, *, dtype: torch.dtype) -> Any:
    """`auto_class.from_pretrained` of a model that is no adapter, with the quantisation and dropout of `config`.

    Raises ConfigError when it cannot be read or lacks a weight.
    """
    options: dict[str, Any] = {}
    if config.quantization != "none":
        options.update(quantization_config=quantization_config(config.quantization), device_map={"": init_world()})
    with explain_read_errors(path, "model"):
        architecture = AutoConfig.from_pretrained(path, trust_remote_code=config.trust_remote_code)
        set_dropout(architecture, config.model_dropout)
        model, report = auto_class.from_pretrained(
            path,
            config=architecture,
            dtype=dtype,
            attn_implementation=working_attention(auto_class, architecture, config.attn_implementation),
            trust_remote_code=config.trust_remote_code,
            output_loading_info=True,
            **options,
        )
    if config.quantization != "none":
        return_freed_memory()
    missing = sorted(set(report["missing_keys"]) - set(getattr(model, "all_tied_weights_keys", None) or {}))
    if missing:
        raise ConfigError(
            f"{path} lacks {len(missing)} weights of {type(model).__name__}, which would start at random: "
            f"{', '.join(missing[:4])}{' ...' if len(missing) > 4 else ''}; give a complete checkpoint"
        )
    return model


def working_attention(auto_class: Any, architecture: Any, wanted: str) -> str:
    """`wanted`, or eager where that is sdpa and the model cannot be computed by it: soft-capped scores, sinks."""
    known = type(architecture) in auto_class._model_mapping
    if wanted != "sdpa" or not known:
        return wanted
    found = auto_class._model_mapping[type(architecture)]
    if all(kind._supports_sdpa for kind in (found if isinstance(found, tuple) else (found,))):
        return wanted
    logger.info(
        "attn_implementation: sdpa does not compute the attention of a %s model (capped scores, or sinks); "
        "eager is taken, and rows are padded",
        architecture.model_type,
    )
    return "eager"


def quantization_config(quantization: str) -> Any:
    """LLM.int8 for `8bit`; NF4 with double quantisation and bf16 arithmetic for `4bit` (QLoRA, arXiv 2305.14314)."""
    from transformers import BitsAndBytesConfig

    if quantization not in ("8bit", "4bit"):
        raise ConfigError(f"quantization={quantization!r} is not one of none, 8bit, 4bit")
    if quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def set_dropout(config: Any, dropout: float) -> None:
    """Set every dropout probability of a model configuration; ConfigError where it has none and `dropout` > 0."""
    names = [name for name in DROPOUT_FIELDS if isinstance(getattr(config, name, None), int | float)]
    for name in names:
        setattr(config, name, dropout if name != "layerdrop" else 0.0)
    if dropout > 0 and not set(names) - {"layerdrop"}:
        raise ConfigError(f"model_dropout={dropout}: a {config.model_type} model has no dropout; set it to 0")


def return_freed_memory() -> None:
    """Give the pages of freed memory back to the system (glibc alone; elsewhere nothing happens).

    Quantising goes through 16- or 32-bit copies layer by layer, and what they leave free is scattered over the heap:
    twice the size of the 4-bit weights stays with the process otherwise.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
