"""A training state of another model, tokenizer or setting is refused, and the difference is named."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from rlhf.checkpoint.fingerprint import check_identity, model_fingerprint
from rlhf.config import ConfigError

MIB = 2**20


def test_every_difference_is_named_with_both_values():
    saved = {"base_model": "X", "lora_rank": 8, "data": ["a", "b"], "seed": 1, "betas": [0.9, 0.95], "gone": True}
    current = {"base_model": "Y", "lora_rank": 8, "data": ["a", "c", "d"], "seed": 1, "betas": (0.9, 0.95), "new": None}
    with pytest.raises(ConfigError) as raised:
        check_identity(saved, current, Path("runs/a/states/step-1"))
    assert str(raised.value) == (
        "the training state in runs/a/states/step-1 is of another run: "
        'base_model was "X" and is "Y"; data[1] was "b" and is "c"; gone was true and is not there; '
        'data[2] was not there and is "d"; new was not there and is null. '
        "Go on with the old settings, choose another --output_dir, or start anew with --resume never"
    )


def test_the_same_run_passes():
    identity = {"model": {"a.json": "x"}, "betas": (0.9, 0.95), "rate": 1e-5, "none": None, "empty": [], 3: "three"}
    check_identity({**identity, "betas": [0.9, 0.95], "3": "three"}, identity, Path("x"))
    with pytest.raises(ConfigError, match=r"empty was \[\] and is not there; empty\[0\] was not there and is 1"):
        check_identity(identity, {**identity, "empty": [1]}, Path("x"))
    with pytest.raises(ConfigError, match="rate was 1e-05 and is 1.0000000000000003e-05"):
        check_identity(identity, {**identity, "rate": 1.0000000000000003e-05}, Path("x"))


def change_weight(directory: Path) -> None:
    state = load_file(directory / "model.safetensors")
    next(iter(state.values())).view(-1)[5] += 1e-3
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})


def append(name: str):
    def change(directory: Path) -> None:
        with (directory / name).open("a") as file:
            file.write(" ")

    change.__name__ = name
    return change


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (change_weight, "model.safetensors"),
        (append("config.json"), "config.json"),
        (append("tokenizer.json"), "tokenizer.json"),
        (append("tokenizer_config.json"), "tokenizer_config.json"),
        (lambda directory: (directory / "tokenizer.json").unlink(), "tokenizer.json"),
        (lambda directory: (directory / "chat_template.jinja").write_text("x"), "chat_template.jinja"),
    ],
)
def test_a_changed_model_directory(change, name, tiny_models, tmp_path):
    shutil.copytree(tiny_models["gpt_neox"], tmp_path / "model")
    before = model_fingerprint(str(tmp_path / "model"))
    assert before == model_fingerprint(str(tiny_models["gpt_neox"]))  # wherever it lies
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= before.keys()
    change(tmp_path / "model")
    after = model_fingerprint(str(tmp_path / "model"))
    assert {file for file in {*before, *after} if before.get(file) != after.get(file)} == {name}


def test_a_file_that_decides_nothing_is_passed_over(tiny_models, tmp_path):
    shutil.copytree(tiny_models["gpt_neox"], tmp_path / "model")
    (tmp_path / "model" / "README.md").write_text("words")
    assert model_fingerprint(str(tmp_path / "model")) == model_fingerprint(str(tiny_models["gpt_neox"]))


def test_two_models_of_the_hub():
    assert model_fingerprint("EleutherAI/polyglot-ko-5.8b") == {"hub name": "EleutherAI/polyglot-ko-5.8b"}


def test_a_large_file_is_sampled_at_both_ends_in_between_and_in_its_header(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"weight": torch.zeros(40 * MIB // 4)}, path)
    before = model_fingerprint(str(tmp_path))
    content = path.read_bytes()
    size = len(content)
    for place in (12, 9000, 500_000, size - 1, size // 2 - MIB, (size - MIB) // 15 + 5, 14 * (size - MIB) // 15):
        changed = bytearray(content)
        changed[place] ^= 1
        path.write_bytes(changed)
        assert model_fingerprint(str(tmp_path)) != before, place
    path.write_bytes(content + b"0")
    assert model_fingerprint(str(tmp_path)) != before
    path.write_bytes(content)
    assert model_fingerprint(str(tmp_path)) == before


def test_a_long_header_counts_whole(tmp_path):
    tensors = {f"layer.{number}.weight{'x' * 300}": torch.zeros(100) for number in range(10_000)}
    save_file(tensors, tmp_path / "model.safetensors")  # a header of about 4 MB, and 4 MB
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.truncate(64 * MIB)
        before = model_fingerprint(str(tmp_path))
        file.seek(2 * MIB)  # between the first two samples
        file.write(b"y")
    assert model_fingerprint(str(tmp_path)) != before


def test_many_gigabytes_take_no_minutes(tmp_path):
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write((100).to_bytes(8, "little"))
        file.truncate(20 * 2**30)  # sparse
    started = time.monotonic()
    assert "21474836480 bytes" in model_fingerprint(str(tmp_path))["model.safetensors"]
    assert time.monotonic() - started < 20
