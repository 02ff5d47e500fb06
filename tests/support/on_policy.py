"""PPO over whatever models and rewards a test hands in, with the parts that are not its subject filled in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from rlhf.algorithms.config import PPOBatchConfig, PPOConfig
from rlhf.algorithms.ppo import PPOTrainer, PtxMixture
from rlhf.config import RunConfig
from rlhf.data.stage_data import StageData
from rlhf.engine import BatchPlan
from rlhf.generation.backend import make_backend
from rlhf.generation.token_sampling import Sampling
from rlhf.models.inner_model import eos_token_ids
from rlhf.pipeline.stages import STAGES
from rlhf.rewards.reward import RewardSources
from rlhf.rewards.reward_model import RewardModel
from rlhf.training.loop import RunContext
from rlhf.training.rollouts import RolloutWorker
from rlhf.types import Responses, RewardOutput, Rollout, TokenizedPrompt, TokenizedResponse


class FunctionReward:
    """A reward from `function(rollout, prompt texts) -> scores [B]`."""

    training_range = None

    def __init__(self, function: Callable[[Rollout, list[str]], torch.Tensor]) -> None:
        self.function = function

    def score(self, responses: Responses) -> RewardOutput:
        return RewardOutput(self.function(responses.rollout, [prompt.text for prompt in responses.prompts]))


def stage_data(train: Sequence[Any], evaluation: Sequence[Any] = ()) -> StageData:
    """Rows as a stage's data."""
    return StageData(list(train), list(evaluation), {}, "")


def context(directory: Path, stage: str = "ppo", **run: Any) -> RunContext:
    """A run without TensorBoard and without training states."""
    row = STAGES[stage]
    return RunContext(stage, RunConfig(tensorboard=False, **run), directory, row.checks, logged=row.logged)


def reward_of(model: Any, tokenizer: Any, actor_tokenizer: Any = None, *, eos_ids: Sequence[int] = (0,)) -> RewardModel:
    """The reward that a scalar model gives."""
    return RewardModel(RewardSources(actor_tokenizer or tokenizer, tuple(eos_ids), model, tokenizer))


def responses_to(
    rollout: Rollout, tokenizer: Any, texts: Sequence[str] | None = None, *, eos_ids: Sequence[int] = (0,)
) -> Responses:
    """What a reward is given of a rollout whose prompts read `texts`."""
    rows = [ids[mask].tolist() for ids, mask in zip(rollout.response_ids, rollout.response_mask.bool(), strict=True)]
    prompts = [TokenizedPrompt(str(index), (1,), text) for index, text in enumerate(texts or [""] * len(rows))]
    ended = torch.tensor([bool(row) and row[-1] in eos_ids for row in rows])
    return Responses(rollout, prompts, tokenizer.batch_decode(rows, skip_special_tokens=True), ended)


def ppo_trainer(
    engine: Any,
    reward: Any,
    prompts: Sequence[TokenizedPrompt],
    evaluation: Sequence[TokenizedPrompt] = (),
    *,
    tokenizer: Any,
    plan: BatchPlan,
    directory: Path,
    new_tokens: int = 6,
    ptx: Sequence[TokenizedResponse] = (),
    config: PPOConfig | None = None,
    batch: PPOBatchConfig | None = None,
    seed: int = 1,
) -> PPOTrainer:
    """A trainer that writes a line of metrics for every iteration."""
    config, batch = config or PPOConfig(), batch or PPOBatchConfig()
    eos_ids = eos_token_ids(engine.actor, tokenizer)
    pad = tokenizer.pad_token_id
    backend = make_backend(
        config.generation_backend, engine.actor, eos_ids=eos_ids, pad_token_id=pad, seed=seed,
        slots=batch.generation_batch_size,
    )  # fmt: skip
    rollouts = RolloutWorker(
        engine,
        backend,
        reward,
        Sampling(new_tokens, temperature=config.temperature, vocabulary_size=len(tokenizer)),
        tokenizer=tokenizer,
        eos_ids=eos_ids,
        plan=plan,
        scoring_tokens=batch.scoring_batch_tokens,
        old_logprobs=config.old_logprobs,
    )
    mixture = PtxMixture(stage_data(ptx), plan, coef=config.ptx_coef, pad_token_id=pad, seed=seed) if ptx else None
    return PPOTrainer(
        rollouts,
        stage_data(prompts, evaluation),
        config,
        batch=batch,
        export=lambda: None,
        context=context(directory, log_every_steps=1, seed=seed),
        ptx=mixture,
    )
