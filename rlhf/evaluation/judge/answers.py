"""The answers that are judged: data sets of prompts and responses, what `rlhf eval` wrote, or a run's held-out ones."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from rlhf.data.records import rows_to_records
from rlhf.data.sources import read_rows
from rlhf.data.spec import DataError, DatasetSpec
from rlhf.data.templates import load_template
from rlhf.evaluation.judge.verdicts import Answered, Compared
from rlhf.types import ResponseRecord

Row = TypeVar("Row")


def answered(source: str, *, limit: int = 0, seed: int = 1) -> list[Answered]:
    """The rows of `source`, or `limit` of them drawn with `seed`. DataError where it holds no answers."""
    return _some(_read(source), limit, seed)


def compared(source: str, against: str | None, *, limit: int = 0, seed: int = 1) -> list[Compared]:
    """The answers of `source` beside those of `against` to the same prompts, or of a run's directory after beside
    before. DataError where the two have no prompt in common, or where a run holds no answers."""
    if against is None:
        return _some(_of_run(Path(source)), limit, seed)
    first, second = _read(source), {row.prompt.strip(): row for row in _read(against)}
    rows = [
        Compared(row.prompt, row.answer, second[row.prompt.strip()].answer, row.category)
        for row in first
        if row.prompt.strip() in second
    ]
    if not rows:
        raise DataError(f"{source} and {against} have no prompt in common: both must answer the same ones")
    return _some(rows, limit, seed)


def _read(source: str) -> list[Answered]:
    path = Path(source)
    if path.is_dir() and _result(path):
        return [Answered(row.prompt, row.answer) for row in _of_run(path)]
    if path.suffix == ".json" and path.is_file():
        found = _mapping(path)
        answers = (found.get("generation") or {}).get("answers") if isinstance(found, dict) else None
        if answers:
            return [Answered(str(each["prompt"]), str(each["response"])) for each in answers]
    spec = DatasetSpec.parse(source)
    plain = load_template("none", None)
    records = rows_to_records(read_rows(spec), "response", template=plain, spec=spec)
    return [
        Answered(record.prompt, record.response, str(record.meta.get("category", "")))
        for record in records
        if isinstance(record, ResponseRecord)
    ]


def _of_run(directory: Path) -> list[Compared]:
    samples = _result(directory)
    if not samples:
        raise DataError(
            f"{directory} holds no held-out answers: name the output_dir of a finished run that sampled them (step 3)"
        )
    return [Compared(str(each["prompt"]), str(each["ppo"]), str(each["sft"])) for each in samples]


def _result(directory: Path) -> list[dict[str, Any]]:
    for path in (directory / "samples.json", *sorted(directory.glob("*/samples.json"))):
        found = _mapping(path) if path.is_file() else None
        if isinstance(found, dict) and found.get("samples"):
            return list(found["samples"])
    return []


def _mapping(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def _some(rows: Sequence[Row], limit: int, seed: int) -> list[Row]:
    if not limit or limit >= len(rows):
        return list(rows)
    kept = sorted(random.Random(seed).sample(range(len(rows)), limit))
    return [rows[index] for index in kept]
