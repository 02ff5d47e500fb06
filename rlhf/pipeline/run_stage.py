"""What the `main` of every stage does around its own work: configuration, the world, the directory, the result."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.checkpoint.atomic import remove_leftovers
from rlhf.checkpoint.export import check_writable
from rlhf.checkpoint.run_lock import RunLock
from rlhf.config import ConfigError, RunConfig, save_config
from rlhf.distributed import any_rank, init_world, is_main, logger, raise_on_all, seed_everything
from rlhf.distributed.rank_watch import watched_ranks
from rlhf.pipeline.result import write_result
from rlhf.pipeline.stages import parse_stage
from rlhf.training.resume import TrainingStates, refusal, remove_states, run_identity

STATES = "states"
"""Where the training states of a stage lie, under its directory."""


@dataclass(frozen=True)
class Stage:
    """One run of a stage: its configuration and the directory it writes to."""

    configs: tuple[Any, ...]
    directory: Path

    @property
    def run(self) -> RunConfig:
        run: RunConfig = self.configs[0]
        return run

    def states(self, **content: Any) -> TrainingStates:
        """The training states of a run on `content`: fingerprints of what it loads, compared when it goes on."""
        return TrainingStates(self.directory / STATES, self.run, run_identity(self.configs, **content))


def stage_main(name: str) -> Callable[[Callable[[Stage], dict[str, Any]]], Callable[..., dict[str, Any]]]:
    """Make `main(argv=None)` of the stage `name` from a function that does its work and returns its result.

    The directory is locked, the ranks are watched, the result is written with the configuration in force, and the
    training states of the finished run are removed (but for those of `keep_every`). With `--resume auto` a run that is
    finished is left as it is.
    """

    def wrap(work: Callable[[Stage], dict[str, Any]]) -> Callable[..., dict[str, Any]]:
        @functools.wraps(work)
        def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
            configs = parse_stage(name, argv)
            stage = Stage(configs, Path(configs[0].output_dir) / name)
            init_world()
            check_writable(stage.directory)
            with _locked(stage.directory), watched_ranks(stage.directory, stage.run):
                if _is_finished(stage):
                    return _read_result(stage)
                _clear_the_way(stage)
                seed_everything(stage.run.seed)
                result = work(stage)
                if is_main():
                    save_config(stage.directory / "config.yaml", stage.configs)
                write_result(stage.directory, result, seed=stage.run.seed)
                remove_states(stage.directory / STATES, stage.run, keep_permanent=True)
            return result

        return main

    return wrap


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """The lock of `directory`, refused on all ranks together."""
    with ExitStack() as stack:
        error: ConfigError | None = None
        try:
            stack.enter_context(RunLock(directory))
        except ConfigError as refused:
            error = refused
        raise_on_all(error)
        yield


def _is_finished(stage: Stage) -> bool:
    """Whether the run that is to be gone on with needs nothing more; as rank 0 sees it."""
    done = is_main() and stage.run.resume == "auto" and bool(_read_result(stage))
    return any_rank(done, init_world())


def _read_result(stage: Stage) -> dict[str, Any]:
    """`result.json` of an earlier run; {} where there is none, or a broken one."""
    path = stage.directory / "result.json"
    try:
        result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    logger.info("%s is finished, %s is there: nothing to do", stage.directory.name, path)
    return result


def _clear_the_way(stage: Stage) -> None:
    """Remove what an earlier run left and this one makes anew. ConfigError where that would lose an unfinished one."""
    states = stage.directory / STATES
    raise_on_all(refusal(states, stage.run) if is_main() else None)
    if is_main():
        (stage.directory / "result.json").unlink(missing_ok=True)
        remove_leftovers(stage.directory)
        if stage.run.resume != "auto":
            remove_states(states, stage.run, keep_permanent=False)
        (stage.directory / ".cleared").touch()  # for run_all.sh: what is there from now on is this run's
