"""Some responses of every rollout, a line of JSON each, for people to read while and after a run goes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rlhf.training.rollouts import RolloutWorker, ScoredRollout

ROLLOUTS_FILE = "rollouts.jsonl"
"""In the directory of an on-policy stage."""


def spread_over_scores(scores: Sequence[float], count: int) -> list[int]:
    """`count` rows, or all, from the highest to the lowest score at even distances; of equal scores the first first."""
    order = sorted(range(len(scores)), key=lambda row: (-scores[row], row))
    if count >= len(order):
        return order
    if count < 2:
        return order[:count]
    return [order[round(place * (len(order) - 1) / (count - 1))] for place in range(count)]


def rollout_lines(
    worker: RolloutWorker,
    scored: ScoredRollout,
    questions: Mapping[tuple[int, ...], str],
    *,
    iteration: int,
    count: int,
) -> Iterator[str]:
    """`count` responses of a rollout, see `spread_over_scores`.

    "prompt" is what was asked, which `questions` tells by the ids that the actor read, "kl" the log-ratio of the whole
    response to the reference in nats, "parts" the scores of the single rewards where there are several.
    """
    import torch

    rollout, tokenizer = scored.rollout, worker.tokenizer
    scores = scored.scores.tolist()
    kept = spread_over_scores(scores, count)
    if not kept:
        return
    read = [tuple(rollout.prompt_ids[row][rollout.prompt_mask[row]].tolist()) for row in kept]
    prompts = [questions[ids] if ids in questions else tokenizer.decode(ids) for ids in read]
    responses = worker.texts(rollout.rows(torch.tensor(kept, device=rollout.response_ids.device)))
    log_ratios = ((scored.logprobs - scored.ref_logprobs) * rollout.response_mask).sum(1)
    for place, row in enumerate(kept):
        line = {
            "iteration": iteration,
            "prompt": prompts[place],
            "response": responses[place],
            "score": round(scores[row], 4),
            "tokens": int(rollout.response_mask[row].sum()),
            "ended": bool(scored.ended[row]),
            "kl": round(float(log_ratios[row]), 4),
        }
        if worker.part_names:
            parts = scored.part_scores[row].tolist()
            line["parts"] = {name: round(part, 4) for name, part in zip(worker.part_names, parts, strict=True)}
        yield json.dumps(line, ensure_ascii=False)
