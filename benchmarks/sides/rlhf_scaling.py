"""One point of `scaling.py`: PPO iterations or SFT steps in this process, phase by phase.

python benchmarks/sides/rlhf_scaling.py JOB.json (one rank), or the same under the deepspeed launcher
"""

from __future__ import annotations

import ctypes
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import measure
import torch
from sides.rlhf_offline import StepClock
from sides.stage_trainers import offline_trainer, ppo_trainer, run_config
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from rlhf.algorithms.config import PPOBatchConfig, PPOConfig, PPOOptimizerConfig
from rlhf.checkpoint.export import export_scalar_model
from rlhf.config import BatchConfig, EngineConfig, ModelConfig, OptimizerConfig, PPODataConfig
from rlhf.distributed.place import rank
from rlhf.distributed.world import close_world, init_world, seed_everything
from rlhf.models.scalar import ScalarModel
from rlhf.models.tiny_base import train_tokenizer
from rlhf.pipeline.stages import PPOStageConfig
from rlhf.types import TokenizedResponse


class PhaseMeter:
    """Seconds of phases since the last `clear`, and the most memory that each has added to what was held before it."""

    def __init__(self, device: Any) -> None:
        self.device = device
        self.highest = 0
        self.bytes: dict[str, int] = {}
        self.seconds: dict[str, list[float]] = {}

    def run(self, phase: str, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call `function`; its seconds and its memory above what was held before it are noted."""
        measure.synchronise(self.device)
        self.note_peak()
        return_freed_memory()
        measure.reset_peak_rss(self.device)
        held, started = measure.current_rss_bytes(self.device), time.perf_counter()
        result = function(*arguments)
        measure.synchronise(self.device)
        self.seconds.setdefault(phase, []).append(time.perf_counter() - started)
        added = measure.peak_rss_bytes(self.device) - held
        self.bytes[phase] = max(self.bytes.get(phase, 0), added)
        self.note_peak()
        return result

    def note_peak(self) -> int:
        """The highest memory so far, before the counter is set back."""
        self.highest = max(self.highest, measure.peak_rss_bytes(self.device))
        return self.highest

    def clear(self) -> None:
        """Forget the seconds of the warm-up; what it added in memory stays: first use allocates."""
        self.seconds.clear()


def return_freed_memory() -> None:
    """Give freed heap back to the system, or a phase that uses it again would seem to add nothing (glibc only)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def save_base(point: Mapping[str, Any], directory: Path) -> None:
    """`actor/` and `reward/`: random GPT-NeoX models whose every token is the last with probability `end_rate`.

    The final norm has bias 1 and gain 1, and the row of the end token is constant k / hidden: normalised states sum
    to 0, so its logit is k whatever was said.
    """
    torch.manual_seed(1)
    tokenizer = train_tokenizer(["0123456789"], 300)
    config = GPTNeoXConfig(
        vocab_size=point["vocabulary"],
        hidden_size=point["hidden"],
        num_hidden_layers=point["layers"],
        num_attention_heads=point["heads"],
        intermediate_size=4 * point["hidden"],
        max_position_embeddings=2048,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
    )
    model = GPTNeoXForCausalLM(config)
    with torch.no_grad():
        model.gpt_neox.final_layer_norm.bias.fill_(1.0)
        head = model.get_output_embeddings().weight
        # logits are about N(sum of the row, squared norm of the row)
        others = (head.sum(1) + head.square().sum(1) / 2).exp().sum() - 1.0
        end_rate = point["end_rate"]
        logit = float(torch.log(others * end_rate / (1 - end_rate))) if end_rate else -30.0
        head[tokenizer.eos_token_id] = logit / point["hidden"]
    model.save_pretrained(directory / "actor")
    tokenizer.save_pretrained(directory / "actor")
    export_scalar_model(ScalarModel(model.gpt_neox, seed=1), tokenizer, directory / "reward")


def random_ids(tokens: int, point: Mapping[str, Any], number: int) -> tuple[int, ...]:
    """Token ids of row `number`: none is the end or the padding."""
    generator = torch.Generator().manual_seed(number)
    return tuple(torch.randint(2, point["vocabulary"], (tokens,), generator=generator).tolist())


def run_ppo(point: Mapping[str, Any], work: Path, device: torch.device) -> tuple[PhaseMeter, int, int]:
    """PPO iterations over one batch of prompts; the meter, the real and the padded tokens of an iteration."""
    rows = len(point["lengths"])
    iterations = point["warm_up"] + point["repeats"]
    config = PPOStageConfig(
        run=run_config(work / "run"),
        model=ModelConfig(),
        engine=EngineConfig(precision=point["dtype"]),
        optimizer=PPOOptimizerConfig(),
        batch=PPOBatchConfig(rows, point["micro_batch_size"], max_steps=iterations, rollout_batch_size=rows),
        data=PPODataConfig(max_prompt_tokens=max(point["lengths"]), max_response_tokens=point["response"]),
        ppo=PPOConfig(actor_model=str(work / "actor"), reward_model=str(work / "reward")),
    )
    prompts = [random_ids(tokens, point, number) for number, tokens in enumerate(point["lengths"])]
    trainer = ppo_trainer(config, prompts, work / "run")
    meter = PhaseMeter(device)
    score = trainer.rollouts.score
    trainer.rollouts.score = lambda *arguments: meter.run("scoring", score, *arguments)  # type: ignore[method-assign]
    real, padded = [], []
    for iteration in range(1, iterations + 1):
        if iteration == point["warm_up"] + 1:
            meter.clear()
        experience = trainer.make_experience(iteration)
        meter.seconds.setdefault("generation", []).append(trainer.experience_metrics["seconds_generation"])
        if iteration > point["warm_up"]:
            mask = experience.rollout.response_mask
            real.append(sum(point["lengths"]) + int(mask.sum()))
            padded.append(rows * (max(point["lengths"]) + int(mask.sum(1).max())))
        meter.run("update", trainer.update, experience, iteration)
    return meter, round(statistics.mean(real)), round(statistics.mean(padded))


def run_sft(point: Mapping[str, Any], work: Path, device: torch.device) -> tuple[PhaseMeter, int, int]:
    """SFT steps over rows of the given lengths, half of each a prompt; as `run_ppo`."""
    rows, lengths = len(point["lengths"]), point["lengths"]
    examples = [
        TokenizedResponse(id=str(number), input_ids=random_ids(tokens, point, number), prompt_tokens=tokens // 2)
        for number, tokens in enumerate(lengths)
    ]
    trainer = offline_trainer(
        "sft",
        str(work / "actor"),
        examples,
        work / "run",
        batch=BatchConfig(rows, point["micro_batch_size"], max_steps=point["warm_up"] + point["repeats"]),
        optimizer=OptimizerConfig(),
        precision=point["dtype"],
    )
    clock: Any = StepClock(device)
    trainer.writer = clock
    meter = PhaseMeter(device)
    meter.run("step", trainer.fit)
    meter.seconds["step"] = clock.seconds[point["warm_up"] :]
    return meter, sum(lengths), rows * max(lengths)


def main(job: Mapping[str, Any]) -> None:
    point, work = job["point"], Path(job["work"])
    device = init_world()
    imported = measure.current_rss_bytes(device)
    seed_everything(1)
    meter, real, padded = (run_ppo if point["stage"] == "ppo" else run_sft)(point, work, device)
    outcome = {
        "point": point,
        "real_tokens": real,
        "padded_tokens": padded,
        "seconds": {phase: statistics.median(times) for phase, times in meter.seconds.items()},
        "seconds_of_all": meter.seconds,
        "phase_bytes": meter.bytes,
        "peak_above_imports_bytes": meter.note_peak() - imported,
    }
    Path(f"{job['result']}.rank{rank()}").write_text(json.dumps(outcome))
    close_world()


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[-1]).read_text()))
