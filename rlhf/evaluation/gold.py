"""Gold of responses to prompts of the embedded world: a truth to hold the score against that PPO optimises."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from rlhf.data.world.judge import judge
from rlhf.data.world.situations import read_situation
from rlhf.types import Responses, TokenizedPrompt

GOLD = "gold"
PART = f"{GOLD}/"
WELL_FORMED = "well_formed_responses"


def measure_gold(responses: Responses) -> dict[str, torch.Tensor]:
    """Gold of each response, [B] float32 under "gold", its parts under "gold/PART", all in [0, 1].

    "well_formed_responses" is 1 for a response of which the world's grammar can write every sentence. {} where one of
    the prompts is not of the world.
    """
    found = [
        judge(_question(prompt), text, ended=bool(ended))
        for prompt, text, ended in zip(responses.prompts, responses.texts, responses.ended.tolist(), strict=True)
    ]
    known = [gold for gold in found if gold is not None]
    if not known or len(known) < len(found):
        return {}
    columns = {GOLD: [gold.total for gold in known]}
    columns |= {f"{PART}{name}": [gold.parts()[name] for gold in known] for name in known[0].parts()}
    columns[WELL_FORMED] = [float(gold.well_formed == 1.0) for gold in known]
    return {name: torch.tensor(values) for name, values in columns.items()}


def of_the_world(prompt: TokenizedPrompt) -> bool:
    """Whether responses to a prompt have a gold."""
    return read_situation(_question(prompt)) is not None


def _question(prompt: TokenizedPrompt) -> str:
    return prompt.messages[-1]["content"] if prompt.messages else prompt.text


def gold_before_and_after(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any] | None:
    """Two evaluations of the same prompts by gold; None where it was not measured.

    `win_rate`: the share of prompts whose responses have the higher mean gold after; a tie counts half.
    """
    golds = [evaluation.get("prompt_measures", {}).get(GOLD) for evaluation in (before, after)]
    if golds[0] is None or golds[1] is None:
        return None
    wins = [(new > old) + 0.5 * (new == old) for old, new in zip(*golds, strict=True)]
    result: dict[str, Any] = {"prompts": len(wins), "win_rate": sum(wins) / len(wins)}
    for name, evaluation in (("before", before), ("after", after)):
        result[name] = evaluation[GOLD]
        result[f"well_formed_{name}"] = evaluation[WELL_FORMED]
        result[f"parts_{name}"] = {
            key.removeprefix(PART): value for key, value in evaluation.items() if key.startswith(PART)
        }
    return result
