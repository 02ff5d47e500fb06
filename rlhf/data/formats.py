"""Which column of a file means what: the choice between the recognised row formats (`rlhf.data.row_formats`).

The columns of a file decide, together
with the kind of record that is wanted; where two readings remain, or none, the error lists them and shows the `columns`
that settle it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from rlhf.data.column_options import PLACEHOLDERS, ColumnChoice, ColumnsError, choices_of, holds_labels
from rlhf.data.headers import column_spelt, columns_named, is_label, numbers_rows, parts_among
from rlhf.data.printed_lists import parse_printed
from rlhf.data.rendered import holds_transcript
from rlhf.data.row_formats import ROW_FORMATS, RowFormat
from rlhf.data.row_values import content_of, is_missing
from rlhf.data.sources import FILE_FORMATS, DataError, DatasetSpec, Row

KINDS = ("prompt", "response", "preference", "ranked", "comparison", "labelled")

_SHAPES = {
    "prompt": (("prompt",), ("messages",), ("text",), ("chosen", "rejected")),
    "response": (("prompt", "response"), ("messages",), ("text",)),
    "preference": (
        ("prompt", "chosen", "rejected"),
        ("prompt", "response", "label"),
        ("messages", "label"),
        ("chosen", "rejected"),
    ),
    "ranked": (("prompt", "responses", "ranks"), ("prompt", "responses", "scores"), ("prompt", "chosen", "rejected")),
}
_ANSWERS: tuple[tuple[str, ...], ...] = (("chosen", "rejected"), ("responses",), ("response",))
"""Our names of the answers that may stand beside a prompt."""
_SHAPES["comparison"] = _SHAPES["ranked"] + _SHAPES["preference"][1:]
_SHAPES["labelled"] = _SHAPES["preference"][1:3] + _SHAPES["ranked"] + _SHAPES["preference"][3:]
"""Our names that make up a record of each kind when `columns` says what they are."""

CONTENT = ("prompt", "response", "chosen", "rejected", "responses", "ranks", "scores", "label", "messages", "text")
NAMES = (*CONTENT, "input", "system", "history", "margin", "category", "id")
"""The names that `columns` may map."""
SCORE_GAP = "sum1-sum2"
"""`columns: {"margin": "sum1-sum2"}` makes the distance of the sums of a scored pair its margin."""


@dataclass(frozen=True)
class Layout:
    """The columns of one file for one kind: our name -> the file's column (several for `responses`).

    `ignored` are the file's columns that nothing is read from. For prompts the columns of answers are not among them.
    """

    format: str
    columns: Mapping[str, str]
    response_columns: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()


def layout_of(rows: Sequence[Row], kind: str, spec: DatasetSpec) -> Layout:
    """How to read the rows of one file as records of `kind`.

    Columns that are null in every row do not count. Raises DataError naming the columns that are there when a mapped
    column is not, when no format fits, or when several fit that would read different columns.
    """
    if kind not in KINDS:
        raise DataError(f"record kind {kind!r} is not one of {', '.join(KINDS)}")
    there = list(dict.fromkeys(name for row in rows for name, value in row.values.items() if value is not None))
    where = f"{rows[0].file} (for `{kind}` records)"
    unknown = sorted(set(spec.columns) - set(NAMES))
    if unknown:
        raise DataError(f"{where}: `columns` maps unknown names {', '.join(unknown)}; valid: {', '.join(NAMES)}")
    left_open = [name for name, column in spec.columns.items() if column == PLACEHOLDERS.get(name)]
    if left_open:
        raise DataError(
            f"{where}: `columns` still has the placeholder {spec.columns[left_open[0]]!r} for `{left_open[0]}`; put "
            f"the name of a column there; the file's columns: {', '.join(there)}"
        )
    mapped, response_columns = _mapped(spec, rows, there, kind, where)
    row_format = spec.format if spec.format not in (None, *FILE_FORMATS) else None
    if any(name in CONTENT for name in mapped) or response_columns:
        if row_format is not None:
            raise DataError(f"{where}: give `columns` or the row format `{row_format}`, not both")
        layout = _layout_of_mapping(mapped, response_columns, rows, there, kind, where, spec)
        return replace(layout, ignored=_ignored(layout, there, kind, spec))
    if row_format is not None:
        candidates = _named_format(row_format, there, kind, where)
    else:
        candidates = _candidates(rows, there, kind)
    if len(candidates) != 1:
        raise _choice_error(candidates, rows, there, kind, where, mapped, spec)
    (reading,) = candidates
    chosen = ROW_FORMATS[reading.format]
    columns = {**reading.columns, **_optional(chosen.optional, there, rows)}
    if chosen.name == "completions":
        response_columns = _completions(there)
    layout = Layout(chosen.name, {**columns, **mapped}, response_columns)
    return replace(layout, ignored=_ignored(layout, there, kind, spec))


def _completions(there: Sequence[str]) -> tuple[str, ...]:
    found = [name for name in there if re.fullmatch(r"completion_\d+", name)]
    return tuple(sorted(found, key=lambda name: int(name.rpartition("_")[2])))


def _optional(optional: Mapping[str, Sequence[str]], there: Sequence[str], rows: Sequence[Row]) -> dict[str, str]:
    """The column of each optional name: the first one with something in it in some row."""
    found: dict[str, str] = {}
    for name, columns in optional.items():
        present = [column for header in columns for column in columns_named(header, there)]
        said = (column for column in present if any(_says_something(row.values.get(column)) for row in rows))
        if present:
            found[name] = next(said, present[0])
    return found


def _says_something(value: Any) -> bool:
    if isinstance(value, str):
        return bool(content_of(value))
    return not is_missing(value) and value not in ([], {})


def _ignored(layout: Layout, there: Sequence[str], kind: str, spec: DatasetSpec) -> tuple[str, ...]:
    used = {*layout.columns.values(), *layout.response_columns}
    used |= set() if "id" in layout.columns else {"id", "id3"}
    used |= set() if "category" in layout.columns or spec.category is not None else {"category"}
    if SCORE_GAP in used:
        used |= {"sum1", "sum2"}
    if kind == "prompt":  # the answers beside a prompt
        headers = {header for item in ROW_FORMATS.values() for name, header in item.fields.items() if name != "prompt"}
        used |= {column for header in headers - {"input"} for column in columns_named(header, there)}
        used |= {column for column in there if re.fullmatch(r"completion_\d+", column)}
    return tuple(column for column in there if column not in used)


def _mapped(
    spec: DatasetSpec, rows: Sequence[Row], there: Sequence[str], kind: str, where: str
) -> tuple[dict[str, str], tuple[str, ...]]:
    mapped: dict[str, str] = {}
    response_columns: tuple[str, ...] = ()
    missing = []
    for name, column in spec.columns.items():
        parts = tuple(part.strip() for part in column.split(","))
        spelt = column_spelt(column, there)
        if spelt is not None or (name == "margin" and column == SCORE_GAP):
            mapped[name] = spelt or column
        elif name == "responses" and len(parts) > 1:
            missing += [part for part in parts if column_spelt(part, there) is None]
            response_columns = tuple(column_spelt(part, there) or part for part in parts)
        else:
            missing.append(column)
    if missing:
        raise ColumnsError(
            f"{where}: `columns` names {', '.join(map(repr, missing))}, which the file does not have; "
            f"its columns: {', '.join(there) or 'none'}",
            _choices(rows, there, kind, _beside(mapped), spec),
        )
    return mapped, response_columns


def _beside(mapped: Mapping[str, str]) -> dict[str, str]:
    """What `columns` maps besides the content."""
    return {name: column for name, column in mapped.items() if name not in CONTENT}


def _layout_of_mapping(
    mapped: Mapping[str, str],
    response_columns: tuple[str, ...],
    rows: Sequence[Row],
    there: Sequence[str],
    kind: str,
    where: str,
    spec: DatasetSpec,
) -> Layout:
    """The shape with the most mapped names (for prompts: the first with one); others count under their own name."""
    known = {name: spelt for name in CONTENT if (spelt := column_spelt(name, there)) is not None} | dict(mapped)
    if response_columns:
        known["responses"] = ", ".join(response_columns)
    given = {*mapped, *(("responses",) if response_columns else ())}
    shapes = [shape for shape in _SHAPES[kind] if all(name in known for name in shape)]
    if not shapes:
        raise ColumnsError(
            f"{where}: `columns` gives {', '.join(sorted(given))}; needed: "
            f"{' or '.join(' + '.join(shape) for shape in _SHAPES[kind])}; the file's columns: {', '.join(there)}",
            _choices(rows, there, kind, _beside(mapped), spec),
        )
    shape = max(shapes, key=lambda names: len(given.intersection(names[:1] if kind == "prompt" else names)))
    names: tuple[str, ...] = shape
    if names == ("prompt",):  # whole dialogues beside it are the prompt, as they are for the other kinds
        beside = [answers for answers in _ANSWERS if all(name in known for name in answers)]
        names += max(beside, key=lambda answers: len(given.intersection(answers)), default=())
    columns = {name: known[name] for name in names}
    if columns.get("prompt") == "instruction" and "input" in there:
        columns["input"] = "input"  # the two belong together in every instruction format
    columns.update({name: column for name, column in mapped.items() if name not in CONTENT})
    if kind == "response" and "label" in mapped:
        columns["label"] = mapped["label"]
    return Layout("columns", columns, response_columns if "responses" in names else ())


def _named_format(name: str, there: Sequence[str], kind: str, where: str) -> list[Layout]:
    if name not in ROW_FORMATS:
        raise DataError(
            f"{where}: unknown format `{name}`; file formats: {', '.join(FILE_FORMATS)}; "
            f"row formats: {', '.join(ROW_FORMATS)}"
        )
    named = ROW_FORMATS[name]
    missing = [header for header in named.fields.values() if not columns_named(header, there)]
    if missing:
        raise DataError(
            f"{where}: format `{name}` needs the columns {', '.join(named.fields.values())}; "
            f"not there: {', '.join(missing)}; the file's columns: {', '.join(there)}"
        )
    if kind not in named.kinds:
        raise DataError(f"{where}: format `{name}` gives {', '.join(named.kinds)} records, not `{kind}`")
    return _readings(replace(named, rivals={}), there)


def _readings(item: RowFormat, there: Sequence[str]) -> list[Layout]:
    """The ways to read a file in one format: none where a header is missing, several where two columns say the same."""
    found = []
    for name, header in item.fields.items():
        columns = columns_named(header, there)
        if columns:
            columns += [column for rival in item.rivals.get(name, ()) for column in columns_named(rival, there)]
        found.append(list(dict.fromkeys(columns)))
    return [Layout(item.name, dict(zip(item.fields, columns, strict=True))) for columns in product(*found)]


def _candidates(rows: Sequence[Row], there: Sequence[str], kind: str) -> list[Layout]:
    """The readings that fit, without those that another one contains or that would read the same columns."""
    fitting = [
        reading
        for item in ROW_FORMATS.values()
        if kind in item.kinds and not any(columns_named(header, there) for header in item.unless)
        for reading in _readings(item, there)
        if not _doubts(reading, rows, there, kind)
    ]
    if not _holds_transcripts(rows):
        fitting = [reading for reading in fitting if reading.format != "transcripts"]
    unmarked = _unmarked_texts(rows, there)
    fitting = [reading for reading in fitting if reading.columns.get("text") not in unmarked]
    fitting = [reading for reading in fitting if not ROW_FORMATS[reading.format].weak] or fitting
    columns = [set(reading.columns.values()) for reading in fitting]
    widest = [
        reading for reading, own in zip(fitting, columns, strict=True) if not any(own < other for other in columns)
    ]
    if kind == "prompt":
        distinct = {
            reading.columns.get("prompt", reading.columns.get("messages", reading.format)): reading
            for reading in reversed(widest)
        }
        widest = list(distinct.values())[::-1]
    return widest


def _doubts(reading: Layout, rows: Sequence[Row], there: Sequence[str], kind: str) -> list[str]:
    """The columns beside which a reading is not certain: labels of the answers, and parts of the question.

    Beside the headers of instruction data, which say what they are, only a column counts whose header says that it is
    a label and whose values are labels.
    """
    item = ROW_FORMATS[reading.format]
    optional = {
        column for headers in item.optional.values() for name in headers for column in columns_named(name, there)
    }
    others = [column for column in there if column not in (*reading.columns.values(), *optional, "category")]
    found = parts_among(others) if item.bare else []
    if kind == "response" and set(item.fields) == {"prompt", "response"}:
        if item.bare:
            found += [column for column in others if is_label(column)]
            found += [column for column in others if not numbers_rows(column) and holds_labels(rows, column)]
        else:
            found += [column for column in others if is_label(column) and holds_labels(rows, column)]
    return list(dict.fromkeys(found))


def _holds_transcripts(rows: Iterable[Row]) -> bool:
    """Whether `chosen` holds whole dialogues, so that no column with the prompt is needed."""
    for row in rows:
        value = row.values.get("chosen")
        if isinstance(value, list) or (isinstance(value, str) and (holds_transcript(value) or parse_printed(value))):
            return True
    return False


def _unmarked_texts(rows: Sequence[Row], there: Sequence[str]) -> list[str]:
    """The columns `text` in which no row has a marker where the answer begins."""
    return [
        column
        for column in columns_named("text", there)
        if not any(isinstance(value := row.values.get(column), str) and holds_transcript(value) for row in rows)
    ]


def _choice_error(
    candidates: Sequence[Layout],
    rows: Sequence[Row],
    there: Sequence[str],
    kind: str,
    where: str,
    mapped: Mapping[str, str],
    spec: DatasetSpec,
) -> ColumnsError:
    columns = f"the file's columns: {', '.join(there) or 'none'}"
    if candidates:
        readings = "; ".join(
            f"`{reading.format}` ({', '.join(f'{name} = {column}' for name, column in reading.columns.items())})"
            for reading in candidates
        )
        choices = [_choice(reading, rows, there, kind, mapped, spec) for reading in candidates]
        return ColumnsError(f"{where}: ambiguous, it could be {readings}; {columns}", choices)
    others = [item.name for item in ROW_FORMATS.values() if kind not in item.kinds and _readings(item, there)]
    also = f" (as {', '.join(sorted(others))} it could give records of another kind)" if others else ""
    for column in _unmarked_texts(rows, there):
        also += f" (`{column}` has no answer marker, such as ### 답변:, ### Response:, Assistant:, to split it at)"
    doubts = {
        column: None
        for item in ROW_FORMATS.values()
        if kind in item.kinds
        for reading in _readings(item, there)
        for column in _doubts(reading, rows, there, kind)
    }
    if doubts:
        also += (
            f" (beside {', '.join(f'`{column}`' for column in doubts)} the rest may not be all that counts: a column "
            "that tells good answers from bad, or a part of the question)"
        )
    choices = _choices(rows, there, kind, mapped, spec)
    return ColumnsError(f"{where}: no known format has these columns{also}; {columns}", choices)


def _choice(
    reading: Layout,
    rows: Sequence[Row],
    there: Sequence[str],
    kind: str,
    mapped: Mapping[str, str],
    spec: DatasetSpec,
) -> ColumnChoice:
    optional = _optional(ROW_FORMATS[reading.format].optional, there, rows)
    optional = {name: column for name, column in optional.items() if column not in reading.columns.values()}
    unread = _ignored(Layout(reading.format, {**mapped, **reading.columns, **optional}), there, kind, spec)
    if set(reading.columns) <= set(NAMES):
        return ColumnChoice({**mapped, **reading.columns, **optional}, unread=unread)
    if reading.format != "completions":
        return ColumnChoice({}, format=reading.format, unread=unread)
    completions = _completions(there)
    columns = {
        "prompt": reading.columns["prompt"],
        "responses": ", ".join(completions),
        "ranks": reading.columns["ranks"],
    }
    unread = tuple(column for column in unread if column not in completions)
    return ColumnChoice({**mapped, **columns, **optional}, format=reading.format, unread=unread)


def _choices(
    rows: Sequence[Row], there: Sequence[str], kind: str, kept: Mapping[str, str], spec: DatasetSpec
) -> list[ColumnChoice]:
    """`choices_of` with the columns beside the prompt, and what stays unread."""
    choices = choices_of(rows, there, kind, kept, _optional(ROW_FORMATS["alpaca"].optional, there, rows))
    return [
        replace(choice, unread=_ignored(Layout("columns", choice.columns), there, kind, spec)) for choice in choices
    ]


def category_of(value: Any) -> str:
    """A category as text: a list is joined by commas, null is ""."""
    if value is None:
        return ""
    if isinstance(value, list | tuple):
        return ",".join(category_of(entry) for entry in value)
    return str(value).strip()
