"""Text files -> documents: what a base model is trained on, mixed by weight, a share of them held out."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rlhf.data.file_bytes import (
    BOM,
    SAVE_AS_UTF8,
    named_file_errors,
    open_unpacked,
    refuse_no_text,
    refuse_nothing,
)
from rlhf.data.mixture import drawn, text_place
from rlhf.data.sources import read_rows
from rlhf.data.spec import DataError, DatasetSpec

TEXT_COLUMN = "text"
TEXT_SUFFIXES = (".txt", ".md", ".markdown")
_HOLD_OUT_SALT = "hold-out document"
_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})(.*)")
_HEADING = re.compile(r" {0,3}#{1,6}(\s|$)")


@dataclass(frozen=True)
class Documents:
    """The documents of one data set, in the order of the file: those to train on, as often as its weight says.

    `cut`: the rule that they were cut by, a name of `CUTS` or "rows". `found`: how many there are, each once.
    """

    path: str
    cut: str
    weight: float
    found: int
    train: tuple[str, ...]
    held_out: tuple[str, ...]


def load_documents(specs: Sequence[str], *, eval_fraction: float, seed: int) -> list[Documents]:
    """The documents of each data set of `specs`, which are written as those of `sft_data` are (`DatasetSpec.parse`).

    Held out is about `eval_fraction` of the documents, chosen by a hash of the document alone: equal ones are on one
    side, whatever file they are in. `weight` counts the others, as in `mixture.blend`. Raises DataError for what cannot
    be read, and where nothing is left to train on or, with `eval_fraction` above 0, to hold out.
    """
    if not 0 <= eval_fraction < 1:
        raise DataError(f"eval_fraction={eval_fraction} must lie in [0, 1): a share of the documents")
    loaded = []
    for index, text in enumerate(specs):
        spec = DatasetSpec.parse(text)
        cut, documents = read_documents(spec)
        train = [document for document in documents if text_place(document, _HOLD_OUT_SALT) >= eval_fraction]
        held_out = [document for document in documents if text_place(document, _HOLD_OUT_SALT) < eval_fraction]
        weighted = tuple(train[position] for _, position in drawn(len(train), spec.weight, seed, index))
        loaded.append(Documents(spec.path, cut, spec.weight, len(documents), weighted, tuple(held_out)))
    found = sum(documents.found for documents in loaded)
    if not any(documents.train for documents in loaded):
        raise DataError(f"of {found} documents none is left to train on; give more text, or a smaller eval_fraction")
    if eval_fraction and not any(documents.held_out for documents in loaded):
        raise DataError(
            f"of {found} documents eval_fraction={eval_fraction} holds none out; give more text, a larger fraction, or "
            "0 to measure no held-out loss"
        )
    return loaded


def read_documents(spec: DatasetSpec) -> tuple[str, list[str]]:
    """How a data set is cut into documents, and the documents: NFC, without white space around them, none empty.

    A text file (`.txt`, `.md`, each with or without `.gz`, or any file with a `format` of CUTS) is cut as `format`
    says; unset, Markdown into sections, and other text into paragraphs where it has blank lines, else into lines. In
    any other file, directory or hub data set a document is the column `text` of a row (`columns: {"text": ...}` names
    another). Raises DataError for a file that cannot be read, is not UTF-8 or has no document.
    """
    name = Path(spec.path.lower().removesuffix(".gz"))
    if spec.format not in CUTS and name.suffix not in TEXT_SUFFIXES:
        return "rows", _row_texts(spec)
    text = _file_text(Path(spec.path).expanduser(), spec.path)
    cut = spec.format
    if cut is None:
        cut = "sections" if name.suffix != ".txt" else "paragraphs" if re.search(r"\n[^\S\n]*\n", text) else "lines"
    if cut not in CUTS:
        raise DataError(f"{spec.path}: `format` of a text file must be one of {', '.join(CUTS)}, not {cut!r}")
    documents = [document for part in CUTS[cut](text) if (document := part.strip())]
    if not documents:
        raise DataError(f"{spec.path}: empty file (only white space)")
    return cut, documents


def _row_texts(spec: DatasetSpec) -> list[str]:
    column = spec.columns.get(TEXT_COLUMN, TEXT_COLUMN)
    documents = []
    for row in read_rows(replace(spec, columns={})):
        text = row.values.get(column)
        if not isinstance(text, str):
            raise DataError(
                f"{row.file}:{row.line}: a document is the text in the column `{column}`, which this row does not have "
                f"(its columns: {', '.join(map(str, row.values))}); name the column: "
                f'{{"path": "{spec.path}", "columns": {{"{TEXT_COLUMN}": "..."}}}}'
            )
        if text := unicodedata.normalize("NFC", text).strip():
            documents.append(text)
    if not documents:
        raise DataError(f"{spec.path}: every row's `{column}` is empty")
    return documents


def _file_text(path: Path, name: str) -> str:
    if not path.exists():
        raise DataError(f"no such file: {name} (looked in {Path.cwd()})")
    with named_file_errors(name), open_unpacked(path) as stream:
        content = stream.read()
    refuse_nothing(content, name)
    refuse_no_text(content, name, f"text ({', '.join(TEXT_SUFFIXES)}) or rows with a column `{TEXT_COLUMN}`")
    try:
        text = content.removeprefix(BOM).decode("utf-8")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise DataError(f"{name}:{line}: not UTF-8; {SAVE_AS_UTF8}") from error
    return unicodedata.normalize("NFC", text).replace("\r\n", "\n")


def _lines(text: str) -> list[str]:
    return text.split("\n")


def _paragraphs(text: str) -> list[str]:
    return re.split(r"\n[^\S\n]*\n", text)


def _sections(text: str) -> Iterator[str]:
    """From a heading to the next one of any level; what looks like a heading inside a fenced block is none."""
    section: list[str] = []
    fence = ""
    for line in text.split("\n"):
        mark = _FENCE.match(line)
        if mark and not fence:
            fence = mark[1]
        elif mark and mark[1].startswith(fence) and not mark[2].strip():
            fence = ""
        if not fence and _HEADING.match(line):
            yield "\n".join(section)
            section = []
        section.append(line)
    yield "\n".join(section)


CUTS: dict[str, Callable[[str], Sequence[str] | Iterator[str]]] = {
    "lines": _lines,
    "paragraphs": _paragraphs,
    "sections": _sections,
}
"""`format` of a text file -> its text to documents."""
