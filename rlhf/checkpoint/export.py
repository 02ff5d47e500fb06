"""Checkpoints that `transformers` and `peft` load by themselves: complete or not there."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rlhf.checkpoint.atomic import replaced_directory
from rlhf.checkpoint.older_names import add_older_names, name_older_tokenizer
from rlhf.config import ConfigError
from rlhf.distributed.collectives import any_rank
from rlhf.distributed.place import is_main

StateDict = dict[str, torch.Tensor]


def export_causal_lm(
    engine: nn.Module, tokenizer: Any, directory: Path, *, state_dict: StateDict | None = None
) -> None:
    """Write the causal LM inside `engine`, with its tokenizer, as a Hugging Face directory; a collective.

    With LoRA it is an adapter directory that names its base. `state_dict` (rank 0) replaces the engine's weights, as
    for an averaged actor. An existing `directory` is replaced at the end. Raises OSError on every rank when rank 0
    cannot write, ValueError for an adapter without weights.
    """
    model: Any = getattr(engine, "module", engine)
    state = full_state_dict(engine, trainable_only=is_adapted(model)) if state_dict is None else state_dict

    def write(part: Path) -> None:
        save_model(model, state, part)
        save_tokenizer(tokenizer, part)

    _write_on_main(engine, Path(directory), write)


def export_scalar_model(engine: nn.Module, tokenizer: Any, directory: Path) -> None:
    """Write the ScalarModel inside `engine`, or its adapter, and the tokenizer; a collective.

    Where `transformers` has a sequence classifier for the architecture, that is what the directory holds.
    """
    model: Any = getattr(engine, "module", engine)
    state = full_state_dict(engine, trainable_only=is_adapted(model.backbone))
    _write_on_main(engine, Path(directory), lambda part: model.save_pretrained(part, state, tokenizer))


def full_state_dict(engine_or_module: nn.Module, *, trainable_only: bool = False) -> StateDict:
    """Copies on the CPU of the parameters and saved buffers, under the names of the wrapped module, on rank 0.

    Other ranks get an empty dict. A collective under ZeRO-3: weights are gathered one module at a time. Tied weights
    appear once; `trainable_only` leaves out frozen weights and buffers.
    """
    module: nn.Module = getattr(engine_or_module, "module", engine_or_module)  # type: ignore[assignment]
    state: StateDict = {}
    seen: set[int] = set()
    for prefix, part in module.named_modules():
        named = [
            (f"{prefix}.{name}" if prefix else name, parameter)
            for name, parameter in part.named_parameters(recurse=False)
            if id(parameter) not in seen and (parameter.requires_grad or not trainable_only)
        ]
        seen.update(id(parameter) for _, parameter in named)
        _copy_gathered(named, state)
        if is_main() and not trainable_only:
            for name, buffer in part.named_buffers(recurse=False):
                if name not in part._non_persistent_buffers_set:
                    state[f"{prefix}.{name}" if prefix else name] = buffer.detach().cpu().clone()
    return state


def check_writable(directory: Path) -> None:
    """Make `directory` and write a byte into it; ConfigError that says why when that cannot be done."""
    directory = Path(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=directory, prefix=".write-test-") as probe:
            probe.write(b"0")
            probe.flush()
    except OSError as error:
        raise ConfigError(
            f"output directory {directory.absolute()} cannot be written: {error.strerror or error}; "
            f"choose another one with --output_dir"
        ) from error


def is_adapted(model: Any) -> bool:
    """True for a `peft` model."""
    return hasattr(model, "peft_config") and hasattr(model, "get_base_model")


def save_model(model: Any, state: StateDict, directory: Path) -> None:
    """Write a model, or the adapter on it, with the weights `state`. Raises ValueError for an adapter without any."""
    if not is_adapted(model):
        save_whole_model(model, directory, state)
        return
    adapter_weights(model, state)
    model.save_pretrained(directory, state_dict=state, save_embedding_layers=False)


def save_whole_model(model: Any, directory: Path, state: StateDict | None = None) -> None:
    """Write a model with its own weights, or `state`, for transformers 5 and 4."""
    model.save_pretrained(directory, state_dict=state)
    add_older_names(directory)


def save_tokenizer(tokenizer: Any, directory: Path) -> None:
    """Write a tokenizer for transformers 5 and 4."""
    tokenizer.save_pretrained(directory)
    name_older_tokenizer(directory, tokenizer.model_input_names)


def adapter_weights(adapted: Any, state: StateDict) -> StateDict:
    """The adapter in `state` under the names of its file. Raises ValueError when there is none."""
    from peft import get_peft_model_state_dict

    found: StateDict = get_peft_model_state_dict(adapted, state_dict=state, save_embedding_layers=False)
    if not found or any(tensor.numel() == 0 for tensor in found.values()):
        raise ValueError("the adapter to be saved has no weights: none was gathered, or none trains")
    return found


def _copy_gathered(named: list[tuple[str, nn.Parameter]], state: StateDict) -> None:
    partitioned = [parameter for _, parameter in named if hasattr(parameter, "ds_id")]
    if partitioned:
        import deepspeed

        with deepspeed.zero.GatheredParameters(partitioned):
            if is_main():
                state.update({name: parameter.detach().cpu().clone() for name, parameter in named})
    elif is_main():
        state.update({name: parameter.detach().cpu().clone() for name, parameter in named})


def _write_on_main(engine: nn.Module, directory: Path, write: Callable[[Path], None]) -> None:
    """Rank 0 writes `directory` in one piece; when it fails all ranks raise instead of waiting for it."""
    failure: Exception | None = None
    if is_main():
        try:
            with replaced_directory(directory) as part:
                write(part)
        except Exception as error:  # raised again below, after the other ranks have been told
            failure = error
    device = getattr(engine, "device", None)
    if any_rank(failure is not None, torch.device(device) if device is not None else "cpu"):
        reported = re.search(r"\(os error (\d+)\)", str(failure))  # safetensors, tokenizers: an error of their own
        if isinstance(failure, OSError) or reported:
            number = failure.errno if isinstance(failure, OSError) else int(reported[1]) if reported else None
            raise OSError(
                number, f"cannot write {directory}: {getattr(failure, 'strerror', None) or failure}"
            ) from failure
        raise failure or OSError(f"rank 0 could not write {directory}")
