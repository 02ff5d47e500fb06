"""What an offline stage is put together from beside its trainer: responses sampled at its evaluations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rlhf.algorithms.ppo import chosen_prompts
from rlhf.engine import RLHFEngine
from rlhf.evaluation.gold import measure_gold
from rlhf.generation.backend import make_backend
from rlhf.generation.token_sampling import Sampling
from rlhf.models.inner_model import eos_token_ids
from rlhf.pipeline.stage_run import StageRun
from rlhf.pipeline.stages import OfflineStageConfig
from rlhf.rewards.reward import RewardSources
from rlhf.rewards.rules import Ends
from rlhf.training.rollouts import RolloutWorker
from rlhf.types import TokenizedPrompt


def held_out_prompts(stage: StageRun[OfflineStageConfig], tokenizer: Any) -> list[TokenizedPrompt]:
    """The prompts of `prompt_eval_data` that are sampled, the same ones for a seed; none where none are named."""
    config = stage.config
    if not config.data.prompt_eval_data:
        return []
    data = stage.load_data(
        "prompt", config.data.prompt_eval_data, [], tokenizer, stage="ppo", report_name="prompts",
        field="prompt_eval_data",
    )  # fmt: skip
    return list(chosen_prompts([*data.train, *data.evaluation], config.offline.eval_prompts, config.run.seed))


def sampled_evaluation(
    stage: StageRun[OfflineStageConfig], engine: Any, tokenizer: Any, prompts: list[TokenizedPrompt]
) -> Callable[[], dict[str, Any]] | None:
    """What samples the actor's responses to `prompts` and says what they are like; None without prompts.

    See `RolloutWorker.evaluate`; nothing scores them but the share that ends.
    """
    if not prompts:
        return None
    config = stage.config
    eos_ids = eos_token_ids(engine, tokenizer)
    backend = make_backend(
        "own", engine, eos_ids=eos_ids, pad_token_id=tokenizer.pad_token_id, seed=config.run.seed,
        slots=config.offline.generation_batch_size,
    )  # fmt: skip
    worker = RolloutWorker(
        RLHFEngine(engine),
        backend,
        Ends(RewardSources(tokenizer, tuple(eos_ids))),
        Sampling(
            config.data.max_response_tokens, temperature=config.offline.temperature, vocabulary_size=len(tokenizer)
        ),
        tokenizer=tokenizer,
        eos_ids=eos_ids,
        plan=stage.plan,
        old_logprobs="sampled",
        measure=measure_gold,
    )
    offline = config.offline
    return lambda: worker.evaluate(
        prompts, copies=offline.eval_samples_per_prompt, shown=offline.sample_table_rows, further=lambda _: {}
    )
