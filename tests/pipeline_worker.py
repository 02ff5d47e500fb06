"""Run the three stages in one process: pipeline_worker.py BASE DATA_DIR OUTPUT_DIR ZERO_STAGE [--field value ...]"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rlhf.distributed import close_world
from step1_sft.main import main as sft
from step2_reward.main import main as reward
from step3_ppo.main import main as ppo

SMALL = (
    "--log_every_steps 1 --precision fp32 --no_tensorboard --adam_eps 1e-3 --micro_batch_size 2 --global_batch_size 8"
)


def run(arguments: list[str]) -> None:
    base, data, output, zero_stage, *extra = [item for item in arguments if not item.startswith("--local_rank")]
    common = ["--output_dir", output, "--cache_dir", f"{output}/cache", "--zero_stage", zero_stage]
    common += ["--base_model", base, "--max_prompt_tokens", "48", "--max_response_tokens", "12", *SMALL.split(), *extra]
    files = {name: f"{data}/{name}.jsonl" for name in ("sft", "preference", "prompts")}
    held = {name: f"{data}/{name}_eval.jsonl" for name in files}
    sft(
        [
            *common,
            "--sft_data",
            files["sft"],
            "--sft_eval_data",
            held["sft"],
            "--max_steps",
            "3",
            "--learning_rate",
            "1e-3",
        ]
    )
    reward(
        [*common, "--preference_data", files["preference"], "--preference_eval_data", held["preference"]]
        + ["--max_steps", "3", "--learning_rate", "1e-3"]
    )
    ppo(
        [*common, "--prompt_data", files["prompts"], "--prompt_eval_data", held["prompts"], "--max_steps", "2"]
        + [
            "--rollout_batch_size",
            "16",
            "--ppo_epochs",
            "2",
            "--learning_rate",
            "1e-3",
            "--critic_learning_rate",
            "1e-3",
        ]
        + ["--eval_samples_per_prompt", "1"]
    )


if __name__ == "__main__":
    run(sys.argv[1:])
    close_world()
