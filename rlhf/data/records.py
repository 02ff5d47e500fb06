"""Rows -> records, of every recognised format (`rlhf.data.formats`), with the template applied.

What a record takes from a row:
- Texts are normalised to NFC and otherwise kept as they are (a U+200D inside an emoji too, and a literal
  `<|endoftext|>`, which tokenisation takes off).
- The last assistant turn of a conversation is the response; everything before it is the prompt.
- A record of kind "prompt" also keeps the conversation as `messages`, and the row's other columns, so that a reward
  can read a reference answer, or render the prompt with another model's template.
- A prompt that is already rendered (hh-rlhf transcripts, one-`text` rows, a prompt with a template's markers) does not
  go through the template again: `meta["rendered"]` is True, and `meta["special_tokens"]` where its markers are special
  tokens (ChatML, Llama).
- `meta["source"]` is "file:line"; `meta["prompt_key"]` identifies the prompt whatever its template and spacing;
  `meta["category"]` is from the mapped column, else `DatasetSpec.category`, else a column `category`, else "".
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rlhf.data.formats import SCORE_GAP, Layout, category_of, layout_of
from rlhf.data.printed_lists import parse_printed
from rlhf.data.prompts import (
    REPEATING_ROWS,
    Prompt,
    PromptReader,
    answers_begin_with_prompt,
    begins_with_plain_marker,
    read_input,
)
from rlhf.data.row_values import (
    BadRow,
    DroppedRow,
    content_of,
    prompt_key,
    read_label,
    read_list,
    read_number,
    read_text,
    shown,
    whole_characters,
)
from rlhf.data.sources import DataError, DatasetSpec, Row, SkippedRow
from rlhf.data.spec import ReadingNotes
from rlhf.data.templates import Template
from rlhf.types import LabelledRecord, PreferenceRecord, PromptRecord, RankedRecord, Record, ResponseRecord

__all__ = ["SkippedRow", "prompt_key", "rows_to_records"]

MAX_PAIRS_PER_PROMPT = 4
"""Pairs made of the labelled responses to one prompt, so that one prompt does not outweigh the others."""

UNFINISHED = (
    "prompts begin with the marker of a turn and do not end with that of the answer, so the template goes around both; "
    "take the markers off, or add the answer's"
)
"""The warning of prompts that `begins_with_plain_marker` is true of."""


BETWEEN = "responses between the best and the worst of a ranking are neither good nor bad and were left out"
"""The warning of rankings that are read as labels."""


@dataclass
class _Labelled:
    """The responses to one prompt that people called acceptable, and the others."""

    prompt: Prompt
    good: list[tuple[Row, str]] = field(default_factory=list)
    bad: list[tuple[Row, str]] = field(default_factory=list)


def rows_to_records(
    rows: Iterable[Row],
    kind: str,
    *,
    template: Template,
    spec: DatasetSpec,
    on_bad_row: str = "error",
    skipped: list[SkippedRow] | None = None,
    notes: ReadingNotes | None = None,
) -> list[Record]:
    """The records of one data set.

    `kind`: "prompt", "response", "preference", "ranked", "comparison" (pairs or rankings, as the files have them), or
    "labelled" (good or bad; of a pair or a ranking the best responses are good, the worst bad, and those between are
    left out and counted). Pairs can be read as rankings of two, labelled rows become pairs (acceptable against not, at
    most `MAX_PAIRS_PER_PROMPT` a prompt), and prompts can be read from every format. A bad row raises DataError with
    file, line and field, or with `on_bad_row="skip"` is appended to `skipped`. Ties and labelled prompts without both
    labels teach nothing: they are appended to `skipped` in either case. Responses labelled as bad are left out of
    "response". Ids are unique in the result. `notes` is told what else a user should know. Raises DataError where no
    record is left.
    """
    if on_bad_row not in ("error", "skip"):
        raise DataError(f"on_bad_row={on_bad_row!r} is not one of error, skip")
    skipped = [] if skipped is None else skipped
    notes = ReadingNotes() if notes is None else notes
    files: dict[str, list[Row]] = {}
    for row in rows:
        files.setdefault(row.file, []).append(row)
    if not files:
        raise DataError(f"{spec.path}: no rows")
    before = len(skipped)
    ids: set[str] = set()
    records: list[Record] = []
    for file_rows in files.values():
        layout = layout_of(file_rows, kind, spec)
        answers_repeat = kind != "prompt" and _notice_repetition(file_rows, layout, notes)
        _notice_ignored(file_rows, layout, notes)
        if unfinished := sum(begins_with_plain_marker(row, layout) for row in file_rows):
            notes.warnings[UNFINISHED] += unfinished
        reader = _Reader(kind, spec, layout, PromptReader(template, layout, answers_repeat=answers_repeat), notes)
        for row in file_rows:
            try:
                made = reader.read(row)
            except BadRow as bad:
                if on_bad_row == "error" and not isinstance(bad, DroppedRow):
                    raise DataError(f"{row.file}:{row.line}: field `{bad.column}` {bad.reason}") from bad
                skipped.append(SkippedRow(row.file, row.line, bad.column, bad.reason))
                continue
            records.extend(_with_unique_id(record, ids) for record in made)
        for record in reader.labelled_pairs(skipped):
            records.append(_with_unique_id(record, ids))
    if not records:
        reasons = [f"{item.file}:{item.line}: `{item.field}` {item.reason}" for item in skipped[before:][:3]]
        raise DataError(f"{spec.path}: no usable `{kind}` record in it; the first reasons: {'; '.join(reasons)}")
    return records


def _notice_ignored(rows: Sequence[Row], layout: Layout, notes: ReadingNotes) -> None:
    for column in layout.ignored:
        count = sum(row.values.get(column) not in (None, "", [], {}) for row in rows)
        if count:
            notes.ignored_columns[column] += count


def _notice_repetition(rows: Sequence[Row], layout: Layout, notes: ReadingNotes) -> bool:
    """Whether the answers of all rows begin with the prompt and white space, more than chance.

    Where only those of some do, or all do but not all with white space, they are counted and kept.
    """
    repeating = sum(answers_begin_with_prompt(row, layout) for row in rows)
    if repeating == len(rows) >= REPEATING_ROWS:
        return True
    touching = sum(answers_begin_with_prompt(row, layout, apart=False) for row in rows)
    if touching == len(rows) >= REPEATING_ROWS:
        repeating = touching
    if repeating:
        notes.warnings["answers begin with their prompt and were kept as they are"] += repeating
    return False


def _with_unique_id(record: Record, ids: set[str]) -> Record:
    unique, count = record.id, 1
    while unique in ids:
        count += 1
        unique = f"{record.id}#{count}"
    ids.add(unique)
    return record if unique == record.id else replace(record, id=unique)


class _Reader:
    """Reads the rows of one file with one layout."""

    def __init__(
        self, kind: str, spec: DatasetSpec, layout: Layout, prompts: PromptReader, notes: ReadingNotes
    ) -> None:
        self.notes = notes
        self.kind = kind
        self.spec = spec
        self.layout = layout
        self.prompts = prompts
        self.labelled: dict[str, _Labelled] = {}

    def read(self, row: Row) -> list[Record]:
        """The records of one row; none for a labelled row, which waits for `labelled_pairs`."""
        columns = self.layout.columns
        if self.kind == "prompt":
            prompt = self.prompts.prompt_alone(row)
            meta, columns = self._meta(row, prompt), self.prompts.other_columns(row)
            return [PromptRecord(self._id(row), prompt.text, meta, prompt.messages, columns)]
        if "label" in columns:
            return self._read_labelled(row)
        if self.kind == "response":
            return self._read_responses(row)
        if "chosen" in columns:
            return self._as_wanted(self._read_pair(row))
        if "sum1" in columns:
            return self._as_wanted(self._read_scored_pair(row))
        return self._as_wanted(self._read_ranking(row))

    def _as_wanted(self, compared: PreferenceRecord | RankedRecord) -> list[Record]:
        """A comparison, or for labelled records its best and its worst responses."""
        if self.kind != "labelled":
            return [compared]
        responses: tuple[str, ...]
        ranks: tuple[int, ...]
        if isinstance(compared, RankedRecord):
            responses, ranks = compared.responses, compared.ranks
        else:
            responses, ranks = (compared.chosen, compared.rejected), (0, 1)
        worst = max(ranks)
        if any(0 < rank < worst for rank in ranks):
            self.notes.warnings[BETWEEN] += 1
        return [
            LabelledRecord(f"{compared.id}-{place}", compared.prompt, response, rank == 0, compared.meta)
            for place, (response, rank) in enumerate(zip(responses, ranks, strict=True))
            if rank in (0, worst)
        ]

    def labelled_pairs(self, skipped: list[SkippedRow]) -> Iterable[Record]:
        """Acceptable against not acceptable responses of each prompt; earlier rows pair first."""
        for group in self.labelled.values():
            pairs = [
                (i + j, i, good, bad)
                for i, good in enumerate(group.good)
                for j, bad in enumerate(group.bad)
                if content_of(good[1]) != content_of(bad[1])
            ]
            if not pairs:
                row = (group.good or group.bad)[0][0]
                what = "the same texts are acceptable and not" if group.good and group.bad else "all have one label"
                reason = f"no pair from the {len(group.good) + len(group.bad)} responses to this prompt: {what}"
                skipped.append(SkippedRow(row.file, row.line, self.layout.columns["label"], reason))
            for _, _, (row, chosen), (other, rejected) in sorted(pairs, key=lambda pair: pair[:2])[
                :MAX_PAIRS_PER_PROMPT
            ]:
                meta = self._meta(row, group.prompt)
                record = PreferenceRecord(
                    f"{self._id(row)}+{other.line}", group.prompt.text, chosen, rejected, 0.0, meta
                )
                yield record

    # one method a shape

    def _read_responses(self, row: Row) -> list[Record]:
        if "instances" in self.layout.columns:
            return self._read_instances(row)
        prompt, response = self.prompts.prompt_and_response(row)
        return [ResponseRecord(self._id(row), prompt.text, response, self._meta(row, prompt))]

    def _read_instances(self, row: Row) -> list[Record]:
        column = self.layout.columns["instances"]
        instances = read_list(row.values.get(column), column)
        records: list[Record] = []
        for index, instance in enumerate(instances):
            if not isinstance(instance, Mapping):
                raise BadRow(column, f"needs objects with input and output, got {shown(instance)}")
            prompt = self.prompts.prompt(row, read_input(instance.get("input"), f"{column}[{index}].input"))
            response = read_text(instance.get("output"), f"{column}[{index}].output")
            name = self._id(row) if len(instances) == 1 else f"{self._id(row)}-{index}"
            records.append(ResponseRecord(name, prompt.text, response, self._meta(row, prompt)))
        return records

    def _read_labelled(self, row: Row) -> list[Record]:
        column = self.layout.columns["label"]
        label = read_label(row.values.get(column), column)
        prompt, response = self.prompts.prompt_and_response(row)
        if self.kind == "response":
            if not label:
                raise DroppedRow(column, "labels the response as bad, which is not to be imitated")
            return [ResponseRecord(self._id(row), prompt.text, response, self._meta(row, prompt))]
        if self.kind == "labelled":
            return [LabelledRecord(self._id(row), prompt.text, response, label, self._meta(row, prompt))]
        group = self.labelled.setdefault(prompt_key(prompt.raw), _Labelled(prompt))
        (group.good if label else group.bad).append((row, response))
        return []

    def _read_pair(self, row: Row) -> PreferenceRecord | RankedRecord:
        prompt, chosen, rejected = self.prompts.pair(row)
        if content_of(chosen) == content_of(rejected):
            columns = self.layout.columns
            raise BadRow(columns["rejected"], f"is the same text as `{columns['chosen']}`")
        return self._pair_record(row, prompt, chosen, rejected, self._margin(row))

    def _read_scored_pair(self, row: Row) -> PreferenceRecord | RankedRecord:
        columns = self.layout.columns
        prompt, responses = self.prompts.prompt_and_answers(row)
        sums = [self._sum(row, "sum1", "scores1"), self._sum(row, "sum2", "scores2")]
        if sums[0] == sums[1]:
            raise DroppedRow(columns["sum1"], f"and `{columns['sum2']}` are equal ({sums[0]:g}): a tie")
        if content_of(responses[0]) == content_of(responses[1]):
            raise BadRow(columns["response2"], f"is the same text as `{columns['response1']}`")
        best = 0 if sums[0] > sums[1] else 1
        by_sums = columns.get("margin") == SCORE_GAP
        margin = read_number(abs(sums[0] - sums[1]), columns["sum1"]) if by_sums else self._margin(row)
        return self._pair_record(row, prompt, responses[best], responses[1 - best], margin)

    def _pair_record(
        self, row: Row, prompt: Prompt, chosen: str, rejected: str, margin: float
    ) -> PreferenceRecord | RankedRecord:
        if self.kind == "ranked":
            return RankedRecord(self._id(row), prompt.text, (chosen, rejected), (0, 1), self._meta(row, prompt))
        return PreferenceRecord(self._id(row), prompt.text, chosen, rejected, margin, self._meta(row, prompt))

    def _read_ranking(self, row: Row) -> RankedRecord:
        columns = self.layout.columns
        prompt, responses = self.prompts.prompt_and_answers(row)
        name = self.layout.response_columns[-1] if self.layout.response_columns else columns["responses"]
        if len(responses) < 2:
            raise BadRow(name, f"needs at least two responses, got {len(responses)}")
        by_rank = "ranks" in columns
        column = columns["ranks" if by_rank else "scores"]
        numbers = [read_number(value, column) for value in read_list(row.values.get(column), column)]
        if len(numbers) != len(responses):
            raise BadRow(column, f"has {len(numbers)} entries for {len(responses)} responses")
        keys = numbers if by_rank else [-number for number in numbers]
        ranks = tuple(sum(other < key for other in keys) for key in keys)
        if len(set(ranks)) == 1:
            raise DroppedRow(column, f"is the same for all {len(ranks)} responses: a tie")
        seen: dict[str, int] = {}
        for response, rank in zip(responses, ranks, strict=True):
            if seen.setdefault(content_of(response), rank) != rank:
                raise BadRow(name, "holds the same text twice with different ranks")
        return RankedRecord(self._id(row), prompt.text, tuple(responses), ranks, self._meta(row, prompt))

    # parts of a row

    def _sum(self, row: Row, name: str, scores_name: str) -> float:
        column = self.layout.columns[name]
        total = read_number(row.values.get(column), column)
        scores = row.values.get(self.layout.columns.get(scores_name, ""))
        scores = parse_printed(scores) if isinstance(scores, str) else scores
        entries = list(scores.values()) if isinstance(scores, Mapping) else scores
        if isinstance(entries, list) and entries and all(isinstance(score, int | float) for score in entries):
            scores_column = self.layout.columns[scores_name]
            try:
                actual = math.fsum(read_number(float(score), scores_column) for score in entries)
            except OverflowError:
                raise BadRow(scores_column, "has a sum that is too large for a number") from None
            if abs(actual - total) > 1e-6:
                raise BadRow(column, f"is {total:g}, but `{scores_column}` sums to {actual:g}")
        return total

    def _margin(self, row: Row) -> float:
        column = self.layout.columns.get("margin")
        return 0.0 if column is None else read_number(row.values.get(column), column)

    def _id(self, row: Row) -> str:
        mapped = self.layout.columns.get("id")
        for column in (mapped,) if mapped else ("id", "id3"):
            value = row.values.get(column)
            if isinstance(value, str | int) and not isinstance(value, bool) and str(value).strip():
                return whole_characters(str(value).strip(), str(column))
        return f"{_stem(row.file)}-{row.line}"

    def _meta(self, row: Row, prompt: Prompt) -> dict[str, Any]:
        column = self.layout.columns.get("category")
        if column is None and self.spec.category is not None:
            category = self.spec.category
        else:
            column = column or "category"
            category = category_of(row.values.get(column))
        whole_characters(category, column or "category")
        meta: dict[str, Any] = {"source": f"{row.file}:{row.line}", "category": category}
        meta["prompt_key"] = prompt_key(prompt.raw)
        if prompt.rendered:
            meta["rendered"] = True
        if prompt.special:
            meta["special_tokens"] = True
        return meta


def _stem(file: str) -> str:
    """The file's name up to its first dot, with the bytes of a name that is not UTF-8 as `\\udc..`."""
    name = Path(file.removeprefix("sample:")).name.encode("utf-8", "backslashreplace").decode()
    return name.partition(".")[0] or name
