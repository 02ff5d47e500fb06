"""One process of this project's PPO on a job of `ppo.py`."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import deepspeed
import torch
import transformers
from measure import current_rss_bytes, peak_rss_bytes, synchronise
from sides.stage_trainers import ppo_trainer, run_config

from rlhf.algorithms.config import PPOBatchConfig, PPOConfig, PPOOptimizerConfig
from rlhf.config import EngineConfig, ModelConfig, PPODataConfig
from rlhf.distributed.world import close_world, init_world, seed_everything
from rlhf.pipeline.stages import PPOStageConfig


def stage_config(job: dict[str, Any], directory: Path) -> PPOStageConfig:
    """The configuration of step 3 that does the job."""
    workload = job["workload"]
    return PPOStageConfig(
        run=run_config(directory, seed=job["seed"]),
        model=ModelConfig(),
        engine=EngineConfig(precision=job["dtype"], max_grad_norm=0.0),  # TRL's PPO clips no gradient
        optimizer=PPOOptimizerConfig(
            learning_rate=workload["learning_rate"], critic_learning_rate=workload["learning_rate"]
        ),
        batch=PPOBatchConfig(
            global_batch_size=workload["prompts"],
            micro_batch_size=workload["micro_batch_size"],
            max_steps=job["warmup"] + job["iterations"],
            rollout_batch_size=workload["prompts"] // job["samples_per_prompt"],
            samples_per_prompt=job["samples_per_prompt"],
            ppo_epochs=workload["ppo_epochs"],
        ),
        data=PPODataConfig(
            max_prompt_tokens=workload["max_prompt_tokens"], max_response_tokens=workload["max_new_tokens"]
        ),
        ppo=PPOConfig(
            actor_model=job["actor"],
            reward_model=job["reward"],
            advantage=job["advantage"],
            critic_init="reward",  # as TRL's starts here
            kl_coef=workload["kl_coef"],
        ),
    )


def main(job_file: str, out_file: str) -> None:
    job = json.loads(Path(job_file).read_text())
    after_imports = current_rss_bytes()
    device = init_world()
    seed_everything(job["seed"])
    with tempfile.TemporaryDirectory() as directory:
        trainer = ppo_trainer(stage_config(job, Path(directory)), job["prompts"], Path(directory))
        first = torch.tensor([job["prompts"][0]], device=device)
        with torch.no_grad():
            fingerprint = trainer.engine.actor.module(input_ids=first).logits[0, -1].float().logsumexp(-1).item()
        iterations: list[dict[str, float | None]] = []
        prompt_tokens, response_tokens = [], []
        for iteration in range(1, job["warmup"] + job["iterations"] + 1):
            synchronise(device)
            started, started_cpu = time.perf_counter(), time.process_time()
            experience = trainer.make_experience(iteration)
            synchronise(device)
            sampled = time.perf_counter()
            trainer.update(experience, iteration)
            synchronise(device)
            ended = time.perf_counter()
            metrics = trainer.experience_metrics
            iterations.append(
                {
                    "total": ended - started,
                    "generation": metrics.get("seconds_generation"),
                    "scoring": metrics.get("seconds_scoring"),
                    "experience": sampled - started,
                    "update": ended - sampled,
                    "cpu": time.process_time() - started_cpu,
                }
            )
            prompt_tokens.append(experience.rollout.prompt_mask.sum(1).tolist())
            response_tokens.append(experience.rollout.response_mask.sum(1).tolist())
            del experience
    result = {
        "iterations": iterations,
        "prompt_tokens": prompt_tokens,
        "response_tokens": response_tokens,
        "peak_bytes": peak_rss_bytes(device),
        "bytes_after_imports": after_imports,
        "fingerprint": fingerprint,
        "threads": torch.get_num_threads(),
        "versions": {
            "deepspeed": deepspeed.__version__,
            "transformers": transformers.__version__,
            "torch": torch.__version__,
        },
    }
    Path(out_file).write_text(json.dumps(result))
    close_world()


if __name__ == "__main__":
    main(*sys.argv[1:])
