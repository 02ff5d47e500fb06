"""Files and hub data sets -> rows: plain mappings that know the file and the line they came from.

The content decides how a file is read, not its name: a JSON array in a file named `.jsonl`, object lines in a
file named `.json`, gzip with or without `.gz`. Only CSV and TSV need their suffix (or `format`, `delimiter`).
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from rlhf.data.file_bytes import (
    BOM,
    SAVE_AS_UTF8,
    named_file_errors,
    open_unpacked,
    refuse_no_text,
    refuse_nothing,
)
from rlhf.data.json_text import JsonError, parse_elements, parse_json
from rlhf.data.spec import FILE_FORMATS, DataError, DatasetSpec, Row, SkippedRow
from rlhf.data.splits import files_of_split
from rlhf.data.text_tables import table_rows
from rlhf.data.world.datasets import DATASETS, default_rows

__all__ = ["FILE_FORMATS", "DataError", "DatasetSpec", "Row", "SkippedRow", "read_rows"]

DATA_SUFFIXES = {
    ".json": "json",
    ".jsonl": "json",
    ".jsonlines": "json",
    ".ndjson": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
}
METADATA_FILES = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
"""JSON files that describe a data set and hold no rows of it; passed over when a directory is read."""
DEFAULT_SPLIT = "train"
"""Of a hub data set and of a saved DatasetDict."""


class _Problems:
    """Raises on a bad row, or lists it: the choice `on_bad_row`."""

    def __init__(self, on_bad_row: str, skipped: list[SkippedRow] | None) -> None:
        if on_bad_row not in ("error", "skip"):
            raise DataError(f"on_bad_row={on_bad_row!r} is not one of error, skip")
        self.skip = on_bad_row == "skip"
        self.skipped = skipped if skipped is not None else []

    def bad_row(self, file: str, line: int, reason: str) -> None:
        if not self.skip:
            raise DataError(f"{file}:{line}: {reason}")
        self.skipped.append(SkippedRow(file, line, "", reason))


def read_rows(spec: DatasetSpec, on_bad_row: str = "error", skipped: list[SkippedRow] | None = None) -> Iterator[Row]:
    """The rows of a data set, in file order; a directory's files by name, those of `spec.split` where it is given.

    A line that is not a JSON object, not UTF-8, or has more fields than the header raises DataError
    (`on_bad_row="error"`) or is appended to `skipped` ("skip"). What is wrong with a file as a whole always raises:
    missing, empty, a git-lfs pointer, binary, cut gzip data, no usable row.
    """
    problems = _Problems(on_bad_row, skipped)
    if spec.delimiter is not None and (len(spec.delimiter) != 1 or spec.delimiter in '"\r\n\0'):
        wanted = "one character, no quotation mark and no line end"
        raise DataError(f"{spec.path}: `delimiter` must be {wanted}, not {spec.delimiter!r}")
    if spec.path.startswith("sample:"):
        _refuse_parts(spec, "a sample data set")
        name = spec.path.removeprefix("sample:")
        if name not in DATASETS:
            raise DataError(f"no sample data set `{name}`; there are: {', '.join(DATASETS)}")
        for line, values in enumerate(default_rows(name), start=1):
            yield Row(dict(values), spec.path, line)
        return
    try:
        path = Path(spec.path).expanduser()
        is_directory, exists = path.is_dir(), path.exists()
    except (OSError, RuntimeError) as error:  # a name that is too long, `~nobody`, a directory that may not be entered
        raise DataError(f"{spec.path}: not a path that can be looked up ({error})") from error
    if is_directory:
        yield from _read_directory(path, spec, problems)
    elif exists:
        _refuse_parts(spec, "a file")
        yield from _read_file(path, spec.path, spec, problems)
    elif re.fullmatch(r"[\w.-]+/[\w.-]+", spec.path) and not _is_data_file(path) and not spec.path.startswith("."):
        yield from _read_hub(spec)
    else:
        raise DataError(f"no such file: {spec.path} (looked in {Path.cwd()})")


def _is_data_file(path: Path) -> bool:
    return _suffix_format(path.name) is not None and path.name not in METADATA_FILES and not path.name.startswith(".")


def _suffix_format(name: str) -> str | None:
    return DATA_SUFFIXES.get(Path(name.lower().removesuffix(".gz")).suffix)


def _read_directory(path: Path, spec: DatasetSpec, problems: _Problems) -> Iterator[Row]:
    if spec.subset is not None:
        path = _folder_in(path, spec.subset, "subset")
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        yield from _read_saved_dataset(path, spec)
        return
    files = _data_files(path)
    split = spec.split
    if split is not None and not files and "+" not in split:
        path, split = _folder_in(path, split, "split"), None
        files = _data_files(path)
    if not files:
        entries = sorted(entry.name for entry in path.iterdir())
        raise DataError(
            f"directory without data files: {path} holds {', '.join(entries[:8]) or 'nothing'}; "
            f"needed: files ending in {', '.join(DATA_SUFFIXES)} (or these with .gz), directly in it"
        )
    for entry in files_of_split(path, files, split):
        yield from _read_file(entry, str(entry), spec, problems)


def _data_files(path: Path) -> list[Path]:
    return sorted(entry for entry in path.iterdir() if entry.is_file() and _is_data_file(entry))


def _folder_in(path: Path, name: str, key: str) -> Path:
    folders = sorted(entry.name for entry in path.iterdir() if entry.is_dir())
    if name not in folders:
        raise DataError(f"{path}: no folder for `{key}` {name!r} in it; there are: {', '.join(folders[:8]) or 'none'}")
    return path / name


def _refuse_parts(spec: DatasetSpec, what: str) -> None:
    given = [key for key in ("split", "subset") if getattr(spec, key) is not None]
    if given:
        parts = " and ".join(f"`{key}` {getattr(spec, key)!r}" for key in given)
        raise DataError(f"{spec.path}: {what} has no parts to choose from, but {parts} is given; leave it out")


def _read_saved_dataset(path: Path, spec: DatasetSpec) -> Iterator[Row]:
    import datasets

    try:
        saved = datasets.load_from_disk(str(path))
    except Exception as error:  # as below: whatever a damaged file makes `datasets` stumble over
        reason = f"{type(error).__name__}: {error}"
        raise DataError(f"{path} looks saved by `save_to_disk` but cannot be loaded: {reason}") from error
    if isinstance(saved, datasets.DatasetDict):
        split = DEFAULT_SPLIT if spec.split is None else spec.split
        if split not in saved:
            raise DataError(f"{path}: no split `{split}`; there are: {', '.join(saved)}")
        saved = saved[split]
    elif spec.split not in (None, str(saved.split)):
        raise DataError(f"{path} is one saved data set (split `{saved.split}`), not `{spec.split}`; leave `split` out")
    yield from _table_rows(saved, str(path))


def _read_hub(spec: DatasetSpec) -> Iterator[Row]:
    import datasets

    split = DEFAULT_SPLIT if spec.split is None else spec.split
    try:
        loaded = datasets.load_dataset(spec.path, spec.subset, split=split)
    except Exception as error:  # the libraries below raise a dozen unrelated types; each is reported with its cause
        reason = str(error).strip().splitlines()
        raise DataError(
            f"{spec.path}: no such file, and not reachable as a hub data set (split `{split}`): "
            f"{type(error).__name__}: {reason[0] if reason else 'no reason given'}; "
            "check the path, or the name and the network"
        ) from error
    yield from _table_rows(loaded, spec.path)


def _table_rows(table: Any, name: str) -> Iterator[Row]:
    if len(table) == 0:
        raise DataError(f"{name}: empty data set, no rows")
    for index, values in enumerate(table, start=1):
        yield Row(values, name, index)


def _read_file(path: Path, name: str, spec: DatasetSpec, problems: _Problems) -> Iterator[Row]:
    with named_file_errors(name):
        yield from _read_open_file(path, name, spec, problems)


def _read_open_file(path: Path, name: str, spec: DatasetSpec, problems: _Problems) -> Iterator[Row]:
    with open_unpacked(path) as stream:
        head = stream.read(8192)
        begins = head.removeprefix(BOM).lstrip()[:1]
        while not begins and (more := stream.read(65536)):
            begins = more.lstrip()[:1]
    refuse_nothing(head, name)
    file_format = "parquet" if head.startswith(b"PAR1") else _file_format(name, head, spec)
    if file_format != "parquet":
        refuse_no_text(head, name, ", ".join(FILE_FORMATS))
    if file_format == "parquet":
        rows = _read_parquet(path, name)
    elif not begins:
        raise DataError(f"{name}: empty file (only white space)")
    elif file_format in ("csv", "tsv"):
        delimiter = spec.delimiter or ("\t" if file_format == "tsv" else ",")
        quotes_enclose = delimiter != "\t" or spec.format == "csv"
        raws = (raw for _, raw in _raw_lines(path))
        as_text = spec.format == "tsv"
        rows = table_rows(raws, name, delimiter, quotes_enclose, problems.bad_row, quotes_are_text=as_text)
    elif begins == b"[":
        rows = _read_json_array(path, name, problems)
    else:
        rows = _read_json_lines(path, name, problems)
    found = False
    for row in rows:
        found = True
        yield row
    if not found:
        raise DataError(f"{name}: empty, no usable row in it")


def _file_format(name: str, head: bytes, spec: DatasetSpec) -> str:
    if spec.format in FILE_FORMATS:
        return "json" if spec.format == "jsonl" else str(spec.format)
    if spec.delimiter is not None:
        return "csv"
    known = _suffix_format(name) if not name.startswith("sample:") else "json"
    if known is not None:
        return known
    if head.removeprefix(BOM).lstrip()[:1] in (b"{", b"["):
        return "json"
    if b"\0" in head:
        return "binary"
    raise DataError(
        f"{name}: the suffix does not tell how to read it; set `format` (one of {', '.join(FILE_FORMATS)}), "
        f'for a text table perhaps `delimiter` too: {{"path": "{name}", "format": "tsv"}}'
    )


def _read_parquet(path: Path, name: str) -> Iterator[Row]:
    with open_unpacked(path) as stream:
        content = io.BytesIO(stream.read())
    line = 0
    for part in _parquet_parts(content, name):
        for values in part:
            line += 1
            yield Row(values, name, line)


def _parquet_parts(content: IO[bytes], name: str) -> Iterator[list[dict[str, Any]]]:
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(content, page_checksum_verification=True)
        columns = file.schema_arrow.names
        repeated = sorted({column for column in columns if columns.count(column) > 1})
        if repeated:
            raise ValueError(f"it names a column twice: {', '.join(repeated)}")
        for batch in file.iter_batches(batch_size=1024):
            yield batch.to_pylist()
    except Exception as error:  # Arrow's own, and those of values Python cannot hold (texts not UTF-8, dates, lengths)
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"{name}: not a readable parquet file ({reason})") from error


def _lines(path: Path, name: str, problems: _Problems) -> Iterator[tuple[int, str]]:
    """Numbered lines with their line ends; split at line feeds only, so U+2028 inside a text does not end a line."""
    for number, raw in _raw_lines(path):
        try:
            yield number, raw.decode("utf-8")
        except UnicodeDecodeError as error:
            problems.bad_row(name, number, f"not UTF-8 (byte {error.start + 1} of the line); {SAVE_AS_UTF8}")


def _raw_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    with open_unpacked(path) as stream:
        for number, raw in enumerate(stream, start=1):
            yield number, raw.removeprefix(BOM) if number == 1 else raw


def _read_json_array(path: Path, name: str, problems: _Problems) -> Iterator[Row]:
    text = "".join(line for _, line in _lines(path, name, _Problems("error", None)))
    elements: list[tuple[Any, str | None]] = []
    try:
        for element in parse_elements(text):
            elements.append(element)
    except JsonError as error:
        if error.reason == "Extra data":
            raise _neither(name, "several JSON arrays, or a line after the array") from error
        if error.line is None:
            raise DataError(f"{name}:{len(elements) + 1}: bad element of the JSON array ({error})") from error
        raise DataError(f"{name}:{error.line}: bad JSON array ({error})") from error
    if elements and not any(isinstance(values, dict) for values, _ in elements):
        raise _neither(name, f"an array of {type(elements[0][0]).__name__}")
    for index, (values, wrong) in enumerate(elements, start=1):
        if not isinstance(values, dict):
            problems.bad_row(name, index, f"element {index} of the array is {type(values).__name__}, not an object")
        elif wrong:
            problems.bad_row(name, index, f"element {index} of the array: {wrong}")
        else:
            yield Row(values, name, index)


def _read_json_lines(path: Path, name: str, problems: _Problems) -> Iterator[Row]:
    first = True
    for number, line in _lines(path, name, problems):
        if not line.strip():
            continue
        try:
            values = parse_json(line)
        except JsonError as error:
            if first and (whole := _whole_file(path)) is not None:
                raise _neither(name, whole) from error
            problems.bad_row(name, number, f"bad JSON line ({error})")
        else:
            if isinstance(values, dict):
                yield Row(values, name, number)
            elif first and not isinstance(values, list):
                raise _neither(name, f"a line that is {type(values).__name__}")
            else:
                problems.bad_row(name, number, f"the line is a JSON {type(values).__name__}, not an object")
        first = False


def _whole_file(path: Path) -> str | None:
    """What a file holds that is one JSON value over several lines; None where it is not that."""
    with open_unpacked(path) as stream:
        try:
            content = parse_json(stream.read().decode("utf-8-sig"))
        except ValueError:
            return None
    if isinstance(content, dict):
        return f"one JSON object with the keys {', '.join(key[:60] for key in list(content)[:8])}"
    return f"one JSON {type(content).__name__}"


def _neither(name: str, found: str) -> DataError:
    return DataError(f"{name}: needed is a JSON array of objects, or one object a line; this is {found}")
