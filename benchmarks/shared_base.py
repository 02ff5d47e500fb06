"""Memory of PPO's four models with LoRA: one shared base against a copy each.

python benchmarks/shared_base.py [--quantization none 8bit 4bit] [--repeats 3]

Makes a GPT-NeoX of random weights (111M parameters, computed in float32), takes it as the SFT model, puts a LoRA
reward model on it, and runs one whole PPO iteration (sampling, scoring, an update of actor and critic) in fresh
processes with `share_base` on and off. Counted is what the process adds to its resident set after its imports: weights,
optimizer states, activations, caches, at the peak of the iteration. Apart from it stands the peak with loading, when
pages of the checkpoint are mapped as well. The checkpoint is stored in bfloat16, as published models are: weights in
the dtype of their file stay mapped from it, and of four such "copies" the system keeps one (`--stored float32`).
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from measure import current_rss_bytes, markdown_table, peak_rss_bytes, reset_peak_rss, worker_environment, write_report

RANK, PROMPT_TOKENS, RESPONSE_TOKENS, PROMPTS, MICRO_BATCH = 8, 32, 32, 4, 2
MIB = 2**20


def build_models(directory: Path, *, hidden: int, layers: int, vocabulary: int, stored: str) -> int:
    """Write `sft` (a GPT-NeoX) and `reward` (an adapter and a head on it) into `directory`; parameters of `sft`."""
    import torch
    import transformers
    from flops import Shape
    from ppo_workloads import make_tokenizer

    from rlhf.checkpoint.export import export_scalar_model
    from rlhf.config import ModelConfig
    from rlhf.models.lora import apply_lora
    from rlhf.models.scalar import ScalarModel

    torch.manual_seed(1)
    tokenizer = make_tokenizer(Shape(hidden, layers, hidden // 64, 4 * hidden, vocabulary))
    config = transformers.GPTNeoXConfig(
        vocab_size=vocabulary, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=hidden // 64,
        intermediate_size=4 * hidden, max_position_embeddings=512, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = transformers.GPTNeoXForCausalLM(config)
    model.to(getattr(torch, stored)).save_pretrained(directory / "sft")
    tokenizer.save_pretrained(directory / "sft")
    parameters = sum(parameter.numel() for parameter in model.parameters())
    reward = apply_lora(
        ScalarModel.from_base(directory / "sft", dtype=torch.float32, seed=2),
        ModelConfig(lora_rank=RANK, lora_alpha=16),
    )
    with torch.no_grad():
        for parameter in reward.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn_like(parameter))
    export_scalar_model(reward, tokenizer, directory / "reward")
    return parameters


def run_side(
    directory: Path, *, share: bool, quantization: str, iterations: int, gradient_checkpointing: bool
) -> dict[str, Any]:
    """PPO in this process; bytes before and at the peak, and a fingerprint of what was computed."""
    import random

    import deepspeed  # noqa: F401  (imported before the first measurement)
    import peft  # noqa: F401
    import torch
    from sides.stage_trainers import ppo_trainer, run_config

    from rlhf.algorithms.config import PPOBatchConfig, PPOConfig, PPOOptimizerConfig
    from rlhf.config import EngineConfig, ModelConfig, PPODataConfig
    from rlhf.distributed.world import close_world, init_world, seed_everything
    from rlhf.models.loading import load_tokenizer
    from rlhf.pipeline.stages import PPOStageConfig

    if quantization != "none":
        import bitsandbytes  # noqa: F401
    importlib.import_module("transformers.models.gpt_neox.modeling_gpt_neox")
    init_world()
    seed_everything(1)
    reset_peak_rss()
    before = current_rss_bytes()
    generator = random.Random(3)
    vocabulary = len(load_tokenizer(directory / "sft"))
    prompts = [[generator.randrange(3, vocabulary) for _ in range(PROMPT_TOKENS)] for _ in range(PROMPTS)]
    with tempfile.TemporaryDirectory() as out:
        config = PPOStageConfig(
            run=run_config(Path(out)),
            model=ModelConfig(
                lora_rank=RANK,
                share_base=share,
                quantization=quantization,  # type: ignore[arg-type]
                gradient_checkpointing=gradient_checkpointing,
            ),
            engine=EngineConfig(precision="fp32"),
            optimizer=PPOOptimizerConfig(learning_rate=1e-4, critic_learning_rate=1e-4),
            batch=PPOBatchConfig(PROMPTS, MICRO_BATCH, max_steps=iterations, rollout_batch_size=PROMPTS),
            data=PPODataConfig(max_prompt_tokens=PROMPT_TOKENS, max_response_tokens=RESPONSE_TOKENS),
            ppo=PPOConfig(actor_model=str(directory / "sft"), reward_model=str(directory / "reward")),
        )
        trainer = ppo_trainer(config, prompts, Path(out))
        loaded, loading_peak = current_rss_bytes(), peak_rss_bytes()
        reset_peak_rss()
        for iteration in range(1, iterations + 1):
            experience = trainer.make_experience(iteration)
            metrics = trainer.update(experience, iteration)
    result = {
        "after_imports_mib": before / MIB,
        "added_by_models_mib": (loaded - before) / MIB,
        "peak_while_loading_mib": (loading_peak - before) / MIB,
        "peak_mib": (peak_rss_bytes() - before) / MIB,
        "scores": experience.scores.tolist(),
        "value_loss": float(metrics["value_loss"]),
        "threads": torch.get_num_threads(),
    }
    close_world()
    return result


def measure_side(directory: Path, share: bool, quantization: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """`run_side` in fresh processes: the median of each number."""
    runs = []
    for repeat in range(arguments.repeats):
        out = directory / f"{quantization}-{share}-{repeat}.json"
        command = [sys.executable, __file__, "--side", "on" if share else "off", "--directory", str(directory)]
        command += ["--quantization", quantization, "--iterations", str(arguments.iterations), "--out", str(out)]
        command += ["--gradient_checkpointing"] if arguments.gradient_checkpointing else []
        done = subprocess.run(
            command, env=worker_environment(arguments.threads), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        if done.returncode != 0:
            raise SystemExit(f"share_base={share} quantization={quantization} failed:\n{done.stdout.decode()[-4000:]}")
        runs.append(json.loads(out.read_text()))
    numbers = [name for name, value in runs[0].items() if isinstance(value, float)]
    return {**runs[0], **{name: statistics.median(run[name] for run in runs) for name in numbers}, "runs": runs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--layers", type=int, default=14)
    parser.add_argument("--vocabulary", type=int, default=8000)
    parser.add_argument("--quantization", nargs="+", default=["none"], choices=("none", "8bit", "4bit"))
    parser.add_argument("--stored", default="bfloat16", choices=("bfloat16", "float32"), help="dtype of the checkpoint")
    parser.add_argument("--iterations", type=int, default=1, help="PPO iterations")
    parser.add_argument("--gradient_checkpointing", action="store_true", help="recompute activations, on both sides")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--side", choices=("on", "off"), help=argparse.SUPPRESS)
    parser.add_argument("--directory", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        result = run_side(
            arguments.directory,
            share=arguments.side == "on",
            quantization=arguments.quantization[0],
            iterations=arguments.iterations,
            gradient_checkpointing=arguments.gradient_checkpointing,
        )
        arguments.out.write_text(json.dumps(result))
        return
    rows, sides = [], {}
    with tempfile.TemporaryDirectory() as place:
        directory = Path(place)
        sizes = {name: getattr(arguments, name) for name in ("hidden", "layers", "vocabulary", "stored")}
        parameters = build_models(directory, **sizes)
        for quantization in arguments.quantization:
            both = {share: measure_side(directory, share, quantization, arguments) for share in (True, False)}
            whole = {share: max(side["peak_mib"], side["peak_while_loading_mib"]) for share, side in both.items()}
            same = all(
                math.isclose(a, b, abs_tol=1e-5)
                for a, b in zip(both[True]["scores"], both[False]["scores"], strict=True)
            )
            for share, side in both.items():
                rows.append(
                    {
                        "base": "float32" if quantization == "none" else quantization,
                        "four models": "one base" if share else "four copies",
                        "after imports (MiB)": side["after_imports_mib"],
                        "added once loaded (MiB)": side["added_by_models_mib"],
                        "added at the peak (MiB)": side["peak_mib"],
                        "share of four copies": side["peak_mib"] / both[False]["peak_mib"],
                        "added with loading (MiB)": whole[share],
                        "share with loading": whole[share] / whole[False],
                        "same scores": "yes" if same else "NO",
                    }
                )
                sides[f"{quantization} {'shared' if share else 'copies'}"] = side
    payload = {"parameters": parameters, "arguments": {**vars(arguments), "directory": None, "out": None}}
    paths = write_report("shared_base", {**payload, "sides": sides}, rows)
    print(f"{parameters / 1e6:.0f}M parameters\n{markdown_table(rows)}\n{paths[0]}")


if __name__ == "__main__":
    main()
