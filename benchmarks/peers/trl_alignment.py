"""One run of TRL's DPO, KTO, GRPO or RLOO trainer for `algorithms.py`: our models, rows, order, steps and rewards.

It runs in the project's environment, which has TRL. What DPO and KTO read are our token ids, step by step as ours
reads them, so that the two sides differ in their arithmetic alone; KTO's batch is not parted, because TRL estimates the
KL divergence in each part. GRPO and RLOO sample by themselves; our reward model scores the ids that they sampled, with
our clipping and penalty.

python benchmarks/peers/trl_alignment.py JOB.json OUT.json (see `AlignmentPlace.trial`)
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import torch
import transformers
import trl
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl_offline import TokenisedDPO, TokenisedKTO

from rlhf.models.loading import load_tokenizer
from rlhf.models.scalar import ScalarModel
from rlhf.pipeline.offline import OFFLINE_ALGORITHMS, held_out_prompts, prepared_data
from rlhf.pipeline.stage_run import StageRun
from rlhf.pipeline.stages import STAGES, parse_stage
from rlhf.rewards.reward import RewardSources
from rlhf.rewards.reward_model import RewardModel
from rlhf.training.data_order import DataOrder
from rlhf.types import Responses, Rollout, TokenizedPrompt


class Clock(transformers.TrainerCallback):
    """Seconds from the first step's beginning to the last one's end."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.ends.append(time.perf_counter())

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.ends.append(time.perf_counter())

    @property
    def seconds(self) -> float:
        return self.ends[-1] - self.ends[0]


def shared_arguments(config: Any, directory: str) -> dict[str, Any]:
    """What every trainer is given: our optimizer, its schedule, no checkpoint, no log."""
    optimizer = config.optimizer
    return {
        "output_dir": directory,
        "learning_rate": optimizer.learning_rate,
        "lr_scheduler_type": optimizer.lr_schedule,
        "adam_beta1": optimizer.adam_betas[0],
        "adam_beta2": optimizer.adam_betas[1],
        "adam_epsilon": optimizer.adam_eps,
        "weight_decay": optimizer.weight_decay,
        "max_grad_norm": config.engine.max_grad_norm,
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": config.run.seed,
    }


def offline_rows(config: Any, tokenizer: Any) -> tuple[list[dict[str, Any]], int]:
    """Our rows in the order of our steps, as TRL takes them, and how many steps there are."""
    with tempfile.TemporaryDirectory() as directory:
        stage: StageRun[Any] = StageRun(STAGES["offline"], config, Path(directory))
        kind = OFFLINE_ALGORITHMS[config.offline.algorithm].kind
        names = (config.data.preference_data, config.data.preference_eval_data)
        _, kept_apart = held_out_prompts(stage, tokenizer)
        data = prepared_data(config, stage.load_data(kind, *names, tokenizer, stage="reward", kept_apart=kept_apart))
        steps = stage.planned_steps(data)
        rows: list[Any] = list(data.train)
        order = DataOrder([1] * len(rows), stage.plan, config.run.seed)
        wanted = [rows[index] for step in range(steps) for index in order.indices(step)]
    if kind == "labelled":
        return [labelled(row) for row in wanted], steps
    return [pair(row) for row in wanted], steps


def pair(row: Any) -> dict[str, Any]:
    """A ranking of two as DPOTrainer's columns."""
    chosen, rejected = sorted(row.candidates, key=lambda each: row.ranks[row.candidates.index(each)])
    start = chosen.prompt_tokens
    return {
        "prompt_ids": list(chosen.input_ids[:start]),
        "chosen_ids": list(chosen.input_ids[start:]),
        "rejected_ids": list(rejected.input_ids[start:]),
    }


def labelled(row: Any) -> dict[str, Any]:
    """A labelled response and the one to another prompt beside it as KTOTrainer's columns."""
    own, other = row.label.response, row.mismatched
    start = own.prompt_tokens
    return {
        "prompt_ids": list(own.input_ids[:start]),
        "completion_ids": list(own.input_ids[start:]),
        "KL_completion_ids": list(other.input_ids[start:]),
        "label": row.label.good,
    }


def train_offline(job: dict[str, Any], directory: str) -> tuple[Any, float, int]:
    config = parse_stage("offline", job["arguments"])
    actor = config.offline.actor_model
    tokenizer = load_tokenizer(actor)
    rows, steps = offline_rows(config, tokenizer)
    kto = config.offline.algorithm == "kto"
    trainer_type, config_type = (TokenisedKTO, trl.KTOConfig) if kto else (TokenisedDPO, trl.DPOConfig)
    clock = Clock()
    trainer = trainer_type(
        AutoModelForCausalLM.from_pretrained(actor, dtype=torch.float32),
        args=config_type(
            **shared_arguments(config, directory),
            beta=config.offline.of("beta"),
            precompute_ref_log_probs=True,
            per_device_train_batch_size=config.batch.global_batch_size,
            max_steps=steps,
            warmup_steps=round(steps * config.optimizer.warmup_ratio),
            max_length=config.data.max_prompt_tokens + config.data.max_response_tokens,
            train_sampling_strategy="sequential",
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(actor),
        callbacks=[clock],
    )
    trainer.train()
    return trainer.model, clock.seconds, steps


class OurReward:
    """Our reward model's scores of what TRL sampled, clipped, less the penalty for a missing end."""

    def __init__(self, config: Any, tokenizer: Any) -> None:
        model = ScalarModel.from_pretrained(config.ppo.reward_model, dtype=torch.float32).eval()
        self.tokenizer, self.ppo = tokenizer, config.ppo
        sources = RewardSources(tokenizer, (tokenizer.eos_token_id,), engine=model, reward_tokenizer=tokenizer)
        self.reward = RewardModel(sources)

    def __call__(self, prompts: Sequence[str], completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
        asked = [self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in prompts]
        prompt_ids, prompt_mask = padded(asked, left=True)
        response_ids, response_mask = padded(completion_ids, left=False)
        ended = torch.tensor([ids[-1] == self.tokenizer.eos_token_id for ids in completion_ids])
        rollout = Rollout(prompt_ids, prompt_mask, response_ids, response_mask, torch.zeros(response_ids.shape))
        examples = [TokenizedPrompt(str(row), tuple(ids), prompts[row]) for row, ids in enumerate(asked)]
        scores = self.reward.score(Responses(rollout, examples, [""] * len(prompts), ended)).scores
        if self.ppo.score_clip:
            scores = scores.clamp(-self.ppo.score_clip, self.ppo.score_clip)
        found: list[float] = (scores - self.ppo.missing_eos_penalty * ~ended).tolist()
        return found


def padded(rows: Sequence[Sequence[int]], *, left: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask [B, L]."""
    longest = max(map(len, rows))
    ids, mask = torch.zeros(len(rows), longest, dtype=torch.long), torch.zeros(len(rows), longest, dtype=torch.bool)
    for index, row in enumerate(rows):
        places = slice(longest - len(row), longest) if left else slice(0, len(row))
        ids[index, places], mask[index, places] = torch.tensor(row), True
    return ids, mask


def train_groups(job: dict[str, Any], directory: str) -> tuple[Any, float, int]:
    config = parse_stage("ppo", job["arguments"])
    batch, ppo, actor = config.batch, config.ppo, config.ppo.actor_model
    tokenizer = AutoTokenizer.from_pretrained(actor, padding_side="left")
    prompts = [tokenizer.decode(ids) for iteration in job["prompts"] for ids in iteration]
    told = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in prompts]
    assert told == [ids for iteration in job["prompts"] for ids in iteration], "a prompt is read otherwise"
    responses = batch.rollout_batch_size * batch.samples_per_prompt
    parts = responses // batch.global_batch_size
    grpo = ppo.advantage == "grpo"
    own = {"loss_type": "grpo", "scale_rewards": "group"} if grpo else {}
    trainer_type, config_type = (trl.GRPOTrainer, trl.GRPOConfig) if grpo else (trl.RLOOTrainer, trl.RLOOConfig)
    clock = Clock()
    trainer = trainer_type(
        model=AutoModelForCausalLM.from_pretrained(actor, dtype=torch.float32),
        reward_funcs=OurReward(config, tokenizer),
        args=config_type(
            **shared_arguments(config, directory),
            **own,
            per_device_train_batch_size=batch.global_batch_size,
            gradient_accumulation_steps=1,
            steps_per_generation=parts,
            num_iterations=batch.ppo_epochs,
            num_generations=batch.samples_per_prompt,
            max_steps=len(job["prompts"]) * batch.ppo_epochs * parts,
            max_completion_length=config.data.max_response_tokens,
            temperature=ppo.temperature,
            beta=ppo.kl_coef,
            epsilon=ppo.clip_range,
            shuffle_dataset=False,
        ),
        processing_class=tokenizer,
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        callbacks=[clock],
    )
    trainer.train()
    return trainer.model, clock.seconds, len(job["prompts"])


def main(job_file: str, out_file: str) -> None:
    job = json.loads(Path(job_file).read_text())
    torch.manual_seed(job["seed"])
    with tempfile.TemporaryDirectory() as directory:
        train = train_groups if "prompts" in job else train_offline
        model, seconds, steps = train(job, directory)
    model.save_pretrained(job["model"])
    versions = {"trl": trl.__version__, "transformers": transformers.__version__, "torch": torch.__version__}
    Path(out_file).write_text(json.dumps({"seconds": seconds, "steps": steps, "versions": versions}))


if __name__ == "__main__":
    main(*sys.argv[1:])
