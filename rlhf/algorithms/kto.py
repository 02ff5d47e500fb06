"""KTO: responses that are good or bad each, without pairs (Ethayarajh et al., arXiv 2402.01306)."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rlhf.algorithms.config import OfflineConfig
from rlhf.data.collate import collate_with_lengths
from rlhf.data.spec import DataError
from rlhf.data.stage_data import StageData
from rlhf.distributed.collectives import all_gather_rows, all_reduce_sum
from rlhf.distributed.log import logger
from rlhf.training.alignment import AlignmentTrainer
from rlhf.training.reference_logprobs import Referenced, response_log_likelihoods
from rlhf.types import ResponseBatch, TensorBatch, TokenizedLabel, TokenizedResponse

BALANCED = (1.0, 4 / 3)
"""What good responses should weigh in all beside the bad ones (arXiv 2402.01306, eq. 9)."""


def reference_point(log_ratios: torch.Tensor) -> torch.Tensor:
    """z_0 = max(0, mean of log pi / pi_ref) of responses that belong to other prompts [B]: arXiv 2402.01306, section
    4.1, an estimate of the KL divergence below which no reward counts as a gain. No gradient goes through it."""
    return log_ratios.detach().mean().clamp(min=0.0)


def kto_margins(log_ratios: torch.Tensor, good: torch.Tensor, kl: torch.Tensor, beta: float) -> torch.Tensor:
    """By how much each reward log pi / pi_ref lies on the right side of `kl`: beta (r - z_0) of a good response, beta
    (z_0 - r) of a bad one [B]."""
    gain = beta * (log_ratios - kl)
    return torch.where(good, gain, -gain)


def kto_loss(
    margins: torch.Tensor, good: torch.Tensor, *, desirable_weight: float, undesirable_weight: float
) -> torch.Tensor:
    """lambda_y (1 - sigmoid(margin)) summed over responses: arXiv 2402.01306, eq. 8, with lambda_D of the good ones and
    lambda_U of the bad ones."""
    weights = torch.where(good, desirable_weight, undesirable_weight)
    return (weights * torch.sigmoid(-margins)).sum()


@dataclass(frozen=True)
class MatchedLabel:
    """A labelled response, and its prompt with the response to another one, by which the KL divergence is estimated."""

    label: TokenizedLabel
    mismatched: TokenizedResponse

    @property
    def candidates(self) -> tuple[TokenizedResponse, TokenizedResponse]:
        """What the reference is asked about."""
        return self.label.response, self.mismatched

    @property
    def id(self) -> str:
        return self.label.id

    @property
    def category(self) -> str:
        return self.label.category


def with_mismatches(rows: Sequence[TokenizedLabel], seed: int) -> list[MatchedLabel]:
    """Each row with the response of another row, drawn with `seed`, whose prompt is another one.

    DataError where all rows have one prompt.
    """
    prompts = [row.response.input_ids[: row.response.prompt_tokens] for row in rows]
    if rows and len(set(prompts)) == 1:
        raise DataError(
            f"kto compares with responses to other prompts, and all {len(rows)} rows have the same one "
            f"({rows[0].id!r} is the first): give rows of at least two prompts"
        )
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    found: dict[int, MatchedLabel] = {}
    for place, index in enumerate(order):
        following = (order[(place + step) % len(order)] for step in range(1, len(order)))
        other = rows[next(each for each in following if prompts[each] != prompts[index])].response
        said = prompts[index] + other.input_ids[other.prompt_tokens :]
        mismatched = TokenizedResponse(other.id, said, len(prompts[index]), other.category)
        found[index] = MatchedLabel(rows[index], mismatched)
    return [found[index] for index in range(len(rows))]


@dataclass(frozen=True)
class KTOBatch(TensorBatch):
    """B labelled responses, as many mismatched ones, `good` [B] bool, and what the reference says of both [B, 2]."""

    own: ResponseBatch
    mismatched: ResponseBatch
    good: torch.Tensor
    ref_logprobs: torch.Tensor


class KTOTrainer(AlignmentTrainer[KTOBatch]):
    """Learns `kto_loss`, averaged over the responses of the global batch, of all of which z_0 is one estimate."""

    def __init__(self, engine: Any, data: StageData, config: OfflineConfig, **loop: Any) -> None:
        super().__init__(engine, data, eval_every_steps=config.eval_every_steps, keep_best=config.keep_best, **loop)
        self.config = config
        self.kl = torch.zeros((), device=self.device)
        self._tell_balance()

    def _tell_balance(self) -> None:
        good = sum(example.row.label.good for example in self.train)
        bad = len(self.train) - good
        weight, other = self.config.of("desirable_weight") * good, self.config.of("undesirable_weight") * bad
        logger.info("kto: %d good and %d bad responses", good, bad)
        low, high = BALANCED
        if not low * other * 0.99 <= weight <= high * other * 1.01:
            logger.warning(
                "kto: all good responses together weigh %.3g, all bad ones %.3g; its authors advise 1 to 4/3 times as "
                "much: see desirable_weight and undesirable_weight", weight, other,
            )  # fmt: skip

    def length(self, example: Referenced[MatchedLabel]) -> int:
        return sum(len(candidate.input_ids) for candidate in example.row.candidates)

    def collate(self, examples: Sequence[Referenced[MatchedLabel]]) -> KTOBatch:
        own, mismatched = (
            collate_with_lengths([example.row.candidates[place] for example in examples], self.pad_token_id)
            for place in range(2)
        )
        good = torch.tensor([example.row.label.good for example in examples])
        return KTOBatch(own, mismatched, good, torch.tensor([example.ref_logprobs for example in examples]))

    def loss_count(self, batch: KTOBatch) -> float:
        return float(len(batch))

    @torch.no_grad()
    def before_step(self, batches: Sequence[KTOBatch]) -> None:
        """Estimate z_0 on the global batch, as the actor is now."""
        self.engine.eval()
        ratios = torch.cat([self.mismatched_ratios(batch) for batch in batches])
        self.engine.train()
        total = all_reduce_sum(torch.stack([ratios.sum(), torch.full_like(ratios[0], len(ratios))]))
        self.kl = reference_point(total[:1] / total[1])

    def mismatched_ratios(self, batch: KTOBatch) -> torch.Tensor:
        """log pi / pi_ref of the responses to other prompts [B]."""
        known = self.reference(batch.mismatched, batch.ref_logprobs[:, 1])
        return response_log_likelihoods(self.engine, batch.mismatched) - known

    def loss_sum(self, batch: KTOBatch) -> torch.Tensor:
        reference = self.reference(batch.own, batch.ref_logprobs[:, 0])
        logprobs = response_log_likelihoods(self.engine, batch.own)
        margins = kto_margins(logprobs - reference, batch.good, self.kl, self.config.of("beta"))
        with torch.no_grad():
            table = torch.stack([margins, logprobs / batch.own.lengths, reference / batch.own.lengths], dim=1)
            self._tell(table.detach(), batch.good)
        return self._loss(margins, batch.good)

    def _loss(self, margins: torch.Tensor, good: torch.Tensor) -> torch.Tensor:
        weights = {name: self.config.of(name) for name in ("desirable_weight", "undesirable_weight")}
        return kto_loss(margins, good, **weights)

    def _tell(self, table: torch.Tensor, good: torch.Tensor) -> None:
        """Meter what is logged of responses with margin, log-probability by token and the reference's [B, 3]."""
        for mask, sums in self._sums(table, good):
            self.meter.add(sums, float(mask.sum()))
        self.meter.add({"kl": self.kl}, 1)

    @staticmethod
    def _sums(table: torch.Tensor, good: torch.Tensor) -> list[tuple[torch.Tensor, dict[str, torch.Tensor]]]:
        """What is logged, as sums over the rows of a mask of 0 and 1."""
        margins, logprobs, reference = table.unbind(1)
        every, better, worse = (mask.to(table) for mask in (torch.ones_like(good), good, ~good))
        right = (margins > 0).to(margins) + 0.5 * (margins == 0).to(margins)
        return [
            (every, {"accuracy": right.sum(), "margin": margins.sum()}),
            (better, {"chosen_logprob": logprobs @ better, "chosen_shift": (logprobs - reference) @ better}),
            (worse, {"rejected_logprob": logprobs @ worse}),
        ]

    def held_out(self) -> dict[str, float]:
        """With z_0 of all held-out rows together."""
        parts = []
        for batch, counted in self.evaluation_batches():
            on_device = batch.to(self.device)
            known = self.reference(on_device.own, on_device.ref_logprobs[:, 0])
            logprobs = response_log_likelihoods(self.engine, on_device.own)
            columns = [logprobs, known, self.mismatched_ratios(on_device), on_device.own.lengths, on_device.good]
            parts.append(torch.stack([column.to(logprobs) for column in columns], dim=1)[:counted])
        table = all_gather_rows(torch.cat(parts)).double().cpu()
        logprobs, known, mismatched, tokens, labels = table.unbind(1)
        good, kl = labels.bool(), reference_point(mismatched)
        margins = kto_margins(logprobs - known, good, kl, self.config.of("beta"))
        by_token = torch.stack([margins, logprobs / tokens, known / tokens], dim=1)
        found = {"loss": float(self._loss(margins, good)) / len(good), "kl": float(kl)}
        for mask, sums in self._sums(by_token, good):
            found |= {name: float(value / mask.sum()) for name, value in sums.items() if mask.any()}
        return found
