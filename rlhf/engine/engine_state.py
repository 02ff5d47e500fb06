"""A DeepSpeed engine's training state in files, to resume on any number of ranks and under any ZeRO stage.

Files of an engine called `actor`: `actor-00000.safetensors` and so on hold float32 weights, the optimizer's moments and
the module's buffers, each whole and under its parameter's name; `actor.json` lists them, with step counts, schedule and
loss scale. Packed moments (8 bit) are in `actor.rank00000.safetensors`, one file for each rank.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from rlhf.config import ConfigError
from rlhf.distributed.collectives import any_rank
from rlhf.distributed.place import is_main, rank, world_size
from rlhf.engine.master_weights import Weight, by_master, refresh_weights, trained_weights
from rlhf.engine.optimizer_state import (
    layout_of,
    moments_of,
    optimizer_kind,
    restore_beta_powers,
    set_moments,
    set_packed_moments,
    step_of,
)
from rlhf.engine.tensor_files import TensorSource, shards, write_tensors

FORMAT_VERSION = 1
SHARD_BYTES = 2**30
"""A file is closed when the next tensor would make it larger than this."""
COUNTERS = ("global_steps", "global_samples", "skipped_steps")
LOSS_SCALE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
"""Fields of DeepSpeed's dynamic loss scaler that change."""

Result = TypeVar("Result")


@torch.no_grad()
def save_engine_state(engine: Any, directory: Path, name: str, *, shard_bytes: int = SHARD_BYTES) -> None:
    """Write all that the engine's next steps depend on, except frozen weights, into files named after `name`.

    A collective. Call it between two optimizer steps: accumulated gradients are not saved. Tensors are gathered one at
    a time and rank 0 writes each before the next; packed moments are written by every rank. Raises OSError on every
    rank, after the last gather, when one could not write; ConfigError for an engine that cannot be saved.
    """
    directory = Path(directory)
    index = directory / f"{name}.json"
    optimizer = engine.basic_optimizer
    weights = trained_weights(engine)
    sources = [*_weight_sources(engine, weights), *_buffer_sources(engine.module)]
    files = {f"{name}-{number:05d}.safetensors": group for number, group in enumerate(shards(sources, shard_bytes))}
    packed = list(_packed_sources(optimizer, weights))
    attempt = _Attempt(engine.device, f"write {index}")
    if is_main():
        attempt.do(lambda: index.unlink(missing_ok=True))  # an older state in these files ends here
    for file, group in files.items():
        values = (source.fetch() for source in group)
        if is_main():
            attempt.do(write_tensors, directory / file, group, values)
        for _ in values:  # after a failure, and on the other ranks: every rank must join every gather
            pass
    if packed:
        values = (source.fetch() for source in packed)
        attempt.do(write_tensors, _rank_file(directory, name), packed, values, {"layout": layout_of(weights)})
    attempt.agree()
    if is_main():
        content = {
            "format_version": FORMAT_VERSION,
            "optimizer": optimizer_kind(optimizer),
            "zero_stage": engine.zero_optimization_stage(),
            "world_size": world_size(),
            "packed_moments": bool(packed),
            "progress": _progress(engine),
            "weights": {
                weight.name: {
                    "shape": list(weight.shape),
                    "step": step_of(optimizer, weight.master),
                    "moments": list(moments_of(optimizer, weight.master)[0]),
                }
                for weight in weights
            },
            "buffers": _shapes(_buffers(engine.module)),
            "files": {file: [source.key for source in group] for file, group in files.items()},
        }
        attempt.do(index.write_text, json.dumps(content, ensure_ascii=False, indent=1), "utf-8")
    attempt.agree()


@torch.no_grad()
def load_engine_state(engine: Any, directory: Path, name: str) -> None:
    """Load what `save_engine_state` wrote into an engine that has taken no step. A collective.

    Every rank reads rank 0's files (one machine or a shared disk), its own part of one tensor at a time. The learning
    rate is that of the engine's own schedule at the saved step. Raises ConfigError, with the first differences and
    before anything is changed, for the state of another model or optimizer and for packed moments on another number
    of ranks or ZeRO stage; OSError when a file cannot be read.
    """
    if engine.global_steps or engine.micro_steps:
        raise ValueError(f"a state is loaded into a fresh engine; this one has taken {engine.global_steps} steps")
    directory = Path(directory)
    index = directory / f"{name}.json"
    weights = trained_weights(engine)
    attempt = _Attempt(engine.device, f"load {index}")
    content = attempt.do(_read_index, index) or {}
    attempt.do(_check, content, engine, weights, str(index))
    attempt.agree()
    attempt.do(_fill, engine, weights, content, directory, name)
    attempt.agree()
    refresh_weights(engine)
    _set_progress(engine, content["progress"])


class _Attempt:
    """Work that may fail on one rank: after the first error the rest is skipped, and all ranks raise together."""

    def __init__(self, device: torch.device, purpose: str) -> None:
        self.device = device
        self.purpose = purpose
        self.error: Exception | None = None

    def do(self, work: Callable[..., Result], *arguments: Any) -> Result | None:
        """What `work` returns; None after an error, this one or an earlier one. Not a collective."""
        if self.error is None:
            try:
                return work(*arguments)
            except Exception as error:  # raised by `agree`, when no rank waits for this one
                self.error = error
        return None

    def agree(self) -> None:
        """Raise on every rank when one had an error. A collective."""
        if any_rank(self.error is not None, self.device):
            raise self.error or OSError(f"another rank could not {self.purpose}")


def _weight_sources(engine: Any, weights: Sequence[Weight]) -> Iterator[TensorSource]:
    for weight in weights:
        moments, _ = moments_of(engine.basic_optimizer, weight.master)
        for kind, tensor in {"weight": weight.master, **moments}.items():
            yield TensorSource(
                f"{kind}/{weight.name}",
                weight.shape,
                tensor.dtype,
                lambda weight=weight, tensor=tensor: weight.gather(tensor, engine.device),  # type: ignore[misc]
            )


def _buffer_sources(module: nn.Module) -> Iterator[TensorSource]:
    for name, buffer in _buffers(module).items():
        yield TensorSource(f"buffer/{name}", tuple(buffer.shape), buffer.dtype, buffer.detach().cpu)


def _packed_sources(optimizer: torch.optim.Optimizer, weights: Sequence[Weight]) -> Iterator[TensorSource]:
    """Of this rank alone; see `set_packed_moments` for the keys."""
    for number, members in enumerate(by_master(weights)):
        for key, tensor in moments_of(optimizer, members[0].master)[1].items():
            yield TensorSource(f"{number}/{key}", tuple(tensor.shape), tensor.dtype, tensor.detach().cpu)


def _buffers(module: nn.Module) -> dict[str, torch.Tensor]:
    """Buffers that belong to the module's state: training may change them."""
    return {
        f"{prefix}.{name}" if prefix else name: buffer
        for prefix, part in module.named_modules()
        for name, buffer in part.named_buffers(recurse=False)
        if name not in part._non_persistent_buffers_set
    }


def _shapes(tensors: Mapping[str, torch.Tensor]) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in tensors.items()}


def _read_index(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        version = content["format_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is damaged ({type(error).__name__}: {error})") from error
    if version != FORMAT_VERSION:
        raise ConfigError(f"{path} has format version {version!r} and this release reads {FORMAT_VERSION}")
    return content


def _check(content: Mapping[str, Any], engine: Any, weights: Sequence[Weight], path: str) -> None:
    """ConfigError where the state is not one of this engine."""
    kind = optimizer_kind(engine.basic_optimizer)
    if content["optimizer"] != kind:
        raise ConfigError(f"{path} is the state of optimizer {content['optimizer']}, not of {kind}; resume with that")
    saved = {name: entry["shape"] for name, entry in content["weights"].items()}
    differences = [
        *_differences("trainable weight", saved, {weight.name: list(weight.shape) for weight in weights}),
        *_differences("buffer", content["buffers"], _shapes(_buffers(engine.module))),
    ]
    if differences:
        more = f" and {len(differences) - 4} more" if len(differences) > 4 else ""
        raise ConfigError(f"{path} is the state of another model: {'; '.join(differences[:4])}{more}")
    then = _sizes(content["zero_stage"], content["world_size"])
    now = _sizes(engine.zero_optimization_stage(), world_size())
    if content["packed_moments"] and then != now:
        remedy = f"resume with {then}"
        if content["zero_stage"] == 0 and engine.zero_optimization_stage() == 1:
            remedy += " and the release that saved it (in 16 bit this one runs stage 0 as stage 1), or start anew"
        raise ConfigError(
            f"{path} holds the packed moments of an 8-bit optimizer, which belong to one division over the ranks: it "
            f"was saved with {then} and cannot be loaded with {now}; {remedy}"
        )
    for members in by_master(weights):
        steps = {content["weights"][weight.name]["step"] for weight in members} - {None}
        if len(steps) > 1:
            raise ConfigError(
                f"{path} has weights that took different numbers of steps ({sorted(steps)}), {members[0].name} among "
                f"them, and with {now} they share one count; resume with {then}"
            )


def _sizes(zero_stage: int, ranks: int) -> str:
    return f"zero_stage={zero_stage} on {ranks} rank{'s' if ranks > 1 else ''}"


def _differences(what: str, saved: Mapping[str, list[int]], here: Mapping[str, list[int]]) -> Iterator[str]:
    for name in {**saved, **here}:
        if name not in saved:
            yield f"{what} {name} {here[name]} is not in it"
        elif name not in here:
            yield f"{what} {name} {saved[name]} is not in the model of the run"
        elif saved[name] != here[name]:
            yield f"{what} {name} is {saved[name]} in it and {here[name]} in the model of the run"


def _fill(engine: Any, weights: Sequence[Weight], content: Mapping[str, Any], directory: Path, name: str) -> None:
    """Set masters, moments and buffers from the files. Not a collective."""
    optimizer = engine.basic_optimizer
    with _disk_errors(directory), ExitStack() as stack:
        opened = {file: stack.enter_context(safe_open(directory / file, "pt")) for file in content["files"]}
        file_of = {key: file for file, keys in content["files"].items() for key in keys}

        def read(key: str) -> torch.Tensor:
            tensor: torch.Tensor = opened[file_of[key]].get_tensor(key)  # a view of the file: its pages are read on use
            return tensor

        for weight in weights:
            weight.part(weight.master).copy_(weight.part_of(read(f"weight/{weight.name}")))
        for buffer, tensor in _buffers(engine.module).items():
            tensor.copy_(read(f"buffer/{buffer}"))
        set_moments(optimizer, weights, content["weights"], read)
        if content["packed_moments"]:
            set_packed_moments(optimizer, weights, _rank_file(directory, name))
    restore_beta_powers(optimizer)


@contextmanager
def _disk_errors(directory: Path) -> Iterator[None]:
    """Errors of safetensors as those of the disk that they are."""
    try:
        yield
    except SafetensorError as error:
        raise OSError(f"a file in {directory} cannot be read: {error}") from error


def _progress(engine: Any) -> dict[str, Any]:
    """Counters of the engine, its schedule and its loss scale."""
    schedule = engine.lr_scheduler.state_dict()
    return {
        **{name: getattr(engine, name) for name in COUNTERS},
        "micro_steps": engine.micro_steps,
        "accumulation_steps": engine.gradient_accumulation_steps(),
        "schedule": {name: schedule[name] for name in ("last_epoch", "_step_count")},
        "loss_scale": {name: getattr(_loss_scaler(engine), name, None) for name in LOSS_SCALE},
    }


def _set_progress(engine: Any, saved: Mapping[str, Any]) -> None:
    for name in COUNTERS:
        setattr(engine, name, saved[name])
    steps, rest = divmod(saved["micro_steps"], saved["accumulation_steps"])
    # DeepSpeed's own step boundaries are multiples of a number that changes with the number of ranks
    engine.micro_steps = steps * engine.gradient_accumulation_steps() + rest
    schedule, last = engine.lr_scheduler, saved["schedule"]["last_epoch"]
    rates = [base * factor(last) for base, factor in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)]
    for group, rate in zip(schedule.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    schedule.load_state_dict({**saved["schedule"], "_last_lr": rates, "lr_lambdas": [None] * len(rates)})
    scaler = _loss_scaler(engine)
    for name, value in saved["loss_scale"].items():
        if value is not None and getattr(scaler, name, None) is not None:
            setattr(scaler, name, value)


def _loss_scaler(engine: Any) -> Any:
    """What holds the loss scale of fp16 where it adapts itself; None elsewhere."""
    if not (engine.fp16_enabled() and engine.dynamic_loss_scale()):
        return None
    return engine.optimizer.loss_scaler


def _rank_file(directory: Path, name: str) -> Path:
    return directory / f"{name}.rank{rank():05d}.safetensors"
