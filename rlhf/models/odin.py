"""A reward model with a head for length beside that for quality, while it trains (ODIN, arXiv 2402.07319)."""

from __future__ import annotations

import torch
from torch import nn

from rlhf.models.forward import hidden_states
from rlhf.models.scalar import ScalarHead, ScalarModel


class OdinHead(ScalarHead):
    """A scalar head with two rows, W_Q for quality and W_L for length, which says its rows too.

    They are given from inside the forward pass because ZeRO-3 has the whole weights nowhere else.
    """

    def __init__(self, hidden_size: int, *, seed: int) -> None:
        super().__init__(hidden_size, seed=seed, outputs=2)

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        """hidden [..., H] -> values [..., 2] float32, and the rows [2, H] scaled to length 1."""
        return super().forward(hidden), nn.functional.normalize(self.weight.float(), dim=1)


class OdinModel(ScalarModel):
    """A `ScalarModel` that says quality and length from the same features.

    `save_pretrained` writes the quality head alone: what is saved is an ordinary reward model.
    """

    head_class = OdinHead

    def forward(  # type: ignore[override]
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Values of quality and of length, [B, L] float32 each, of rows padded on either side; the head's rows [2, H]
        scaled to length 1."""
        hidden, padded = hidden_states(self.backbone, input_ids, attention_mask)
        values, rows = self.scalar_head(hidden)
        return padded(values[:, 0]), padded(values[:, 1]), rows
