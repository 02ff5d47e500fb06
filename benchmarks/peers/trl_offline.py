"""TRL's side of `sft.py`, `reward.py`, `dpo.py` and `kto.py`: its trainer in this process.

python benchmarks/peers/trl_offline.py '<job as json>' (see `offline.run_side`)
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import measure
import torch
from datasets import Dataset
from transformers import AutoTokenizer, GPTNeoXForCausalLM, GPTNeoXForSequenceClassification, TrainerCallback
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

REBALANCE_SEED = 42
"""`BatchRebalanceSampler` is made without a seed by the trainer, and this is its default."""


class TokenisedDPO(DPOTrainer):
    """Takes rows that are token ids already, as the other trainers do by themselves."""

    def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
        return dataset


class TokenisedKTO(KTOTrainer):
    """As `TokenisedDPO`."""

    def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
        return dataset


class StepClock(TrainerCallback):
    """The time at which each optimizer step ends, the tokens the trainer has counted by then, and its logged losses."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.trainer: Any = None
        self.ends: list[float] = []
        self.cpu_ends: list[float] = []
        self.tokens: list[int] = [0]
        self.logged: list[tuple[int, float]] = []

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.ends.append(time.perf_counter())
        self.cpu_ends.append(time.process_time())

    def on_step_end(self, *_: Any, **__: Any) -> None:
        measure.synchronise(self.device)
        self.ends.append(time.perf_counter())
        self.cpu_ends.append(time.process_time())
        self.tokens.append(int(self.trainer._total_train_tokens))

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if logs and "loss" in logs:
            self.logged.append((state.global_step, float(logs["loss"])))


def rows_in_order(job: Mapping[str, Any], work: Path) -> list[dict[str, Any]]:
    """The rows as the trainer is to meet them: step by step ours, shuffled within a step."""
    rows = json.loads((work / "rows.json").read_text())
    ordered = []
    for number, step in enumerate(json.loads((work / "order.json").read_text())):
        shuffled = list(step)
        random.Random(number).shuffle(shuffled)
        ordered += [rows[index] for index in shuffled]
    if job["arguments"].get("train_sampling_strategy") == "batch_rebalance":
        order = torch.randperm(len(ordered), generator=torch.Generator().manual_seed(REBALANCE_SEED)).tolist()
        placed = list(ordered)
        for position, index in enumerate(order):  # this sampler shuffles first: undo it
            placed[index] = ordered[position]
        return placed
    return ordered


def data_set(job: Mapping[str, Any], rows: list[dict[str, Any]]) -> Dataset:
    """Pre-tokenised columns as the trainers take them, with the `length` that samplers group by."""
    kind = job["kind"]
    if job["algorithm"]:
        names = ("completion_ids", "KL_completion_ids") if kind == "labelled" else ("chosen_ids", "rejected_ids")
        columns = [
            {
                "prompt_ids": first[:start],
                names[0]: first[start:],
                names[1]: second[start:],
                "length": max(len(first), len(second)),
                **({"label": row["good"]} if kind == "labelled" else {}),
            }
            for row in rows
            for (first, start), (second, _) in [row["candidates"]]
        ]
    elif kind == "response":
        columns = [
            {"input_ids": ids, "labels": [-100] * start + ids[start:], "length": len(ids)}
            for ids, start in (row["candidates"][0] for row in rows)
        ]
    else:
        columns = [
            {"chosen_ids": chosen, "rejected_ids": rejected, "length": max(len(chosen), len(rejected))}
            for (chosen, _), (rejected, _) in (row["candidates"] for row in rows)
        ]
    return Dataset.from_list(columns)


def arguments(job: Mapping[str, Any], tokens: int) -> dict[str, Any]:
    """Arguments of the configuration: the run's arithmetic, nothing logged but two losses, then the job's own."""
    run = job["run"]
    found = {
        "output_dir": str(Path(job["work"]) / "trl"),
        "per_device_train_batch_size": run["micro_batch_size"],
        "gradient_accumulation_steps": run["global_batch_size"] // run["micro_batch_size"],
        "num_train_epochs": 1,
        "learning_rate": job["learning_rate"],
        "lr_scheduler_type": "constant",
        "max_grad_norm": 1.0,
        "max_length": job["max_tokens"],
        "seed": job["seed"],
        "bf16": run["dtype"] == "bf16",
        "fp16": run["dtype"] == "fp16",
        "use_cpu": run["device"] == "cpu",
        "dataloader_pin_memory": run["device"] != "cpu",
        "train_sampling_strategy": "sequential",
        "logging_strategy": "steps",
        "logging_first_step": True,
        "logging_steps": run["steps"],
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        **job["arguments"],
    }
    if found.get("packing"):  # one packed row is many of ours: as many rows as hold a step's tokens
        packed = max(1, round(tokens / run["steps"] / job["max_tokens"]))
        found.update(per_device_train_batch_size=1, gradient_accumulation_steps=packed)
    return found


def train(job: Mapping[str, Any]) -> dict[str, Any]:
    """Train as the job says; the same fields as our side, and the real tokens of each step."""
    run, work = job["run"], Path(job["work"])
    imported = measure.current_rss_bytes(run["device"])
    rows = rows_in_order(job, work)
    tokens = sum(len(ids) for row in rows for ids, _ in row["candidates"])
    tokenizer = AutoTokenizer.from_pretrained(work / "base")
    clock = StepClock(run["device"])
    shared: dict[str, Any] = {"train_dataset": data_set(job, rows), "processing_class": tokenizer}
    shared["callbacks"] = [clock]
    model: Any
    trainer: Any
    if job["algorithm"]:
        model = GPTNeoXForCausalLM.from_pretrained(work / "base")
        made, configured = (TokenisedKTO, KTOConfig) if job["kind"] == "labelled" else (TokenisedDPO, DPOConfig)
        trainer = made(model, args=configured(**arguments(job, tokens)), **shared)
    elif job["kind"] == "response":
        model = GPTNeoXForCausalLM.from_pretrained(work / "base")
        trainer = SFTTrainer(model, SFTConfig(**arguments(job, tokens)), **shared)
    else:
        model = GPTNeoXForSequenceClassification.from_pretrained(work / "base", num_labels=1)
        with torch.no_grad():
            model.score.weight.copy_(torch.load(work / "head.pt")["weight"])
        trainer = RewardTrainer(model, RewardConfig(**arguments(job, tokens)), **shared)
    clock.trainer = trainer
    trainer.train()
    (first, first_loss), *rest = clock.logged
    return {
        "imported_bytes": imported,
        "peak_bytes": measure.peak_rss_bytes(run["device"]),
        "step_seconds": [end - start for start, end in pairwise(clock.ends)],
        "step_cpu_seconds": [end - start for start, end in pairwise(clock.cpu_ends)],
        "step_tokens": [after - before for before, after in pairwise(clock.tokens)],
        "first_loss": first_loss,
        "mean_loss_after_first": rest[-1][1] if rest else float("nan"),
    }


if __name__ == "__main__":
    the_job = json.loads(sys.argv[1])
    outcome = train(the_job)
    Path(the_job["result"]).write_text(json.dumps(outcome))
