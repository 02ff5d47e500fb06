"""Lines of CSV and TSV files -> rows."""

from __future__ import annotations

import csv
import re
import sys
from collections.abc import Callable, Iterable, Iterator

from rlhf.data.file_bytes import SAVE_AS_UTF8
from rlhf.data.spec import DataError, Row

_UNDECODED = re.compile("[\udc80-\udcff]")
"""Bytes that are not UTF-8, as "surrogateescape" decodes them; UTF-8 itself cannot give these characters."""

MISSING_WORDS = frozenset({"nan", "NaN", "NaT", "None", "<NA>", "NULL", "null", "\\N", "#N/A"})
"""What pandas, SQL exports and spreadsheets write where there is no value."""


def table_rows(
    raw_lines: Iterable[bytes],
    name: str,
    delimiter: str,
    quotes_enclose: bool,
    bad_row: Callable[[str, int, str], None],
    *,
    quotes_are_text: bool = False,
) -> Iterator[Row]:
    """The rows of a text table whose first record names the columns; a column without a name is passed over.

    A cell that holds a word for a missing value (`MISSING_WORDS`) is None; an empty one is an empty text.

    `quotes_enclose` False takes quotation marks for characters of the text where every line then has the header's
    number of fields; where they could enclose a field all the same, `quotes_are_text` decides. `bad_row(name, line,
    reason)` is told of a record that is not UTF-8 or has more fields than the header, which gives no row. Raises
    DataError for what is wrong with the table as a whole.
    """
    lines: Iterable[str] = (raw.decode("utf-8", "surrogateescape") for raw in raw_lines)
    records = None
    if not quotes_enclose:
        lines = list(lines)
        records = _plain_records(lines, name, delimiter, quotes_are_text)
    rows = iter(records) if records is not None else _quoted_records(lines, name, delimiter)
    number, header = next(rows, (1, []))
    if any(map(_UNDECODED.search, header)):
        raise DataError(f"{name}:{number}: the header is not UTF-8; {SAVE_AS_UTF8}")
    named = [column for column in header if column]
    repeated = sorted({column for column in named if named.count(column) > 1})
    if repeated:
        raise DataError(f"{name}:{number}: the header names a column twice: {', '.join(repeated)}")
    for number, cells in rows:
        if any(map(_UNDECODED.search, cells)):
            bad_row(name, number, f"not UTF-8; {SAVE_AS_UTF8}")
        elif len(cells) > len(header):
            reason = f"too many fields: {len(cells)}, but the header has {len(header)} ({', '.join(header)})"
            bad_row(name, number, reason + f"; a text that holds {delimiter!r} must be in quotes")
        else:
            named_cells = zip(header, map(_cell_value, cells), strict=False)
            yield Row({column: cell for column, cell in named_cells if column}, name, number, text_cells=True)


def _cell_value(cell: str) -> str | None:
    return None if cell.strip() in MISSING_WORDS else cell


def _plain_records(
    lines: list[str], name: str, delimiter: str, quotes_are_text: bool
) -> list[tuple[int, list[str]]] | None:
    """The records of a table whose lines all have the header's number of fields when quotes are plain characters.

    A TSV file often holds a bare quotation mark, which a CSV reader would take for the start of a field that spans
    lines. None where the lines do not agree, so that quotes must mean something. Raises DataError where a CSV reader
    would find other records without a fault: which of the two was meant cannot be told.
    """
    records: list[tuple[int, list[str]]] = []
    opened = None
    for number, line in enumerate(lines, start=1):
        text = line.rstrip("\r\n")
        if text:
            cells = text.split(delimiter)
            records.append((number, [_unquoted(cell) for cell in cells]))
            if opened is None and any(cell.startswith('"') and _unquoted(cell) is cell for cell in cells):
                opened = number
    if len({len(cells) for _, cells in records}) != 1:
        return None
    if opened is not None and not quotes_are_text:
        try:
            quoted = list(_quoted_records(lines, name, delimiter))
        except DataError:
            return records
        if quoted != records and all(len(cells) <= len(records[0][1]) for _, cells in quoted):
            raise DataError(
                f"{name}:{opened}: the quotation marks can be read in two ways, as characters of the text or around a "
                f'field that holds a tab or a line end; if they enclose fields, say {{"path": "{name}", '
                '"format": "csv", "delimiter": "\\t"}, and "format": "tsv" if they are characters'
            )
    return records


def _unquoted(cell: str) -> str:
    inner = cell[1:-1]
    if len(cell) >= 2 and cell[0] == cell[-1] == '"' and '"' not in inner.replace('""', ""):
        return inner.replace('""', '"')
    return cell


def _quoted_records(lines: Iterable[str], name: str, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # the module's limit of 131,072 characters cuts real answers off
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    while True:
        start = reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            if "new-line" in str(error):
                raise DataError(f"{name}:{start}: a carriage return outside quotes; save it with line feeds") from error
            raise DataError(f"{name}:{start}: bad quotes in the record that begins here ({error})") from error
        if cells is None:
            return
        if cells:
            yield start, cells
