"""One process of TRL 0.24's PPOTrainer on a job of `ppo.py`; runs in the peer's environment.

TRL has no hooks for its phases. They are told apart by wrapping three things it calls in every iteration:
`batch_generation` (its duration is the generation; its beginning is that of the iteration), the first
`accelerator.accumulate` after it (the update begins; between the two lies the scoring, with rewards and advantages),
and the next `batch_generation` or the end of the training (the iteration, and with it the update, ends).

The settings are its fastest that keep the arithmetic: no gradient checkpointing (its default is on), the fused AdamW,
no logging to anywhere, no saving, no sample generations, and `local_rollout_forward_batch_size` from the job (ppo.py
says which is fastest): it is how many prompts are sampled side by side and how many rows are scored at once.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import torch
import transformers
import trl
import trl.trainer.ppo_trainer as module
from datasets import Dataset
from measure import current_rss_bytes, peak_rss_bytes, synchronise
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedTokenizerFast


class Clock:
    """Marks of the running iteration and the phases of those that are over."""

    def __init__(self, device: torch.device, pad_token_id: int) -> None:
        self.device = device
        self.pad_token_id = pad_token_id
        self.iterations: list[dict[str, float]] = []
        self.lengths: list[list[int]] = []
        self.marks: dict[str, float] = {}

    def now(self) -> float:
        synchronise(self.device)
        return time.perf_counter()

    def close_iteration(self) -> None:
        """Turn the marks of the iteration that ends here into seconds."""
        if self.marks:
            end = self.now()
            self.iterations.append(
                {
                    "total": end - self.marks["start"],
                    "generation": self.marks["sampled"] - self.marks["start"],
                    "scoring": self.marks["scored"] - self.marks["sampled"],
                    "update": end - self.marks["scored"],
                    "cpu": time.process_time() - self.marks["cpu"],
                }
            )
        self.marks = {}

    def wrap_generation(self, original):
        def batch_generation(model, queries, *arguments, **named):
            self.close_iteration()
            self.marks = {"start": self.now(), "cpu": time.process_time()}
            result = original(model, queries, *arguments, **named)
            self.marks["sampled"] = self.now()
            responses = result[0][:, queries.shape[1] :]
            self.lengths.append((responses != self.pad_token_id).sum(1).tolist())
            return result

        return batch_generation

    def wrap_accumulate(self, original):
        def accumulate(*arguments, **named):
            if "scored" not in self.marks:
                self.marks["scored"] = self.now()
            return original(*arguments, **named)

        return accumulate


def main(job_file: str, out_file: str) -> None:
    job = json.loads(Path(job_file).read_text())
    after_imports = current_rss_bytes()
    workload, on_gpu = job["workload"], job["device"] == "cuda"
    device = torch.device(job["device"])
    dtype = torch.bfloat16 if job["dtype"] == "bf16" and job["peer_bf16_weights"] else torch.float32
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(Path(job["actor"]) / "tokenizer.json"),
        eos_token="<eos>",
        pad_token="<pad>",
        padding_side="left",
    )
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (job["eos_token_id"], job["pad_token_id"])
    torch.manual_seed(job["seed"])
    actor, reference = (AutoModelForCausalLM.from_pretrained(job["actor"], dtype=dtype) for _ in range(2))
    critic, reward = (
        AutoModelForSequenceClassification.from_pretrained(job["actor"], dtype=dtype, num_labels=1) for _ in range(2)
    )
    first = torch.tensor([job["prompts"][0]])
    with torch.no_grad():
        fingerprint = actor(input_ids=first).logits[0, -1].float().logsumexp(-1).item()
    rows = workload["prompts"]
    total = job["warmup"] + job["iterations"]
    with tempfile.TemporaryDirectory() as directory:
        trainer = module.PPOTrainer(
            args=trl.PPOConfig(
                output_dir=directory,
                per_device_train_batch_size=workload["micro_batch_size"],
                gradient_accumulation_steps=rows // workload["micro_batch_size"],
                num_mini_batches=1,
                num_ppo_epochs=workload["ppo_epochs"],
                local_rollout_forward_batch_size=job["peer_rollout_batch"],
                total_episodes=total * rows,
                response_length=workload["max_new_tokens"],
                stop_token="eos",
                temperature=1.0,
                missing_eos_penalty=None,
                kl_coef=workload["kl_coef"],
                whiten_rewards=False,
                learning_rate=workload["learning_rate"],
                num_sample_generations=0,
                gradient_checkpointing=job["peer_gradient_checkpointing"],
                bf16=job["dtype"] == "bf16",
                fp16=job["dtype"] == "fp16",
                use_cpu=not on_gpu,
                save_strategy="no",
                eval_strategy="no",
                report_to="none",
                seed=job["seed"],
            ),
            processing_class=tokenizer,
            model=actor,
            ref_model=reference,
            reward_model=reward,
            value_model=critic,
            train_dataset=Dataset.from_dict({"input_ids": job["prompts"]}),
            eval_dataset=Dataset.from_dict({"input_ids": job["prompts"][:1]}),
        )
        clock = Clock(device, tokenizer.pad_token_id)
        module.batch_generation = clock.wrap_generation(module.batch_generation)
        trainer.accelerator.accumulate = clock.wrap_accumulate(trainer.accelerator.accumulate)
        trainer.train()
        clock.close_iteration()
    result = {
        "iterations": clock.iterations,
        "response_tokens": clock.lengths,
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
