"""Which configuration dataclasses each stage is made of, and how a stage's command line is parsed."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf.algorithms.ppo import PPOBatchConfig, PPOConfig, PPOOptimizerConfig
from rlhf.algorithms.reward import RewardConfig
from rlhf.algorithms.sft import SFTConfig
from rlhf.config import (
    BatchConfig,
    EngineConfig,
    ModelConfig,
    OptimizerConfig,
    PPODataConfig,
    RewardDataConfig,
    RunConfig,
    SFTDataConfig,
    parse_config,
)

STAGE_CONFIGS: dict[str, tuple[type, ...]] = {
    "sft": (RunConfig, ModelConfig, EngineConfig, OptimizerConfig, BatchConfig, SFTDataConfig, SFTConfig),
    "reward": (RunConfig, ModelConfig, EngineConfig, OptimizerConfig, BatchConfig, RewardDataConfig, RewardConfig),
    "ppo": (RunConfig, ModelConfig, EngineConfig, PPOOptimizerConfig, PPOBatchConfig, PPODataConfig, PPOConfig),
}
DEFAULT_CONFIG = Path(__file__).parents[1] / "training_scripts" / "configs" / "default.yaml"
"""Hyper-parameters that suit the embedded tiny model."""


def parse_stage(stage: str, argv: Sequence[str] | None = None) -> tuple[Any, ...]:
    """The configuration of `stage` ("sft", "reward", "ppo"), one instance per class of `STAGE_CONFIGS[stage]`."""
    known = {
        item.name for configs in STAGE_CONFIGS.values() for config in configs for item in dataclasses.fields(config)
    }
    default = DEFAULT_CONFIG if DEFAULT_CONFIG.is_file() else None
    return parse_config(stage, STAGE_CONFIGS[stage], argv, default_config=default, known_fields=known)
