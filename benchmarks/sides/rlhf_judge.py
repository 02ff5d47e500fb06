"""Evaluates policies as step 3 evaluates its own: the same held-out prompts, random numbers, KL and gold.

A job has the `arguments` of step3_ppo/main.py (their actor is the reference), `policies`, a list of [iteration,
directory or null for that actor], and `iterations`, for so many of which the prompts are told as token ids, in the
order in which step 3 takes them. `checked` are responses of the actor with what reward model and actor say of them,
by which another side can show that it runs the same models.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from rlhf.algorithms.ppo import PPOTrainer, ppo_optimizer_steps
from rlhf.distributed.world import close_world, init_world, seed_everything
from rlhf.models.loading import load_causal_lm
from rlhf.pipeline.on_policy import OnPolicyModels
from rlhf.pipeline.stage_run import StageRun
from rlhf.pipeline.stages import STAGES, PPOStageConfig, parse_stage
from rlhf.training.loop import RunContext
from rlhf.training.rollouts import EVALUATION

CHECKED_ROWS = 16


def make_trainer(config: PPOStageConfig, directory: Path) -> PPOTrainer:
    """The trainer that step3_ppo/main.py makes of `config`, in `directory`; it exports nothing."""
    stage = StageRun(STAGES["ppo"], config, directory)
    models = OnPolicyModels.find(stage)
    prompts = stage.load_data("prompt", config.data.prompt_data, config.data.prompt_eval_data, models.tokenizer)
    steps = ppo_optimizer_steps(config.ppo, config.batch, stage.plan, len(prompts.train))
    engine = models.build(stage, optimizer_steps=steps)
    return PPOTrainer(
        models.rollouts(stage, engine),
        prompts,
        config.ppo,
        batch=config.batch,
        export=lambda: None,
        context=RunContext("ppo", config.run, directory, STAGES["ppo"].checks),
    )


def checked_rows(trainer: PPOTrainer) -> list[dict[str, Any]]:
    """Responses of the actor: token ids, the score, and the log-probability of the whole response as sampled from."""
    examples = trainer.evaluated[:CHECKED_ROWS]
    scored = trainer.rollouts.run(examples, EVALUATION)
    mask = scored.rollout.response_mask
    return [
        {
            "prompt": list(example.input_ids),
            "response": scored.rollout.response_ids[row][mask[row]].tolist(),
            "score": float(scored.scores[row]),
            "logprob": float((scored.logprobs[row] * mask[row]).sum()),
        }
        for row, example in enumerate(examples)
    ]


def main(job_file: str, out_file: str) -> None:
    job = json.loads(Path(job_file).read_text())
    config: PPOStageConfig = parse_stage("ppo", job["arguments"])
    init_world()
    seed_everything(config.run.seed)
    with tempfile.TemporaryDirectory() as directory:
        trainer = make_trainer(config, Path(directory))
        train = trainer.prompts.train
        result: dict[str, Any] = {
            "prompts": [
                [list(train[index].input_ids) for index in trainer.order.indices(iteration)]
                for iteration in range(job["iterations"])
            ],
            "checked": checked_rows(trainer),
            "evaluations": [],
        }
        for iteration, directory_of_policy in job["policies"]:
            if directory_of_policy is not None:
                policy = load_causal_lm(directory_of_policy, config.model, dtype=torch.float32)
                trainer.engine.actor.module.load_state_dict(policy.state_dict())
            found = trainer.evaluate(iteration)
            numbers = {name: value for name, value in found.items() if isinstance(value, float)}
            by_prompt = found["prompt_measures"].get("gold")
            result["evaluations"].append({"iteration": iteration, **numbers, "gold_by_prompt": by_prompt})
    Path(out_file).write_text(json.dumps(result))
    close_world()


if __name__ == "__main__":
    main(*sys.argv[1:])
