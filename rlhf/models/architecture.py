"""What the configuration of a model says before a weight is read: whether it can be trained as asked, and its size."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING, AutoModelForCausalLM

from rlhf.config import ConfigError, ModelConfig
from rlhf.models.directories import check_model_path
from rlhf.models.experts import check_no_experts
from rlhf.models.lora import linear_module_names, resolve_targets
from rlhf.models.positions import model_config
from rlhf.models.pretrained import set_dropout

WEIGHT_FILES = ("model*.safetensors", "adapter_model.safetensors", "pytorch_model*.bin", "adapter_model.bin")


@dataclass(frozen=True)
class ModelSize:
    """Numbers of weights: all of the base, and those that train with the configuration it was counted for."""

    weights: int
    trainable: int


def check_trainable(path: str | Path, config: ModelConfig, *, what: str) -> None:
    """Check that the causal LM in `path` can train as `config` says; no weight is read.

    Raises ConfigError, naming the field `what`, for a model that is no causal LM, a directory without weights, a
    mixture of experts, LoRA targets that match nothing, dropout that the model does not have, and packages that are not
    installed.
    """
    check_weights_there(path)
    check_packages(config)
    architecture = model_config(path, trust_remote_code=config.trust_remote_code)
    if not _generates(architecture):
        raise ConfigError(
            f"{what} {path} is a {architecture.model_type} model, which transformers does not load as a causal "
            "language model; give one that generates text from left to right, such as GPT-NeoX or Llama"
        )
    check_no_experts(architecture)
    if config.model_dropout > 0:
        set_dropout(architecture, config.model_dropout)
    if config.lora_rank > 0:
        resolve_targets(_without_weights(path, config), config.lora_targets)


def check_vocabulary_size(path: str | Path, tokenizer: Any, *, what: str, trust_remote_code: bool = False) -> None:
    """ConfigError where the configuration in `path` has fewer rows of the embedding than `tokenizer` has ids."""
    rows = getattr(model_config(path, trust_remote_code=trust_remote_code).get_text_config(), "vocab_size", None)
    if isinstance(rows, int) and rows < len(tokenizer):
        raise ConfigError(
            f"{what} {path} has an embedding of {rows} rows, and the tokenizer of the run {len(tokenizer)} tokens; use "
            "the tokenizer that was saved with the model"
        )


def _generates(architecture: Any) -> bool:
    """Whether transformers has a model of this configuration that generates text from left to right.

    BERT and its relatives can be made to: they are encoders all the same, whose attention looks ahead.
    """
    if "AutoModelForCausalLM" in (getattr(architecture, "auto_map", None) or {}):
        return True
    encoder = type(architecture) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(architecture, "is_decoder", False)
    return type(architecture) in MODEL_FOR_CAUSAL_LM_MAPPING and not encoder


def model_size(path: str | Path, config: ModelConfig) -> ModelSize:
    """The size of the causal LM in `path`, or of the backbone of a reward model or critic there, by its configuration.

    Raises ConfigError for LoRA targets that match nothing.
    """
    model = _without_weights(path, config)
    weights = sum(weight.numel() for weight in model.parameters())
    if config.lora_rank == 0:
        return ModelSize(weights, weights)
    targets = resolve_targets(model, config.lora_targets)
    return ModelSize(weights, config.lora_rank * sum(_sides(model, name) for name in _matched(model, targets)))


def _without_weights(path: str | Path, config: ModelConfig) -> Any:
    """The modules of a causal LM, on no device. It takes torch a second to learn how, the first time."""
    architecture = model_config(path, trust_remote_code=config.trust_remote_code)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(architecture, trust_remote_code=config.trust_remote_code)


def check_weights_there(path: str | Path) -> None:
    """ConfigError for a model directory in which no file of weights lies, or only what stands for one in git."""
    check_model_path(path)
    directory = Path(path)
    if not directory.is_dir():
        return  # a hub name: its files are known once it is downloaded
    found = [file for pattern in WEIGHT_FILES for file in directory.glob(pattern)]
    if not found:
        raise ConfigError(
            f"{directory} has a configuration and no weights (looked for {', '.join(WEIGHT_FILES)}); "
            "is a download or a copy incomplete?"
        )
    for index in directory.glob("*.index.json"):
        needed = set(json.loads(index.read_text(encoding="utf-8")).get("weight_map", {}).values())
        missing = sorted(name for name in needed if not (directory / name).is_file())
        if missing:
            raise ConfigError(
                f"{directory} lacks {len(missing)} of the {len(needed)} files that {index.name} names: "
                f"{', '.join(missing[:3])}{' ...' if len(missing) > 3 else ''}; is a download or a copy incomplete?"
            )
    for file in found:
        with file.open("rb") as opened:
            if opened.read(40).startswith(b"version https://git-lfs"):
                raise ConfigError(f"{file} is a git-lfs pointer and not the weights; run `git lfs pull` in {directory}")


def check_packages(config: ModelConfig) -> None:
    """ConfigError for a package that `config` needs and that is not installed."""
    if config.quantization != "none" and importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            f"quantization={config.quantization} needs bitsandbytes: pip install 'rlhf[quantization]', or set none"
        )
    if config.attn_implementation == "flash_attention_2" and importlib.util.find_spec("flash_attn") is None:
        raise ConfigError(
            "attn_implementation=flash_attention_2 needs the package flash-attn, which is not installed; use sdpa"
        )


def _matched(model: Any, targets: list[str]) -> list[str]:
    names = linear_module_names(model)
    return [name for name in names if any(name == target or name.endswith(f".{target}") for target in targets)]


def _sides(model: nn.Module, name: str) -> int:
    """Inputs plus outputs of a linear module, which one unit of rank has weights for."""
    return sum(model.get_submodule(name).weight.shape)  # type: ignore[union-attr, arg-type]
