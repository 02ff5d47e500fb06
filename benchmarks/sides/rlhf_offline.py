"""Our side of `sft.py` and `reward.py`: one training run in this process, timed from outside the trainer.

python benchmarks/sides/rlhf_offline.py '<job as json>' (see `offline.run_side`)
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import measure
import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from rlhf.algorithms.reward import RewardConfig, RewardTrainer
from rlhf.algorithms.sft import SFTConfig, SFTTrainer
from rlhf.config import BatchConfig, EngineConfig, OptimizerConfig, RunConfig
from rlhf.distributed import init_world, seed_everything, world_size
from rlhf.engine import BatchPlan, compute_dtype, training_engine
from rlhf.models.loading import load_causal_lm, load_tokenizer
from rlhf.models.scalar import ScalarModel
from rlhf.types import TokenizedRanking, TokenizedResponse


class StepClock:
    """Stands in a trainer's `writer`: the time at which each optimizer step ends, and its loss."""

    def __init__(self, device: Any) -> None:
        self.device = device
        self.ends = [time.perf_counter()]
        self.cpu_ends = [time.process_time()]
        self.losses: list[float] = []

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
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


def save_models(size: Any, tokenizer: Any, work: Path) -> None:
    """`base/`: a GPT-NeoX with random weights and its tokenizer; `head.pt`: the scalar head both reward models get."""
    torch.manual_seed(1)
    config = GPTNeoXConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        intermediate_size=4 * size.hidden,
        max_position_embeddings=1024,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
    )
    model = GPTNeoXForCausalLM(config)
    model.save_pretrained(work / "base")
    tokenizer.save_pretrained(work / "base")
    head = ScalarModel(model.gpt_neox, seed=1).scalar_head
    torch.save({"weight": head.weight.detach(), "bias": head.bias.detach()}, work / "head.pt")


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
        else:
            examples.append(TokenizedRanking(row["id"], candidates, ranks=tuple(range(len(candidates)))))
    return examples


def build_trainer(kind: str, rows: Sequence[Any], run: Any, directory: Path, *, pad_token_id: int) -> Any:
    """A trainer over `rows` without an engine, set up as step1_sft/main.py and step2_reward/main.py set it up."""
    shared: dict[str, Any] = {
        "plan": BatchPlan(run.global_batch_size, run.micro_batch_size, world_size()),
        "batch": BatchConfig(run.global_batch_size, run.micro_batch_size, max_steps=run.steps),
        "run": RunConfig(output_dir=str(directory), seed=1, log_every_steps=1, tensorboard=False),
        "directory": directory,
        "pad_token_id": pad_token_id,
        "export": lambda: None,
    }
    if kind == "response":
        return SFTTrainer(None, rows, [], config=SFTConfig(), **shared)
    return RewardTrainer(None, rows, [], config=RewardConfig(), **shared)


def train(job: Mapping[str, Any], run: Any) -> dict[str, Any]:
    """Train as the job says; {"imported_bytes", "peak_bytes", "step_seconds", "first_loss", ...}."""
    device = init_world()
    imported = measure.current_rss_bytes(device)
    seed_everything(job["seed"])
    work = Path(job["work"])
    tokenizer = load_tokenizer(str(work / "base"))
    dtype = compute_dtype(run.dtype)
    rows = read_rows_file(job["kind"], work / "rows.json")
    model: torch.nn.Module
    if job["kind"] == "response":
        model = load_causal_lm(str(work / "base"), dtype=dtype)
    else:
        model = ScalarModel.from_base(str(work / "base"), dtype=dtype, seed=1)
    trainer = build_trainer(job["kind"], rows, run, work / "ours", pad_token_id=tokenizer.pad_token_id)
    trainer.engine = training_engine(
        model,
        engine=EngineConfig(precision=run.dtype),
        optimizer=OptimizerConfig(learning_rate=job["learning_rate"], lr_schedule="constant", adam_betas=[0.9, 0.999]),
        plan=trainer.plan,
        total_steps=trainer.total_steps,
    )
    clock = trainer.writer = StepClock(device)
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
    from offline import Run

    job = json.loads(sys.argv[1])
    outcome = train(job, Run(**job["run"]))
    Path(job["result"]).write_text(json.dumps(outcome))
