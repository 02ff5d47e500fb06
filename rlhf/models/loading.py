"""Tokenizers and models from a directory or a hub name: adapters merged, quantised where asked, no weight missing."""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import MODEL_MAPPING, AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

from rlhf.config import ConfigError
from rlhf.distributed import init_world, rank_zero_first
from rlhf.models.model_call import innermost

SCALAR_HEAD_FILE = "scalar_head.safetensors"
"""The file beside a backbone that makes a directory a reward model or a critic."""
ADAPTER_CONFIG_FILE = "adapter_config.json"
DROPOUT_FIELDS = (
    "attention_dropout", "hidden_dropout", "activation_dropout", "dropout", "attn_pdrop", "resid_pdrop", "embd_pdrop",
    "attn_dropout", "resid_dropout", "residual_dropout", "embed_dropout", "embedding_dropout", "ffn_dropout",
    "layerdrop", "attention_probs_dropout_prob", "hidden_dropout_prob",
)  # fmt: skip
"""Names that model configurations of `transformers` give to their dropout probabilities."""


def load_tokenizer(path: str | Path, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a model; padding falls back to the end-of-sequence token, so the vocabulary never grows.

    Raises ConfigError when it cannot be read or has no end-of-sequence token.
    """
    _check_path(path)
    with _explained(path, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            f"the tokenizer of {path} has no end-of-sequence token, without which a model cannot learn to stop; "
            f"set `eos_token` in its tokenizer_config.json"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_causal_lm(
    path: str | Path,
    *,
    dtype: torch.dtype,
    attn_implementation: str = "sdpa",
    quantization: str = "none",
    trust_remote_code: bool = False,
    dropout: float = 0.0,
) -> Any:
    """A causal language model with its language-modelling head, its embedding exactly as long as it was saved.

    A LoRA adapter directory is merged in float32 once, into `<path>/merged/`, and read from there, so that it can be
    quantised, partitioned, or be the base of another adapter. Raises ConfigError for a path that holds no such model.
    """
    check_causal_directory(path)
    return load_pretrained(
        AutoModelForCausalLM,
        path,
        dtype=dtype,
        attn_implementation=attn_implementation,
        quantization=quantization,
        trust_remote_code=trust_remote_code,
        dropout=dropout,
    )


def check_causal_directory(path: str | Path) -> None:
    """ConfigError for a local path that holds no model, or a reward model or critic."""
    _check_path(path)
    if _is_file(path, SCALAR_HEAD_FILE):
        raise ConfigError(
            f"{path} is a reward model or critic ({SCALAR_HEAD_FILE} is there) and has no language-modelling head; "
            f"give the directory of a causal language model, such as the output of step1_sft"
        )


def load_backbone(path: str | Path, **options: Any) -> Any:
    """The base model without its language-modelling head, from a causal LM or a scalar model directory.

    `options` are those of `load_causal_lm`.
    """
    _check_path(path)
    return load_pretrained(AutoModel, path, **options)


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


def load_pretrained(
    auto_class: Any,
    path: str | Path,
    *,
    dtype: torch.dtype,
    attn_implementation: str = "sdpa",
    quantization: str = "none",
    trust_remote_code: bool = False,
    dropout: float = 0.0,
) -> Any:
    """`auto_class.from_pretrained` with adapters merged, quantisation, dropout set, and no weight left out."""
    path = merged_path(path, dtype=dtype, trust_remote_code=trust_remote_code)
    options: dict[str, Any] = {}
    if quantization != "none":
        options.update(quantization_config=quantization_config(quantization), device_map={"": init_world()})
    with _explained(path, "model"):
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
        set_dropout(config, dropout)
        model, report = auto_class.from_pretrained(
            path,
            config=config,
            dtype=dtype,
            attn_implementation=attn_implementation,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            **options,
        )
    if quantization != "none":
        return_freed_memory()
    missing = sorted(set(report["missing_keys"]) - set(getattr(model, "all_tied_weights_keys", None) or {}))
    if missing:
        raise ConfigError(
            f"{path} lacks {len(missing)} weights of {type(model).__name__}, which would start at random: "
            f"{', '.join(missing[:4])}{' ...' if len(missing) > 4 else ''}; give a complete checkpoint"
        )
    return model


def return_freed_memory() -> None:
    """Give the pages of freed memory back to the system (glibc alone; elsewhere nothing happens).

    Quantising goes through 16- or 32-bit copies layer by layer, and what they leave free is scattered over the heap:
    twice the size of the 4-bit weights stays with the process otherwise.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


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


def merged_path(path: str | Path, *, dtype: torch.dtype, trust_remote_code: bool = False) -> str:
    """`path` itself, or for an adapter directory the plain model directory that it is merged into (once, by rank 0).

    The name of the merged directory follows the adapter's content, so a changed adapter is merged anew.
    """
    with _explained(path, "model"):
        config_file = _adapter_config(path)
    if config_file is None:
        return str(path)
    from rlhf.models.lora import merge_adapter

    adapter = Path(config_file).absolute().parent
    digest = hashlib.sha256()
    for file in sorted(adapter.glob("adapter_*")):
        digest.update(file.name.encode() + file.read_bytes())
    merged = adapter / "merged" / f"{digest.hexdigest()[:12]}-{str(dtype).removeprefix('torch.')}"
    if not merged.exists() and not os.access(adapter, os.W_OK):
        raise ConfigError(
            f"the adapter {path} must be merged before use and {adapter} cannot be written; merge it yourself with "
            f"`python -m rlhf.models.lora merge {path} OUT_DIR` and use OUT_DIR"
        )
    rank_zero_first(merged, lambda: merge_adapter(adapter, merged, dtype, trust_remote_code=trust_remote_code))
    return str(merged)


def adapter_base(path: str | Path) -> str | None:
    """The base that the adapter directory `path` names, or None: no adapter, or its base is not there any more."""
    file = Path(path) / ADAPTER_CONFIG_FILE
    if not file.is_file():
        return None
    base = json.loads(file.read_text(encoding="utf-8")).get("base_model_name_or_path")
    return None if not base or (Path(base).is_absolute() and not Path(base).is_dir()) else str(base)


def base_key(path: str | Path) -> str:
    """Equal for two names of one directory: links are followed, merges of one adapter differ in dtype alone."""
    if not Path(path).is_dir():
        return str(path)
    real = Path(path).resolve()
    if real.parent.name == "merged" and (real.parent.parent / ADAPTER_CONFIG_FILE).is_file():
        return str(real.parent / re.sub(r"^([0-9a-f]{12})-\w+$", r"\1", real.name))
    return str(real)


def _adapter_config(path: str | Path) -> str | None:
    if Path(path).is_dir():
        file = Path(path) / ADAPTER_CONFIG_FILE
        return str(file) if file.is_file() else None
    from transformers.utils import find_adapter_config_file

    found: str | None = find_adapter_config_file(str(path))
    if found is None:
        return None
    from huggingface_hub import snapshot_download

    return str(Path(snapshot_download(str(path))) / ADAPTER_CONFIG_FILE)  # the adapter's weights as well


def _is_file(path: str | Path, name: str) -> bool:
    return (Path(path) / name).is_file()


def _check_path(path: str | Path) -> None:
    """ConfigError for what looks like a local path and is not a model directory."""
    text = str(path)
    local = Path(text)
    if local.is_dir():
        if not any(_is_file(local, name) for name in ("config.json", ADAPTER_CONFIG_FILE)):
            held = ", ".join(sorted(entry.name for entry in local.iterdir())[:8]) or "nothing"
            raise ConfigError(
                f"{local} is not a model directory: it has neither config.json nor {ADAPTER_CONFIG_FILE} "
                f"(it holds {held})"
            )
    elif local.is_absolute() or text.startswith((".", "~")) or text.count("/") != 1 or local.exists():
        if text.count("/") == 0 and not local.exists() and not text.startswith((".", "~")):
            return  # a hub name without an owner, such as gpt2
        kind = "a file, not a directory" if local.exists() else "not there"
        raise ConfigError(f"model directory {local} is {kind} (looked in {Path.cwd()})")


@contextmanager
def _explained(path: str | Path, what: str) -> Iterator[None]:
    """Turn the errors of reading `path` into one that says where was looked."""
    try:
        yield
    except ConfigError:
        raise
    except (OSError, ValueError) as error:
        if Path(path).is_dir():
            raise ConfigError(f"cannot read the {what} in {path}: {error}") from error
        raise ConfigError(
            f"cannot load the {what} {path}: there is no such directory in {Path.cwd()}, and the hub has no such name "
            f"or cannot be reached ({str(error).splitlines()[0]}); give a model directory, or download it first"
        ) from error
