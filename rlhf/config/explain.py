"""What a field means, from the string literal under it, and the `--help` of a stage made of that."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import shutil
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HELP_WIDTH = 120


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


@dataclass(frozen=True)
class FieldsInForce:
    """The fields of one stage: `values` are those that a file or the command line gives, `sources` says which.

    `files`: the configuration files that were read.
    """

    classes: tuple[type, ...]
    values: Mapping[str, Any]
    sources: Mapping[str, Path | str]
    files: Sequence[Path] = ()


def field_help(stages: Mapping[str, FieldsInForce]) -> str:
    """Every field of the stages once, by concern: the value in force, where that comes from, type and meaning."""
    width = min(HELP_WIDTH, shutil.get_terminal_size((HELP_WIDTH, 24)).columns)
    lines = [
        f"Fields of {', '.join(stages)}: each with the value in force and where it comes from. Given as --field VALUE",
        "on the command line (a list takes several, a yes/no field also --no_field) or as YAML in --config FILE.",
    ]
    families: dict[type, dict[str, dict[str, _FieldInForce]]] = {}
    for stage, fields in stages.items():
        for config_class in fields.classes:
            family = families.setdefault(root_class(config_class), {})
            for entry in _entries(config_class, fields):
                family.setdefault(entry.name, {})[stage] = entry
    for root, family in families.items():
        lines += ["", f"{concern(root)}: {class_text(root)}"]
        for name, by_stage in family.items():
            lines.append(f"  --{name} {_merged_values(by_stage, len(stages))}")
            lines += textwrap.wrap(_merged_texts(by_stage), width, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines)


@dataclass(frozen=True)
class _FieldInForce:
    name: str
    value: str
    source: str
    kind: str
    text: str


def _entries(config_class: type, fields: FieldsInForce) -> Iterator[_FieldInForce]:
    texts = field_docstrings(config_class)
    for item in dataclasses.fields(config_class):
        value = fields.values.get(item.name, default_of(item))
        source = fields.sources.get(item.name, "default")
        shown = source.name if isinstance(source, Path) else source
        kind = type_text(item.type).replace("`", "")
        yield _FieldInForce(item.name, value_text(value), shown, kind, texts[item.name])


def _merged_values(by_stage: Mapping[str, _FieldInForce], stages: int) -> str:
    """One value where the stages agree, else that of each."""
    found = {(entry.value, entry.source) for entry in by_stage.values()}
    kind = next(iter(by_stage.values())).kind
    if len(found) > 1:
        parts = (f"{stage} {entry.value} ({entry.source})" for stage, entry in by_stage.items())
        return f"{', '.join(parts)}  ({kind})"
    value, source = found.pop()
    owners = "" if len(by_stage) == stages else f"; {', '.join(by_stage)}"
    return f"{value}  ({source}; {kind}{owners})"


def _merged_texts(by_stage: Mapping[str, _FieldInForce]) -> str:
    texts: dict[str, list[str]] = {}
    for stage, entry in by_stage.items():
        texts.setdefault(entry.text, []).append(stage)
    (first, _), *others = texts.items()
    return " ".join([first, *(f"In {', '.join(stages)}: {text}" for text, stages in others)])


def concern(config_class: type) -> str:
    """What the fields of a configuration class are about, as a heading: classes of one root share it."""
    return root_class(config_class).__name__.removesuffix("Config")


def root_class(config_class: type) -> type:
    """The dataclass a configuration class extends, or itself."""
    return [owner for owner in config_class.__mro__ if dataclasses.is_dataclass(owner)][-1]


def class_text(config_class: type) -> str:
    """The first sentence of the class's docstring."""
    return (inspect.getdoc(config_class) or "").split("\n\n")[0].replace("\n", " ")


def default_of(item: dataclasses.Field[Any]) -> Any:
    """The default of a field; raises ValueError for a field without one, since a stage must run with no argument."""
    if item.default is not dataclasses.MISSING:
        return item.default
    if item.default_factory is not dataclasses.MISSING:
        return item.default_factory()
    raise ValueError(f"configuration field {item.name} has no default; every field needs one")


def value_text(value: Any) -> str:
    """A value as it would be written in YAML; `unset` for None, `empty` for an empty list."""
    if value is None:
        return "unset"
    if isinstance(value, list):
        return f"[{', '.join(_plain(entry) for entry in value)}]" if value else "empty"
    return _plain(value)


def type_text(kind: Any) -> str:
    """A field's type for readers: the choices of a Literal, else the annotation."""
    text = kind.__name__ if isinstance(kind, type) else str(kind)
    literal = re.fullmatch(r"(?:typing\.)?Literal\[(.*?)\](?: \| None)?", text)
    if literal:
        return ", ".join(f"`{choice.strip().strip(chr(34) + chr(39))}`" for choice in literal.group(1).split(","))
    return text.removesuffix(" | None")


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return re.sub(
            r"e([+-])0*(\d)", lambda match: f"e{match.group(1).replace('+', '')}{match.group(2)}", f"{value:g}"
        )
    return str(value)
