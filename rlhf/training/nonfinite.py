"""What happens when a number is not finite: the run stops on all ranks, says where, and keeps what did it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from rlhf.distributed.collectives import all_gather_rows
from rlhf.distributed.place import is_main, rank, world_size
from rlhf.doctor.findings import finding
from rlhf.doctor.monitor import record_stop
from rlhf.types import TensorBatch, TokenizedPrompt

ROLLOUT_ENGINES = {
    "scores": "reward",
    "token_rewards": "reward",
    "values": "critic",
    "ref_logprobs": "reference",
    "logprobs": "actor",
}
"""Which engine says what of a rollout, in the order they are looked at."""


class NonFiniteError(RuntimeError):
    """A number that is not finite, with the step, the engine and the first tensor; raised on all ranks."""


def loss_error(
    engine: Any, engine_name: str, name: str, step: int, micro_batches: Sequence[Any], parts: Sequence[torch.Tensor],
    directory: Path | None,
) -> NonFiniteError:  # fmt: skip
    """The error of a loss that is not finite; `parts` are this rank's, one for each micro-batch. A collective."""
    from rlhf.engine.gradients import first_nonfinite_weight

    mine = torch.stack(list(parts)).sum() if parts else torch.zeros((), device=engine.device)
    per_rank = all_gather_rows(mine.float().reshape(1)).tolist()
    bad = [index for index, part in enumerate(parts) if not bool(torch.isfinite(part))]
    weight = first_nonfinite_weight(engine)
    shares = ", ".join(f"rank {index}: {part}" for index, part in enumerate(per_rank) if not _finite(part))
    where = f"its part of {shares}"
    if bad:
        where += f"; first in micro-batch {bad[0] + 1} of {len(parts)} on rank {rank()}"
    where += f"; the weight {weight} is not finite already" if weight else "; all weights are finite"
    kept = _dump(directory, [micro_batches[index] for index in bad] or micro_batches, step, engine_name)
    return _stopped(directory, engine_name, step, f"{name} is not finite at step {step} ({where}){kept}")


def gradient_error(
    engine: Any, engine_name: str, name: str, step: int, micro_batches: Sequence[Any], directory: Path | None,
    repeat: Callable[[], None] | None,
) -> NonFiniteError:  # fmt: skip
    """The error of a gradient that is not finite under a finite loss. A collective.

    `repeat` runs the backward passes again where DeepSpeed has thrown the gradients away; no weight has changed.
    """
    from rlhf.engine.gradients import first_nonfinite_gradient

    if repeat is not None:
        repeat()
    parameter = first_nonfinite_gradient(engine)
    first = f"first that of {parameter}" if parameter else "found in the gradient norm, in no single gradient"
    where = f"{first}; the loss is finite, no weight has changed"
    kept = _dump(directory, micro_batches, step, engine_name)
    return _stopped(
        directory, engine_name, step, f"the gradient of {name} is not finite at step {step} ({where}){kept}"
    )


def check_rollout(scored: Any, examples: Sequence[TokenizedPrompt], iteration: int, directory: Path) -> None:
    """NonFiniteError when a model says something that is not finite of a rollout; names the row and its prompt.

    `scored` is a `rlhf.training.rollouts.ScoredRollout` with all rows, the same on every rank.
    """
    for name, engine_name in ROLLOUT_ENGINES.items():
        found = getattr(scored, name)
        finite = torch.isfinite(found.reshape(len(found), -1)).all(1)
        if bool(finite.all()):
            continue
        rows = (~finite).nonzero().squeeze(1)
        first = int(rows[0])
        kept = _dump(directory, [scored.rollout.rows(rows)], iteration, engine_name)
        prompt = " ".join(examples[first].text.split())[-80:]
        raise _stopped(
            directory, engine_name, iteration,
            f"{name} of the rollout are not finite at iteration {iteration}: {len(rows)} of {len(finite)} rows, first "
            f"row {first}, prompt {examples[first].id!r} (...{prompt}){kept}",
        )  # fmt: skip


def _stopped(directory: Path | None, engine_name: str, step: int, message: str) -> NonFiniteError:
    found = finding("not_finite", "critical", step, step, f"engine {engine_name}: {message}", float("inf"))
    if directory is not None and is_main():
        record_stop(directory, found)
    return NonFiniteError(f"{found.message}. {found.meaning} Try: {found.remedy}")


def _finite(value: float) -> bool:
    return abs(value) < float("inf")  # false for nan too


def _dump(directory: Path | None, batches: Sequence[Any], step: int, engine_name: str) -> str:
    """Write `batches` to `nonfinite_batch_rank<R>.safetensors`; a clause that names the file, or why there is none."""
    if directory is None or not batches:
        return ""
    path = directory / f"nonfinite_batch_rank{rank()}.safetensors"
    tensors = {name: value for index, batch in enumerate(batches) for name, value in _tensors(str(index), batch)}
    try:
        directory.mkdir(parents=True, exist_ok=True)
        save_file(tensors, path, metadata={"step": str(step), "engine": engine_name, "rank": str(rank())})
    except (OSError, SafetensorError) as error:
        return f"; the batch could not be written to {path}: {error}"
    beside = f" and beside it those of the other {world_size() - 1} ranks" if world_size() > 1 else ""
    return f"; the batch is in {path}{beside}"


def _tensors(prefix: str, batch: Any) -> list[tuple[str, torch.Tensor]]:
    if isinstance(batch, torch.Tensor):
        return [(prefix, batch.detach().cpu().clone().contiguous())]
    if not isinstance(batch, TensorBatch):
        return []
    pairs = ((item.name, getattr(batch, item.name)) for item in fields(batch))  # type: ignore[arg-type]
    return [found for name, value in pairs for found in _tensors(f"{prefix}.{name}", value)]
