"""Engines of many kinds that are trained, saved, loaded and compared: in the test's process and on several ranks."""

from __future__ import annotations

import errno
import importlib.util
import json
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from safetensors.torch import load_file

from rlhf.checkpoint.export import full_state_dict
from rlhf.config import EngineConfig, ModelConfig, OptimizerConfig
from rlhf.distributed.collectives import all_reduce_sum, any_rank
from rlhf.distributed.place import is_main, rank, world_size
from rlhf.distributed.world import close_world, init_world
from rlhf.engine import BatchPlan, compute_dtype, load_engine_state, save_engine_state, training_engine, zero3_loading
from rlhf.models.forward import forward_logits
from rlhf.models.loading import load_causal_lm
from rlhf.models.lora import apply_lora
from rlhf.models.scalar import ScalarModel

TOTAL_STEPS, SAVED_AFTER, LAST = 8, 3, 5
SHARD_BYTES = 4_000
"""Small enough for several files, and for weights that are larger than a file."""
FP16 = {"fp16": {"initial_scale_power": 8, "loss_scale_window": 2, "hysteresis": 2}}
BF16_GRADIENTS = {"data_types": {"grad_accum_dtype": "bf16"}}
"""With bf16 and ZeRO-1 another of DeepSpeed's optimizers: the one that earlier releases had."""
ROUND_ROBIN = {"zero_optimization": {"round_robin_gradients": True}}
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Case:
    """A kind of engine. `model` is the name of a directory; `settings` are merged into DeepSpeed's."""

    name: str
    zero_stage: int = 0
    precision: str = "fp32"
    model: str = "gpt_neox"
    optimizer: str = "adamw"
    offload: str = "none"
    lora: bool = False
    quantization: str = "none"
    scalar: bool = False
    settings: dict[str, Any] = field(default_factory=dict)
    overflows: bool = False
    """Let the gradients of some steps overflow."""


def build(case: Case, models: Path, *, micro_batch_size: int = 1, seed: int = 0) -> Any:
    """An engine of two weight-decay groups, warm-up and cosine schedule; 6 sequences to a step."""
    torch.manual_seed(seed)  # of adapters
    plan = BatchPlan(6, micro_batch_size, world_size())
    settings = models / f"{case.name}.rank{rank()}.json"
    settings.write_text(json.dumps(case.settings))
    config = EngineConfig(
        zero_stage=case.zero_stage,  # type: ignore[arg-type]
        precision=case.precision,  # type: ignore[arg-type]
        offload=case.offload,  # type: ignore[arg-type]
        deepspeed_config=str(settings),
        max_grad_norm=0.5,
    )
    optimizer = OptimizerConfig(
        optimizer=case.optimizer,  # type: ignore[arg-type]
        learning_rate=1e-2,
        weight_decay=0.1,
        lr_schedule="cosine",
        warmup_steps=4,
    )
    model_config = ModelConfig(
        quantization=case.quantization,  # type: ignore[arg-type]
        lora_rank=4 if case.lora else 0,
        lora_alpha=8,
    )
    with zero3_loading(config, plan):
        load = ScalarModel.from_base if case.scalar else load_causal_lm
        model: Any = load(models / case.model, model_config, dtype=compute_dtype(case.precision))
    if case.scalar:
        model.register_buffer("seen", torch.zeros(()))  # a buffer that training changes
    if case.lora:
        model = apply_lora(model, model_config)
    return training_engine(model, engine=config, optimizer=optimizer, plan=plan, total_steps=TOTAL_STEPS)


def allow_fp16() -> Any:
    """A context for fp16: CPUs without instructions for it compute in it too, but DeepSpeed's accelerator says no."""
    return mock.patch.object(get_accelerator(), "is_fp16_supported", lambda: True)


def train(case: Case, engine: Any, first: int, last: int, *, micro_batch_size: int = 1) -> list[float]:
    """Steps `first` to `last` (not included) over 6 rows each; their losses over all ranks, before each step."""
    losses = []
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        ids = torch.randint(1, 90, (6, 8), generator=generator)
        mask = torch.arange(8)[None] < torch.tensor([[8], [3], [7], [2], [6], [4]])
        ids, total = ids * mask, float(mask[:, 1:].sum())
        starts = range(rank() * micro_batch_size, 6, micro_batch_size * world_size())
        running = torch.zeros(())
        for start in starts:
            engine.set_gradient_accumulation_boundary(start == starts[-1])
            rows = slice(start, start + micro_batch_size)
            loss = loss_sum(case, engine, ids[rows], mask[rows]) / total
            if case.overflows and step % 3 == 1:
                loss = loss * 1e30
            engine.backward(loss * world_size(), scale_wrt_gas=False)
            running += loss.detach()
        engine.step()
        if case.scalar:
            engine.module.seen.fill_(1.0 + step)
        losses.append(float(all_reduce_sum(running)))
    return losses


def loss_sum(case: Case, engine: Any, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    if case.scalar:
        return ((engine(ids, mask) - ids / 90).pow(2) * mask)[:, 1:].sum()
    logprobs = forward_logits(engine, ids, mask)[:, :-1].float().log_softmax(-1)
    return -(logprobs.gather(2, ids[:, 1:, None]).squeeze(2) * mask[:, 1:]).sum()


def save(engine: Any, directory: Path) -> None:
    save_engine_state(engine, directory, "actor", shard_bytes=SHARD_BYTES)


def saved_tensors(directory: Path) -> Tensors:
    """Every tensor of a saved state, by file name for packed ones."""
    found: Tensors = {}
    for path in sorted(directory.glob("actor*.safetensors")):
        tensors = load_file(path)
        if ".rank" in path.name:
            found.update({f"{path.name}:{key}": tensor for key, tensor in tensors.items()})
        else:
            assert not found.keys() & tensors.keys()
            found.update(tensors)
    return found


def assert_same_bytes(expected: Tensors, found: Tensors) -> None:
    assert expected and expected.keys() == found.keys(), sorted(expected.keys() ^ found.keys())[:5]
    for name, tensor in expected.items():
        other = found[name]
        assert tensor.dtype == other.dtype and tensor.shape == other.shape, name
        same = torch.equal(tensor.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))
        assert same, f"{name}: {(tensor.float() - other.float()).abs().max()}"


def assert_same_state(expected: Path, found: Path) -> None:
    assert_same_bytes(saved_tensors(expected), saved_tensors(found))
    assert json.loads((expected / "actor.json").read_text()) == json.loads((found / "actor.json").read_text())


def goes_on_exactly(case: Case, models: Path, out: Path) -> list[float]:
    """A run to step LAST and one that is saved and loaded into a new engine on the way end in the same bytes.

    Returns the losses after SAVED_AFTER.
    """
    whole = build(case, models)
    train(case, whole, 0, SAVED_AFTER)
    save(whole, out / "saved")
    at_save = full_state_dict(whole, trainable_only=True)
    losses = train(case, whole, SAVED_AFTER, LAST)
    save(whole, out / "whole")

    resumed = build(case, models, seed=1)
    fresh = full_state_dict(resumed, trainable_only=True)
    with torch.no_grad():  # an evaluation before the state is loaded must leave no trace
        loss_sum(case, resumed.eval() or resumed, torch.ones(1, 4, dtype=torch.long), torch.ones(1, 4) > 0)
    resumed.train()
    load_engine_state(resumed, out / "saved", "actor")
    loaded = full_state_dict(resumed, trainable_only=True)
    save(resumed, out / "loaded")
    assert train(case, resumed, SAVED_AFTER, LAST) == losses
    save(resumed, out / "resumed")

    end, resumed_end = full_state_dict(whole, trainable_only=True), full_state_dict(resumed, trainable_only=True)
    assert whole.get_lr() == resumed.get_lr() and whole.micro_steps == resumed.micro_steps
    if is_main():
        assert not any(torch.equal(fresh[name], tensor) for name, tensor in at_save.items()), "nothing was learnt"
        assert not any(torch.equal(end[name], tensor) for name, tensor in at_save.items())
        assert_same_bytes(at_save, loaded)
        assert_same_bytes(end, resumed_end)
        assert_same_state(out / "saved", out / "loaded")
        assert_same_state(out / "whole", out / "resumed")
        assert len(list((out / "saved").glob("actor-*.safetensors"))) > 1
    return losses


def assert_deepspeed_finds(engine: Any, directory: Path) -> None:
    """What DeepSpeed's own helpers say of the engine's weights and moments is what was saved. A collective."""
    if hasattr(engine.optimizer, "_lazy_init_hp_params_optimizer_state"):
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    saved = saved_tensors(directory)
    for name, parameter in engine.module.named_parameters():
        assert torch.equal(safe_get_full_fp32_param(parameter), saved[f"weight/{name}"]), name
        for key in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(safe_get_full_optimizer_state(parameter, key), saved[f"{key}/{name}"]), (key, name)


TWO_RANKS = (
    Case("fp32-0"),
    Case("fp32-1", 1),
    Case("fp32-2", 2),
    Case("fp32-3", 3),
    Case("bf16-0", 0, "bf16"),
    Case("bf16-1", 1, "bf16"),
    Case("bf16-1-bf16-gradients", 1, "bf16", settings=BF16_GRADIENTS),
    Case("bf16-2", 2, "bf16"),
    Case("bf16-2-4bit", 2, "bf16", model="wide", lora=True, quantization="4bit", settings=ROUND_ROBIN),
    Case("bf16-3-lora", 3, "bf16", lora=True),
    Case("bf16-0-8bit-adam", 0, "bf16", model="wide", optimizer="adamw_8bit"),
    Case("bf16-3-offload", 3, "bf16", offload="all", model="gpt2"),
)


def on_two_ranks(models: Path, out: Path, one_rank: Path) -> dict[str, list[float]]:
    """Everything that is tested on two ranks; the losses after SAVED_AFTER by name."""
    has_bitsandbytes = importlib.util.find_spec("bitsandbytes") is not None
    losses = {
        case.name: goes_on_exactly(case, models, out / case.name)
        for case in TWO_RANKS
        if has_bitsandbytes or "bit" not in case.optimizer + case.quantization
    }
    for stage in (1, 2, 3):
        case = Case(f"from-one-{stage}", stage)
        engine = build(case, models)
        load_engine_state(engine, one_rank, "actor")
        save(engine, out / case.name)
        assert_deepspeed_finds(engine, one_rank)
        losses[case.name] = train(case, engine, SAVED_AFTER, LAST)
    failed_writes(engine, models, out)
    for stage in (0, 1, 2, 3):
        case = Case(f"bf16-from-one-{stage}", stage, "bf16")
        engine = build(case, models)
        load_engine_state(engine, one_rank.parent / (one_rank.name + "-bf16"), "actor")
        save(engine, out / case.name)
    return losses


@contextmanager
def full_disk(bytes_left: int) -> Iterator[None]:
    """Files of this process cannot grow beyond `bytes_left`: the system refuses the write that would, as when full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_left, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def failed_writes(engine: Any, models: Path, out: Path) -> None:
    """A disk that is full in the middle of a save and a file that is gone: both ranks hear of it, and go on."""
    before = full_state_dict(engine)
    try:
        with full_disk(SHARD_BYTES) if is_main() else nullcontext():  # a weight that fills a file alone is larger
            save(engine, out / "full")
    except OSError as error:
        assert not is_main() or error.errno == errno.EFBIG, error
        assert is_main() or "another rank could not write" in str(error), error
    else:
        raise AssertionError(f"rank {rank()} was not told that rank 0 could not write")
    assert not (out / "full" / "actor.json").exists()
    save(engine, out / "again")
    if is_main():
        (out / "again" / "actor-00003.safetensors").unlink()
    any_rank(False)  # wait for it
    other = build(Case("other", 2), models)
    try:
        load_engine_state(other, out / "again", "actor")
    except OSError:
        pass
    else:
        raise AssertionError("a state without one of its files was loaded")
    after = full_state_dict(engine)
    assert not is_main() or assert_same_bytes(before, after) is None


if __name__ == "__main__":
    models, out, one_rank = (Path(argument) for argument in sys.argv[1:] if not argument.startswith("--local_rank"))
    init_world()
    found = on_two_ranks(models, out, one_rank)
    if is_main():
        (out / "losses.json").write_text(json.dumps(found))
    print("a rank is done")
    close_world()
