"""Saved adapters on a model without a head."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from rlhf.config import ConfigError
from rlhf.models.classifier import ADAPTER_PREFIX, HEAD_NAMES
from rlhf.models.directories import ADAPTER_CONFIG_FILE


def load_adapter(base: Any, path: str | Path, *, trainable: bool, gradient_checkpointing: bool = False) -> Any:
    """The saved adapter in `path` on the backbone `base`, unmerged, without dropout.

    All that trains is the adapter, or nothing. The head of an adapter that makes a sequence classifier is left out.
    Raises ConfigError when the directory lacks a weight of the adapter it describes, or they do not fit.
    """
    from peft import PeftConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
    from peft.utils import load_peft_weights

    config = PeftConfig.from_pretrained(str(path))
    weights = load_peft_weights(str(path), device="cpu")
    if config.task_type == "SEQ_CLS":
        weights = _of_the_backbone(weights, base.base_model_prefix)
        config.modules_to_save = [name for name in config.modules_to_save or () if name not in HEAD_NAMES] or None
        config.task_type = "FEATURE_EXTRACTION"
    config.lora_dropout = 0.0
    config.inference_mode = not trainable
    if gradient_checkpointing:
        # with a frozen embedding no input of a checkpointed block would need a gradient, and the adapter gets none
        base.enable_input_require_grads()
    base.requires_grad_(False)
    try:
        adapted: Any = get_peft_model(base, config)
        wanted = get_peft_model_state_dict(adapted, save_embedding_layers=False).keys()
        set_peft_model_state_dict(adapted, weights)
    except (RuntimeError, ValueError) as error:  # shapes, target modules
        raise ConfigError(
            f"the adapter {path} does not fit its base {base.name_or_path}: {str(error).splitlines()[0]}; "
            f"name the base that it was trained on in {ADAPTER_CONFIG_FILE}"
        ) from error
    missing = sorted(wanted - weights.keys())
    if missing:
        raise ConfigError(
            f"the adapter {path} lacks {len(missing)} of its weights, which would start at random: "
            f"{', '.join(missing[:4])}; give a complete adapter"
        )
    name_base(adapted, base)
    return adapted


def name_base(adapted: Any, base: Any) -> None:
    """Write the absolute path of the base into the adapter, so that it is found from any working directory."""
    source = Path(str(base.name_or_path))
    if source.is_dir():
        adapted.peft_config["default"].base_model_name_or_path = str(source.absolute())


def _of_the_backbone(weights: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """The names that the adapter of a whole classifier would have on its backbone alone."""
    inner = f"{ADAPTER_PREFIX}{prefix}."
    return {
        ADAPTER_PREFIX + name.removeprefix(inner): tensor for name, tensor in weights.items() if name.startswith(inner)
    }
