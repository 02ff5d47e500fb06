"""One run of TRL 0.24's PPOTrainer for `learning.py`, from saved models; runs in the peer's environment.

It takes the job's prompts in the job's order, and its policy is saved every `save_every` iterations. The
seconds of an iteration begin with its sampling and end with its last optimizer step; saving is off the clock.

What had to be seen to, so that both sides learn from the same models and in the same steps:
- The reward model's head has a bias (`score_bias` of its configuration), which the class of transformers has no place
  for; the layer is given one. The value model starts from the reward model, as in TRL's examples.
- `gradient_accumulation_steps` spans minibatches: a minibatch that is to make an optimizer step of its own needs
  gradient_accumulation_steps 1 and `num_mini_batches` more than 1.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import torch
import transformers
import trl
import trl.trainer.ppo_trainer as module
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl.trainer.utils import get_reward
from trl_ppo import Clock


def load_scalar(path: str) -> Any:
    """The reward model in `path` with its bias."""
    model = AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float32)
    head = torch.nn.Linear(model.score.in_features, 1)
    with torch.no_grad():
        head.weight.copy_(model.score.weight)
        head.bias.fill_(model.config.score_bias)
    model.score = head
    return model


@torch.no_grad()
def check(rows: list[dict[str, Any]], actor: Any, reward: Any, pad_token_id: int, temperature: float) -> dict[str, Any]:
    """What these models say of the job's rows by the functions that the trainer calls: scores, log-probabilities."""
    scores, logprobs = [], []
    for row in rows:
        length = len(row["prompt"])
        ids = torch.tensor([[*row["prompt"], *row["response"], pad_token_id]])
        scores.append(get_reward(reward, ids, pad_token_id, length)[1].item())
        logits = module.forward(actor, ids[:, :-1], pad_token_id).logits[:, length - 1 : -1] / (temperature + 1e-7)
        logprobs.append(module.selective_log_softmax(logits, ids[:, length:-1]).sum().item())
    return {"scores": scores, "logprobs": logprobs}


class SavePolicy(transformers.TrainerCallback):
    """Ends the clock's iteration and saves the policy where it is due."""

    def __init__(self, clock: Clock, directory: Path, every: int, last: int) -> None:
        self.clock, self.directory, self.every, self.last = clock, directory, every, last
        self.saved: list[tuple[int, str]] = []

    def on_step_end(self, args, state, control, model=None, **others):
        self.clock.close_iteration()
        step = state.global_step
        if step % self.every == 0 or step == self.last:
            path = self.directory / f"policy-{step}"
            model.policy.save_pretrained(path)
            self.saved.append((step, str(path)))


def main(job_file: str, out_file: str) -> None:
    job = json.loads(Path(job_file).read_text())
    settings, prompts = job["settings"], job["prompts"]
    rows = len(prompts[0])
    tokenizer = AutoTokenizer.from_pretrained(job["actor"], padding_side="left")
    torch.manual_seed(job["seed"])
    actor, reference = (AutoModelForCausalLM.from_pretrained(job["actor"], dtype=torch.float32) for _ in range(2))
    reward, value = load_scalar(job["reward"]), load_scalar(job["reward"])
    checked = check(job["checked"], actor, reward, tokenizer.pad_token_id, settings["temperature"])
    data = Dataset.from_dict({"input_ids": [ids for batch in prompts for ids in batch]})
    clock = Clock(torch.device("cpu"), tokenizer.pad_token_id)
    save = SavePolicy(clock, Path(job["directory"]), job["save_every"], len(prompts))
    with tempfile.TemporaryDirectory() as directory:
        trainer = module.PPOTrainer(
            args=trl.PPOConfig(
                output_dir=directory,
                per_device_train_batch_size=rows,
                gradient_accumulation_steps=1,
                num_mini_batches=rows // job["minibatch"],
                local_rollout_forward_batch_size=rows,
                total_episodes=len(data),
                stop_token="eos",
                num_sample_generations=0,
                gradient_checkpointing=False,  # its default; it is faster without, and the same
                bf16=False,
                use_cpu=True,
                disable_tqdm=True,
                save_strategy="no",
                eval_strategy="no",
                report_to="none",
                seed=job["seed"],
                **settings,
            ),
            processing_class=tokenizer,
            model=actor,
            ref_model=reference,
            reward_model=reward,
            value_model=value,
            train_dataset=data,
            eval_dataset=data.select([0]),
            callbacks=[save],
        )
        in_order = DataLoader(data, batch_size=rows, shuffle=False, collate_fn=trainer.data_collator)
        trainer.dataloader = trainer.accelerator.prepare(in_order)
        module.batch_generation = clock.wrap_generation(module.batch_generation)
        trainer.accelerator.accumulate = clock.wrap_accumulate(trainer.accelerator.accumulate)
        trainer.train()
    result = {
        "iterations": clock.iterations,
        "saved": save.saved,
        "checked": checked,
        "optimizer": type(trainer.optimizer.optimizer).__name__,
        "threads": torch.get_num_threads(),
        "versions": {"trl": trl.__version__, "transformers": transformers.__version__, "torch": torch.__version__},
    }
    Path(out_file).write_text(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
