"""One process of TRL 1.x's GRPOTrainer or RLOOTrainer on a job of `ppo.py` with `--advantage grpo | rloo`.

The settings are its fastest that keep the arithmetic: no gradient checkpointing (its default is on), float32 where the
job says so, one optimizer step for a rollout, nothing logged or saved. It samples with transformers' `generate`.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import torch
import transformers
import trl
from datasets import Dataset
from measure import current_rss_bytes, peak_rss_bytes, synchronise
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedTokenizerFast

TRAINERS = {"grpo": (trl.GRPOTrainer, trl.GRPOConfig), "rloo": (trl.RLOOTrainer, trl.RLOOConfig)}


class StepClock(transformers.TrainerCallback):
    """The time at which each optimizer step ends: sampling, scoring and update of a rollout lie between two."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.ends: list[tuple[float, float]] = []

    def mark(self) -> None:
        synchronise(self.device)
        self.ends.append((time.perf_counter(), time.process_time()))

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.mark()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.mark()


def main(job_file: str, out_file: str) -> None:
    job = json.loads(Path(job_file).read_text())
    after_imports = current_rss_bytes()
    workload, device = job["workload"], torch.device(job["device"])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(Path(job["actor"]) / "tokenizer.json"), eos_token="<eos>", pad_token="<pad>",
        unk_token="<unk>", padding_side="left",
    )  # fmt: skip
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (job["eos_token_id"], job["pad_token_id"])
    torch.manual_seed(job["seed"])
    dtype = torch.bfloat16 if job["dtype"] == "bf16" and job["peer_bf16_weights"] else torch.float32
    actor = AutoModelForCausalLM.from_pretrained(job["actor"], dtype=dtype)
    reward = AutoModelForSequenceClassification.from_pretrained(job["actor"], dtype=dtype, num_labels=1)
    with torch.no_grad():
        first = torch.tensor([job["prompts"][0]])
        fingerprint = actor(input_ids=first).logits[0, -1].float().logsumexp(-1).item()
    lengths: list[list[int]] = []

    def counted(prompts: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
        """Notes the lengths of a rollout; worth nothing."""
        lengths.append([len(ids) for ids in completion_ids])
        return [0.0] * len(prompts)

    trainer_type, config_type = TRAINERS[job["advantage"]]
    clock, rows = StepClock(device), workload["prompts"]
    with tempfile.TemporaryDirectory() as directory:
        trainer = trainer_type(
            model=actor,
            reward_funcs=[reward, counted],
            reward_processing_classes=[tokenizer, None],
            args=config_type(
                output_dir=directory,
                per_device_train_batch_size=workload["micro_batch_size"],
                gradient_accumulation_steps=rows // workload["micro_batch_size"],
                num_generations=job["samples_per_prompt"],
                max_steps=job["warmup"] + job["iterations"],
                num_iterations=workload["ppo_epochs"],
                max_completion_length=workload["max_new_tokens"],
                temperature=1.0,
                beta=workload["kl_coef"],
                learning_rate=workload["learning_rate"],
                max_grad_norm=0.0,
                gradient_checkpointing=job["peer_gradient_checkpointing"],
                bf16=job["dtype"] == "bf16",
                fp16=job["dtype"] == "fp16",
                use_cpu=device.type != "cuda",
                dataloader_pin_memory=device.type == "cuda",
                logging_strategy="no",
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                seed=job["seed"],
            ),
            processing_class=tokenizer,
            train_dataset=Dataset.from_dict({"prompt": [tokenizer.decode(ids) for ids in job["prompts"]]}),
            callbacks=[clock],
        )
        trainer.train()
    iterations = [{"total": end[0] - start[0], "cpu": end[1] - start[1]} for start, end in pairwise(clock.ends)]
    result = {
        "iterations": iterations,
        "response_tokens": lengths,
        "peak_bytes": peak_rss_bytes(device),
        "bytes_after_imports": after_imports,
        "fingerprint": fingerprint,
        "optimizer": type(trainer.optimizer.optimizer).__name__,
        "attention": actor.config._attn_implementation,
        "threads": torch.get_num_threads(),
        "versions": {"trl": trl.__version__, "transformers": transformers.__version__, "torch": torch.__version__},
    }
    Path(out_file).write_text(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
