"""What the offline stage is put together from: a trainer for each algorithm, its reference, and sampled evaluations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from rlhf.algorithms.config import OfflineConfig
from rlhf.algorithms.kto import KTOTrainer, with_mismatches
from rlhf.algorithms.offline_losses import OFFLINE_LOSSES
from rlhf.algorithms.ppo import chosen_prompts
from rlhf.algorithms.preference import PreferenceTrainer
from rlhf.config import ConfigError
from rlhf.data.spec import DataError
from rlhf.data.stage_data import StageData
from rlhf.engine import RLHFEngine, inference_engine, zero3_loading
from rlhf.evaluation.gold import GOLD, measure_gold, of_the_world
from rlhf.generation.backend import make_backend
from rlhf.generation.token_sampling import Sampling
from rlhf.models.inner_model import eos_token_ids
from rlhf.pipeline.stage_run import StageRun
from rlhf.pipeline.stages import OfflineStageConfig
from rlhf.rewards.reward import RewardSources
from rlhf.rewards.rules import Ends
from rlhf.training.alignment import AlignmentTrainer, LiveReference
from rlhf.training.data_order import visited
from rlhf.training.reference_logprobs import response_log_likelihoods, with_reference, without_reference
from rlhf.training.rollouts import RolloutWorker
from rlhf.types import RankedBatch, ResponseBatch, TokenizedPrompt


@dataclass(frozen=True)
class OfflineAlgorithm:
    """What an algorithm learns from and what trains it.

    `kind` of its rows, see `load_stage_data`; `prepared` makes of all rows, with the seed, what `trainer` learns from.
    """

    kind: Literal["comparison", "labelled"]
    needs_reference: bool
    trainer: type[AlignmentTrainer[Any]]
    prepared: Callable[[Sequence[Any], int], Sequence[Any]]


OFFLINE_ALGORITHMS = {
    **{
        name: OfflineAlgorithm("comparison", loss.needs_reference, PreferenceTrainer, lambda rows, _: rows)
        for name, loss in OFFLINE_LOSSES.items()
    },
    "kto": OfflineAlgorithm("labelled", True, KTOTrainer, with_mismatches),
}
"""By the name that `algorithm` has in the configuration."""


def prepared_data(config: OfflineStageConfig, data: StageData) -> StageData:
    """`data` as the rows that the algorithm learns from. DataError where it can learn from no such rows, ConfigError
    where `keep_best` has no evaluation to choose from."""
    if config.offline.keep_best is not None and not data.evaluation:
        raise ConfigError(
            f"keep_best={config.offline.keep_best} chooses between evaluations, and without held-out rows there are "
            "none: name preference_eval_data, set eval_fraction above 0, or leave keep_best out"
        )
    prepared = OFFLINE_ALGORITHMS[config.offline.algorithm].prepared
    parts: dict[str, Any] = {}
    for name, rows, told in (
        ("train", data.train, "preference_data"),
        (
            "evaluation",
            data.evaluation,
            "the held-out rows (preference_eval_data, or eval_fraction of preference_data)",
        ),
    ):
        try:
            parts[name] = list(prepared(rows, config.run.seed))
        except DataError as error:
            raise DataError(f"{told}: {error}") from error
    return replace(data, **parts)


def referenced_data(
    stage: StageRun[OfflineStageConfig], engine: Any, data: StageData, pad_token_id: int, *, base: str, steps: int
) -> StageData:
    """`prepared_data` with what the reference says of the rows that `steps` steps visit and of the held-out ones, where
    the algorithm asks it beforehand. `base`: the fingerprint of the actor."""
    config = stage.config
    algorithm = OFFLINE_ALGORITHMS[config.offline.algorithm]
    known = algorithm.needs_reference and config.offline.reference == "cached"
    identity = {"model": base, "precision": config.engine.precision, "quantization": config.model.quantization}

    def referenced(rows: Sequence[Any]) -> list[Any]:
        if not known:
            return without_reference(rows)
        return with_reference(
            engine, rows, stage.plan, pad_token_id=pad_token_id, cache_dir=Path(config.run.cache_dir), identity=identity
        )

    train = without_reference(data.train)
    used = visited(len(train), stage.plan, config.run.seed, steps=steps)
    for index, row in zip(used, referenced([data.train[index] for index in used]), strict=True):
        train[index] = row
    return replace(data, train=train, evaluation=referenced(data.evaluation))


def live_reference(
    stage: StageRun[OfflineStageConfig], engine: Any, load: Callable[[], nn.Module]
) -> LiveReference | None:
    """The reference as a model: the one that `load` gives, or with LoRA the actor of `engine` without its adapter.

    None where the algorithm needs none, or has asked it beforehand.
    """
    config = stage.config
    if config.offline.reference == "cached" or not OFFLINE_ALGORITHMS[config.offline.algorithm].needs_reference:
        return None
    adapted = bool(config.model.lora_rank)
    reference = None
    if not adapted:
        with zero3_loading(config.engine, stage.plan):
            model = load()
        reference = inference_engine(model, engine=config.engine, plan=stage.plan)
    models = RLHFEngine(engine, reference=reference, reference_is_actor_without_adapter=adapted)

    def said(batch: RankedBatch | ResponseBatch) -> torch.Tensor:
        was_training = engine.training
        engine.eval()  # with LoRA it is the reference, without dropout
        with torch.no_grad(), models.reference_model() as model:
            found = response_log_likelihoods(model, batch)
        engine.train(was_training)
        return found

    return said


def held_out_prompts(
    stage: StageRun[OfflineStageConfig], tokenizer: Any
) -> tuple[list[TokenizedPrompt], frozenset[str]]:
    """The prompts of `prompt_eval_data` that are sampled, the same ones for a seed, none where none are named; and the
    keys of all that are there, which nothing is to be trained on.

    ConfigError where `keep_best` names a figure that they do not give.
    """
    config = stage.config
    if not config.data.prompt_eval_data:
        _check_kept(config.offline, [])
        return [], frozenset()
    data = stage.load_data(
        "prompt", config.data.prompt_eval_data, [], tokenizer, stage="ppo", report_name="prompts",
        field="prompt_eval_data",
    )  # fmt: skip
    everything = [*data.train, *data.evaluation]
    _check_kept(config.offline, everything)
    return list(chosen_prompts(everything, config.offline.eval_prompts, config.run.seed)), data.prompt_keys


def _check_kept(config: OfflineConfig, prompts: Sequence[TokenizedPrompt]) -> None:
    """ConfigError where `keep_best` names a figure that these held-out prompts do not give."""
    if config.keep_best == GOLD and not (prompts and all(map(of_the_world, prompts))):
        there = "not all of them are" if prompts else "none is named"
        raise ConfigError(
            f"keep_best=gold needs prompt_eval_data of the embedded world, which alone has a gold, and {there}: name "
            "sample:prompts_heldout, or leave keep_best out"
        )


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
