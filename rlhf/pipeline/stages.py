"""Which configuration dataclasses each stage is made of, and how a stage's command line is parsed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rlhf.algorithms.ppo import EmptyRolloutError, PPOBatchConfig, PPOConfig, PPOOptimizerConfig
from rlhf.algorithms.reward import RewardConfig
from rlhf.algorithms.sft import SFTConfig
from rlhf.config import (
    EMBEDDED_BASE,
    BatchConfig,
    ConfigError,
    EngineConfig,
    ModelConfig,
    OptimizerConfig,
    PPODataConfig,
    RewardDataConfig,
    RunConfig,
    SFTDataConfig,
    check_together,
    parse_config,
)
from rlhf.distributed import close_world, setup_logging
from rlhf.distributed.job_exit import run_to_end
from rlhf.training.nonfinite import NonFiniteError

STAGE_CONFIGS: dict[str, tuple[type, ...]] = {
    "sft": (RunConfig, ModelConfig, EngineConfig, OptimizerConfig, BatchConfig, SFTDataConfig, SFTConfig),
    "reward": (RunConfig, ModelConfig, EngineConfig, OptimizerConfig, BatchConfig, RewardDataConfig, RewardConfig),
    "ppo": (RunConfig, ModelConfig, EngineConfig, PPOOptimizerConfig, PPOBatchConfig, PPODataConfig, PPOConfig),
}
DEFAULT_CONFIG = Path(__file__).parents[2] / "training_scripts" / "configs" / "default.yaml"
"""Hyper-parameters that suit the embedded tiny model."""


def parse_stage(stage: str, argv: Sequence[str] | None = None) -> tuple[Any, ...]:
    """The configuration of `stage` ("sft", "reward", "ppo"), one instance per class of `STAGE_CONFIGS[stage]`."""
    known = {
        item.name for configs in STAGE_CONFIGS.values() for config in configs for item in dataclasses.fields(config)
    }
    default = DEFAULT_CONFIG if DEFAULT_CONFIG.is_file() else None
    configs = parse_config(stage, STAGE_CONFIGS[stage], argv, default_config=default, known_fields=known)
    _, model, engine, *_ = configs
    check_together(model, engine)
    return configs


def run_stage(main: Callable[[], Any]) -> None:
    """Run a stage's `main`; what a user can mend ends it with a sentence, not with a traceback."""
    from rlhf.data import DataError

    setup_logging()
    run_to_end(main, (ConfigError, DataError, NonFiniteError, EmptyRolloutError))
    close_world()


def resolve_base_model(base_model: str, cache_dir: Path) -> str:
    """The model to load: `default` is built from the embedded corpus on first use (about a minute) and kept."""
    if base_model != EMBEDDED_BASE:
        return base_model
    from rlhf.data import embedded_corpus
    from rlhf.models.tiny_base import build_tiny_base

    return str(build_tiny_base(embedded_corpus(), cache_dir))


def find_stage_model(given: str | None, field: str, output_dir: str, stage: str) -> str:
    """The directory an earlier stage saved: the one named, or that of `output_dir`.

    Raises ConfigError that says how to make it when it is not there.
    """
    if given is not None:
        return given
    path = Path(output_dir) / stage / "model"
    if not path.is_dir():
        script = {"sft": "step1_sft", "reward": "step2_reward"}[stage]
        raise ConfigError(
            f"{path} not found: PPO needs the model that {script} saves. Run `deepspeed {script}/main.py "
            f"--output_dir {output_dir}` first, or name a directory with --{field}"
        )
    return str(path)


def paired_samples(before: Sequence[dict[str, Any]], after: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Responses of the SFT and the PPO actor to the same prompts, with their scores."""
    return [
        {
            "prompt": first["prompt"],
            "sft": first["response"],
            "ppo": second["response"],
            "score_sft": first["score"],
            "score_ppo": second["score"],
        }
        for first, second in zip(before, after, strict=True)
    ]
