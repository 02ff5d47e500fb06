"""Log-probabilities of whole responses: of a batch, and those of a reference, computed once and kept."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from rlhf.checkpoint.atomic import replaced_file
from rlhf.data.collate import collate_with_lengths
from rlhf.distributed.collectives import all_gather_rows
from rlhf.distributed.log import logger
from rlhf.distributed.place import is_main, rank, world_size
from rlhf.models.token_logprobs import token_logprobs
from rlhf.training.data_order import Plan
from rlhf.types import RankedBatch, ResponseBatch, TokenizedResponse


class Compared(Protocol):
    """A row of which the reference is asked about K responses."""

    @property
    def id(self) -> str: ...

    @property
    def category(self) -> str: ...

    @property
    def candidates(self) -> Sequence[TokenizedResponse]: ...


Row = TypeVar("Row", bound=Compared)


@dataclass(frozen=True)
class Referenced(Generic[Row]):
    """A row with the log-probability that the reference gives each of its K responses, 0 where none is asked."""

    row: Row
    ref_logprobs: tuple[float, ...]

    @property
    def category(self) -> str:
        return self.row.category


def response_log_likelihoods(model: nn.Module, batch: RankedBatch | ResponseBatch) -> torch.Tensor:
    """log pi of each whole response, its end included: sums over tokens [N], float32."""
    mask = batch.attention_mask.bool()
    places = torch.arange(mask.shape[1], device=mask.device)
    ends = mask.sum(1, keepdim=True)
    scored = mask & (places >= ends - batch.lengths.unsqueeze(1))
    return token_logprobs(model, batch.input_ids, mask, scored)[0].sum(1)


def without_reference(rows: Sequence[Row]) -> list[Referenced[Row]]:
    """Rows for a loss that needs no reference, or asks it live."""
    return [Referenced(each, (0.0,) * len(each.candidates)) for each in rows]


def with_reference(
    engine: Any,
    rows: Sequence[Row],
    plan: Plan,
    *,
    pad_token_id: int,
    cache_dir: Path,
    identity: Mapping[str, Any],
) -> list[Referenced[Row]]:
    """Rows with what `engine`'s model says of them as it is now: the actor before it learns is its own reference.

    Computed over all ranks, and kept under `cache_dir` for the next run of the same rows and `identity` (model,
    precision). A collective.
    """
    if not rows:
        return []
    file = cache_dir / "reference" / f"{_key(rows, identity)}.safetensors"
    there = all_gather_rows(torch.tensor([int(file.is_file())], device=engine.device))
    if bool(there.all()):
        found = load_file(file)["ref_logprobs"]
        logger.info("reference log-probabilities of %d rows: from %s", len(rows), file)
    else:
        found = _compute(engine, rows, plan, pad_token_id)
        if is_main():
            file.parent.mkdir(parents=True, exist_ok=True)
            with replaced_file(file) as part:
                save_file({"ref_logprobs": found}, part)
            logger.info("reference log-probabilities of %d rows: computed, kept in %s", len(rows), file)
    values = [part.tolist() for part in found.split([len(each.candidates) for each in rows])]
    return [Referenced(each, tuple(said)) for each, said in zip(rows, values, strict=True)]


@torch.no_grad()
def _compute(engine: Any, rows: Sequence[Compared], plan: Plan, pad_token_id: int) -> torch.Tensor:
    """log pi of every candidate, in order [sum of K]."""
    lengths = [sum(len(candidate.input_ids) for candidate in each.candidates) for each in rows]
    parts = plan.micro_batches(lengths)
    while len(parts) % world_size():  # every rank takes equally many: a forward may be a collective
        parts.append(parts[-1])
    sizes = torch.tensor([len(each.candidates) for each in rows])
    starts = sizes.cumsum(0) - sizes
    was_training = engine.training
    engine.eval()
    tables = []
    for part in parts[rank() :: world_size()]:
        batch = collate_with_lengths([one for index in part for one in rows[index].candidates], pad_token_id)
        numbers = torch.cat([starts[index] + torch.arange(int(sizes[index])) for index in part])
        said = response_log_likelihoods(engine, batch.to(engine.device)).double().cpu()
        tables.append(torch.stack([numbers.double(), said], dim=1))
    engine.train(was_training)
    table = all_gather_rows(torch.cat(tables).to(engine.device)).cpu()
    found = torch.zeros(int(sizes.sum()))
    found[table[:, 0].long()] = table[:, 1].float()
    return found


def _key(rows: Sequence[Compared], identity: Mapping[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode())
    for each in rows:
        for candidate in each.candidates:
            digest.update(str((candidate.prompt_tokens, candidate.input_ids)).encode())
    return digest.hexdigest()[:32]
