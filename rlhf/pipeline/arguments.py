"""Sort a pipeline's command line into the arguments of its launcher and of each stage, checked before any stage starts.

`python -m rlhf.pipeline.arguments [--stages sft,reward,ppo] ARGS...` prints bash assignments that
`training_scripts/run_all.sh` evaluates: STAGES (those that run), RESUME_STAGES (those with `resume: auto`),
OVERWRITE_STAGES (those whose earlier run is removed), SUMMARISED (whether a table of them can be made), OUTPUT_DIR,
MAX_RESTARTS, LAUNCHER_ARGS, and by stage SCRIPT_sft, TITLE_sft, ARGS_sft and so on.
A field goes to every stage that has it; `--reward.learning_rate 1e-4` goes to that stage alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import json
import os
import shlex
import sys
from collections.abc import Mapping, Sequence, Set
from pathlib import Path

from rlhf.algorithms.config import OFFLINE_CONSTANTS
from rlhf.config import EMBEDDED_BASE, REMOVED_FIELDS, ConfigError, RunConfig, facts_of, read_options
from rlhf.config.explain import field_help
from rlhf.config.values import from_words
from rlhf.distributed.place import free_port
from rlhf.pipeline.command_line import leave_broken_pipe
from rlhf.pipeline.earlier_run import RESULT, finished_refusal
from rlhf.pipeline.stages import PROJECT, STAGES, default_run, parse_stage, stage_fields

LAUNCHER_OPTIONS = {
    "num_devices": "--num_gpus",
    "num_nodes": "--num_nodes",
    "hostfile": "--hostfile",
    "master_addr": "--master_addr",
    "master_port": "--master_port",
}
"""Options of the pipeline and what the `deepspeed` launcher calls them."""


HELP_ALL = "--help-all"
ALIGNED_OFFLINE = ("sft", "offline")
"""The stages of `--align` with an algorithm that needs neither a reward model nor sampling."""


@dataclasses.dataclass(frozen=True)
class PipelineArguments:
    """The command line, sorted. `stage_arguments` has one list per stage of `stages`."""

    stages: tuple[str, ...]
    output_dir: str
    launcher_arguments: list[str]
    stage_arguments: dict[str, list[str]]
    single_process: bool = False
    """Whether one process on this machine is all there is, which needs no launcher."""
    resume_stages: tuple[str, ...] = ()
    """Stages that resume what an earlier run left, be it by the command line or by the configuration file."""
    overwrite_stages: tuple[str, ...] = ()
    """Stages whose earlier run is removed before the first stage starts."""
    max_restarts: int = 0
    """How many failures of the whole run are answered by starting the stage again."""


def sort_arguments(arguments: Sequence[str], *, user_dir: Path, over_an_earlier_run: bool = False) -> PipelineArguments:
    """Sort `arguments` and check them against the fields of every stage that will run.

    Relative paths are taken from `user_dir`, because the stages run in the project's root. Raises ConfigError for an
    option that no stage has (naming the nearest ones), or one that only a stage has that does not run, and for the
    directory of an earlier run unless `over_an_earlier_run`.
    """
    given = _read(arguments, user_dir)
    _check_names(given)
    per_stage = {stage: given.words_of(stage) for stage in given.stages}
    runs = {stage: _run_config(stage, words) for stage, words in per_stage.items()}
    output_dir = _output_dir(runs)
    if given.short and all("--output_dir" not in words for words in per_stage.values()):
        output_dir = _make_trial(runs, per_stage)
    if not over_an_earlier_run:
        _check_nothing_is_lost(runs)
    return PipelineArguments(
        given.stages,
        output_dir,
        _launcher_arguments(given.launcher),
        per_stage,
        single_process=given.launcher.keys() <= {"num_devices", "master_port"} and _devices(given.launcher) == "1",
        resume_stages=tuple(stage for stage, run in runs.items() if run.resume == "auto"),
        overwrite_stages=tuple(stage for stage, run in runs.items() if run.overwrite),
        max_restarts=given.max_restarts,
    )


@dataclasses.dataclass
class _Given:
    """The words of the command line by whom they are for; an option of a stage is (name, values)."""

    launcher: dict[str, str]
    stages: tuple[str, ...]
    short: bool
    max_restarts: int
    shared: list[tuple[str, list[str]]]
    own: dict[str, list[tuple[str, list[str]]]]
    align: str = ""

    def words_of(self, stage: str) -> list[str]:
        """The command line of one stage: shared options that it has, its own, and those of a short run."""
        fields = _option_names(stage)
        given = [option for option in self.shared if option[0] in fields] + self.own[stage]
        names = {name for name, _ in given}
        if self.short:
            given += [(name, [value]) for name, value in STAGES[stage].short_run.items() if name not in names]
        return [part for name, values in given for part in (f"--{name}", *values)]


def _read(arguments: Sequence[str], user_dir: Path) -> _Given:
    given = _Given({}, tuple(stage.name for stage in default_run()), False, 0, [], {stage: [] for stage in STAGES})
    seen: set[str] = set()
    for name, values in read_options(arguments):
        if name in seen:
            raise ConfigError(f"--{name} is given twice; a list takes all its values after one --{name}")
        seen.add(name)
        section, _, field_name = name.rpartition(".")
        values = _from_user_dir(field_name, values, user_dir)
        if name == "short":
            given.short = bool(from_words(name, values, bool))
        elif name == "stages":
            given.stages = _stages(values)
        elif name == "align":
            given.align = _alignment(_single(name, values))
        elif name == "max_restarts":
            given.max_restarts = _whole_number(name, _single(name, values), least=0)
        elif name in LAUNCHER_OPTIONS:
            given.launcher[name] = _single(name, values)
        elif not section:
            given.shared.append((name, values))
        elif section in STAGES:
            given.own[section].append((field_name, values))
        else:
            raise ConfigError(f"--{name}: `{section}` is not a stage; the stages are {', '.join(STAGES)}")
    if given.align:
        if "stages" in seen:
            raise ConfigError(f"--align {given.align} says which stages run: leave --stages out")
        given.stages = ALIGNED_OFFLINE
        given.own["offline"].append(("algorithm", [given.align]))
    return given


def _check_names(given: _Given) -> None:
    """ConfigError for an option that no stage has, or none of those that run."""
    fields = {name: _option_names(name) for name in STAGES}
    for name, _ in given.shared:
        _check_known(name, given.stages, fields)
    for stage, options in given.own.items():
        for name, _ in options:
            if name not in fields[stage]:
                raise ConfigError(
                    f"--{stage}.{name}: stage {stage} has no field `{name}`{_nearest(name, fields[stage])}"
                )


def all_fields(arguments: Sequence[str]) -> str:
    """Every field of every stage as this command line sets it, for reading."""
    pipeline = sort_arguments(arguments, user_dir=Path.cwd(), over_an_earlier_run=True)
    os.chdir(PROJECT)  # where the stages run, and what paths of a configuration file are taken from
    return field_help({name: stage_fields(name, pipeline.stage_arguments[name]) for name in pipeline.stages})


def bash_assignments(pipeline: PipelineArguments) -> str:
    """The sorted arguments as bash assignments, quoted for `eval`."""
    default = tuple(stage.name for stage in default_run())
    lines = [
        f"STAGES=({' '.join(pipeline.stages)})",
        f"RESUME_STAGES=({' '.join(pipeline.resume_stages)})",
        f"OVERWRITE_STAGES=({' '.join(pipeline.overwrite_stages)})",
        f"SUMMARISED={'yes' if pipeline.stages in (ALIGNED_OFFLINE, default) else ''}",
        f"OUTPUT_DIR={shlex.quote(pipeline.output_dir)}",
        f"MAX_RESTARTS={pipeline.max_restarts}",
        f"SINGLE_PROCESS={'yes' if pipeline.single_process else ''}",
        f"LAUNCHER_ARGS=({shlex.join(pipeline.launcher_arguments)})",
    ]
    for name, stage in STAGES.items():  # one that does not run gets an empty list: bash's `set -u` wants every name
        lines += [
            f"SCRIPT_{name}={shlex.quote(stage.script)}",
            f"TITLE_{name}={shlex.quote(stage.title)}",
            f"ARGS_{name}=({shlex.join(pipeline.stage_arguments.get(name, []))})",
        ]
    return "\n".join(lines)


def _single(name: str, values: Sequence[str]) -> str:
    if len(values) != 1:
        raise ConfigError(f"--{name} needs one value, got {list(values)}")
    return values[0]


def _stages(values: Sequence[str]) -> tuple[str, ...]:
    wanted = [stage for value in values for stage in value.split(",") if stage]
    unknown = [stage for stage in wanted if stage not in STAGES]
    if unknown or not wanted:
        raise ConfigError(f"--stages {','.join(wanted)}: the stages are {', '.join(STAGES)}, separated by commas")
    return tuple(stage for stage in STAGES if stage in wanted)


def _alignment(value: str) -> str:
    """An offline algorithm, or nothing for ppo, which the run takes anyway."""
    if value not in ("ppo", *OFFLINE_CONSTANTS):
        raise ConfigError(f"--align {value}: choose ppo or one of {', '.join(OFFLINE_CONSTANTS)}")
    return "" if value == "ppo" else value


def _option_names(stage: str) -> set[str]:
    names = {"config"}
    for kind in STAGES[stage].config_classes().values():
        for item in dataclasses.fields(kind):
            names.add(item.name)
            if item.type == "bool":
                names.add(f"no_{item.name}")
    return names


def _check_known(name: str, stages: Sequence[str], fields: Mapping[str, set[str]]) -> None:
    if any(name in fields[stage] for stage in stages):
        return
    owners = [stage for stage in STAGES if name in fields[stage]]
    if owners:
        raise ConfigError(
            f"--{name} is a field of {', '.join(owners)}, which this run ({', '.join(stages)}) leaves out"
        )
    if name in REMOVED_FIELDS:
        raise ConfigError(f"--{name} is no field any more: {REMOVED_FIELDS[name]}")
    known = set().union(*fields.values(), LAUNCHER_OPTIONS, ("short", "stages", "align", "max_restarts"))
    raise ConfigError(f"unknown option --{name}{_nearest(name, known)}")


def _nearest(name: str, known: Set[str]) -> str:
    near = difflib.get_close_matches(name, sorted(known), n=3)
    return f"; did you mean {', '.join('--' + match for match in near)}?" if near else "; see docs/configuration.md"


def _from_user_dir(name: str, values: Sequence[str], user_dir: Path) -> list[str]:
    """The values of an option, with relative paths made absolute where the option names files."""
    kind = _paths().get(name)
    if kind == "written":
        return [str((user_dir / Path(value).expanduser()).absolute()) for value in values]
    return [_existing(name, value, user_dir) for value in values] if kind == "read" else list(values)


def _paths() -> dict[str, str | None]:
    """Every option that names files, and whether they are read or written."""
    fields = (
        item
        for stage in STAGES.values()
        for kind in stage.config_classes().values()
        for item in dataclasses.fields(kind)
    )
    return {"config": "read", "hostfile": "read", **{item.name: facts_of(item).path for item in fields}}


def _existing(name: str, value: str, user_dir: Path) -> str:
    if value.startswith("{"):
        with contextlib.suppress(json.JSONDecodeError):
            source = json.loads(value)
            if isinstance(source.get("path"), str):
                return json.dumps({**source, "path": _existing(name, source["path"], user_dir)}, ensure_ascii=False)
        return value
    path = user_dir / Path(value).expanduser()
    known = value == EMBEDDED_BASE or (name == "template" and path.is_dir())  # a name, whatever lies here beside it
    return str(path.absolute()) if value and path.exists() and not known else value


def _run_config(stage: str, values: Sequence[str]) -> RunConfig:
    """Parse all of a stage's arguments, so that a mistake in the last one is found before the first one runs."""
    try:
        run: RunConfig = parse_stage(stage, values).run
    except ConfigError as error:
        raise ConfigError(f"stage {stage}: {error}") from error
    return run


def _check_nothing_is_lost(runs: Mapping[str, RunConfig]) -> None:
    """ConfigError where a run of a stage lies, unfinished or finished, and nothing is said of it: not after the earlier
    stages were trained anew over the models it stands on."""
    directories = {stage: PROJECT / run.output_dir / stage for stage, run in runs.items()}  # an absolute one wins
    for stage, run in runs.items():
        directory = directories[stage]
        unfinished = any(directory.glob("states/step-*")) and not (directory / RESULT).is_file()
        if unfinished and run.resume is None and not run.overwrite:
            raise ConfigError(
                f"{directory} holds an unfinished run: go on with --resume auto, start anew and lose it with --resume "
                "never, or choose another --output_dir"
            )
    for stage, run in runs.items():
        refused = finished_refusal(directories[stage], run)
        if refused is not None:
            raise refused


def _make_trial(runs: Mapping[str, RunConfig], per_stage: Mapping[str, list[str]]) -> str:
    """Give a trial of a few steps a directory of its own, beside that of the run it tries out; the directory.

    It is a trial and nothing else: what an earlier one left there is overwritten unasked.
    """
    directory = f"{_output_dir(runs).rstrip('/')}-short"
    for stage, run in runs.items():
        run.output_dir = directory
        run.overwrite = run.resume != "auto"
        per_stage[stage] += ["--output_dir", directory]
    return directory


def _output_dir(runs: Mapping[str, RunConfig]) -> str:
    directories = {stage: run.output_dir for stage, run in runs.items()}
    if len(set(directories.values())) > 1:
        raise ConfigError(f"the stages must share one output_dir, got {directories}; set it at the file's top level")
    return next(iter(directories.values()))


def _whole_number(name: str, value: str, *, least: int) -> int:
    if not (value.isdecimal() and int(value) >= least):
        raise ConfigError(f"--{name} needs a whole number of at least {least}, got {value!r}")
    return int(value)


def _launcher_arguments(options: Mapping[str, str]) -> list[str]:
    for name in ("num_devices", "num_nodes", "master_port"):
        if name in options:
            _whole_number(name, options[name], least=1)
    if "hostfile" in options and not Path(options["hostfile"]).is_file():
        raise ConfigError(f"--hostfile {options['hostfile']}: no such file (see training_scripts/hostfile.example)")
    chosen = dict(options)
    devices = _devices(options)
    if devices is not None:
        chosen["num_devices"] = devices
    if "hostfile" not in chosen:
        chosen.setdefault("master_port", str(free_port()))
    return [part for name, value in chosen.items() for part in (LAUNCHER_OPTIONS[name], value)]


def _devices(options: Mapping[str, str]) -> str | None:
    """`--num_devices`; without it 1 on a CPU, where DeepSpeed would start one process per NUMA node."""
    on_a_cpu = "hostfile" not in options and os.environ.get("DS_ACCELERATOR") == "cpu"
    return options.get("num_devices", "1" if on_a_cpu else None)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the assignments, with `--help-all` every field; a mistake goes to standard error and returns 2."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        if HELP_ALL in arguments:
            print(all_fields([word for word in arguments if word != HELP_ALL]))
        else:
            print(bash_assignments(sort_arguments(arguments, user_dir=Path.cwd())))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `--help-all | head`
        leave_broken_pipe()
    return 0


if __name__ == "__main__":
    sys.exit(main())
