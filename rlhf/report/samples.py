"""Responses of two models to the same prompts, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def paired_samples(before: Sequence[dict[str, Any]], after: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Responses of the SFT and the PPO actor to the same prompts, with their scores.

    "prompt" is what the data row asks, "rendered_prompt" what the actors were given: with the template around it, and
    without the beginning that a limit cut off. Where gold was measured both answers' stands beside their scores.
    """
    measured = all("gold" in sample.get("measures", {}) for sample in (*before, *after))
    return [
        {
            "prompt": first["prompt"],
            "rendered_prompt": first["rendered_prompt"],
            "sft": first["response"],
            "ppo": second["response"],
            "score_sft": first["score"],
            "score_ppo": second["score"],
            **({"gold_sft": first["measures"]["gold"], "gold_ppo": second["measures"]["gold"]} if measured else {}),
        }
        for first, second in zip(before, after, strict=True)
    ]
