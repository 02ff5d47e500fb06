"""How many tokens a model can read, by its configuration alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from rlhf.config import ConfigError
from rlhf.models.directories import adapter_config_file, check_model_path, explain_read_errors

STRETCHED = frozenset({"linear", "dynamic", "yarn"})
"""Rotary scalings whose factor is not yet in `max_position_embeddings` (in that of llama3 and longrope it is)."""


def check_positions(
    path_or_config: str | Path | PreTrainedConfig, needed_tokens: int, *, what: str, trust_remote_code: bool = False
) -> None:
    """ConfigError when the model `what` (such as "the actor") has fewer positions than `needed_tokens`.

    `needed_tokens` is max_prompt_tokens + max_response_tokens. No weight is read. A rotary model is held to the length
    that its configuration names: beyond it nothing fails and its answers decay. A model without a limit passes.
    """
    config, place = path_or_config, ""
    if not isinstance(config, PreTrainedConfig):
        place = f" {config}"
        config = model_config(config, trust_remote_code=trust_remote_code)
    limit = max_positions(config)
    if limit is not None and needed_tokens > limit:
        raise ConfigError(
            f"{what}{place} has {limit} positions, and max_prompt_tokens + max_response_tokens is {needed_tokens}: "
            f"together they may be {limit}. What is above your longest prompt or response (data.json of a run counts "
            "what was cut) can go and changes nothing; below that, lower max_prompt_tokens if long prompts may lose "
            "their beginning, else max_response_tokens, and either changes the training"
        )


def max_positions(config: Any) -> int | None:
    """The longest sequence a model of this configuration is made for, in tokens; None without a limit.

    Rotary scaling counts: `original_max_position_embeddings`, or the length there is, times its factor.
    """
    config = config.get_text_config()
    attention = getattr(config, "attn_config", None)  # of MPT
    if getattr(config, "alibi", False) or getattr(attention, "alibi", False):
        return None  # a length is named that attention biases do not need
    limit = getattr(config, "max_position_embeddings", None) or getattr(config, "max_seq_len", None)
    if not isinstance(limit, int):
        return None
    scaling = getattr(config, "rope_parameters", None) or {}
    if scaling.get("rope_type") in STRETCHED:
        original = scaling.get("original_max_position_embeddings") or limit
        limit = max(limit, int(original * float(scaling.get("factor") or 1.0)))
    return limit


def model_config(path: str | Path, *, trust_remote_code: bool = False) -> Any:
    """The configuration of the model in `path`, of an adapter that of its base. ConfigError where none can be read."""
    check_model_path(path)
    with explain_read_errors(path, "model"):
        adapter = adapter_config_file(path)
        if adapter is not None:
            base = json.loads(Path(adapter).read_text(encoding="utf-8")).get("base_model_name_or_path")
            if not base:
                raise ConfigError(f"{adapter} names no base model; set base_model_name_or_path")
            return model_config(base, trust_remote_code=trust_remote_code)
        return AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
