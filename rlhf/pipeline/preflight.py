"""Check every stage of a run before the first one starts: `python -m rlhf.pipeline.preflight ARGS...`.

Each stage's own `main` runs up to where it would load weights (`rlhf.pipeline.dry_run`): models are known by their
configuration, data sets are read to the last row and their tokens kept for the stage itself. Exit status 0, or 2 after
one sentence that says what is wrong.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from rlhf.config import ConfigError, DataConfig, facts_of
from rlhf.data.sources import read_rows
from rlhf.data.spec import DataError, DatasetSpec
from rlhf.distributed.exit_codes import EXIT_USER
from rlhf.distributed.failures import storage_failure
from rlhf.distributed.log import logger, setup_logging
from rlhf.pipeline.arguments import PipelineArguments, sort_arguments
from rlhf.pipeline.dry_run import DryRun, DryRunEndError, Findings
from rlhf.pipeline.earlier_run import check_inputs_stay, read_result
from rlhf.pipeline.stage_run import StageRun
from rlhf.pipeline.stages import PROJECT, STAGES, config_files, parse_stage

Result = TypeVar("Result")
REPORTS = ".check"
"""Under the output directory while the check runs; it stays, with the lists of skipped rows, where that fails."""


def check_all(pipeline: PipelineArguments) -> list[str]:
    """A line about each stage that will run, and one about the disk.

    Raises ConfigError or DataError that begins with the stage: the first one that this stage would raise. What is
    small is read first, so that a mistake in it does not wait for what is large.
    """
    configs = {name: parse_stage(name, pipeline.stage_arguments[name]) for name in _stages_to_run(pipeline)}
    if not configs:
        return ["every stage is finished"]
    for name, config in configs.items():
        files = config_files(name, pipeline.stage_arguments[name])
        for stage in pipeline.overwrite_stages:
            _for_stage(name, partial(check_inputs_stay, config, files, Path(pipeline.output_dir) / stage))
        _for_stage(name, partial(_check_first_rows, config.data))
    devices, bases = _devices(pipeline.launcher_arguments), dict[str, str]()
    reports = Path(pipeline.output_dir) / REPORTS
    shutil.rmtree(reports, ignore_errors=True)
    runs = {}
    for name, config in configs.items():
        dry_run = DryRun(devices, bases, reports / name)
        dry_run.report_dir.mkdir(parents=True)
        runs[name] = StageRun(STAGES[name], config, Path(config.run.output_dir) / name, dry_run)
    taken = {earlier for name in runs for earlier in STAGES[name].takes.values()}
    for name in runs:
        if name in taken:
            bases[name] = _for_stage(name, runs[name].base_model)
    sizes = {name: _data_bytes(config.data) for name, config in configs.items()}
    found = {name: _for_stage(name, partial(_dry_run, runs[name])) for name in sorted(runs, key=sizes.__getitem__)}
    disk = _check_disk(Path(pipeline.output_dir), found)
    shutil.rmtree(reports)
    return [*(_line(run, found[name]) for name, run in runs.items()), disk]


def _stages_to_run(pipeline: PipelineArguments) -> list[str]:
    """The stages but for those at the beginning that are finished and to be resumed, which `run_all.sh` skips."""
    stages = list(pipeline.stages)
    while stages and stages[0] in pipeline.resume_stages and read_result(Path(pipeline.output_dir) / stages[0]):
        del stages[0]
    return stages


def _devices(launcher_arguments: Sequence[str]) -> int:
    """Processes that the launcher will start."""
    options = dict(zip(launcher_arguments[::2], launcher_arguments[1::2], strict=True))
    wanted = int(options.get("--num_gpus", 0))
    if "--hostfile" in options:
        slots = _slots(Path(options["--hostfile"]))
        return sum(min(wanted or count, count) for count in slots[: int(options.get("--num_nodes", len(slots)))])
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    there = int(accelerator.device_count())
    if wanted > there and accelerator.device_name() != "cpu":
        raise ConfigError(f"--num_devices {wanted}: this machine shows {there} ({accelerator.device_name()})")
    return wanted or max(1, there)


def _slots(hostfile: Path) -> list[int]:
    """The devices of each host that a hostfile names; ConfigError for a line that does not say how many."""
    lines = [line.split("#")[0].strip() for line in hostfile.read_text(encoding="utf-8").splitlines()]
    hosts = {line: re.search(r"\bslots=(\d+)", line) for line in lines if line}
    slots = [int(found[1]) for found in hosts.values() if found]
    if not slots or len(slots) < len(hosts):
        wrong = next((line for line, found in hosts.items() if not found), "it is empty")
        raise ConfigError(
            f"--hostfile {hostfile}: {wrong!r} does not name a host and its devices; a line is `HOST slots=NUMBER` "
            "(see training_scripts/hostfile.example)"
        )
    return slots


def _for_stage(name: str, check: Callable[[], Result]) -> Result:
    """What `check` returns; its error with the stage before it."""
    try:
        return check()
    except DataError as error:
        raise DataError(f"stage {name}: {error}") from error
    except ConfigError as error:
        raise ConfigError(f"stage {name}: {error}") from error


def _data_sets(config: DataConfig) -> list[DatasetSpec]:
    """Every data set that the configuration of a stage names."""
    named = [getattr(config, item.name) for item in dataclasses.fields(config) if facts_of(item).path == "read"]
    return [DatasetSpec.parse(text) for texts in named if isinstance(texts, list) for text in texts]


def _check_first_rows(config: DataConfig) -> None:
    """DataError for a data set that is not there or of which not even the first row can be read."""
    for spec in _data_sets(config):
        next(read_rows(spec, "skip", []), None)


def _data_bytes(config: DataConfig) -> int:
    """Bytes of the local files of a stage's data sets."""
    paths = [Path(spec.path).expanduser() for spec in _data_sets(config)]
    files = [*paths, *(file for path in paths if path.is_dir() for file in path.rglob("*"))]
    return sum(file.stat().st_size for file in files if file.is_file())


def _dry_run(run: StageRun[Any]) -> Findings:
    """Have the stage's script do all that comes before its weights."""
    path = PROJECT / run.stage.script
    spec = importlib.util.spec_from_file_location(f"dry_run_of_{run.stage.name}", path)
    assert spec is not None and spec.loader is not None, f"{path} is a script of this project"
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    try:
        module.main.__wrapped__(run)
    except DryRunEndError as end:
        return end.found
    raise AssertionError(f"{run.stage.script} loads its weights without asking `StageRun.end_dry_run` first")


def _line(run: StageRun[Any], found: Findings) -> str:
    assert run.dry_run is not None
    rows = ", ".join(
        f"{'' if name == 'data' else f'{name}: '}{len(data.train)} rows to train on and {len(data.evaluation)} held out"
        for name, data in run.dry_run.data.items()
    )
    sizes = ", ".join(
        f"{role} {_millions(size.weights)} weights"
        + ("" if size.trainable == size.weights else f" of which {_millions(size.trainable)} train")
        for role, size in found.sizes.items()
    )
    return f"{run.stage.label}: {found.steps} optimizer steps; {rows}; {sizes}"


def _check_disk(output_dir: Path, found: Mapping[str, Findings]) -> str:
    """What the run will take on the disk beside what is there; ConfigError when there is less."""
    output_dir.mkdir(parents=True, exist_ok=True)
    exported = sum(each.export_bytes for each in found.values())
    states = max((each.state_bytes for each in found.values()), default=0)  # those of a finished stage are removed
    there = sum(file.stat().st_size for name in found for file in (output_dir / name).rglob("*") if file.is_file())
    free = shutil.disk_usage(output_dir).free
    needed = f"{_gib(exported)} for models and {_gib(states)} for training states"
    if exported + states > free + there:
        raise ConfigError(
            f"the disk of {output_dir} has {_gib(free)} free, and the run takes about {needed}: choose another disk "
            "with --output_dir, or keep fewer training states with --keep_last 1 (0 keeps none: a killed run is lost)"
        )
    return f"disk: about {needed}; {_gib(free)} free in {output_dir}"


def _millions(count: int) -> str:
    return f"{count / 1e9:.1f}B" if count >= 1e9 else f"{count / 1e6:.1f}M"


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"


class _Once(logging.Filter):
    """Passes what has not been said before: the stages read one file."""

    def __init__(self) -> None:
        super().__init__()
        self.said: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        new = message not in self.said
        self.said.add(message)
        return new


def main(argv: Sequence[str] | None = None) -> int:
    """Check the run that these arguments describe."""
    started = time.monotonic()
    setup_logging()
    once = _Once()
    logger.addFilter(once)
    try:
        pipeline = sort_arguments(list(sys.argv[1:] if argv is None else argv), user_dir=Path.cwd())
        os.chdir(PROJECT)  # where the stages run, and what paths of a configuration file are taken from
        lines = check_all(pipeline)
    except (ConfigError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER
    except OSError as error:
        refused = storage_failure(error)
        if refused is None:
            raise
        print(f"error: {refused}", file=sys.stderr)
        return EXIT_USER
    finally:
        logger.removeFilter(once)
    print("\n".join([*lines, f"nothing is wrong; checked in {time.monotonic() - started:.0f} s"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
