"""The offline losses by the name that `algorithm` has in the configuration: a new one is a file and a row."""

from __future__ import annotations

from rlhf.algorithms.candidates import OfflineLoss
from rlhf.algorithms.dpo import dpo_loss, dpo_margin, ipo_loss, ipo_margin
from rlhf.algorithms.orpo import orpo_loss, orpo_margin
from rlhf.algorithms.rrhf import rrhf_loss, rrhf_margin
from rlhf.algorithms.simpo import simpo_loss, simpo_margin

OFFLINE_LOSSES: dict[str, OfflineLoss] = {
    "dpo": OfflineLoss(dpo_loss, dpo_margin, needs_reference=True),
    "ipo": OfflineLoss(ipo_loss, ipo_margin, needs_reference=True),
    "rrhf": OfflineLoss(rrhf_loss, rrhf_margin, needs_reference=False),
    "orpo": OfflineLoss(orpo_loss, orpo_margin, needs_reference=False),
    "simpo": OfflineLoss(simpo_loss, simpo_margin, needs_reference=False),
}
