"""Direct preference optimisation, and what differs from it in the loss of a pair alone."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from rlhf.algorithms.candidates import Candidates
from rlhf.algorithms.config import OfflineConfig


def log_ratios(given: Candidates, *, by_token: bool = False) -> torch.Tensor:
    """log pi / pi_ref of the better response less that of the worse one: [M]; `by_token`: each over its tokens."""
    ratios = given.logprobs - given.ref_logprobs
    if by_token:
        ratios = ratios / given.tokens
    better, worse = given.pairs
    return ratios[better] - ratios[worse]


def dpo_margin(given: Candidates, config: OfflineConfig) -> torch.Tensor:
    """The difference of the implicit rewards, beta h [M]; h as in `log_ratios`.

    With `length_coef` alpha that of length-regularised DPO (R-DPO, arXiv 2403.19159, eq. 9): alpha (|y_w| - |y_l|) is
    added, so that a longer winner need not be raised as far.
    """
    better, worse = given.pairs
    longer = (given.tokens[better] - given.tokens[worse]).to(given.logprobs.dtype)
    return config.of("beta") * log_ratios(given) + config.of("length_coef") * longer


def dpo_loss(given: Candidates, config: OfflineConfig) -> torch.Tensor:
    """-log sigmoid(margin): DPO, arXiv 2305.18290, eq. 7.

    With `label_smoothing` e, the share of the pairs whose label is wrong: conservative DPO, -(1 - e) log sigmoid(m) - e
    log sigmoid(-m) (Mitchell 2023, "A note on DPO with noisy preferences", eq. 3); and with `robust` its unbiased form,
    (-(1 - e) log sigmoid(m) + e log sigmoid(-m)) / (1 - 2 e) (arXiv 2403.00409, eq. 12).
    """
    margin, wrong = dpo_margin(given, config), config.of("label_smoothing")
    right, flipped = -F.logsigmoid(margin), -F.logsigmoid(-margin)
    if config.robust:
        return given.mean_over_pairs(((1 - wrong) * right - wrong * flipped) / (1 - 2 * wrong))
    return given.mean_over_pairs((1 - wrong) * right + wrong * flipped)


def ipo_margin(given: Candidates, config: OfflineConfig) -> torch.Tensor:
    """beta h of the log-ratios by token [M]."""
    return config.of("beta") * log_ratios(given, by_token=True)


def ipo_loss(given: Candidates, config: OfflineConfig) -> torch.Tensor:
    """(h - 1 / (2 beta))^2: IPO, arXiv 2310.12036, eq. 17 with tau = beta.

    h is of log-ratios by token, as its authors computed it and TRL does: by response the loss would grow with length.
    """
    return given.mean_over_pairs((log_ratios(given, by_token=True) - 1 / (2 * config.of("beta"))) ** 2)
