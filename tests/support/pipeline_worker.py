"""Run every stage in one process:
pipeline_worker.py BASE DATA_DIR OUTPUT_DIR ZERO_STAGE [--steps N] [--iterations N] [--advantage NAME]
    [--offline NAME] [--also_offline NAME] [--field value ...]"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from rlhf.pipeline.stage_run import run_as_script
from step1_sft.main import main as sft
from step2_reward.main import main as reward
from step3_ppo.main import main as ppo
from step3_ppo.offline import main as offline

SMALL = (
    "--log_every_steps 1 --precision fp32 --no_tensorboard --adam_eps 1e-3 --micro_batch_size 2 --global_batch_size 8 "
    "--max_prompt_tokens 48 --max_response_tokens 12 --learning_rate 1e-3"
)
ON_POLICY = (
    "--rollout_batch_size 16 --ppo_epochs 2 --critic_learning_rate 1e-3 --eval_samples_per_prompt 1 --ema_decay 0.9 "
    "--kl_target 6 --kl_horizon 100"
)


def run() -> None:
    parser = argparse.ArgumentParser()
    for name in ("base", "data", "output", "zero_stage"):
        parser.add_argument(name)
    parser.add_argument("--steps", default="3", help="optimizer steps of SFT and of the reward model")
    parser.add_argument("--iterations", default="2", help="of PPO")
    parser.add_argument("--advantage", default="gae", help="of the on-policy stage")
    parser.add_argument("--offline", default="dpo", help="algorithm of the offline stage")
    parser.add_argument("--also_offline", help="another one, in OUTPUT_DIR/also, with a live reference")
    given, extra = parser.parse_known_args()
    common = ["--output_dir", given.output, "--cache_dir", f"{given.output}/cache", "--zero_stage", given.zero_stage]
    common += ["--base_model", given.base, *SMALL.split(), *extra]

    def data(field: str, name: str) -> list[str]:
        return [
            f"--{field}_data",
            f"{given.data}/{name}.jsonl",
            f"--{field}_eval_data",
            f"{given.data}/{name}_eval.jsonl",
        ]

    sft([*common, *data("sft", "sft"), "--max_steps", given.steps])
    reward([*common, *data("preference", "preference"), "--max_steps", given.steps])
    grouped = ["--samples_per_prompt", "4", "--rollout_batch_size", "4"] if given.advantage != "gae" else []
    on_policy = [*ON_POLICY.split(), "--advantage", given.advantage, *grouped]
    ppo([*common, *data("prompt", "prompts"), "--max_steps", given.iterations, *on_policy])
    sampled = ["--prompt_eval_data", f"{given.data}/prompts_eval.jsonl", "--eval_samples_per_prompt", "1"]
    aligned = ["--max_steps", given.steps, "--algorithm", given.offline]
    offline([*common, *data("preference", "preference"), *aligned, *sampled])
    if given.also_offline:
        actor = ["--actor_model", f"{given.output}/sft/model", "--output_dir", f"{given.output}/also"]
        also = ["--max_steps", given.steps, "--algorithm", given.also_offline, "--reference", "live"]
        offline([*common, *data("preference", "preference"), *actor, *also])


if __name__ == "__main__":
    run_as_script(run)
