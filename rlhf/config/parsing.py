"""Configuration dataclasses filled from defaults, a YAML file and the command line, in this order."""

from __future__ import annotations

import ast
import copy
import dataclasses
import difflib
import inspect
import json
import logging
import math
import os
import sys
import textwrap
from collections.abc import Collection, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path
from types import MappingProxyType, NoneType, UnionType
from typing import Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

import yaml

from rlhf.config.errors import ConfigError
from rlhf.config.facts import facts_of
from rlhf.config.settings import REMOVED_FIELDS
from rlhf.config.yaml_text import WrittenFloat, WrittenInt, read_yaml, write_yaml

logger = logging.getLogger("rlhf")

MAX_CONFIG_BYTES = 200_000


def field_docstrings(config_class: type) -> dict[str, str]:
    """Field name -> the string literal under it, over the class and its bases; the class's own one wins.

    Raises ValueError that names the class and the field where a field of the dataclass has none.
    """
    found: dict[str, str] = {}
    for owner in reversed(config_class.__mro__):
        if not dataclasses.is_dataclass(owner):
            continue
        definition = ast.parse(textwrap.dedent(inspect.getsource(owner))).body[0]
        assert isinstance(definition, ast.ClassDef)
        for statement, following in zip(definition.body, definition.body[1:], strict=False):
            if not isinstance(statement, ast.AnnAssign) or not isinstance(statement.target, ast.Name):
                continue
            if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
                found[statement.target.id] = " ".join(str(following.value.value).split())
    for item in dataclasses.fields(config_class):
        if not found.get(item.name):
            raise ValueError(
                f"{config_class.__module__}.{config_class.__name__}.{item.name} has no docstring under it; "
                "write what it means, its unit and where its default comes from"
            )
    return found


def load_config_file(path: str | Path, stage: str, *, sections: Collection[str]) -> dict[str, Any]:
    """Read a YAML file into the flat fields of one stage (shared fields, overlaid by the stage's section).

    `sections` are the names of all stages.

    Raises ConfigError when the file is missing, cannot be read, is not YAML, repeats a key, or is not a mapping.
    """
    path = Path(path)
    try:
        if not path.is_file():
            raise ConfigError(f"configuration file not found: {path} (looked in {Path.cwd()})")
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise ConfigError(f"{path} is not a configuration file: it has more than {MAX_CONFIG_BYTES} bytes")
        content = read_yaml(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not a YAML file: {error}") from error
    except OSError as error:
        raise ConfigError(f"configuration file {path} cannot be read: {error.strerror or error}") from error
    if content is None:
        content = {}
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold a mapping of field names to values, not {type(content).__name__}")
    shared = {name: value for name, value in content.items() if name not in sections}
    section = {} if content.get(stage) is None else content[stage]
    if not isinstance(section, dict):
        raise ConfigError(f"{path}: section `{stage}:` must hold a mapping of field names to values")
    return {**shared, **section}


def parse_config(
    stage: str,
    config_classes: Mapping[str, type],
    argv: Sequence[str] | None = None,
    *,
    sections: Collection[str],
    known_fields: AbstractSet[str] = frozenset(),
    default_config: str | Path | None = None,
) -> dict[str, Any]:
    """Fill `config_classes` (by name) from the defaults, then `--config FILE`, then the command line.

    `sections` are the names of all stages, `known_fields` those of their fields: a shared file may hold them and this
    stage passes them over. `default_config` is read when the command line names neither `--config` nor a model: it
    tunes the embedded default and would not suit another one. `--local_rank`, which launchers add, is dropped: the
    rank is read from the environment. `--help` explains every field and exits. Returns an instance of each class.
    Raises ConfigError for an unknown field (with the nearest known names) or a value of the wrong type.
    """
    classes = list(config_classes.values())
    arguments = _without_local_rank(list(sys.argv[1:] if argv is None else argv))
    parser = _parser(stage, classes, explained=bool({"-h", "--help"} & set(arguments)))
    config_path, arguments = _take_config_option(arguments)
    given = _given(arguments)
    models = {item.name for each in classes for item in dataclasses.fields(each) if facts_of(item).names_model}
    implicit = config_path is None and default_config is not None and given.isdisjoint(models)
    if implicit:
        config_path = str(default_config)
    own = {name: kind for config in classes for name, kind in get_type_hints(config).items()}
    if config_path is not None:
        logger.info("configuration: %s", config_path)
        values = load_config_file(config_path, stage, sections=sections)
        _check_names(values, known_fields | own.keys(), config_path)
        values = {name: value for name, value in values.items() if name in own}
        if implicit:  # its held-out data belongs to its training data
            values = {
                name: value
                for name, value in values.items()
                if not (name.endswith("_eval_data") and name.replace("_eval_data", "_data") in given)
            }
        parser.set_defaults_with_config(
            **{name: _checked(name, value, own[name], config_path) for name, value in values.items()}
        )
    *configs, unknown = parser.parse_args_into_dataclasses(
        args=arguments, return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        _check_names([unknown[0].split("=")[0].removeprefix("--")], own.keys(), "command line")
        raise ConfigError(f"command line: cannot read {unknown[0]!r}; fields are given as `--name value`")
    for config in configs:
        _check_values(config)
    return dict(zip(config_classes, configs, strict=True))


def _parser(stage: str, classes: Sequence[type], *, explained: bool) -> Any:
    """The command line of the fields of `classes`; `explained` gives each its docstring as help."""
    from trl import TrlParser

    class Parser(TrlParser):
        @staticmethod
        def _parse_dataclass_field(parser: Any, field: dataclasses.Field[Any]) -> None:
            plain = copy.copy(field)
            plain.metadata = MappingProxyType({})  # it would be handed on to argparse; ours is not for it
            TrlParser._parse_dataclass_field(parser, plain)

        def error(self, message: str) -> NoReturn:
            raise ConfigError(f"command line: {message}")

    parser = Parser(list[Any](classes), prog=f"step {stage}", allow_abbrev=False)
    if explained:
        texts = {name: text for config in classes for name, text in field_docstrings(config).items()}
        for action in parser._actions:
            action.help = texts.get(action.dest, action.help or "").replace("%", "%%")
    return parser


def save_config(path: Path, configs: Iterable[Any]) -> None:
    """Write the configuration in force as YAML that `--config` reads back."""
    merged = {name: value for config in configs for name, value in dataclasses.asdict(config).items()}
    path.write_text(write_yaml(merged), encoding="utf-8")


def _given(arguments: Sequence[str]) -> set[str]:
    """The names of the options among `arguments`."""
    return {argument.split("=")[0].removeprefix("--").replace("-", "_") for argument in arguments}


def _take_config_option(arguments: list[str]) -> tuple[str | None, list[str]]:
    for index, argument in enumerate(arguments):
        if argument == "--config":
            if index + 1 == len(arguments):
                raise ConfigError("--config needs the path of a YAML file after it")
            return arguments[index + 1], arguments[:index] + arguments[index + 2 :]
        if argument.startswith("--config="):
            return argument.split("=", 1)[1], arguments[:index] + arguments[index + 1 :]
    return None, arguments


def _without_local_rank(arguments: list[str]) -> list[str]:
    kept: list[str] = []
    skip = False
    for argument in arguments:
        if skip:
            skip = False
        elif argument in ("--local_rank", "--local-rank"):
            skip = True
        elif not argument.startswith(("--local_rank=", "--local-rank=")):
            kept.append(argument)
    return kept


def _check_names(names: Iterable[str], known: AbstractSet[str], source: str) -> None:
    for name in names:
        if name in REMOVED_FIELDS and name not in known:
            raise ConfigError(f"{source}: `{name}` is no field any more: {REMOVED_FIELDS[name]}")
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=3)
            hint = f"did you mean {', '.join(near)}?" if near else "see docs/configuration.md for every field"
            raise ConfigError(f"{source}: unknown field `{name}`; {hint}")


def _check_values(config: Any) -> None:
    """ConfigError for a number that is not finite and for a text that no file name and no file could hold."""
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        for entry in value if isinstance(value, list) else [value]:
            infinite = entry == math.inf and facts_of(item).may_be_infinite
            if isinstance(entry, float) and not (math.isfinite(entry) or infinite):
                raise ConfigError(f"{item.name}={entry} must be a finite number")
            if isinstance(entry, str) and not _can_be_written(entry):
                raise ConfigError(f"{item.name}={entry!r} holds a character that cannot be written (NUL, half a pair)")


def _can_be_written(text: str) -> bool:
    try:
        return b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        return False


def _checked(name: str, value: Any, kind: Any, path: str) -> Any:
    """Convert a YAML value to the type `kind` of its field where that loses nothing (1 -> 1.0, "5e-5" -> 5e-5)."""
    needed = str(kind) if get_origin(kind) else kind.__name__
    shown = repr(value) if len(repr(value)) <= 200 else repr(value)[:200] + "..."
    wrong = ConfigError(f"{path}: field `{name}` needs {needed}, got {shown} ({_type_name(value)})")
    if get_origin(kind) in (UnionType, Union):  # the second one where a Literal is part of it
        if value is None:
            return None
        kind = next(part for part in get_args(kind) if part is not NoneType)
    if get_origin(kind) is list:
        if value is None:
            raise wrong
        convert = _number if get_args(kind) == (float,) else _list_entry
        return [convert(entry, wrong) for entry in (value if isinstance(value, list) else [value])]
    if get_origin(kind) is Literal:
        for choice in get_args(kind):
            if str(value) == str(choice):
                return choice
        raise ConfigError(f"{path}: field `{name}`={shown} is not one of {', '.join(map(str, get_args(kind)))}")
    if kind is float:
        # infinity is for `_check_values` to judge, which knows the field
        return value if isinstance(value, float) and value == math.inf else _number(value, wrong)
    if kind is int and isinstance(value, int) and not isinstance(value, bool):
        return int(value)
    if kind is str:
        return _text(value, wrong)
    if type(value) is not kind:
        raise wrong
    return value


def _type_name(value: Any) -> str:
    return type(value).__name__.removeprefix("Written").lower()


def _list_entry(value: Any, wrong: ConfigError) -> str:
    return _text(json.dumps(value, ensure_ascii=False) if isinstance(value, dict) else value, wrong)


def _text(value: Any, wrong: ConfigError) -> str:
    if isinstance(value, WrittenInt | WrittenFloat):
        return value.text  # a name that YAML reads as a number
    if not isinstance(value, str) or not _can_be_written(value):
        raise wrong
    return value


def _number(value: Any, wrong: ConfigError) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise wrong
    try:
        number = float(value)  # YAML reads 5e-5 as a string
    except (ValueError, OverflowError):
        raise wrong from None
    if not math.isfinite(number):
        raise wrong
    return number
