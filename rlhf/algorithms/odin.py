"""ODIN (arXiv 2402.07319): a head for length is trained beside the one for quality, and takes what follows length.

L = BT(r_Q + r_L) + lambda_L (|rho(r_Q, L)| - rho(r_L, L)) + lambda_O |W_Q W_L^T|
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rlhf.distributed.collectives import all_gather_rows
from rlhf.distributed.place import rank


def pearson(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Pearson's correlation of two vectors [N], with its gradient; 0 where one of them is constant."""
    first, second = first - first.mean(), second - second.mean()
    return (first * second).sum() / ((first**2).sum() * (second**2).sum()).clamp(min=1e-12).sqrt()


def length_loss(quality: torch.Tensor, length: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """|rho(r_Q, L)| - rho(r_L, L): ODIN (arXiv 2402.07319), the loss of the length head.

    `quality` and `length` [N] are what the two heads say of N responses of `tokens` [N] tokens, rho is Pearson's
    correlation. The length head takes what follows length, either way; the quality head is left none of it.
    """
    return pearson(quality, tokens).abs() - pearson(length, tokens)


def orthogonality_loss(rows: torch.Tensor) -> torch.Tensor:
    """|W_Q W_L^T| of `rows` [2, H], the weights of the quality and the length head, each scaled to length 1 (ODIN)."""
    return (rows[0] * rows[1]).sum().abs()


@dataclass(frozen=True)
class LengthPull:
    """`length_loss` of a global batch as a sum over its rows: what each row of this rank adds to its gradient.

    `value` and `correlations` (rho of quality, rho of length) are those of the global batch; `gradient` [n, 2] is the
    derivative by what the two heads say of this rank's rows.
    """

    value: torch.Tensor
    correlations: tuple[float, float]
    gradient: torch.Tensor

    @classmethod
    def of(cls, quality: torch.Tensor, length: torch.Tensor, tokens: torch.Tensor) -> LengthPull:
        """From this rank's rows [n] of the global batch; a collective.

        A correlation is not a sum over rows, so that its mean over micro-batches or ranks would be another loss.
        """
        mine = torch.stack([quality.double(), length.double(), tokens.double()], dim=1)
        counts = all_gather_rows(torch.tensor([len(mine)], device=mine.device))
        start = int(counts[: rank()].sum())
        rows = all_gather_rows(mine)
        with torch.enable_grad():
            heads = rows[:, :2].detach().requires_grad_()
            value = length_loss(heads[:, 0], heads[:, 1], rows[:, 2])
            (gradient,) = torch.autograd.grad(value, heads)
        found = tuple(float(pearson(rows[:, column], rows[:, 2])) for column in (0, 1))
        return cls(value.detach(), (found[0], found[1]), gradient[start : start + len(mine)])

    def split(self, rows: list[int]) -> list[LengthPull]:
        """The parts of micro-batches with so many `rows` each."""
        return [LengthPull(self.value, self.correlations, part) for part in self.gradient.split(rows)]

    def surrogate(self, quality: torch.Tensor, length: torch.Tensor) -> torch.Tensor:
        """0, with the gradient of the length loss by these rows [n]."""
        pulled = (self.gradient * torch.stack([quality, length], dim=1).double()).sum()
        return pulled - pulled.detach()
