"""Our side of sft.py, reward.py, dpo.py and kto.py: one training run in this process, timed from outside.

python benchmarks/sides/rlhf_offline.py '<job as json>' (see `offline.run_side`)
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import measure
from sides.stage_trainers import offline_trainer

from rlhf.config import BatchConfig, OptimizerConfig
from rlhf.distributed.world import init_world, seed_everything
from rlhf.types import TokenizedLabel, TokenizedRanking, TokenizedResponse

STAGE_OF = {"response": "sft", "comparison": "reward"}
"""The stage that learns from rows of each kind, where no algorithm is named."""


class StepClock:
    """Stands in a trainer's `writer`: the time at which each optimizer step ends, and its loss."""

    def __init__(self, device: Any) -> None:
        self.device = device
        self.ends = [time.perf_counter()]
        self.cpu_ends = [time.process_time()]
        self.losses: list[float] = []

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        if "loss" not in metrics:  # of an evaluation
            return
        measure.synchronise(self.device)
        self.ends.append(time.perf_counter())
        self.cpu_ends.append(time.process_time())
        self.losses.append(float(metrics["loss"]))

    def open(self) -> None:
        """Nothing is kept in a file."""

    def close(self) -> None:
        """Nothing is open."""

    @property
    def seconds(self) -> list[float]:
        """Seconds of each step."""
        return [end - start for start, end in pairwise(self.ends)]

    @property
    def cpu_seconds(self) -> list[float]:
        """CPU seconds of each step, of all threads."""
        return [end - start for start, end in pairwise(self.cpu_ends)]


def read_rows_file(kind: str, path: Path) -> list[Any]:
    """The rows of `offline.prepare` as tokenised examples: responses, or rankings with the best candidate first."""
    examples: list[Any] = []
    for row in json.loads(path.read_text()):
        candidates = tuple(
            TokenizedResponse(id=row["id"], input_ids=tuple(ids), prompt_tokens=start)
            for ids, start in row["candidates"]
        )
        if kind == "response":
            examples.append(candidates[0])
        elif kind == "labelled":  # matched with responses to other prompts again, by the same seed
            examples.append(TokenizedLabel(candidates[0], row["good"]))
        else:
            examples.append(TokenizedRanking(row["id"], candidates, ranks=tuple(range(len(candidates)))))
    return examples


def train(job: Mapping[str, Any]) -> dict[str, Any]:
    """Train as the job says; {"imported_bytes", "peak_bytes", "step_seconds", "first_loss", ...}."""
    device = init_world()
    imported = measure.current_rss_bytes(device)
    seed_everything(job["seed"])
    work, run = Path(job["work"]), job["run"]
    trainer = offline_trainer(
        "offline" if job["algorithm"] else STAGE_OF[job["kind"]],
        str(work / "base"),
        read_rows_file(job["kind"], work / "rows.json"),
        work / "ours",
        batch=BatchConfig(run["global_batch_size"], run["micro_batch_size"], max_steps=run["steps"]),
        optimizer=OptimizerConfig(learning_rate=job["learning_rate"], lr_schedule="constant", adam_betas=[0.9, 0.999]),
        precision=run["dtype"],
        algorithm=job["algorithm"],
    )
    clock: Any = StepClock(device)
    trainer.writer = clock
    trainer.fit()
    return {
        "imported_bytes": imported,
        "peak_bytes": measure.peak_rss_bytes(device),
        "step_seconds": clock.seconds,
        "step_cpu_seconds": clock.cpu_seconds,
        "first_loss": clock.losses[0],
        "mean_loss_after_first": sum(clock.losses[1:]) / len(clock.losses[1:]),
    }


if __name__ == "__main__":
    the_job = json.loads(sys.argv[1])
    outcome = train(the_job)
    Path(the_job["result"]).write_text(json.dumps(outcome))
