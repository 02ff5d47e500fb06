"""The trainers of the stages' scripts, built as those build them, over models and rows that a benchmark hands in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rlhf.algorithms.config import OfflineConfig, RewardConfig, SFTConfig
from rlhf.algorithms.ppo import PPOTrainer, ppo_optimizer_steps
from rlhf.algorithms.reward import RewardTrainer
from rlhf.algorithms.sft import SFTTrainer
from rlhf.config import (
    BatchConfig,
    EngineConfig,
    ModelConfig,
    OfflineDataConfig,
    OptimizerConfig,
    RewardDataConfig,
    RunConfig,
    SFTDataConfig,
)
from rlhf.data import StageData
from rlhf.engine import compute_dtype
from rlhf.models.loading import load_causal_lm, load_tokenizer
from rlhf.models.scalar import ScalarModel
from rlhf.pipeline.offline import OFFLINE_ALGORITHMS, prepared_data, referenced_data
from rlhf.pipeline.on_policy import OnPolicyModels
from rlhf.pipeline.stage_run import StageRun
from rlhf.pipeline.stages import STAGES, OfflineStageConfig, PPOStageConfig, RewardStageConfig, SFTStageConfig
from rlhf.training.loop import RunContext
from rlhf.training.offline import OfflineTrainer
from rlhf.types import TokenizedPrompt


def run_config(directory: Path, *, seed: int = 1) -> RunConfig:
    """A run that writes a line of metrics for every step and nothing else."""
    cache = str(directory / "cache")
    return RunConfig(output_dir=str(directory), cache_dir=cache, seed=seed, log_every_steps=1, tensorboard=False)


def offline_trainer(
    stage_name: str,
    model: str,
    rows: Sequence[Any],
    directory: Path,
    *,
    batch: BatchConfig,
    optimizer: OptimizerConfig,
    precision: Any,
    algorithm: str = "",
) -> OfflineTrainer[Any]:
    """The trainer of step 1 ("sft"), 2 ("reward") or 3 without sampling ("offline", `algorithm`) from the causal LM in
    `model`; nothing is held out or exported."""
    shared: dict[str, Any] = {
        "run": run_config(directory),
        "model": ModelConfig(),
        "engine": EngineConfig(precision=precision),
        "optimizer": optimizer,
        "batch": batch,
    }
    dtype, tokenizer = compute_dtype(precision), load_tokenizer(model)
    config: Any
    load: Callable[[], Any]
    trainer: Callable[..., OfflineTrainer[Any]]
    if stage_name == "offline":
        offline = OfflineConfig(algorithm=algorithm)  # type: ignore[arg-type]
        config = OfflineStageConfig(**shared, data=OfflineDataConfig(), offline=offline)
        load = partial(load_causal_lm, model, config.model, dtype=dtype)
        trainer = partial(OFFLINE_ALGORITHMS[algorithm].trainer, config=offline)
    elif stage_name == "sft":
        config = SFTStageConfig(**shared, data=SFTDataConfig(), sft=SFTConfig())
        load = partial(load_causal_lm, model, config.model, dtype=dtype)
        trainer = partial(SFTTrainer, config=config.sft)
    else:
        config = RewardStageConfig(**shared, data=RewardDataConfig(), reward=RewardConfig())
        load = partial(ScalarModel.from_base, model, config.model, dtype=dtype, seed=1)
        trainer = partial(RewardTrainer, config=config.reward)
    stage = StageRun(STAGES[stage_name], config, directory)
    data = StageData(list(rows), [], {}, "")
    total_steps = stage.planned_steps(data)
    engine = stage.training_engine(load, tokenizer, total_steps=total_steps)
    if stage_name == "offline":
        data = prepared_data(config, data)
        data = referenced_data(stage, engine, data, tokenizer.pad_token_id, base="", steps=total_steps)
    return trainer(
        engine,
        data,
        pad_token_id=tokenizer.pad_token_id,
        plan=stage.plan,
        total_steps=total_steps,
        export=lambda: None,
        context=RunContext(stage_name, config.run, directory, STAGES[stage_name].checks),
    )


def ppo_trainer(config: PPOStageConfig, prompts: Sequence[Sequence[int]], directory: Path) -> PPOTrainer:
    """The trainer of step 3 over prompts of these token ids; the models are those that `config.ppo` names."""
    examples = [TokenizedPrompt(id=str(row), input_ids=tuple(ids), text="") for row, ids in enumerate(prompts)]
    stage = StageRun(STAGES["ppo"], config, directory)
    models = OnPolicyModels.find(stage)
    steps = ppo_optimizer_steps(config.ppo, config.batch, stage.plan, len(examples))
    engine = models.build(stage, optimizer_steps=steps)
    return PPOTrainer(
        models.rollouts(stage, engine),
        StageData(examples, [], {}, ""),
        config.ppo,
        batch=config.batch,
        export=lambda: None,
        context=RunContext("ppo", config.run, directory, STAGES["ppo"].checks),
    )
