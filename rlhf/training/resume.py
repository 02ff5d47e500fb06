"""Saving and resuming a run: everything its next step depends on is saved between two steps and loaded exactly."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file, save_file

from rlhf.checkpoint.fingerprint import check_identity
from rlhf.checkpoint.random_state import load_rng, save_rng
from rlhf.checkpoint.state_directory import SavedState, StateDirectory
from rlhf.config import ConfigError, RunConfig, facts_of
from rlhf.distributed.collectives import raise_on_all
from rlhf.distributed.log import logger
from rlhf.distributed.place import is_main, rank, world_size
from rlhf.distributed.world import init_world

TENSORS = "loop.safetensors"
IDENTITY_VERSION = 6
"""Raised when models, data or settings are told apart in another way, so that an older state cannot be compared, or
when a state lacks what the end of a run needs."""
SAVES_PER_RUN = 10
"""How often a run saves its state where `save_every_steps` is 0."""


class Resumable(Protocol):
    """A loop that can be saved and resumed (`rlhf.training.loop.Loop`)."""

    def engines(self) -> Mapping[str, Any]:
        """Training engines by name."""

    def state(self) -> dict[str, Any]:
        """What the next step depends on beside the engines, alike on every rank; JSON."""

    def rank_state(self) -> dict[str, Any]:
        """The same of this rank alone."""

    def tensors(self) -> dict[str, torch.Tensor]:
        """Further tensors, on rank 0 ({} on the others). A collective."""

    def load_state(
        self, state: dict[str, Any], rank_states: Sequence[dict[str, Any]], tensors: dict[str, torch.Tensor]
    ) -> None:
        """Load what the three above gave; `rank_states` are those of the saved ranks that this rank stands in for."""


class TrainingStates:
    """The training states of one stage's run: when they are saved, what is in them, and which run may load them."""

    def __init__(self, directory: Path, run: RunConfig, identity: Mapping[str, Any]) -> None:
        self.run = run
        self.identity = identity
        self.store = _store(directory, run)

    def due(self, step: int, total: int) -> bool:
        """Whether the state after `step` of `total` is to be saved."""
        every = self.run.save_every_steps or max(1, total // SAVES_PER_RUN)
        return self.run.keep_last > 0 and (step % every == 0 or step == total)

    def save(self, step: int, loop: Resumable) -> bool:
        """Save the state after `step`; False when it could not be written (said in the log). A collective."""
        content = {"identity": self.identity, "identity_version": IDENTITY_VERSION, "loop": loop.state()}
        tensors = loop.tensors()

        def rank_files(part: Path) -> None:
            save_rng(part, rank())
            _rank_file(part, rank()).write_text(json.dumps(loop.rank_state()), encoding="utf-8")
            if tensors:
                save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, part / TENSORS)

        engines = (partial(_save_engine, name, engine) for name, engine in loop.engines().items())
        return self.store.save(step, content, *engines, rank_files)

    def restore(self, loop: Resumable) -> bool:
        """Resume from the newest whole state where the run asks for it; False for a fresh start.

        A collective. Raises ConfigError for the state of another run, naming the differences.
        """
        from rlhf.engine import load_engine_state
        from rlhf.engine.master_weights import trained_weights

        if self.run.keep_last:
            for engine in loop.engines().values():
                trained_weights(engine)  # an engine that cannot be saved says so now, and not at the first save
        saved = self.store.newest() if self.run.resume == "auto" else None
        if saved is None:
            if self.run.resume == "auto":
                logger.info("no training state to resume from: starting at step 0")
            return False
        refused: ConfigError | None = None
        if is_main():  # as rank 0 saved it: a node's copy of a model may hold one file more
            try:
                _check_version(saved)
                check_identity(saved.content["identity"], self.identity, saved.path)
            except ConfigError as error:
                refused = error
        raise_on_all(refused)
        for name, engine in loop.engines().items():
            load_engine_state(engine, saved.path, name)
        before, now = saved.world_size, world_size()
        if before != now:
            logger.info("the training state is one of %d processes and %d run now", before, now)
        mine = [json.loads(_rank_file(saved.path, each).read_text("utf-8")) for each in range(rank(), before, now)]
        loop.load_state(saved.content["loop"], mine, _load_tensors(saved))
        load_rng(saved.path, rank(), seed=self.run.seed, step=saved.step)
        logger.info("resuming after step %d from %s", saved.step, saved.path)
        return True


def _check_version(saved: SavedState) -> None:
    if saved.content.get("identity_version") != IDENTITY_VERSION:
        raise ConfigError(
            f"the training state in {saved.path} was saved by an earlier release of this library, which told models, "
            "data and settings apart in another way or kept less in a state: finish the run with that release, or "
            "start anew with --resume never"
        )


def run_identity(configs: Iterable[Any], **content: Any) -> dict[str, Any]:
    """What must be the same for a run to be resumed: the fields that do not say `may_change_on_resume`, and `content`
    (fingerprints of models, tokenizer and data)."""
    fixed = {
        item.name: getattr(config, item.name)
        for config in configs
        for item in dataclasses.fields(config)
        if not facts_of(item).may_change_on_resume
    }
    return {**fixed, **content}


def refusal(directory: Path, run: RunConfig) -> ConfigError | None:
    """Why a run must not start over the states in `directory`: an unfinished one left them, and `resume` is unset."""
    steps = _store(directory, run).steps()
    if not steps or run.resume is not None or (directory.parent / "result.json").is_file():
        return None
    return ConfigError(
        f"{directory.parent} holds an unfinished run, saved after step {max(steps)}: go on with --resume auto, "
        "start anew and lose it with --resume never, or choose another --output_dir"
    )


def remove_states(directory: Path, run: RunConfig, *, keep_permanent: bool) -> None:
    """Remove the training states in `directory`, but with `keep_permanent` for those of `keep_every` (rank 0)."""
    store = _store(directory, run)
    steps = store.steps() if is_main() else []
    if steps and not keep_permanent:
        logger.warning("removing the training states of an earlier run in %s (steps %s)", directory, steps)
    store.clear(keep_permanent=keep_permanent)


def _store(directory: Path, run: RunConfig) -> StateDirectory:
    return StateDirectory(directory, keep_last=run.keep_last, keep_every=run.keep_every, device=init_world())


def _save_engine(name: str, engine: Any, part: Path) -> None:
    from rlhf.engine import save_engine_state

    save_engine_state(engine, part, name)


def _rank_file(directory: Path, number: int) -> Path:
    return directory / f"loop-rank{number:05d}.json"


def _load_tensors(saved: SavedState) -> dict[str, torch.Tensor]:
    path = saved.path / TENSORS
    return load_file(path) if is_main() and path.is_file() else {}
