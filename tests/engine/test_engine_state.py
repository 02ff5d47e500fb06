"""A DeepSpeed engine's state goes into files and comes back: the same bytes, on other ranks, or a clear refusal.

Exactness is the comparison of every byte of weights, moments and counters after further steps (see
`engine_state_worker.goes_on_exactly`). On another number of ranks or ZeRO stage the values that were saved are compared
exactly and the losses of the next steps to 1e-4 (float32): gradients are then summed in another order.
"""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from rlhf.config import ConfigError
from rlhf.engine import load_engine_state, save_engine_state
from rlhf.engine.optimizer_state import restore_beta_powers
from tests.support.engine_state_worker import (
    BF16_GRADIENTS,
    FP16,
    LAST,
    SAVED_AFTER,
    SHARD_BYTES,
    Case,
    allow_fp16,
    assert_same_bytes,
    assert_same_state,
    build,
    full_disk,
    goes_on_exactly,
    save,
    saved_tensors,
    train,
)
from tests.support.launch import ROOT
from tests.support.local_engine import skip_without_cpu_adam
from tests.support.tiny_models import save_tiny_model

ONE_RANK = Case("one-rank")


LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(scope="module")
def models(tokenizer, tmp_path_factory) -> Path:
    """gpt_neox, gpt2 (tied embeddings), and one wide enough for 8-bit moments and 4-bit weights."""
    root = tmp_path_factory.mktemp("models")
    for name in ("gpt_neox", "gpt2"):
        save_tiny_model(root / name, name, tokenizer)
    save_tiny_model(root / "wide", "gpt_neox", tokenizer, hidden_size=64, intermediate_size=128, num_hidden_layers=1)
    return root


@pytest.fixture(scope="module")
def one_rank(models, tmp_path_factory) -> tuple[Path, list[float], Any]:
    """A state saved by one rank without ZeRO, the losses after it, and the engine of the end."""
    directory = tmp_path_factory.mktemp("one_rank")
    for case, place in (
        (Case("bf16", 0, "bf16"), directory.with_name(directory.name + "-bf16")),
        (ONE_RANK, directory),
    ):
        engine = build(case, models)
        train(case, engine, 0, SAVED_AFTER)
        save(engine, place)
    return directory, train(ONE_RANK, engine, SAVED_AFTER, LAST), engine


@pytest.mark.parametrize(
    "case",
    [
        Case("fp32-0"),
        Case("fp32-2", 2),
        Case("fp32-3", 3),
        Case("bf16-0-tied", 0, "bf16", model="gpt2"),
        Case("bf16-1", 1, "bf16"),
        Case("bf16-1-bf16-gradients", 1, "bf16", settings=BF16_GRADIENTS),
        Case("bf16-2", 2, "bf16"),
        Case("bf16-3-tied", 3, "bf16", model="gpt2"),
        Case("fp16-0", 0, "fp16", settings=FP16, overflows=True),
        Case("fp16-2", 2, "fp16", settings=FP16, overflows=True),
        Case("fp16-3", 3, "fp16", settings=FP16, overflows=True),
        Case("scalar-0", scalar=True),
        Case("scalar-3", 3, scalar=True),
        Case("lora-0", lora=True),
    ],
    ids=lambda case: case.name,
)
def test_one_rank_goes_on_exactly(case, models, tmp_path):
    with allow_fp16():
        goes_on_exactly(case, models, tmp_path)
    if case.precision == "fp16":
        progress = json.loads((tmp_path / "whole" / "actor.json").read_text())["progress"]
        assert progress["skipped_steps"] == 2 and progress["loss_scale"]["cur_scale"] != 2**8
    if case.scalar:
        assert saved_tensors(tmp_path / "saved")["buffer/seen"] == SAVED_AFTER


@pytest.mark.parametrize(
    "case",
    [
        Case("paged-adam-0", model="wide", optimizer="paged_adamw_8bit"),
        Case("8bit-adam-3", 3, model="wide", optimizer="adamw_8bit"),
        Case("4bit-8bit-adam-1", 1, "bf16", model="wide", optimizer="adamw_8bit", lora=True, quantization="4bit"),
    ],
    ids=lambda case: case.name,
)
def test_bitsandbytes_goes_on_exactly(case, models, tmp_path):
    pytest.importorskip("bitsandbytes")
    goes_on_exactly(case, models, tmp_path)
    packed = [key for key in saved_tensors(tmp_path / "saved") if ".rank00000" in key]
    assert bool(packed) == (not case.lora)  # an adapter this small keeps plain moments


def test_a_state_without_a_loss_scale_leaves_that_of_fp16_as_it_starts(one_rank, models):
    with allow_fp16():
        engine = build(Case("fp16-0", 0, "fp16", settings=FP16), models)
    load_engine_state(engine, one_rank[0], "actor")
    assert engine.global_steps == SAVED_AFTER and engine.optimizer.loss_scaler.cur_scale == 2**8


def test_packed_moments_of_another_stage_say_what_to_resume_with(models, tmp_path):
    pytest.importorskip("bitsandbytes")
    packed = Case("8bit-3", 3, model="wide", optimizer="adamw_8bit")
    engine = build(packed, models)
    train(packed, engine, 0, 1)
    save(engine, tmp_path)
    other = build(replace(packed, name="8bit-1", zero_stage=1), models)
    with pytest.raises(ConfigError, match="cannot be loaded with zero_stage=1 on 1 rank; resume with .*=3 on 1 rank$"):
        load_engine_state(other, tmp_path, "actor")


@pytest.mark.parametrize("builds", [True, False])
def test_an_offloaded_optimizer_goes_on_exactly(builds, models, tmp_path, monkeypatch):
    from rlhf.engine import factory

    if not builds:
        monkeypatch.setattr(factory, "_cpu_adam_builds", lambda: False)
    else:
        skip_without_cpu_adam()
    goes_on_exactly(Case("offload-2", 2, "bf16", offload="optimizer"), models, tmp_path)


def test_deepspeeds_cpu_adam_is_brought_to_its_step():
    """It keeps powers of the betas to itself, which are not those that it would set anew (with 0.999 it shows)."""
    skip_without_cpu_adam()
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    def steps(weight: torch.nn.Parameter, optimizer: DeepSpeedCPUAdam, first: int, last: int) -> None:
        for step in range(first, last):
            weight.grad = torch.randn(64, generator=torch.Generator().manual_seed(step))
            optimizer.step()

    ends = []
    for caught_up in (None, True, False):
        weight = torch.nn.Parameter(torch.ones(64))
        optimizer = DeepSpeedCPUAdam([weight], lr=1e-2, betas=(0.9, 0.999))
        steps(weight, optimizer, 0, 50)
        if caught_up is not None:
            resumed = torch.nn.Parameter(weight.detach().clone())
            state, optimizer = optimizer.state[weight], DeepSpeedCPUAdam([resumed], lr=1e-2, betas=(0.9, 0.999))
            weight, optimizer.state[resumed] = resumed, state
            if caught_up:
                restore_beta_powers(optimizer)
        steps(weight, optimizer, 50, 60)
        ends.append(weight.detach())
    assert torch.equal(ends[0], ends[1]) and not torch.equal(ends[0], ends[2])


NEW_PROCESS = """
import sys
from pathlib import Path
from rlhf.engine import load_engine_state
from tests.support.engine_state_worker import LAST, SAVED_AFTER, Case, build, save, train
models, saved, out = map(Path, sys.argv[1:])
case = Case("one-rank")
engine = build(case, models)
load_engine_state(engine, saved, "actor")
print("losses:", train(case, engine, SAVED_AFTER, LAST))
save(engine, out)
"""


def test_a_new_process_goes_on_exactly(models, one_rank, tmp_path):
    saved, losses, engine = one_rank
    environment = {key: value for key, value in os.environ.items() if key not in LAUNCHER}
    done = subprocess.run(
        [sys.executable, "-c", NEW_PROCESS, str(models), str(saved), str(tmp_path / "resumed")],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert f"losses: {losses}" in done.stdout, done.stdout[-2000:] + done.stderr[-2000:]
    save(engine, tmp_path / "whole")
    assert_same_state(tmp_path / "whole", tmp_path / "resumed")


def test_a_state_before_the_first_step(models, tmp_path):
    """No moments yet; the weights differ from those of the files when an adapter is drawn."""
    for stage, precision in ((0, "bf16"), (2, "fp32")):
        case = Case(f"first-{stage}", stage, precision, lora=True)
        engines = [build(case, models, seed=seed) for seed in (0, 1)]
        out = tmp_path / case.name
        save(engines[0], out)
        load_engine_state(engines[1], out, "actor")
        assert train(case, engines[0], 0, 2) == train(case, engines[1], 0, 2)


def test_the_schedule_is_the_engines_own(models, one_rank):
    """At the saved step: a run that goes on with another learning rate gets it."""
    engine = build(Case("schedule"), models)
    assert engine.get_lr() == [0.0025, 0.0025]
    engine.lr_scheduler.base_lrs = [0.5, 0.5]
    load_engine_state(engine, one_rank[0], "actor")
    assert engine.get_lr() == [0.5, 0.5]  # the last of four warm-up steps


def copied_state(saved: Path, target: Path) -> tuple[Path, dict[str, Any]]:
    target.mkdir()
    for path in saved.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target, json.loads((target / "actor.json").read_text())


def test_the_count_of_micro_steps_fits_the_new_number(models, one_rank, tmp_path):
    """Where DeepSpeed counts micro-batches itself: 18 of 6 to a step were 3 steps, which have 2 to a step here."""
    saved, index = copied_state(one_rank[0], tmp_path / "state")
    index["progress"]["micro_steps"] = 6 * SAVED_AFTER
    (saved / "actor.json").write_text(json.dumps(index))
    engine = build(Case("counts"), models, micro_batch_size=3)
    load_engine_state(engine, saved, "actor")
    assert engine.micro_steps == 2 * SAVED_AFTER and engine.global_samples == 6 * SAVED_AFTER


def test_the_state_of_another_model_is_refused(models, one_rank, tmp_path):
    with pytest.raises(ConfigError, match="another model: trainable weight gpt_neox.* is not in the model of the run"):
        load_engine_state(build(Case("gpt2", model="gpt2"), models), one_rank[0], "actor")
    with pytest.raises(
        ConfigError, match=r"embed_in.weight is \[96, 16\] in it and \[96, 64\] in the model.*; .* more"
    ):
        load_engine_state(build(Case("wide", model="wide"), models), one_rank[0], "actor")
    with pytest.raises(ConfigError, match="another model.* more$"):
        load_engine_state(build(Case("lora", lora=True), models), one_rank[0], "actor")
    engine = build(Case("buffers"), models)
    before = {name: parameter.clone() for name, parameter in engine.module.named_parameters()}
    engine.module.register_buffer("extra", torch.zeros(2))
    with pytest.raises(ConfigError, match=r"another model: buffer extra \[2\] is not in it$"):
        load_engine_state(engine, one_rank[0], "actor")
    assert all(torch.equal(parameter, before[name]) for name, parameter in engine.module.named_parameters())


def test_other_states_that_are_refused(models, one_rank, tmp_path):
    engine = build(Case("refused", 1), models)
    saved, index = copied_state(one_rank[0], tmp_path / "state")
    for changes, message in (
        ({"format_version": 9}, "format version 9 and this release reads 1"),
        ({"optimizer": "AdamW8bit"}, "the state of optimizer AdamW8bit, not of AdamW"),
    ):
        (saved / "actor.json").write_text(json.dumps({**index, **changes}))
        with pytest.raises(ConfigError, match=message):
            load_engine_state(engine, saved, "actor")
    next(iter(index["weights"].values()))["step"] = 9
    (saved / "actor.json").write_text(json.dumps(index))
    with pytest.raises(
        ConfigError, match=r"different numbers of steps \(\[3, 9\]\).*resume with zero_stage=0 on 1 rank"
    ):
        load_engine_state(engine, saved, "actor")
    (saved / "actor.json").write_text('{"format_version": 1')
    with pytest.raises(ConfigError, match="actor.json is damaged"):
        load_engine_state(engine, saved, "actor")
    with pytest.raises(FileNotFoundError, match="critic.json"):
        load_engine_state(engine, saved, "critic")
    with pytest.raises(ValueError, match="has taken 5 steps"):
        load_engine_state(one_rank[2], one_rank[0], "actor")


def test_a_truncated_file_is_an_error_of_the_disk(models, one_rank, tmp_path):
    saved, _ = copied_state(one_rank[0], tmp_path / "state")
    content = (saved / "actor-00002.safetensors").read_bytes()
    (saved / "actor-00002.safetensors").write_bytes(content[:-8])
    with pytest.raises(OSError, match="cannot be read"):
        load_engine_state(build(Case("truncated", 1), models), saved, "actor")


def test_a_failed_write_leaves_nothing_to_load(models, one_rank, tmp_path):
    """The disk is full in the middle of a save: an OSError with its number, and no index of what was there before."""
    engine = one_rank[2]
    save(engine, tmp_path)
    with full_disk(SHARD_BYTES), pytest.raises(OSError, match="File too large") as caught:
        save(engine, tmp_path)
    assert caught.value.errno == errno.EFBIG and (tmp_path / "actor-00000.safetensors").stat().st_size == SHARD_BYTES
    with pytest.raises(FileNotFoundError):
        load_engine_state(build(Case("after-failure"), models), tmp_path, "actor")


def test_files_are_bounded_and_plain_safetensors(one_rank, models):
    saved, *_ = one_rank
    for path in saved.glob("actor-*.safetensors"):
        tensors = load_file(path)
        assert len(tensors) == 1 or sum(tensor.nbytes for tensor in tensors.values()) <= SHARD_BYTES
        save_file(tensors, saved.parent / "again.safetensors", metadata={"format": "pt"})
        assert_same_bytes(tensors, load_file(saved.parent / "again.safetensors"))
    assert sorted(path.suffix for path in saved.iterdir() if path.suffix != ".safetensors") == [".json"]


def test_two_engines_share_a_directory(models, one_rank, tmp_path):
    engine = one_rank[2]
    for name in ("actor", "critic"):
        save_engine_state(engine, tmp_path, name)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "actor-00000.safetensors", "actor.json", "critic-00000.safetensors", "critic.json",
    ]  # fmt: skip


def test_an_unknown_form_of_deepspeed_is_refused(models, tmp_path, monkeypatch):
    engine = build(Case("unknown", 1), models)
    monkeypatch.setattr(engine.optimizer, "zenflow", True)
    with pytest.raises(ConfigError, match="DeepSpeedZeroOptimizer in this form cannot be saved.*keep_last=0"):
        save_engine_state(engine, tmp_path, "actor")
