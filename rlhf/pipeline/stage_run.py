"""One run of a stage: what the `main` of every stage does around its own work, and what it needs for that."""

from __future__ import annotations

import functools
import os
import resource
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import nn

from rlhf.algorithms.ppo import EmptyRolloutError
from rlhf.checkpoint.atomic import remove_leftovers, write_json
from rlhf.checkpoint.export import check_writable
from rlhf.checkpoint.run_lock import RunLock
from rlhf.config import EMBEDDED_BASE, ConfigError, RunConfig, save_config
from rlhf.data import DataError, StageData, load_stage_data
from rlhf.distributed.collectives import all_reduce_max, any_rank, raise_on_all
from rlhf.distributed.job_exit import run_to_end
from rlhf.distributed.log import logger, setup_logging
from rlhf.distributed.place import is_main, world_size
from rlhf.distributed.rank_watch import watched_ranks
from rlhf.distributed.verdict import exit_now
from rlhf.distributed.world import close_world, init_world, seed_everything
from rlhf.engine import BatchPlan, check_engine, compute_dtype, training_engine, zero3_loading
from rlhf.models.architecture import check_trainable, check_vocabulary_size, model_size
from rlhf.models.directories import check_causal_directory
from rlhf.models.loading import check_vocabulary
from rlhf.models.lora import apply_lora
from rlhf.models.positions import check_positions
from rlhf.pipeline.dry_run import DryRun, DryRunEndError, Findings, disk_use
from rlhf.pipeline.earlier_run import (
    RESULT,
    check_inputs_stay,
    finished_refusal,
    read_json,
    read_result,
    remove_earlier_run,
    remove_summary,
)
from rlhf.pipeline.stages import STAGES, Stage, StageConfig, config_files, default_run, find_stage_model, parse_stage
from rlhf.pipeline.surroundings import note_start
from rlhf.report.summary import BASE_SECONDS
from rlhf.rewards.reward import RewardError
from rlhf.training.data_order import planned_steps
from rlhf.training.loop import RunContext
from rlhf.training.nonfinite import NonFiniteError
from rlhf.training.resume import TrainingStates, refusal, remove_states, run_identity

PREPARATION = "preparation.json"
"""What was made for the stage before it could train, and how long it took; a resumed run counts it too."""
PIPELINE_VARIABLE = "RLHF_PIPELINE"
"""Set in the environment of a stage that is one of several, after which the report is written."""
STATES = "states"
"""Where the training states of a stage lie, under its directory."""
USER_ERRORS = (ConfigError, DataError, NonFiniteError, EmptyRolloutError, RewardError)
"""Errors whose message is all that a user needs."""

Config = TypeVar("Config", bound=StageConfig)


@dataclass(frozen=True)
class StageRun(Generic[Config]):
    """One run of `stage` with `config`, which writes to `directory`."""

    stage: Stage
    config: Config
    directory: Path
    dry_run: DryRun | None = None
    """Where everything is checked before a run: how, and what was found; the weights are then not loaded."""

    @property
    def run(self) -> RunConfig:
        return self.config.run

    @functools.cached_property
    def plan(self) -> BatchPlan:
        """How the sequences of an optimizer step lie over the devices."""
        batch = self.config.batch
        devices = world_size() if self.dry_run is None else self.dry_run.devices
        return BatchPlan(batch.global_batch_size, batch.micro_batch_size, devices, batch.micro_batch_tokens)

    def base_model(self, *, with_head: bool = False) -> str:
        """The model to start from; the embedded one is trained on first use, which is announced and counted, and kept.

        Raises ConfigError for one that cannot train as the configuration says, has fewer positions than a prompt and
        its response may have, or, where it is to be used `with_head`, has no language-modelling head.
        """
        base_model = self.config.model.base_model
        if base_model == EMBEDDED_BASE:
            base_model = str(self._embedded_base())
        self.check_positions(base_model, "base_model")
        if with_head:
            check_causal_directory(base_model)
        check_trainable(base_model, self.config.model, what="base_model")
        if self.dry_run is not None:
            self.dry_run.trained["model"] = base_model
        return base_model

    def _embedded_base(self) -> Path:
        from rlhf.data import embedded_corpus
        from rlhf.models.tiny_base import build_tiny_base, tiny_base_path, write_untrained_tiny_base

        texts, cache_dir = embedded_corpus(), Path(self.run.cache_dir)
        if self.dry_run is not None:
            stand_in = self.dry_run.report_dir.parent / EMBEDDED_BASE
            if not stand_in.is_dir():
                write_untrained_tiny_base(texts, stand_in)
            return stand_in
        there, started = tiny_base_path(texts, cache_dir).exists(), time.perf_counter()
        path = build_tiny_base(texts, cache_dir)
        if not there:
            write_json(self.directory / PREPARATION, {BASE_SECONDS: round(time.perf_counter() - started, 1)})
        return path

    def check_positions(self, path: str, what: str) -> None:
        """ConfigError when the model in `path` has fewer positions than a prompt and its response may have."""
        data = self.config.data
        check_positions(
            path,
            data.max_prompt_tokens + data.max_response_tokens,
            what=what,
            trust_remote_code=self.config.model.trust_remote_code,
        )

    def earlier_model(self, config_field: str, given: str | None) -> str:
        """The model that `config_field` takes from an earlier stage where it is not `given`."""
        if given is None and self.dry_run is not None and self.stage.takes[config_field] in self.dry_run.bases:
            return self.dry_run.bases[self.stage.takes[config_field]]
        return find_stage_model(self.stage, config_field, given, self.run.output_dir)

    def starting_model(self, config_field: str, given: str | None) -> str:
        """The causal model that `config_field` takes from an earlier stage where it is not `given`, to be trained on.

        ConfigError as in `base_model`.
        """
        path = self.earlier_model(config_field, given)
        check_causal_directory(path)
        self.check_positions(path, config_field)
        check_trainable(path, self.config.model, what=config_field)
        if self.dry_run is not None:
            self.dry_run.trained["model"] = path
        return path

    def load_data(
        self, kind: str, specs: Sequence[str], eval_specs: Sequence[str], tokenizer: Any, **options: Any
    ) -> StageData:
        """The stage's data sets as tokens; see `rlhf.data.load_stage_data`."""
        data = load_stage_data(
            kind,
            specs,
            eval_specs,
            config=self.config.data,
            tokenizer=tokenizer,
            seed=self.run.seed,
            cache_dir=Path(self.run.cache_dir),
            report_dir=self.directory if self.dry_run is None else self.dry_run.report_dir,
            stages=tuple(stage.name for stage in default_run()),
            **{"stage": self.stage.name, **options},
        )
        if self.dry_run is None:
            for line in data.summary:
                logger.info(line)
        else:
            self.dry_run.data[options.get("report_name", "data")] = data
        return data

    def planned_steps(self, data: StageData, *, added: int = 0) -> int:
        """Optimizer steps of an offline run over `data` and so many rows `added` to it."""
        return planned_steps(len(data.train) + added, self.config.batch, self.plan.global_batch_size)

    def end_dry_run(self, trained: Mapping[str, str], tokenizer: Any, total_steps: int) -> None:
        """End a dry run, where this is one: the next thing is to load the weights of the models that train, by role.

        Raises ConfigError for engines that could not be made and models that lack tokens, DryRunEndError otherwise.
        """
        if self.dry_run is None:
            return
        model, engine = self.config.model, self.config.engine
        check_engine(engine, self.config.optimizer, self.plan)
        for role, path in trained.items():
            check_vocabulary_size(path, tokenizer, what=role, trust_remote_code=model.trust_remote_code)
        sizes = {role: model_size(path, model) for role, path in trained.items()}
        exported, states = disk_use(
            sizes,
            self.run,
            steps=total_steps,
            weight_bytes=compute_dtype(engine.precision).itemsize,
            adapted=model.lora_rank > 0,
        )
        raise DryRunEndError(Findings(total_steps, sizes, exported, states))

    def training_engine(self, load: Callable[[], nn.Module], tokenizer: Any, *, total_steps: int) -> Any:
        """The model that `load` gives, adapted where LoRA is on, in a training engine. A dry run ends here."""
        if self.dry_run is not None:
            self.end_dry_run(self.dry_run.trained, tokenizer, total_steps)
        model_config, engine_config = self.config.model, self.config.engine
        with zero3_loading(engine_config, self.plan):
            model = load()
        check_vocabulary(getattr(model, "backbone", model), tokenizer)
        if model_config.lora_rank:
            model = apply_lora(model, model_config, seed=self.run.seed)
        return training_engine(
            model,
            engine=engine_config,
            optimizer=self.config.optimizer,
            plan=self.plan,
            total_steps=total_steps,
            gradient_checkpointing=model_config.gradient_checkpointing,
        )

    def context(self, **content: Any) -> RunContext:
        """What the loop is given. `content`: fingerprints of all it loads, compared when the run is resumed."""
        identity = run_identity(self.config.parts(), **content)
        states = TrainingStates(self.directory / STATES, self.run, identity)
        return RunContext(
            self.stage.name, self.run, self.directory, self.stage.checks, states, self.stage.logged, self._note_start
        )

    def _note_start(self, step: int) -> None:
        """Write down what the run goes on with after `step`: only now is it sure that it is the same run."""
        save_config(self.directory / "config.yaml", self.config.parts())
        note_start(self.directory, step=step)


def stage_main(name: str) -> Callable[[Callable[[StageRun[Any]], dict[str, Any]]], Callable[..., dict[str, Any]]]:
    """Make `main(argv=None)` of the stage `name` from a function that does its work and returns its result.

    The directory is locked, the ranks are watched, the result is written with the configuration in force, and the
    training states of the finished run are removed (but for those of `keep_every`). With `--resume auto` a run that is
    finished is left as it is.
    """

    def wrap(work: Callable[[StageRun[Any]], dict[str, Any]]) -> Callable[..., dict[str, Any]]:
        @functools.wraps(work)
        def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
            config = parse_stage(name, argv)
            run = StageRun(STAGES[name], config, Path(config.run.output_dir) / name)
            init_world()
            check_writable(run.directory)
            if config.run.overwrite:
                check_inputs_stay(config, config_files(name, argv), run.directory)
            with _locked(run.directory), watched_ranks(run.directory, config.run):
                if _is_finished(run):
                    return _read_result(run)
                _clear_the_way(run)
                seed_everything(config.run.seed)
                result = work(run)
                if is_main():
                    save_config(run.directory / "config.yaml", config.parts())
                result = {**result, "seconds": round(result["seconds"], 1), "seed": config.run.seed}
                result |= {**read_json(run.directory / PREPARATION), "peak_memory_bytes": _peak_memory()}
                write_json(run.directory / RESULT, result)
                remove_states(run.directory / STATES, config.run, keep_permanent=True)
            return result

        main.stage = name  # type: ignore[attr-defined]
        return main

    return wrap


def _write_run_report(main: Callable[[], Any]) -> None:
    """`report.html` of the run that this stage belongs to; that it cannot be written is no failure of the run."""
    try:
        from rlhf.report.page import REPORT_FILE, write_report
        from rlhf.report.run_record import read_run

        directory = Path(parse_stage(main.stage).run.output_dir)  # type: ignore[attr-defined]
        path = write_report([read_run(directory, STAGES.values())], directory / REPORT_FILE)
    except Exception as error:  # whatever it is, the models are there
        logger.warning("no report: %s: %s", type(error).__name__, error)
    else:
        logger.info("report: %s", path)


def _peak_memory() -> dict[str, int]:
    """The most that any rank held, of this machine's memory and of its device's. A collective."""
    device = init_world()
    on_gpu = torch.cuda.is_available()
    return {
        "host": all_reduce_max(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, device),  # kilobytes on Linux
        "device": all_reduce_max(torch.cuda.max_memory_allocated() if on_gpu else 0, device),
    }


def run_as_script(main: Callable[[], Any]) -> None:
    """Run a stage's `main`; what a user can mend ends it with a sentence, not with a traceback. Rank 0 writes a report
    at the end, unless a pipeline does.

    A rank of several leaves at once: a library's thread that outlives the interpreter would end it with an abort, and
    a finished job with a false status.
    """
    setup_logging()
    run_to_end(main, USER_ERRORS)
    ranks, first = world_size(), is_main()
    close_world()
    if first and PIPELINE_VARIABLE not in os.environ:
        _write_run_report(main)
    if ranks > 1:
        exit_now(0)


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


def _is_finished(run: StageRun[Any]) -> bool:
    """Whether the run that is to be resumed needs nothing more; as rank 0 sees it."""
    done = is_main() and run.run.resume == "auto" and bool(_read_result(run))
    return any_rank(done, init_world())


def _read_result(run: StageRun[Any]) -> dict[str, Any]:
    result = read_result(run.directory)
    if result:
        logger.info("%s is finished, %s is there: nothing to do", run.directory.name, run.directory / RESULT)
    return result


def _clear_the_way(run: StageRun[Any]) -> None:
    """Remove what an earlier run left and this one makes anew. ConfigError where that would lose more than was said:
    a finished run without `overwrite`, or an unfinished one unasked."""
    if run.run.overwrite:
        _overwrite(run)
    states = run.directory / STATES
    refused = finished_refusal(run.directory, run.run) or refusal(states, run.run) if is_main() else None
    raise_on_all(refused)
    if is_main():
        if (run.directory / RESULT).exists():
            remove_summary(run.directory)
            (run.directory / RESULT).unlink()
        remove_leftovers(run.directory)
        if run.run.resume != "auto":
            (run.directory / PREPARATION).unlink(missing_ok=True)
            remove_states(states, run.run, keep_permanent=False)
        (run.directory / ".cleared").touch()  # for run_all.sh: what is there from now on is this run's


def _overwrite(run: StageRun[Any]) -> None:
    """Empty the directory for this run. A collective: no rank goes on before that is done."""
    error: OSError | None = None
    if is_main():
        if any(not entry.name.startswith(".") for entry in run.directory.iterdir()):
            logger.warning("removing what an earlier run left in %s (overwrite)", run.directory)
        try:
            remove_earlier_run(run.directory)
        except OSError as failed:
            error = failed
    raise_on_all(error)
    run.run.overwrite = False  # done; the configuration that is saved must not do it again
