"""Supervised fine-tuning: imitate the responses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from rlhf.algorithms.config import SFTConfig
from rlhf.data.collate import collate_responses
from rlhf.data.stage_data import StageData
from rlhf.training.metrics import MeanMeter
from rlhf.training.offline import OfflineTrainer
from rlhf.training.scoring import label_loss
from rlhf.types import IGNORE_INDEX, TokenBatch, TokenizedResponse


class SFTTrainer(OfflineTrainer[TokenBatch]):
    """Cross-entropy of the response tokens, averaged over the tokens of the global batch."""

    def __init__(self, engine: Any, data: StageData, config: SFTConfig, *, pad_token_id: int, **loop: Any) -> None:
        super().__init__(engine, data, eval_every_steps=config.eval_every_steps, **loop)
        self.config = config
        self.pad_token_id = pad_token_id

    def length(self, example: TokenizedResponse) -> int:
        return len(example.input_ids)

    def collate(self, examples: Sequence[TokenizedResponse]) -> TokenBatch:
        return collate_responses(examples, self.pad_token_id, whole_text=self.config.loss_on == "whole_text")

    def loss_count(self, batch: TokenBatch) -> float:
        return float((batch.labels[:, 1:] != IGNORE_INDEX).sum())

    def loss_sum(self, batch: TokenBatch) -> torch.Tensor:
        return label_loss(self.engine, batch)

    def evaluate(self) -> dict[str, Any]:
        """Loss in nats per token and perplexity on the held-out rows."""
        meter = MeanMeter()
        for batch, counted in self.evaluation_batches():
            batch.labels[counted:] = IGNORE_INDEX
            moved = batch.to(self.engine.device)
            meter.add({"eval_loss": self.loss_sum(moved)}, self.loss_count(moved))
        loss = meter.means(self.engine.device)["eval_loss"]
        rows = float(len(self.evaluation))
        return {"eval_loss": loss, "eval_perplexity": math.exp(min(loss, 700.0)), "eval_rows": rows}
