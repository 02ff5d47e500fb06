"""Engines under DeepSpeed ZeRO 0 to 3, in this process and on two ranks."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from deepspeed.utils import safe_get_full_grad
from torch import nn

from rlhf.checkpoint.export import export_scalar_model, full_state_dict
from rlhf.config import ConfigError, EngineConfig, ModelConfig, OptimizerConfig
from rlhf.engine import (
    BatchPlan,
    RLHFEngine,
    build_optimizer,
    build_schedule,
    device_of,
    inference_engine,
    training_engine,
    zero3_loading,
)
from rlhf.models.forward import forward_logits
from rlhf.models.loading import load_causal_lm
from rlhf.models.lora import apply_lora
from rlhf.models.scalar import ScalarModel
from rlhf.pipeline.stages import parse_stage
from tests.support.local_engine import skip_without_cpu_adam
from tests.support.tiny_models import save_tiny_model

FP32 = torch.float32


PLAN = BatchPlan(6, 2, 1)


each_stage = pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])


OPTIMIZER = OptimizerConfig(learning_rate=1e-2, lr_schedule="constant")


def batch(rows: int = 6, length: int = 10) -> tuple[torch.Tensor, torch.Tensor]:
    """Ragged right-padded rows, so that micro-batches hold different numbers of tokens."""
    generator = torch.Generator().manual_seed(11)
    ids = torch.randint(1, 90, (rows, length), generator=generator)
    mask = torch.arange(length)[None] < torch.tensor([[10], [3], [7], [2], [9], [4]])[:rows]
    return ids * mask, mask


def token_sum(model: nn.Module, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Sum over the real tokens after the first of -log p."""
    logprobs = forward_logits(model, ids, mask)[:, :-1].float().log_softmax(-1)
    taken = logprobs.gather(2, ids[:, 1:, None]).squeeze(2)
    return -(taken * mask[:, 1:]).sum()


def reference_gradients(path: Path) -> dict[str, torch.Tensor]:
    """Gradients of the token mean over all six rows, by plain autograd."""
    model = load_causal_lm(path, dtype=FP32)
    ids, mask = batch()
    (token_sum(model, ids, mask) / mask[:, 1:].sum()).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def make_engine(path: Path, zero_stage: int, *, plan: BatchPlan = PLAN, precision: str = "fp32", **changes: Any) -> Any:
    config = EngineConfig(zero_stage=zero_stage, precision=precision)  # type: ignore[arg-type]
    with zero3_loading(config, plan):
        model = load_causal_lm(path, dtype=FP32 if precision == "fp32" else torch.bfloat16)
    arguments = {"optimizer": OPTIMIZER, "total_steps": 10, **changes}
    return training_engine(model, engine=config, plan=plan, **arguments)


def backward_in_micro_batches(engine: Any, plan: BatchPlan, rank: int) -> None:
    """The whole batch in micro-batches, scaled as the trainer scales it; stops before the optimizer step."""
    ids, mask = batch()
    total = mask[:, 1:].sum()
    starts = range(rank * plan.micro_batch_size, len(ids), plan.micro_batch_size * plan.world_size)
    for index, start in enumerate(starts):
        rows = slice(start, start + plan.micro_batch_size)
        loss = token_sum(engine, ids[rows], mask[rows])
        engine.backward(loss * plan.accumulation_steps * plan.world_size / total)
        if index + 1 < plan.accumulation_steps:
            engine.step()


def full_gradients(engine: Any) -> dict[str, torch.Tensor]:
    return {name: safe_get_full_grad(parameter).clone() for name, parameter in engine.module.named_parameters()}


@each_stage
def test_the_gradient_is_the_token_mean_of_the_global_batch(zero_stage, tiny_models):
    engine = make_engine(tiny_models["gpt_neox"], zero_stage)
    backward_in_micro_batches(engine, PLAN, 0)
    found, expected = full_gradients(engine), reference_gradients(tiny_models["gpt_neox"])
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.abs().max() > 1e-4
        torch.testing.assert_close(found[name], gradient, atol=2e-6, rtol=1e-4)


@pytest.fixture(scope="module")
def reward_model(tiny_models, tokenizer, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("reward") / "model"
    model = ScalarModel.from_base(tiny_models["gpt_neox"], dtype=FP32, seed=4)
    model.set_normalisation(0.5, 2.0)
    export_scalar_model(model, tokenizer, directory)
    return directory


@pytest.fixture(scope="module")
def wide_models(tokenizer, tmp_path_factory) -> tuple[dict[str, Path], Path]:
    root = tmp_path_factory.mktemp("wide")
    causal = save_tiny_model(root / "causal", "gpt_neox", tokenizer, hidden_size=64, intermediate_size=128)
    model = ScalarModel.from_base(causal, dtype=FP32, seed=4)
    model.set_normalisation(0.5, 2.0)
    export_scalar_model(model, tokenizer, root / "reward")
    return {"gpt_neox": causal}, root / "reward"


@each_stage
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_first_update_is_adams_first_step(zero_stage, precision, tiny_models):
    """Whatever DeepSpeed does to allocate its states must leave no trace: no decay, no step counted."""
    changes = {"optimizer": OptimizerConfig(learning_rate=1e-2, lr_schedule="constant", weight_decay=0.3)}
    engine = make_engine(tiny_models["gpt_neox"], zero_stage, precision=precision, **changes)
    plain = load_causal_lm(tiny_models["gpt_neox"], dtype=FP32 if precision == "fp32" else torch.bfloat16)
    for parameter in plain.parameters():
        parameter.data = parameter.data.float()
    optimizer = build_optimizer(plain, changes["optimizer"])
    ids, mask = batch()
    (token_sum(plain, ids, mask) / mask[:, 1:].sum()).backward()
    nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
    optimizer.step()
    backward_in_micro_batches(engine, PLAN, 0)
    engine.step()
    state = full_state_dict(engine)
    largest = max(parameter.grad.abs().max() for parameter in plain.parameters())
    compared = 0
    for name, parameter in plain.named_parameters():
        # where a gradient is next to nothing its sign is rounding noise, and the sign is Adam's first step
        told = parameter.grad.abs() > (1e-4 if precision == "fp32" else 3e-2) * largest
        compared += int(told.sum())
        difference = (state[name].float() - parameter)[told].abs()
        assert (difference < (1e-4 if precision == "fp32" else 4e-3 * parameter[told].abs() + 5e-4)).all(), name
    assert compared > 300


@each_stage
@pytest.mark.parametrize("architecture", ["gpt_neox", "llama"])
def test_in_bf16_actor_and_reference_say_the_same_at_the_start(architecture, zero_stage, tiny_models):
    """Bit for bit, so that KL is 0: rotary frequencies must not be rounded in one of them."""
    actor = make_engine(tiny_models[architecture], zero_stage, precision="bf16")
    actor.eval()
    config = EngineConfig(zero_stage=zero_stage, precision="bf16")  # type: ignore[arg-type]
    with zero3_loading(config, PLAN):
        model = load_causal_lm(tiny_models[architecture], dtype=torch.bfloat16)
    reference = inference_engine(model, engine=config, plan=PLAN)
    ids, mask = batch()
    with torch.no_grad():
        first, second = forward_logits(actor, ids, mask), forward_logits(reference, ids, mask)
    assert first.dtype == torch.bfloat16 and torch.equal(first, second)
    module = getattr(reference, "module", reference)
    assert not any(part.training for part in module.modules())
    assert not any(parameter.requires_grad for parameter in reference.parameters())


@pytest.mark.parametrize("architecture", ["gpt2", "opt", "gemma", "qwen2"])
def test_zero_3_loads_every_architecture_as_it_is(architecture, tiny_models):
    """Tied embeddings too. The whole model is compared by its logits and its gathered weights."""
    engine = make_engine(tiny_models[architecture], 3)
    engine.eval()
    plain = load_causal_lm(tiny_models[architecture], dtype=FP32).eval()
    ids, mask = batch()
    with torch.no_grad():
        torch.testing.assert_close(forward_logits(engine, ids, mask), forward_logits(plain, ids, mask))
    state = full_state_dict(engine)
    assert state.keys() == dict(plain.named_parameters()).keys() | dict(plain.named_buffers()).keys() & state.keys()
    assert all(torch.equal(state[name], parameter) for name, parameter in plain.named_parameters())


@each_stage
def test_gradient_checkpointing_gives_the_same_gradient(zero_stage, tiny_models):
    engine = make_engine(tiny_models["llama"], zero_stage, gradient_checkpointing=True)
    calls: list[int] = []
    engine.module.model.layers[0].self_attn.register_forward_hook(lambda *_: calls.append(1))
    backward_in_micro_batches(engine, PLAN, 0)
    assert len(calls) == 2 * PLAN.accumulation_steps
    found = full_gradients(engine)
    for name, gradient in reference_gradients(tiny_models["llama"]).items():
        torch.testing.assert_close(found[name], gradient, atol=2e-6, rtol=1e-4)


def test_gradients_are_clipped_to_the_global_norm(tiny_models):
    norms = {}
    for limit in (0.0, 0.01):
        config = EngineConfig(precision="fp32", max_grad_norm=limit)
        model = load_causal_lm(tiny_models["gpt_neox"], dtype=FP32)
        engine = training_engine(model, engine=config, optimizer=OPTIMIZER, plan=PLAN, total_steps=3)
        backward_in_micro_batches(engine, PLAN, 0)
        seen: list[float] = []
        engine.optimizer.register_step_pre_hook(
            lambda *_, seen=seen, engine=engine: seen.append(
                math.sqrt(sum(float(p.grad.pow(2).sum()) for p in engine.module.parameters()))
            )
        )
        engine.step()
        norms[limit] = seen[0]
    assert norms[0.0] > 0.1 and norms[0.01] == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize(
    ("schedule", "warmup", "expected"),
    [
        ("constant", {}, [1, 1, 1, 1, 1, 1, 1, 1, 1]),
        ("linear", {}, [1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8, 0]),
        ("linear", {"warmup_steps": 4}, [1 / 4, 2 / 4, 3 / 4, 1, 1, 3 / 4, 2 / 4, 1 / 4, 0]),
        (
            "cosine",
            {"warmup_ratio": 0.25},
            [1 / 2, 1, 1, *[0.5 + 0.5 * math.cos(math.pi * k / 6) for k in range(1, 7)]],
        ),
        ("constant", {"warmup_steps": 2, "warmup_ratio": 0.9}, [1 / 2, 1, 1, 1, 1, 1, 1, 1, 1]),
    ],
)
def test_learning_rate_of_every_step(schedule, warmup, expected):
    """Eight steps and the one after the last: every step of the run learns, the decay ends at 0 after it."""
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=2.0)
    scheduler = build_schedule(optimizer, OptimizerConfig(lr_schedule=schedule, **warmup), 8)
    rates = []
    for _ in range(9):
        rates.append(optimizer.param_groups[0]["lr"] / 2.0)
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(("warmup", "total", "late"), [(2, 3, False), (2, 2, True), (5, 3, True), (1, 1, False)])
def test_a_warm_up_that_fills_the_run_is_said(warmup, total, late, caplog):
    """Not of a single step, which learns at the peak."""
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))])
    with caplog.at_level("WARNING", logger="rlhf"):
        build_schedule(optimizer, OptimizerConfig(warmup_steps=warmup), total)
    said = f"warm-up of {warmup} steps and a run of {total}: the peak learning rate comes late"
    assert caplog.messages == ([said] if late else [])


def test_schedule_errors():
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))])
    with pytest.raises(ConfigError, match="'square' is not one of cosine, linear, constant"):
        build_schedule(optimizer, OptimizerConfig(lr_schedule="square"), 8)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="total_steps=0"):
        build_schedule(optimizer, OptimizerConfig(), 0)


@each_stage
def test_the_engine_follows_the_schedule(zero_stage, tiny_models):
    optimizer = OptimizerConfig(learning_rate=1.0, lr_schedule="linear", warmup_steps=2)
    engine = make_engine(tiny_models["gpt_neox"], zero_stage, plan=BatchPlan(2, 2, 1), total_steps=4,
                         optimizer=optimizer, learning_rate=1e-3)  # fmt: skip
    ids, mask = batch(2)
    rates = []
    for _ in range(4):
        rates.append(engine.optimizer.param_groups[0]["lr"])
        engine.backward(token_sum(engine, ids, mask) / 10)
        engine.step()
    assert rates == pytest.approx([0.5e-3, 1e-3, 1e-3, 0.5e-3])
    assert engine.optimizer.param_groups[0]["lr"] == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("zero_stage", [0, 3])
def test_only_matrices_decay(zero_stage, tiny_models):
    with zero3_loading(EngineConfig(zero_stage=zero_stage, precision="fp32"), PLAN):  # type: ignore[arg-type]
        model = load_causal_lm(tiny_models["gpt_neox"], dtype=FP32)
    groups = build_optimizer(model, OptimizerConfig(weight_decay=0.1)).param_groups
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {group["weight_decay"]: {names[id(p)] for p in group["params"]} for group in groups}
    assert found[0.0] == {name for name in names.values() if name.endswith("bias") or "norm" in name}
    assert found[0.1] == set(names.values()) - found[0.0]


@pytest.mark.parametrize("optimizer", ["adamw_8bit", "paged_adamw_8bit"])
@each_stage
def test_8_bit_adam_follows_adam(optimizer, zero_stage, tokenizer, tmp_path):
    pytest.importorskip("bitsandbytes")
    path = save_tiny_model(tmp_path / "model", "gpt_neox", tokenizer, hidden_size=64, intermediate_size=128)
    ids, mask = batch()
    losses = {}
    for kind in ("adamw", optimizer):
        config = OptimizerConfig(optimizer=kind, learning_rate=1e-2, lr_schedule="constant")
        engine = make_engine(path, zero_stage, plan=BatchPlan(6, 6, 1), optimizer=config)
        losses[kind] = []
        for _ in range(4):
            loss = token_sum(engine, ids, mask) / mask[:, 1:].sum()
            engine.backward(loss)
            engine.step()
            losses[kind].append(loss.item())
    assert losses["adamw"][-1] < losses["adamw"][0] - 1.0
    assert losses[optimizer] == pytest.approx(losses["adamw"], rel=0.05)


@pytest.mark.parametrize(("zero_stage", "offload"), [(1, "optimizer"), (2, "optimizer"), (3, "optimizer"), (3, "all")])
@pytest.mark.parametrize("builds", [True, False])
def test_offload_trains_as_without(zero_stage, offload, builds, tiny_models, monkeypatch):
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    from rlhf.engine import factory

    if not builds:
        monkeypatch.setattr(factory, "_cpu_adam_builds", lambda: False)
    else:
        skip_without_cpu_adam()
    ids, mask = batch()
    losses = []
    for where in ("none", offload):
        config = EngineConfig(zero_stage=zero_stage, offload=where, precision="fp32")  # type: ignore[arg-type]
        with zero3_loading(config, BatchPlan(6, 6, 1)):
            model = load_causal_lm(tiny_models["gpt_neox"], dtype=FP32)
        engine = training_engine(model, engine=config, optimizer=OPTIMIZER, plan=BatchPlan(6, 6, 1), total_steps=4)
        if where != "none":
            assert isinstance(engine.basic_optimizer, DeepSpeedCPUAdam) == builds
        run = []
        for _ in range(4):
            loss = token_sum(engine, ids, mask) / mask[:, 1:].sum()
            engine.backward(loss)
            engine.step()
            run.append(loss.item())
        losses.append(run)
    assert losses[0][-1] < losses[0][0] - 0.1
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


def test_a_compiler_that_fails_is_logged_and_not_fatal(monkeypatch, caplog, tiny_models):
    import deepspeed.ops.op_builder as builders

    class Broken:
        def load(self, verbose: bool = True) -> None:
            raise RuntimeError("no g++ here")

    monkeypatch.setattr(builders, "CPUAdamBuilder", Broken)
    with caplog.at_level("WARNING", logger="rlhf"):
        built = build_optimizer(load_causal_lm(tiny_models["gpt_neox"], dtype=FP32), OPTIMIZER, offload="optimizer")
    assert isinstance(built, torch.optim.AdamW) and "no g++ here" in caplog.text


def test_what_does_not_go_together(tiny_models, tmp_path):
    model = load_causal_lm(tiny_models["gpt_neox"], dtype=FP32)
    arguments: dict[str, Any] = {"optimizer": OPTIMIZER, "total_steps": 1}
    with pytest.raises(ConfigError, match="batch plan is for 4 processes and 1 run"):
        training_engine(model, engine=EngineConfig(precision="fp32"), plan=BatchPlan(4, 1, 4), **arguments)
    with pytest.raises(ConfigError, match="precision=fp32 and the trainable weight .* is torch.bfloat16"):
        half = load_causal_lm(tiny_models["gpt_neox"], dtype=torch.bfloat16)
        training_engine(half, engine=EngineConfig(precision="fp32"), plan=PLAN, **arguments)
    with pytest.raises(ConfigError, match="no trainable parameter"):
        frozen = load_causal_lm(tiny_models["gpt_neox"], dtype=FP32).requires_grad_(False)
        training_engine(frozen, engine=EngineConfig(precision="fp32"), plan=PLAN, **arguments)
    with pytest.raises(ConfigError, match="adamw_8bit does not go with offload=optimizer"):
        build_optimizer(model, OptimizerConfig(optimizer="adamw_8bit"), offload="optimizer")
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"stage": 2}}')
    with pytest.raises(ConfigError, match="stage=2 and zero_stage makes it 1"):
        config = EngineConfig(zero_stage=1, precision="fp32", deepspeed_config=str(tmp_path / "ds.json"))
        training_engine(model, engine=config, plan=PLAN, **arguments)


@pytest.mark.parametrize("quantization", ["8bit", "4bit"])
def test_a_quantised_base_with_zero_3_is_refused(quantization, tiny_models, reward_model):
    """Where the models are built, and already where a stage's configuration is read."""
    with pytest.raises(ConfigError, match=f"quantization={quantization} does not go with zero_stage=3"):
        build_four(tiny_models, reward_model, 3, lora_rank=2, quantization=quantization)
    for stage in ("sft", "reward", "ppo"):
        options = ["--quantization", quantization, "--lora_rank", "2", "--zero_stage"]
        assert parse_stage(stage, [*options, "2"])
        with pytest.raises(ConfigError, match=f"quantization={quantization} does not go with zero_stage=3"):
            parse_stage(stage, [*options, "3"])
    with pytest.raises(ConfigError, match="needs lora_rank above 0"):
        build_four(tiny_models, reward_model, 0, quantization=quantization)


def build_four(tiny_models, reward_model: Path, zero_stage: int, *, ema_decay: float = 0.0, precision: str = "fp32",
               critic_model: Path | None = None, **model: Any) -> RLHFEngine:  # fmt: skip
    return RLHFEngine.build(
        tiny_models["gpt_neox"], critic_model=critic_model or reward_model, reward_model=reward_model,
        model=ModelConfig(**model),
        engine=EngineConfig(zero_stage=zero_stage, precision=precision),  # type: ignore[arg-type]
        optimizer=OPTIMIZER, critic_learning_rate=5e-3, plan=BatchPlan(6, 6, 1), total_steps=4,
        ema_decay=ema_decay,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("zero_stage", "changes"),
    [
        (0, {}), (1, {}), (2, {}), (3, {}), (0, {"lora_rank": 2}), (2, {"lora_rank": 2}), (3, {"lora_rank": 2}),
        (0, {"lora_rank": 2, "precision": "bf16"}), (3, {"precision": "bf16"}),
        (0, {"lora_rank": 2, "gradient_checkpointing": True}), (3, {"lora_rank": 2, "gradient_checkpointing": True}),
        (0, {"lora_rank": 2, "quantization": "8bit"}), (2, {"lora_rank": 2, "quantization": "4bit"}),
    ],
)  # fmt: skip
def test_four_models_in_one_process(zero_stage, changes, tiny_models, reward_model, wide_models):
    if "quantization" in changes:
        pytest.importorskip("bitsandbytes")
        tiny_models, reward_model = wide_models  # the 4-bit kernels want wider layers
    four = build_four(tiny_models, reward_model, zero_stage, **changes)
    ids, mask = batch()
    lora = "lora_rank" in changes
    assert (four.reference is None) == four.reference_is_actor_without_adapter == lora

    def look() -> tuple[torch.Tensor, ...]:
        with torch.no_grad(), four.scoring():
            with four.reference_model() as model:
                reference = forward_logits(model, ids, mask)
            return forward_logits(four.actor, ids, mask), reference, four.critic(ids, mask), four.reward(ids, mask)

    actor, reference, values, scores = look()
    assert torch.equal(actor, reference)
    if "quantization" not in changes:
        assert torch.equal(values, scores)  # the critic starts as the reward model, head included
    four.actor.backward(token_sum(four.actor, ids, mask) / mask.sum())
    four.actor.step()
    after_actor = look()
    assert (after_actor[0] - actor).abs().max() > 1e-3 or lora
    for unchanged, before in zip(after_actor[1:], (reference, values, scores), strict=True):
        assert torch.equal(unchanged, before)
    for _ in range(2):  # a LoRA adapter moves the output from its second step on, when its second half is not 0
        four.actor.backward(token_sum(four.actor, ids, mask) / mask.sum())
        four.actor.step()
        four.critic.backward((four.critic(ids, mask) - 3.0)[mask].pow(2).mean())
        four.critic.step()
    after = look()
    assert (after[0] - actor).abs().max() > 1e-3
    assert torch.equal(after[1], reference) and torch.equal(after[3], scores)
    assert (after[2] - 3.0)[mask].abs().mean() < (values - 3.0)[mask].abs().mean()
    assert four.critic.optimizer.param_groups[0]["lr"] == pytest.approx(5e-3)
    raw = ScalarModel.from_base(tiny_models["gpt_neox"], dtype=FP32, seed=4).eval()
    close = 0.05 if "precision" in changes else 1e-5
    with torch.no_grad():
        torch.testing.assert_close(scores[mask], (raw(ids, mask)[mask] - 0.5) / 2.0, atol=close, rtol=1e-4)


@pytest.mark.parametrize(("zero_stage", "lora_rank"), [(0, 0), (3, 0), (0, 2), (2, 2)])
def test_what_is_not_named_is_not_loaded(zero_stage, lora_rank, tiny_models, reward_model, monkeypatch):
    """An algorithm without a critic, a reward model or a reference pays for none of them, and cannot use one."""
    loaded: list[str] = []
    real = transformers.PreTrainedModel.from_pretrained.__func__

    def counted(cls, path, *arguments, **options):
        loaded.append(str(path))
        return real(cls, path, *arguments, **options)

    monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", classmethod(counted))
    arguments: dict[str, Any] = {
        "model": ModelConfig(lora_rank=lora_rank), "optimizer": OPTIMIZER, "plan": PLAN, "total_steps": 4,
        "engine": EngineConfig(zero_stage=zero_stage, precision="fp32"),
    }  # fmt: skip
    alone = RLHFEngine.build(tiny_models["gpt_neox"], with_reference=False, **arguments)
    assert loaded == [str(tiny_models["gpt_neox"])]
    assert alone.critic is alone.reference is alone.reward is alone.averaged_actor is None
    assert not alone.reference_is_actor_without_adapter
    with pytest.raises(ConfigError, match="no reference model.*with_reference=True"), alone.reference_model():
        pass
    ids, mask = batch()
    with torch.no_grad(), alone.scoring():
        assert not alone.actor.module.training
        start = forward_logits(alone.actor, ids, mask)
    assert alone.actor.module.training
    alone.actor.backward(token_sum(alone.actor, ids, mask) / mask.sum())
    alone.actor.step()

    loaded.clear()
    without_critic = RLHFEngine.build(tiny_models["gpt_neox"], reward_model=reward_model, **arguments)
    assert len(loaded) == 3 - bool(lora_rank)  # with LoRA the reference is the actor
    assert without_critic.critic is None and without_critic.reward is not None
    assert without_critic.reference_is_actor_without_adapter == bool(lora_rank)
    with torch.no_grad(), without_critic.scoring(), without_critic.reference_model() as reference:
        assert torch.equal(forward_logits(reference, ids, mask), start)
    with_critic = RLHFEngine.build(
        tiny_models["gpt_neox"], critic_model=reward_model, with_reference=False, critic_learning_rate=2e-3, **arguments
    )
    assert with_critic.reward is with_critic.reference is None
    assert with_critic.critic.optimizer.param_groups[0]["lr"] == 2e-3


def test_modes_are_restored_after_scoring(tiny_models, reward_model):
    four = build_four(tiny_models, reward_model, 0)
    four.actor.train()
    four.critic.train()
    dropouts = [module for module in four.actor.modules() if isinstance(module, nn.Dropout)]
    for module in dropouts:
        module.p = 0.3
    frozen = dropouts[0]
    frozen.eval()  # a mode set by hand is a mode to restore
    ids, mask = batch()
    with torch.no_grad():
        assert not torch.equal(forward_logits(four.actor, ids, mask), forward_logits(four.actor, ids, mask))
        with four.scoring():
            assert torch.equal(forward_logits(four.actor, ids, mask), forward_logits(four.actor, ids, mask))
            assert not any(module.training for module in four.critic.module.modules())
    assert four.actor.module.training and dropouts[1].training and four.critic.module.training and not frozen.training
    assert not four.reward.training and four.reference is not None and not four.reference.training
    with pytest.raises(ZeroDivisionError), four.scoring():
        raise ZeroDivisionError
    assert four.actor.module.training
    four.eval()
    assert not four.actor.module.training and not four.critic.module.training


def test_dropout_is_off_in_ppo(tiny_models, reward_model):
    """In training mode too: with dropout the ratio of the first update would not be 1."""
    four = build_four(tiny_models, reward_model, 0, model_dropout=0.3, lora_rank=2, lora_dropout=0.3)
    four.actor.train()
    four.critic.train()
    ids, mask = batch()
    with torch.no_grad():
        for model in (lambda: forward_logits(four.actor, ids, mask), lambda: four.critic(ids, mask)):
            assert torch.equal(model(), model())


def test_another_critic(tiny_models, reward_model, tokenizer, tmp_path):
    ids, mask = batch()
    fresh = build_four(tiny_models, reward_model, 0, critic_model=tiny_models["llama"])
    head = dict(fresh.critic.module.named_parameters())
    assert fresh.critic.module.config.model_type == "llama" and head["scalar_head.bias"].item() == 0.0
    other = ScalarModel.from_base(tiny_models["llama"], dtype=FP32, seed=9).eval()
    export_scalar_model(other, tokenizer, tmp_path / "critic")
    saved = build_four(tiny_models, reward_model, 0, critic_model=tmp_path / "critic")
    with torch.no_grad(), saved.scoring():
        assert torch.equal(saved.critic(ids, mask), other(ids, mask))


@each_stage
def test_averaged_actor(zero_stage, tiny_models, reward_model):
    four = build_four(tiny_models, reward_model, zero_stage, ema_decay=0.75)
    ids, mask = batch()
    expected = {name: tensor.clone() for name, tensor in full_state_dict(four.actor).items()}
    for _ in range(3):
        four.actor.backward(token_sum(four.actor, ids, mask) / mask.sum())
        four.actor.step()
        four.averaged_actor.update()
        for name, tensor in full_state_dict(four.actor).items():
            expected[name] = 0.75 * expected[name] + 0.25 * tensor
    found = four.averaged_actor.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor)
    four.averaged_actor.load_state_dict({name: tensor + 1 for name, tensor in found.items()})
    torch.testing.assert_close(four.averaged_actor.state_dict()["lm_head.weight"], expected["lm_head.weight"] + 1)
    with pytest.raises(ValueError, match="differing: lm_head.weight"):
        four.averaged_actor.load_state_dict(
            {name: tensor for name, tensor in found.items() if name != "lm_head.weight"}
        )


def test_engine_errors(tiny_models, reward_model):
    with pytest.raises(ConfigError, match="ema_decay=1.5"):
        build_four(tiny_models, reward_model, 0, ema_decay=1.5)
    four = build_four(tiny_models, reward_model, 0)
    with pytest.raises(ConfigError, match="no LoRA adapter to switch off"):
        RLHFEngine(four.actor, reference_is_actor_without_adapter=True)
    with pytest.raises(ConfigError, match="one reference is enough"):
        RLHFEngine(four.actor, reference=four.reference, reference_is_actor_without_adapter=True)
    with pytest.raises(ConfigError, match="is not a reward model"):
        build_four(tiny_models, tiny_models["llama"], 0)


def test_zero_3_loading_ends_with_its_block(tiny_models):
    from transformers.integrations import is_deepspeed_zero3_enabled

    config = EngineConfig(zero_stage=3, precision="fp32")
    with zero3_loading(config, PLAN):
        assert is_deepspeed_zero3_enabled()
    assert not is_deepspeed_zero3_enabled()
    assert not hasattr(next(load_causal_lm(tiny_models["gpt_neox"], dtype=FP32).parameters()), "ds_id")


def test_an_adapter_directory_loads_inside_zero_3(tiny_models, tokenizer, tmp_path):
    from rlhf.checkpoint.export import export_causal_lm

    model = apply_lora(load_causal_lm(tiny_models["gpt_neox"], dtype=FP32), ModelConfig(lora_rank=2, lora_alpha=8))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2)
    export_causal_lm(model, tokenizer, tmp_path / "adapter")
    engine = make_engine(tmp_path / "adapter", 3)
    engine.eval()
    assert hasattr(next(engine.module.parameters()), "ds_id")
    ids, mask = batch()
    with torch.no_grad():
        torch.testing.assert_close(
            forward_logits(engine, ids, mask), forward_logits(model.eval(), ids, mask), atol=1e-5, rtol=1e-4
        )
    assert device_of(engine) == device_of(model) == torch.device("cpu")


def test_the_front_door_opens_without_a_launcher(tiny_models, tmp_path):
    """As in a notebook: no launcher, no environment, one process."""
    code = f"""
import torch
from rlhf.config import EngineConfig, OptimizerConfig
from rlhf.engine import BatchPlan, training_engine
from rlhf.models.loading import load_causal_lm
model = load_causal_lm({str(tiny_models["gpt_neox"])!r}, dtype=torch.float32)
engine = training_engine(model, engine=EngineConfig(zero_stage=2, precision="fp32"), optimizer=OptimizerConfig(),
                         plan=BatchPlan(2, 1, 1), total_steps=1)
ids = torch.tensor([[1, 2, 3]])
for _ in range(2):
    engine.backward(engine(input_ids=ids, labels=ids).loss)
    engine.step()
print("steps taken:", engine.global_steps)
"""
    import os

    environment = {
        name: value for name, value in os.environ.items()
        if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    }  # fmt: skip
    environment["PYTHONPATH"] = str(Path(__file__).resolve().parents[2])
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert "steps taken: 1" in done.stdout, done.stderr[-3000:]
