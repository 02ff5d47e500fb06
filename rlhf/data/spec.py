"""What names a data set, what a row of one is, and the error that data raises."""

from __future__ import annotations

import os
import re
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from rlhf.data.json_text import JsonError, parse_json

FILE_FORMATS = ("json", "jsonl", "csv", "tsv", "parquet")


class DataError(ValueError):
    """Data that cannot be used: names the file, the line and the field where there is one, and what to do."""


@dataclass(frozen=True)
class SkippedRow:
    """A row left out with `on_bad_row="skip"` (or a tie, which teaches nothing); `field` is the file's column or ""."""

    file: str
    line: int
    field: str
    reason: str


@dataclass
class ReadingNotes:
    """What a user should know of how a data set was read; none of it is an error.

    `ignored_columns`: columns that nothing is read from, with the number of rows that have a value there. `warnings`:
    sentences, with the number of rows that they are about.
    """

    ignored_columns: Counter[str] = field(default_factory=Counter)
    warnings: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class Row:
    """One row of a data set.

    `line` counts from 1: the line of a text file where the row begins, the element of a JSON array, or the row of a
    parquet, Arrow or hub table. `text_cells`: the values are cells of a text table, which holds lists as text.
    """

    values: Mapping[str, Any]
    file: str
    line: int
    text_cells: bool = False


@dataclass(frozen=True)
class DatasetSpec:
    """Where rows are and what their columns mean.

    `path`: a file, a directory, a hub name `org/name`, or `sample:NAME`; `${NAME}` in it is an environment variable.
    `columns`: our name -> the file's column.
    `format`: a file format (`FILE_FORMATS`) where the suffix does not tell, or a row format
    (`rlhf.data.row_formats.ROW_FORMATS`) where the fields do not tell. `weight`: see `mixture.blend`. `split`: of a hub
    data set or a saved DatasetDict (None: `train`), or of a directory whose files or folders are named for splits.
    `subset`: the configuration of a hub data set that has several, or the folder of a local directory. `category`: of
    every row. `delimiter`: of a text table, one character.
    """

    path: str
    columns: Mapping[str, str] = field(default_factory=dict)
    format: str | None = None
    weight: float = 1.0
    split: str | None = None
    category: str | None = None
    delimiter: str | None = None
    subset: str | None = None

    @classmethod
    def parse(cls, text: str) -> DatasetSpec:
        """A path, directory, hub name or `sample:NAME` as it is, or a JSON object with the fields of this class."""
        text = text.strip()
        if not text:
            raise DataError("a data set needs a path, a directory, a hub name or `sample:NAME`; nothing was given")
        if not text.startswith("{"):
            return cls(path=expand_variables(text))
        try:
            given = parse_json(text)
        except JsonError as error:
            raise DataError(f"data set {_start(text)} begins like a JSON object but is not one: {error}") from error
        valid = [item.name for item in fields(cls)]
        unknown = sorted(set(given) - set(valid))
        if unknown:
            raise DataError(
                f"data set {_start(text)}: unknown key {', '.join(unknown)}; valid keys: {', '.join(valid)}"
            )
        if not isinstance(given.get("path"), str) or not given["path"]:
            raise DataError(f"data set {_start(text)} needs `path` (a file, a directory, a hub name or `sample:NAME`)")
        for name in ("format", "split", "subset", "category", "delimiter"):
            if given.get(name) is not None and not isinstance(given[name], str):
                raise DataError(f"data set {_start(text)}: `{name}` must be a text, not {given[name]!r}")
        columns = {} if given.get("columns") is None else given["columns"]
        if not isinstance(columns, dict) or not all(isinstance(column, str) for column in columns.values()):
            raise DataError(
                f'data set {_start(text)}: `columns` must look like {{"prompt": "질문", "response": "답변"}}'
            )
        weight = given.get("weight", 1.0)
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight <= sys.float_info.max:
            raise DataError(f"data set {_start(text)}: `weight` must be a number above 0, not {weight!r}")
        if given.get("delimiter") is not None and len(given["delimiter"]) != 1:
            raise DataError(f"data set {_start(text)}: `delimiter` must be one character, not {given['delimiter']!r}")
        path = expand_variables(given["path"])
        return cls(**{**given, "path": path, "columns": columns, "weight": float(weight)})


def _start(text: str) -> str:
    return repr(text) if len(text) <= 300 else f"{text[:300]!r}..."


def expand_variables(path: str) -> str:
    """`path` with each `${NAME}` replaced by that environment variable; DataError where it is not set."""

    def value(match: re.Match[str]) -> str:
        name = match.group(1)
        if not os.environ.get(name):
            raise DataError(f"data set {path!r}: the environment variable {name} is not set; `export {name}=...` first")
        return os.environ[name]

    return re.sub(r"\$\{(\w+)\}", value, path)
