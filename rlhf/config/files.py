"""Configuration files: YAML with shared fields, a section for each stage, and `extends` for what it builds on."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from rlhf.config.errors import ConfigError
from rlhf.config.yaml_text import read_yaml, write_yaml

MAX_CONFIG_BYTES = 200_000
EXTENDS = "extends"


@dataclass(frozen=True)
class FileFields:
    """The fields that one stage takes from a file and what it extends.

    `values`: name -> value as YAML has it; `sources`: name -> the file that gave it; `files`: all that were read, the
    named one first. `left_out`: evaluation data of an extended file whose training data this one replaces.
    """

    values: dict[str, Any]
    sources: dict[str, Path]
    files: tuple[Path, ...]
    left_out: dict[str, Path] = field(default_factory=dict)


def load_config_file(
    path: str | Path, stage: str, *, sections: Collection[str], presets: Path | None = None, method: str | None = None
) -> FileFields:
    """Read a YAML file as one stage sees it: what it extends, then its shared fields, then the stage's section, then
    that of the stage's `method`.

    `sections` are the names of all stages and methods; `extends` names a file of the directory `presets`, or a path
    beside the file. Raises ConfigError when a file is missing, cannot be read, is not YAML, repeats a key, is not a
    mapping, or extends itself.
    """
    own = (stage,) if method is None else (stage, method)
    return _load(Path(path), own, sections, presets, ())


def save_config(path: Path, configs: Iterable[Any]) -> None:
    """Write the configuration in force as YAML that `--config` reads back."""
    merged = {name: value for config in configs for name, value in dataclasses.asdict(config).items()}
    path.write_text(write_yaml(merged), encoding="utf-8")


def evaluation_data_left_out(base: Mapping[str, Any], given: Mapping[str, Any]) -> set[str]:
    """Evaluation data of `base` that belongs to training data which `given` replaces without naming its own."""
    left_out = set()
    for name in base:
        training = name.replace("_eval_data", "_data")
        replaced = training != name and training in given and _as_list(given[training]) != _as_list(base.get(training))
        if replaced and name not in given:
            left_out.add(name)
    return left_out


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _load(
    path: Path, own_sections: Sequence[str], sections: Collection[str], presets: Path | None, above: tuple[Path, ...]
) -> FileFields:
    if path.resolve() in above:
        chain = " -> ".join(str(each) for each in (*above, path.resolve()))
        raise ConfigError(f"configuration files extend one another in a circle: {chain}")
    content = _read(path)
    own = {name: value for name, value in content.items() if name not in (*sections, EXTENDS)}
    for name in own_sections:
        section = {} if content.get(name) is None else content[name]
        if not isinstance(section, dict):
            raise ConfigError(f"{path}: section `{name}:` must hold a mapping of field names to values")
        if EXTENDS in section:
            raise ConfigError(f"{path}: `{EXTENDS}` stands at the top level of a file, not in section `{name}:`")
        own.update(section)
    if EXTENDS not in content:
        return FileFields(own, dict.fromkeys(own, path), (path,))
    base = _load(_extended(content[EXTENDS], path, presets), own_sections, sections, presets, (*above, path.resolve()))
    left_out = {name: base.sources[name] for name in evaluation_data_left_out(base.values, own)}
    kept = {name: value for name, value in base.values.items() if name not in left_out}
    return FileFields(
        {**kept, **own},
        {**{name: base.sources[name] for name in kept}, **dict.fromkeys(own, path)},
        (path, *base.files),
        {**{name: source for name, source in base.left_out.items() if name not in own}, **left_out},
    )


def _extended(name: Any, path: Path, presets: Path | None) -> Path:
    """The file that `extends: name` in `path` means: a preset by its bare name, else a path beside the file."""
    if not isinstance(name, str) or not name:
        raise ConfigError(f"{path}: `{EXTENDS}` needs the name of a preset or a file, got {name!r}")
    if "/" in name or name.endswith((".yaml", ".yml")):
        return path.parent / Path(name).expanduser()
    known = sorted(preset.stem for preset in presets.glob("*.yaml")) if presets else []
    if presets is None or name not in known:
        raise ConfigError(
            f"{path}: `{EXTENDS}: {name}` is not a preset ({', '.join(known)}); a file of your own is named with .yaml"
        )
    return presets / f"{name}.yaml"


def _read(path: Path) -> Mapping[str, Any]:
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
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold a mapping of field names to values, not {type(content).__name__}")
    return content
