"""With LoRA the four models of PPO stand on one base: the numbers of four copies, every weight in memory once."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from rlhf.algorithms.config import PPOBatchConfig, PPOConfig, PPOOptimizerConfig
from rlhf.checkpoint.export import export_causal_lm, export_scalar_model, full_state_dict
from rlhf.config import ConfigError, EngineConfig, ModelConfig
from rlhf.distributed.place import world_size
from rlhf.engine import BatchPlan, RLHFEngine
from rlhf.models.adapters import load_adapter
from rlhf.models.directories import base_key
from rlhf.models.forward import forward_logits
from rlhf.models.loading import backbone_of, load_causal_lm
from rlhf.models.lora import apply_lora, prepare_quantized
from rlhf.models.scalar import ScalarModel
from rlhf.models.shared import share_modules
from rlhf.training.rollouts import ScoredRollout
from rlhf.types import TokenizedPrompt
from tests.support.on_policy import ppo_trainer, reward_of
from tests.support.tiny_models import save_tiny_model

FP32 = torch.float32


OPTIMIZER = PPOOptimizerConfig(learning_rate=1e-3, critic_learning_rate=1e-3, adam_eps=1e-3, lr_schedule="constant")
"""Adam's epsilon as in test_two_ranks.py: with a small one rounding noise becomes a whole step."""


PROMPTS = ([5, 9, 3], [7], [4, 4, 8, 2, 6], [30, 31], [12, 13, 14, 15], [9, 9], [3, 1, 4, 1, 5], [22])


@dataclasses.dataclass(frozen=True)
class Models:
    """Directories of a base, a reward model with an adapter on it, and a reward model that is no adapter."""

    base: Path
    reward: Path
    whole_reward: Path


def lora(model: nn.Module, **changes: Any) -> Any:
    return apply_lora(model, ModelConfig(**{"lora_rank": 2, "lora_alpha": 8, **changes}))


def shake(model: nn.Module, seed: int = 1) -> nn.Module:
    """Give adapters and heads visible weights, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def save_reward(base: Path, directory: Path, tokenizer: Any, **changes: Any) -> Path:
    targets = ["query_key_value", "attention.dense"]
    options = {"lora_rank": 3, "lora_alpha": 12, "lora_dropout": 0.3, "lora_targets": targets, **changes}
    model: Any = shake(lora(ScalarModel.from_base(base, dtype=FP32, seed=4), **options))
    model.set_normalisation(0.5, 2.0)
    export_scalar_model(model, tokenizer, directory)
    return directory


@pytest.fixture(scope="module")
def models(tokenizer, tmp_path_factory) -> Models:
    root = tmp_path_factory.mktemp("shared")
    wide = {"hidden_size": 64, "intermediate_size": 128}  # the 4-bit kernels want wider layers than 16
    base = save_tiny_model(root / "base", "gpt_neox", tokenizer, **wide)
    other = save_tiny_model(root / "other", "gpt_neox", tokenizer, seed=5, **wide)
    whole: Any = shake(ScalarModel.from_base(other, dtype=FP32, seed=4))
    export_scalar_model(whole, tokenizer, root / "whole_reward")
    return Models(base, save_reward(base, root / "reward", tokenizer), root / "whole_reward")


def build(actor: Path, reward: Path, critic: Path | None = None, *, zero_stage: int = 0, ema_decay: float = 0.0,
          precision: str = "fp32", **model: Any) -> RLHFEngine:  # fmt: skip
    torch.manual_seed(7)  # of the first halves of new adapters
    return RLHFEngine.build(
        actor, critic_model=critic or reward, reward_model=reward,
        model=ModelConfig(**{"lora_rank": 2, "lora_alpha": 8, **model}),
        engine=EngineConfig(zero_stage=zero_stage, precision=precision),  # type: ignore[arg-type]
        optimizer=OPTIMIZER, critic_learning_rate=1e-3, plan=plan(), total_steps=20, ema_decay=ema_decay, seed=3,
    )  # fmt: skip


def plan() -> BatchPlan:
    return BatchPlan(4, 2, world_size())


def inner(model: Any) -> Any:
    return getattr(model, "module", model)


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(1, 90, (4, 9), generator=torch.Generator().manual_seed(11))
    mask = torch.arange(9)[None] < torch.tensor([[9], [3], [7], [5]])
    return ids * mask, mask


def outputs(four: RLHFEngine) -> dict[str, torch.Tensor]:
    """What the four say of one batch."""
    ids, mask = batch()
    with torch.no_grad(), four.scoring():
        with four.reference_model() as model:
            reference = forward_logits(model, ids, mask)[mask]
        return {
            "actor": forward_logits(four.actor, ids, mask)[mask],
            "reference": reference,
            "critic": four.critic(ids, mask)[mask],
            "reward": four.reward(ids, mask)[mask],
        }


def run_ppo(four: RLHFEngine, tokenizer: Any, iterations: int = 2) -> dict[str, torch.Tensor]:
    """Whole PPO iterations; everything they computed and what they trained, by name."""
    prompts = [TokenizedPrompt(str(row), tuple(ids), "") for row, ids in enumerate(PROMPTS)]
    with tempfile.TemporaryDirectory() as place:
        trainer = ppo_trainer(
            four, reward_of(four.reward, tokenizer), prompts, tokenizer=tokenizer, plan=plan(), directory=Path(place),
            config=PPOConfig(ema_decay=four.averaged_actor.decay if four.averaged_actor else 0.0),
            batch=PPOBatchConfig(global_batch_size=4, micro_batch_size=2, max_steps=iterations, rollout_batch_size=8,
                                 ppo_epochs=2),
        )  # fmt: skip
        run = trainer.rollouts.run
        rollouts: list[ScoredRollout] = []
        trainer.rollouts.run = lambda *given: rollouts.append(run(*given)) or rollouts[-1]  # type: ignore
        found: dict[str, torch.Tensor] = {}
        for iteration in range(1, iterations + 1):
            experience = trainer.make_experience(iteration)
            metrics = trainer.update(experience, iteration)
            for name in ("scores", "values", "advantages"):
                found[f"{iteration} {name}"] = getattr(experience, name)
            found[f"{iteration} ref_logprobs"] = rollouts[-1].ref_logprobs
            found[f"{iteration} logprobs"] = experience.rollout.logprobs
            numbers = {name: value for name, value in metrics.items() if "seconds" not in name}
            found.update({f"{iteration} {name}": torch.tensor(float(value)) for name, value in numbers.items()})
    for role in ("actor", "critic"):
        state = full_state_dict(getattr(four, role), trainable_only=True)
        found.update({f"{role} {name}": tensor for name, tensor in state.items()})
    return found


def base_pointers(model: Any) -> dict[str, int]:
    """Where each weight of the base lies, by its name in the backbone."""
    found = {}
    for name, parameter in inner(model).named_parameters():
        if ".lora_" not in name and not name.startswith("scalar_head."):
            short = name.split("base_model.model.")[-1].removeprefix("backbone.").removeprefix("gpt_neox.")
            found[short.replace("base_layer.", "")] = parameter.data_ptr()
    return found


@pytest.mark.parametrize("checkpointing", [False, True])
def test_one_base_computes_what_four_copies_compute(checkpointing, models, tokenizer):
    start, found = {}, {}
    for share in (True, False):
        four = build(models.base, models.reward, share_base=share, gradient_checkpointing=checkpointing)
        assert (four.reference is None) == share
        start[share] = outputs(four)
        found[share] = {**run_ppo(four, tokenizer), **outputs(four)}
    assert torch.equal(start[True]["critic"], start[True]["reward"])  # the critic starts as the reward model
    assert found[True].keys() == found[False].keys() and len(found[True]) > 50
    for name, tensor in found[False].items():
        torch.testing.assert_close(found[True][name], tensor, atol=1e-6, rtol=1e-6, msg=name)
    for name in ("actor", "critic"):
        assert (start[True][name] - found[True][name]).abs().max() > 1e-3
    for name in ("reference", "reward"):
        assert torch.equal(start[True][name], found[True][name])
    ids, mask = batch()
    with torch.no_grad():
        alone = ScalarModel.from_pretrained(models.reward, dtype=FP32).eval()(ids, mask)[mask]  # the adapter merged
        plain = forward_logits(load_causal_lm(models.base, dtype=FP32).eval(), ids, mask)[mask]
    torch.testing.assert_close(start[True]["reward"], alone, atol=1e-5, rtol=1e-4)
    assert torch.equal(start[True]["reference"], plain)


@pytest.mark.parametrize("quantization", ["4bit", "8bit"])
def test_in_16_bit_over_a_quantised_base_the_reference_is_the_actor_as_it_starts(quantization, models):
    pytest.importorskip("bitsandbytes")
    found = {}
    for share in (True, False):
        four = build(models.base, models.reward, precision="bf16", quantization=quantization, share_base=share)
        found[share] = outputs(four)
        assert torch.equal(found[share]["actor"], found[share]["reference"])
        assert torch.equal(found[share]["critic"], found[share]["reward"])
    for name, tensor in found[True].items():
        assert torch.equal(tensor, found[False][name]), name


@pytest.mark.parametrize(
    ("precision", "quantization"), [("fp32", "none"), ("bf16", "none"), ("fp32", "4bit"), ("bf16", "4bit")]
)
def test_every_weight_of_the_base_is_in_memory_once(precision, quantization, models, tokenizer):
    if quantization != "none":
        pytest.importorskip("bitsandbytes")
    four = build(models.base, models.reward, precision=precision, quantization=quantization)
    run_ppo(four, tokenizer, 1)
    actor, critic, reward = (base_pointers(model) for model in (four.actor, four.critic, four.reward))
    assert critic == reward and len(critic) > 20
    assert {name: actor[name] for name in critic} == critic and len(set(actor.values())) == len(actor)
    copies = build(models.base, models.reward, precision=precision, quantization=quantization, share_base=False)
    held = [base_pointers(model) for model in (copies.actor, copies.critic, copies.reference, copies.reward)]
    assert len(set().union(*(pointers.values() for pointers in held))) == sum(map(len, held))


def test_training_one_role_changes_no_other(models):
    four = build(models.base, models.reward)
    ids, mask = batch()
    losses = {
        "actor": lambda: -forward_logits(four.actor, ids, mask).log_softmax(-1)[..., 3][mask].mean(),
        "critic": lambda: (four.critic(ids, mask) - 3.0)[mask].pow(2).mean(),
    }
    for role, loss in losses.items():
        before = outputs(four)
        engine = getattr(four, role)
        with four.updating(engine):
            for _ in range(6):
                engine.backward(loss())
                engine.step()
        for name, tensor in outputs(four).items():
            assert torch.equal(tensor, before[name]) == (name != role), f"{name} while {role} trained"


def test_who_trains_what(models):
    four = build(models.base, models.reward)
    actor, critic, reward = (dict(inner(model).named_parameters()) for model in (four.actor, four.critic, four.reward))
    trainable = {name for name, parameter in critic.items() if parameter.requires_grad}
    assert {name for name in trainable if ".lora_" not in name} == {"scalar_head.weight", "scalar_head.bias"}
    assert {name.split(".lora_")[0].split("layers.")[1] for name in trainable if ".lora_" in name} == {
        f"{layer}.attention.{module}" for layer in (0, 1) for module in ("query_key_value", "dense")
    }  # the reward model's targets, and its rank below, not those of the configuration
    assert all(parameter.shape[0] == 3 for name, parameter in critic.items() if ".lora_A." in name)
    assert all(parameter.shape[0] == 2 for name, parameter in actor.items() if ".lora_A." in name)
    assert all(".lora_" in name for name, parameter in actor.items() if parameter.requires_grad)
    assert not any(parameter.requires_grad for parameter in reward.values())
    adapters = [{p.data_ptr() for name, p in named.items() if ".lora_" in name} for named in (actor, critic, reward)]
    assert len(set().union(*adapters)) == sum(map(len, adapters))
    ids, mask = batch()
    four.critic.train()  # without the dropout that the reward model trained with: the first ratio would not be 1
    with torch.no_grad():
        assert torch.equal(four.critic(ids, mask), four.critic(ids, mask))
    optimized = {id(p) for group in four.critic.optimizer.param_groups for p in group["params"]}
    assert optimized == {id(critic[name]) for name in trainable}


def test_the_log_says_who_shares_which_base(models, tokenizer, caplog):
    caplog.set_level("INFO", "rlhf")
    base, trained = base_key(models.base), "the critic trains the adapter it starts from, with its rank and targets"

    def said(*given: Any, **options: Any) -> list[str]:
        caplog.clear()
        build(*given, **options)
        return [line for line in caplog.messages if line.startswith(("one base", "share_base", "the critic trains"))]

    everyone = f"one base for actor, reference, critic, reward: {base}"
    assert said(models.base, models.reward) == [everyone, f"{trained}: {models.reward}"]
    assert said(models.base, models.reward, models.base) == [everyone], "a critic of its own has a new adapter"
    assert said(models.base, models.whole_reward) == [
        f"one base for actor, reference: {base}", f"one base for critic, reward: {base_key(models.whole_reward)}"
    ]  # fmt: skip
    assert said(models.base, models.reward, share_base=False) == [
        "share_base is off: actor, critic, reference and reward model load a copy of their base each"
    ]
    pytest.importorskip("bitsandbytes")
    assert said(models.base, models.reward, quantization="8bit")[0] == f"{everyone} in 8bit"


@pytest.mark.parametrize("quantization", ["8bit", "4bit"])
def test_a_quantised_base_is_shared(quantization, models, tokenizer):
    pytest.importorskip("bitsandbytes")
    found = {}
    for share in (True, False):
        four = build(models.base, models.reward, share_base=share, quantization=quantization)
        integers = {
            parameter.data_ptr()
            for model in (four.actor, four.critic, four.reference, four.reward) if model is not None
            for parameter in inner(model).parameters() if parameter.dtype in (torch.int8, torch.uint8)
        }  # fmt: skip
        assert len(integers) == (8 if share else 32)  # four linear layers in each of two blocks
        start = outputs(four)
        found[share] = {**run_ppo(four, tokenizer), **outputs(four)}
        assert torch.equal(start["critic"], start["reward"]) and torch.equal(start["reward"], found[share]["reward"])
        assert (start["actor"] - found[share]["actor"]).abs().max() > 1e-3
    for name, tensor in found[False].items():
        torch.testing.assert_close(found[True][name], tensor, atol=1e-5, rtol=1e-5, msg=name)


def test_a_reward_model_on_another_base_stays_apart(models, tokenizer, tmp_path):
    other = save_tiny_model(tmp_path / "other", "gpt_neox", tokenizer, seed=8)
    for reward in (models.whole_reward, save_reward(other, tmp_path / "reward", tokenizer)):
        four = build(models.base, reward)
        actor, critic, scores = (base_pointers(model) for model in (four.actor, four.critic, four.reward))
        assert critic == scores and not set(actor.values()) & set(critic.values())
        ids, mask = batch()
        alone = ScalarModel.from_pretrained(reward, dtype=FP32).eval()
        with torch.no_grad():
            wanted = alone(ids, mask)[mask]
        before = outputs(four)
        torch.testing.assert_close(before["reward"], wanted, atol=1e-5, rtol=1e-4)
        assert torch.equal(before["critic"], before["reward"])
        run_ppo(four, tokenizer, 1)
        after = outputs(four)
        assert torch.equal(before["reward"], after["reward"]) and not torch.equal(before["critic"], after["critic"])


def test_a_whole_reward_model_is_not_quantised(models):
    pytest.importorskip("bitsandbytes")
    four = build(models.base, models.whole_reward, quantization="4bit")
    assert any(parameter.dtype == torch.uint8 for parameter in inner(four.critic).parameters())
    ids, mask = batch()
    with torch.no_grad():
        wanted = ScalarModel.from_pretrained(models.whole_reward, dtype=FP32).eval()(ids, mask)[mask]
    assert torch.equal(outputs(four)["reward"], wanted)


def test_a_critic_from_the_causal_lm(models, tokenizer):
    found = {}
    for share in (True, False):
        four = build(models.base, models.reward, models.base, share_base=share)
        same = base_pointers(four.actor)["final_layer_norm.weight"] == base_pointers(four.critic)[
            "final_layer_norm.weight"]  # fmt: skip
        assert same == share
        assert {p.shape[0] for name, p in four.critic.module.named_parameters() if ".lora_A." in name} == {2}
        found[share] = {**outputs(four), **run_ppo(four, tokenizer, 1)}
    for name, tensor in found[False].items():
        torch.testing.assert_close(found[True][name], tensor, atol=1e-6, rtol=1e-6, msg=name)


def test_a_reward_model_trained_from_the_sft_adapter(models, tokenizer, tmp_path):
    """As in the pipeline: SFT writes an adapter, the reward model starts from it; PPO may use another dtype."""
    sft = shake(lora(load_causal_lm(models.base, dtype=FP32)), seed=3)
    export_causal_lm(sft, tokenizer, tmp_path / "sft")
    reward = save_reward(tmp_path / "sft", tmp_path / "reward", tokenizer)
    (tmp_path / "link").symlink_to(tmp_path / "sft")
    for precision in ("fp32", "bf16"):
        four = build(tmp_path / "link", reward, precision=precision)
        actor, critic = base_pointers(four.actor), base_pointers(four.critic)
        assert {actor[name] for name in critic} == set(critic.values())
    bases = list((tmp_path / "sft" / "merged").iterdir())
    assert len(bases) == 2 and len({base_key(base) for base in bases}) == 1


def test_a_reward_model_whose_base_is_gone(models, tokenizer, tmp_path):
    base = shutil.copytree(models.base, tmp_path / "base")
    reward = save_reward(base, tmp_path / "reward", tokenizer)
    expected = outputs(build(models.base, reward))["reward"]
    ScalarModel.from_pretrained(reward, dtype=FP32)  # leaves its merged weights beside the adapter
    shutil.rmtree(base)
    four = build(models.base, reward)
    torch.testing.assert_close(outputs(four)["reward"], expected, atol=1e-5, rtol=1e-4)
    assert base_pointers(four.critic) == base_pointers(four.reward) != base_pointers(four.actor)


def test_wrong_directories(models, tokenizer, tmp_path):
    with pytest.raises(ConfigError, match="has no language-modelling head"):
        build(models.reward, models.reward)
    with pytest.raises(ConfigError, match="is not a reward model"):
        build(models.base, models.base)
    broken = shutil.copytree(models.reward, tmp_path / "broken")
    tensors = load_file(broken / "adapter_model.safetensors")
    del tensors[next(name for name in tensors if ".lora_A." in name)]
    save_file(tensors, broken / "adapter_model.safetensors")
    with pytest.raises(ConfigError, match="lacks 1 of its weights"):
        build(models.base, broken)
    small = save_tiny_model(tmp_path / "small", "gpt_neox", tokenizer)
    settings = json.loads((models.reward / "adapter_config.json").read_text())
    moved = shutil.copytree(models.reward, tmp_path / "moved")
    (moved / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": str(small)}))
    with pytest.raises(ConfigError, match="does not fit its base"):
        build(models.base, moved)


@pytest.mark.parametrize("architecture", ["gpt_neox", "llama", "gpt2", "opt", "qwen2", "gemma"])
def test_a_second_tree_over_the_same_weights(architecture, tiny_models):
    first = load_causal_lm(tiny_models[architecture], dtype=FP32).eval()
    ids, mask = batch()
    with torch.no_grad():
        plain = forward_logits(first, ids, mask)[mask]
    calls: list[str] = []
    for name, module in first.named_modules():
        module.register_forward_hook(lambda *_, name=name: calls.append(name))
    first.enable_input_require_grads()
    second = share_modules(first)
    assert [name for name, _ in second.named_modules()] == [name for name, _ in first.named_modules()]
    assert not {id(module) for module in first.modules()} & {id(module) for module in second.modules()}
    assert all(a is b for a, b in zip(first.parameters(), second.parameters(), strict=True))
    adapted = shake(lora(second))
    backbone = share_modules(backbone_of(first))
    assert type(backbone) is type(first.base_model)
    with torch.no_grad():
        assert (forward_logits(adapted, ids, mask)[mask] - plain).abs().max() > 1e-3
        assert not calls  # the hooks of the first tree stay there
        assert torch.equal(forward_logits(first, ids, mask)[mask], plain)
        assert torch.equal(first.base_model(input_ids=ids).last_hidden_state, backbone(input_ids=ids).last_hidden_state)
    assert calls and not any("lora_" in name for name, _ in first.named_modules())
    adapted.gradient_checkpointing_enable()
    assert adapted.is_gradient_checkpointing and not first.is_gradient_checkpointing


def test_functions_set_on_a_module_stay_with_it():
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(3, 3)
            self.again = self.inner
            self.function = torch.tanh  # an attribute of its own goes along

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.function(self.again(self.inner(x)))

    first = Odd()
    x = torch.ones(1, 3)
    wanted = first(x)
    first.inner.forward = lambda x: x  # what accelerate's hooks do
    second = share_modules(first)
    assert second.inner is second.again and second.inner is not first.inner
    second.inner.register_buffer("mark", x)
    second.inner.bias = None
    assert first.inner.bias is not None and not hasattr(first.inner, "mark")
    second.inner.bias = first.inner.bias
    assert torch.equal(second(x), wanted) and not torch.equal(first(x), wanted)


@pytest.mark.parametrize("quantization", ["8bit", "4bit"])
@pytest.mark.parametrize("first_to_compute", [0, 1])
def test_quantised_trees_compute_in_any_order(quantization, first_to_compute, models):
    """bitsandbytes moves what an 8-bit layer computes with into the layer's state at its first forward."""
    pytest.importorskip("bitsandbytes")
    ids, mask = batch()
    alone: Any = prepare_quantized(
        load_causal_lm(models.base, ModelConfig(quantization=quantization, lora_rank=1), dtype=FP32)
    ).eval()
    with torch.no_grad():
        wanted = forward_logits(alone, ids, mask)[mask]
    base = prepare_quantized(
        load_causal_lm(models.base, ModelConfig(quantization=quantization, lora_rank=1), dtype=FP32)
    ).eval()
    trees = [lora(share_modules(base)).eval(), share_modules(base)]
    scalar = ScalarModel(load_adapter(share_modules(backbone_of(base)), models.reward, trainable=True), seed=1)
    for tree in (trees[first_to_compute], trees[1 - first_to_compute]):
        with torch.no_grad():
            assert torch.equal(forward_logits(tree, ids, mask)[mask], wanted)
    scalar.train()(ids, mask).pow(2).mean().backward()  # after the others have computed in eval mode
    gradients = [parameter.grad for parameter in scalar.parameters() if parameter.requires_grad]
    assert len(gradients) == 2 + 2 * 2 * 2 and all(gradient.abs().sum() > 0 for gradient in gradients)
    with torch.no_grad():
        assert torch.equal(forward_logits(trees[1], ids, mask)[mask], wanted)


def export_all(four: RLHFEngine, tokenizer: Any, directory: Path) -> None:
    export_causal_lm(four.actor, tokenizer, directory / "actor")
    export_causal_lm(four.actor, tokenizer, directory / "actor_ema", state_dict=four.averaged_actor.state_dict())
    export_scalar_model(four.critic, tokenizer, directory / "critic")


def test_saved_models_load_apart(models, tokenizer, tmp_path):
    before = {file.name: file.read_bytes() for file in models.reward.iterdir() if file.is_file()}
    four = build(models.base, models.reward, ema_decay=0.5)
    run_ppo(four, tokenizer)
    export_all(four, tokenizer, tmp_path)
    ids, mask = batch()
    torch.save((ids, mask), tmp_path / "batch.pt")
    assert before == {file.name: file.read_bytes() for file in models.reward.iterdir() if file.is_file()}
    for name, count in (("actor", 2 * 2), ("actor_ema", 2 * 2), ("critic", 2 * 2 * 2)):
        settings = json.loads((tmp_path / name / "adapter_config.json").read_text())
        assert settings["base_model_name_or_path"] == str(models.base)
        stored = load_file(tmp_path / name / "adapter_model.safetensors").keys() - {"base_model.model.score.weight"}
        assert len(stored) == count  # its own adapter and no base
        assert not (tmp_path / name / "model.safetensors").exists()
    code = f"""
import torch
from rlhf.models.forward import forward_logits
from rlhf.models.scalar import ScalarModel
from rlhf.models.loading import load_causal_lm
ids, mask = torch.load("batch.pt")
with torch.no_grad():
    torch.save({{
        "actor": forward_logits(load_causal_lm("actor", dtype=torch.float32).eval(), ids, mask)[mask],
        "ema": forward_logits(load_causal_lm("actor_ema", dtype=torch.float32).eval(), ids, mask)[mask],
        "critic": ScalarModel.from_pretrained("critic", dtype=torch.float32).eval()(ids, mask)[mask],
        "reward": ScalarModel.from_pretrained({str(models.reward)!r}, dtype=torch.float32).eval()(ids, mask)[mask],
    }}, "outputs.pt")
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found, wanted = torch.load(tmp_path / "outputs.pt"), outputs(four)
    for name in ("actor", "critic", "reward"):
        torch.testing.assert_close(found[name], wanted[name], atol=1e-5, rtol=1e-4, msg=name)
    moved = (wanted["actor"] - wanted["reference"]).norm()
    assert 0 < (found["ema"] - wanted["reference"]).norm() < moved  # between the start and the actor
