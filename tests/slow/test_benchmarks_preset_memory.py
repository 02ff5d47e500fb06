"""The tensors of real engines on this CPU against the memory that benchmarks/preset_memory.py calculates."""

from __future__ import annotations

import gc
import importlib
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf.checkpoint.export import export_scalar_model
from rlhf.engine import BatchPlan, RLHFEngine
from rlhf.models.lora import apply_lora
from rlhf.models.scalar import ScalarModel
from rlhf.pipeline.stages import parse_stage
from tests.support.tiny_models import ROWS, save_tiny_model, tiny_config

ROOT = Path(__file__).parents[2]
PLAN = BatchPlan(4, 4, 1)
SHAPE = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 3}


@pytest.fixture()
def memory(monkeypatch):
    """The script, as a module."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("preset_memory")


def live_bytes() -> dict[int, int]:
    """The bytes of every storage that a tensor of this process has, by its address."""
    gc.collect()
    found = {}
    for item in gc.get_objects():
        if issubclass(type(item), torch.Tensor) and item.device.type == "cpu":
            for tensor in (item, item.grad if item.is_leaf else None):
                if tensor is not None:
                    storage = tensor.untyped_storage()
                    found[storage.data_ptr()] = storage.nbytes()
    return found


def build(stages: dict[str, Any], actor: Path, reward: Path) -> RLHFEngine:
    config = stages["ppo"]
    return RLHFEngine.build(
        actor, critic_model=reward, reward_model=reward, model=config.model, engine=config.engine,
        optimizer=config.optimizer, critic_learning_rate=1e-3, plan=PLAN, total_steps=4, zero_critic_head=True,
    )  # fmt: skip


def backward(engine: Any, scalar: bool) -> None:
    ids = torch.randint(1, ROWS, (4, 12))
    output = engine(ids, attention_mask=torch.ones_like(ids))
    loss = (output if scalar else output.logits).float().pow(2).mean()
    engine.set_gradient_accumulation_boundary(True)
    engine.backward(loss)


CASES = {
    "every weight": ("fp32", 0, 0, 0, "none"),
    "every weight, bf16": ("bf16", 1, 0, 0, "none"),
    "every weight, bf16, gradients divided": ("bf16", 2, 0, 0, "none"),
    "adapters": ("fp32", 0, 4, 4, "none"),
    "adapters, bf16": ("bf16", 0, 4, 2, "none"),
    "a whole reward model": ("bf16", 1, 4, 0, "none"),
    "4 bits": ("bf16", 0, 4, 4, "4bit"),
    "8 bits": ("bf16", 0, 4, 4, "8bit"),
}


@pytest.mark.parametrize("case", CASES)
def test_the_tensors_of_a_real_engine_weigh_what_the_script_says(
    memory, case: str, tokenizer, tmp_path, monkeypatch
) -> None:
    precision, stage, rank, reward_rank, quantization = CASES[case]
    actor = save_tiny_model(tmp_path / "actor", "gpt_neox", tokenizer, **SHAPE)
    base = save_tiny_model(tmp_path / "base", "gpt_neox", tokenizer, seed=1, **SHAPE)
    monkeypatch.setitem(memory.ARCHITECTURES, str(actor), tiny_config("gpt_neox", **SHAPE))
    monkeypatch.setitem(memory.ARCHITECTURES, str(base), tiny_config("gpt_neox", **SHAPE))
    common = ["--precision", precision, "--zero_stage", str(stage), "--output_dir", str(tmp_path)]
    options = {
        "sft": ["--base_model", str(actor)],
        "reward": ["--base_model", str(base), "--lora_rank", str(reward_rank)],
        "ppo": ["--base_model", str(actor), "--lora_rank", str(rank), "--quantization", quantization],
    }
    stages = {name: parse_stage(name, [*common, *options[name]]) for name in options}
    model = ScalarModel.from_base(base, dtype=torch.float32)
    if reward_rank:
        model = apply_lora(model, stages["reward"].model)
    export_scalar_model(model, tokenizer, tmp_path / "reward")
    del model
    before = live_bytes()
    engines = build(stages, actor, tmp_path / "reward")
    backward(engines.actor, scalar=False)
    backward(engines.critic, scalar=True)
    engines.actor.step()  # Adam makes its moments in the first step
    engines.critic.step()
    during: set[int] = set()  # the sizes of what is there in the middle of a backward pass
    if stage == 2:
        trained = next(weight for weight in engines.actor.parameters() if weight.requires_grad)
        trained.register_hook(lambda gradient: during.update(live_bytes().values()))
    backward(engines.actor, scalar=False)
    backward(engines.critic, scalar=True)
    held = sum(size for place, size in live_bytes().items() if place not in before)
    said = memory.stage_memory(stages, "ppo", 1)
    code_tables = 2 * 3 * 4 * 4 * (16 + 256) if quantization == "4bit" else 0  # of NF4 and of its scales, each layer
    assert held == pytest.approx(said.weights + said.optimizer + said.gradients + code_tables, rel=5e-3)
    if stage == 2:
        assert said.buckets == 2 * 1_000_000 and said.buckets in during
