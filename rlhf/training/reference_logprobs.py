"""Log-probabilities of whole responses: of a batch, and those of a reference, computed once and kept."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from rlhf.checkpoint.atomic import replaced_file
from rlhf.data.collate import collate_rankings
from rlhf.distributed.collectives import all_gather_rows
from rlhf.distributed.log import logger
from rlhf.distributed.place import is_main, rank, world_size
from rlhf.models.token_logprobs import token_logprobs
from rlhf.training.data_order import Plan
from rlhf.types import RankedBatch, TokenizedRanking


@dataclass(frozen=True)
class ReferencedRanking:
    """A ranking with the log-probability that the reference gives each of its K responses, 0 where none is asked."""

    ranking: TokenizedRanking
    ref_logprobs: tuple[float, ...]

    @property
    def category(self) -> str:
        return self.ranking.category


def response_log_likelihoods(model: nn.Module, batch: RankedBatch) -> torch.Tensor:
    """log pi of each whole response, its end included: sums over tokens [N], float32."""
    mask = batch.attention_mask.bool()
    places = torch.arange(mask.shape[1], device=mask.device)
    ends = mask.sum(1, keepdim=True)
    scored = mask & (places >= ends - batch.lengths.unsqueeze(1))
    return token_logprobs(model, batch.input_ids, mask, scored)[0].sum(1)


def without_reference(rankings: Sequence[TokenizedRanking]) -> list[ReferencedRanking]:
    """Rankings for a loss that needs no reference."""
    return [ReferencedRanking(each, (0.0,) * len(each.candidates)) for each in rankings]


def with_reference(
    engine: Any,
    rankings: Sequence[TokenizedRanking],
    plan: Plan,
    *,
    pad_token_id: int,
    cache_dir: Path,
    identity: Mapping[str, Any],
) -> list[ReferencedRanking]:
    """Rankings with what `engine`'s model says of them as it is now: the actor before it learns is its own reference.

    Computed over all ranks, and kept under `cache_dir` for the next run of the same rankings and `identity` (model,
    precision). A collective.
    """
    if not rankings:
        return []
    file = cache_dir / "reference" / f"{_key(rankings, identity)}.safetensors"
    there = all_gather_rows(torch.tensor([int(file.is_file())], device=engine.device))
    if bool(there.all()):
        found = load_file(file)["ref_logprobs"]
        logger.info("reference log-probabilities of %d rankings: from %s", len(rankings), file)
    else:
        found = _compute(engine, rankings, plan, pad_token_id)
        if is_main():
            file.parent.mkdir(parents=True, exist_ok=True)
            with replaced_file(file) as part:
                save_file({"ref_logprobs": found}, part)
            logger.info("reference log-probabilities of %d rankings: computed, kept in %s", len(rankings), file)
    sizes = [len(each.candidates) for each in rankings]
    values = [part.tolist() for part in found.split(sizes)]
    return [ReferencedRanking(each, tuple(row)) for each, row in zip(rankings, values, strict=True)]


@torch.no_grad()
def _compute(engine: Any, rankings: Sequence[TokenizedRanking], plan: Plan, pad_token_id: int) -> torch.Tensor:
    """log pi of every candidate, in order [sum of K]."""
    lengths = [sum(len(candidate.input_ids) for candidate in each.candidates) for each in rankings]
    parts = plan.micro_batches(lengths)
    while len(parts) % world_size():  # every rank takes equally many: a forward may be a collective
        parts.append(parts[-1])
    sizes = torch.tensor([len(each.candidates) for each in rankings])
    starts = sizes.cumsum(0) - sizes
    was_training = engine.training
    engine.eval()
    tables = []
    for part in parts[rank() :: world_size()]:
        chosen = [rankings[index] for index in part]
        batch = collate_rankings(chosen, pad_token_id, {each.category: 0 for each in chosen})
        numbers = torch.cat([starts[index] + torch.arange(int(sizes[index])) for index in part])
        said = response_log_likelihoods(engine, batch.to(engine.device)).double().cpu()
        tables.append(torch.stack([numbers.double(), said], dim=1))
    engine.train(was_training)
    table = all_gather_rows(torch.cat(tables).to(engine.device)).cpu()
    found = torch.zeros(int(sizes.sum()))
    found[table[:, 0].long()] = table[:, 1].float()
    return found


def _key(rankings: Sequence[TokenizedRanking], identity: Mapping[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode())
    for each in rankings:
        for candidate in each.candidates:
            digest.update(str((candidate.prompt_tokens, candidate.input_ids)).encode())
    return digest.hexdigest()[:32]
