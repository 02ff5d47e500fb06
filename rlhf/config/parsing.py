"""Configuration dataclasses filled from defaults, a YAML file and the command line, in this order."""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import logging
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, get_type_hints

from rlhf.config.errors import ConfigError
from rlhf.config.explain import FieldsInForce, default_of, field_help, value_text
from rlhf.config.facts import facts_of
from rlhf.config.files import FileFields, evaluation_data_left_out, load_config_file
from rlhf.config.settings import REMOVED_FIELDS
from rlhf.config.values import check_values, from_words, from_yaml

logger = logging.getLogger("rlhf")

HELP = ("-h", "--help")
NO_METHODS: Mapping[str, Collection[str]] = MappingProxyType({})


def parse_config(
    stage: str,
    config_classes: Mapping[str, type],
    argv: Sequence[str] | None = None,
    *,
    sections: Collection[str],
    methods: Mapping[str, Collection[str]] = NO_METHODS,
    known_fields: AbstractSet[str] = frozenset(),
    default_config: str | Path | None = None,
) -> dict[str, Any]:
    """Fill `config_classes` (by name) from the defaults, then `--config FILE`, then the command line.

    `sections` are the names of all stages, `known_fields` those of their fields: a shared file may hold them and this
    stage passes them over. `methods`: a field of a stage and its values, each of which may have a section too, read
    after the stage's own where the field has that value. `default_config` is read when the command line names neither
    `--config` nor a model: it tunes the embedded default and would not suit another one; where it is not read, the log
    says what that changes. A file may extend any file of its directory by its bare name. `--local_rank`, which
    launchers add, is dropped: the rank is read from the environment. `--help` explains every field and exits.
    Returns an instance of each class. Raises ConfigError for an unknown field (with the nearest known names) or a
    value of the wrong type.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    fields = fields_in_force(
        stage,
        config_classes.values(),
        [word for word in words if word not in HELP],
        sections=sections,
        methods=methods,
        known_fields=known_fields,
        default_config=default_config,
    )
    if any(word in HELP for word in words):
        print(field_help({stage: fields}))
        raise SystemExit(0)
    configs = {}
    for name, config_class in config_classes.items():
        own = {item.name for item in dataclasses.fields(config_class)}
        configs[name] = config_class(**{field: value for field, value in fields.values.items() if field in own})
        check_values(configs[name])
    return configs


def fields_in_force(
    stage: str,
    config_classes: Iterable[type],
    words: Sequence[str],
    *,
    sections: Collection[str],
    methods: Mapping[str, Collection[str]] = NO_METHODS,
    known_fields: AbstractSet[str],
    default_config: str | Path | None,
) -> FieldsInForce:
    """What a file and the command line `words` give; see `parse_config`."""
    classes = tuple(config_classes)
    fields = _Fields.of(classes, known_fields)
    config_path, given = _given(words, fields)
    default = None if default_config is None else Path(default_config)
    implicit = config_path is None and given.keys().isdisjoint(fields.models)
    path = default if implicit else config_path

    def from_file(file: Path) -> FileFields:
        return _from_file(file, stage, sections, methods, None if default is None else default.parent, fields, given)

    read = None if path is None else from_file(path)
    if read is not None:  # held-out data belongs to its training data; what the user's own file says stays
        not_named = {name: value for name, value in read.values.items() if read.sources[name] != config_path}
        read = _without(read, evaluation_data_left_out(not_named, given))
    _tell(stage, read, given, default, fields, from_file)
    sources: dict[str, Path | str] = dict.fromkeys(given, "command line")
    if read is None:
        return FieldsInForce(classes, given, sources)
    return FieldsInForce(classes, {**read.values, **given}, {**read.sources, **sources}, read.files)


def read_options(words: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """(`name`, values) of every `--name value...` or `--name=value`, in order, dashes in a name as underscores.

    A value is whatever does not begin with two dashes. Raises ConfigError for a word that stands for itself.
    """
    index = 0
    while index < len(words):
        word = words[index]
        if not word.startswith("--") or word == "--":
            raise ConfigError(f"command line: cannot read {word!r}; fields are given as `--name value`")
        name, equals, value = word[2:].partition("=")
        index += 1
        values = [value] if equals else []
        while not equals and index < len(words) and not words[index].startswith("--"):
            values.append(words[index])
            index += 1
        yield name.replace("-", "_"), values


@dataclass(frozen=True)
class _Fields:
    """The fields of a stage: their types, their defaults, those that name a model, and those other stages have."""

    kinds: Mapping[str, Any]
    defaults: Mapping[str, Any]
    models: frozenset[str]
    known: AbstractSet[str]

    @classmethod
    def of(cls, classes: Iterable[type], known: AbstractSet[str]) -> _Fields:
        classes = list(classes)
        kinds = {name: kind for config_class in classes for name, kind in get_type_hints(config_class).items()}
        items = [item for config_class in classes for item in dataclasses.fields(config_class)]
        defaults = {item.name: default_of(item) for item in items}
        models = frozenset(item.name for item in items if facts_of(item).names_model)
        return cls({name: kinds[name] for name in defaults}, defaults, models, known)


def _given(words: Sequence[str], fields: _Fields) -> tuple[Path | None, dict[str, Any]]:
    """The file that `--config` names and the fields that the command line gives, converted."""
    path: Path | None = None
    given: dict[str, Any] = {}
    for name, values in read_options(words):
        if name == "local_rank":
            continue
        if name == "config":
            if path is not None or len(values) != 1:
                raise ConfigError("command line: --config needs the path of a YAML file after it, and stands once")
            path = Path(values[0])
        elif name.startswith("no_") and fields.kinds.get(name[3:]) is bool and not values:
            given[name[3:]] = False
        else:
            check_names([name], fields.kinds.keys(), "command line")
            given[name] = from_words(name, values, fields.kinds[name])
    return path, given


def _from_file(
    path: Path,
    stage: str,
    sections: Collection[str],
    methods: Mapping[str, Collection[str]],
    presets: Path | None,
    fields: _Fields,
    given: Mapping[str, Any],
) -> FileFields:
    """What a file holds for this stage and its method, converted. The command line's `given` may name the method."""
    names = {*sections, *itertools.chain.from_iterable(methods.values())}
    read = load_config_file(path, stage, sections=names, presets=presets)
    for field in methods.keys() & fields.kinds.keys():
        method = given.get(field, read.values.get(field, fields.defaults[field]))
        if method not in methods[field]:
            continue
        read = load_config_file(path, stage, sections=names, presets=presets, method=method)
        if read.values.get(field, method) != method and field not in given:
            raise ConfigError(
                f"{read.sources[field]}: section `{method}:` sets {field}, which says what sections are read: set it "
                f"in section `{stage}:`"
            )
    for name in read.values:
        check_names([name], fields.known | fields.kinds.keys(), str(read.sources[name]))
    values = {
        name: from_yaml(name, value, fields.kinds[name], str(read.sources[name]))
        for name, value in read.values.items()
        if name in fields.kinds
    }
    return dataclasses.replace(read, values=values)


def _without(read: FileFields, names: Collection[str]) -> FileFields:
    left_out = {name: read.sources[name] for name in names}
    values = {name: value for name, value in read.values.items() if name not in names}
    return dataclasses.replace(read, values=values, left_out={**read.left_out, **left_out})


def _tell(
    stage: str, read: FileFields | None, given: Mapping[str, Any], default: Path | None, fields: _Fields, read_file: Any
) -> None:
    """Log which files are read, which evaluation data is left out, and what the default file would have set."""
    if read is not None:
        logger.info("configuration: %s", ", extending ".join(map(str, read.files)))
        for name, source in read.left_out.items():
            logger.info("configuration: %s of %s is left out: it belongs to the training data there", name, source.name)
    if default is None or (read is not None and any(path.samefile(default) for path in read.files)):
        return
    values = {**({} if read is None else read.values), **given}
    differs = [
        f"{name} {value_text(fields.defaults[name])} (there {value_text(value)})"
        for name, value in read_file(default).values.items()
        if name not in values and value != fields.defaults[name]
    ]
    if differs:
        own_model = any(values.get(name, fields.defaults[name]) != fields.defaults[name] for name in fields.models)
        advice = "it suits the embedded model" if own_model else f"`extends: {default.stem}` in a file keeps them"
        logger.info(
            "configuration of %s: %s is not read, hence %s; %s", stage, default.name, ", ".join(differs), advice
        )


def check_names(names: Iterable[str], known: AbstractSet[str], source: str) -> None:
    """ConfigError for a name that no field has, with the nearest ones, or what a removed field is replaced by."""
    for name in names:
        if name in known:
            continue
        if name in REMOVED_FIELDS:
            raise ConfigError(f"{source}: `{name}` is no field any more: {REMOVED_FIELDS[name]}")
        near = difflib.get_close_matches(str(name), known, n=3)
        hint = f"did you mean {', '.join(near)}?" if near else "see docs/configuration.md for every field"
        raise ConfigError(f"{source}: unknown field `{name}`; {hint}")
