"""Responses of two models to the same prompts, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def paired_samples(before: Sequence[dict[str, Any]], after: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Responses of the SFT and the PPO actor to the same prompts, with their scores."""
    return [
        {
            "prompt": first["prompt"],
            "sft": first["response"],
            "ppo": second["response"],
            "score_sft": first["score"],
            "score_ppo": second["score"],
        }
        for first, second in zip(before, after, strict=True)
    ]
