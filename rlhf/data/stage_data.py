"""A stage's data in one call: files -> records -> split, held-out part, blend -> tokens, with a report of it all."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rlhf.checkpoint.atomic import replaced_file
from rlhf.config import DataConfig
from rlhf.data.column_options import ColumnsError
from rlhf.data.mixture import blend, drop_leaked, hold_out, stage_share
from rlhf.data.records import rows_to_records
from rlhf.data.sources import read_rows
from rlhf.data.spec import DataError, DatasetSpec, ReadingNotes, SkippedRow
from rlhf.data.templates import Template, load_template
from rlhf.data.token_cache import cached_tokens, record_key_parts, tokenizer_fingerprint
from rlhf.data.tokenize import Tokenized, TokenReport, tokenize_records
from rlhf.distributed.log import logger
from rlhf.distributed.place import is_main
from rlhf.types import Record, TokenizedRanking

FIELDS = {
    "response": "sft_data",
    "comparison": "preference_data",
    "labelled": "preference_data",
    "prompt": "prompt_data",
}
"""The option that names the data sets of each kind."""
EVAL_FIELDS = {kind: field.replace("_data", "_eval_data") for kind, field in FIELDS.items()}


@dataclass(frozen=True)
class StageData:
    """Tokenised rows to train and to evaluate on, and the report that was written as `data.json`.

    `fingerprint` is one of all rows, in their order, as tokens; `summary` says in a few lines what there is;
    `prompt_keys` are their prompts, whatever the template and spacing.
    """

    train: list[Any]
    evaluation: list[Any]
    report: dict[str, Any]
    fingerprint: str
    summary: Sequence[str] = ()
    prompt_keys: frozenset[str] = frozenset()


@dataclass(frozen=True)
class _Part:
    """One training data set on its way: how many records each step left of it."""

    spec: DatasetSpec
    records: list[Record]
    heldout: list[Record]
    read: int
    after_stage_split: int
    notes: ReadingNotes
    leaked: int = 0

    def counts(self) -> dict[str, Any]:
        return {
            "path": self.spec.path,
            "weight": self.spec.weight,
            **_noted(self.notes),
            "read": self.read,
            "after_stage_split": self.after_stage_split,
            "held_out": len(self.heldout),
            "dropped_leaks": self.leaked,
            "kept": len(self.records),
        }


def load_stage_data(
    kind: str,
    specs: Sequence[str],
    eval_specs: Sequence[str],
    *,
    config: DataConfig,
    stage: str,
    tokenizer: Any,
    seed: int,
    cache_dir: Path,
    report_dir: Path,
    report_name: str = "data",
    stages: Sequence[str] = (),
    field: str | None = None,
    kept_apart: Collection[str] = (),
) -> StageData:
    """Read, render, split, blend and tokenise the data of one stage.

    `kind` is what a row must give: "prompt", "response", "comparison" or "labelled". Each data set is cut to the share
    that `config.stage_split` gives to `stage`, one of all `stages`; `eval_specs`, or where there are none
    `config.eval_fraction` of each set, is held out, and training records with a held-out prompt are dropped. Columns
    that nothing is read from are logged and reported for each data set. Tokens are kept under `cache_dir`. Rank 0
    writes `report_dir/data.json`, and `skipped_rows.jsonl` when rows were skipped. A second call for the same directory
    needs a `report_name` of its own (`ptx`: `ptx.json`, `ptx_skipped_rows.jsonl`). `field` is the option that named
    `specs` where it is not that of `FIELDS`. `kept_apart` are the keys of further prompts that training records
    may not be about. DataError when no row is left, and with the option written out where a
    file's columns must be named.
    """
    template = load_template(config.template, tokenizer)
    skipped_file = report_dir / ("skipped_rows.jsonl" if report_name == "data" else f"{report_name}_skipped_rows.jsonl")
    skipped: list[SkippedRow] = []
    try:
        parts = _read_all(kind, specs, field or FIELDS[kind], template, config, skipped)
        eval_parts = _read_all(kind, eval_specs, EVAL_FIELDS[kind], template, config, skipped)
    finally:  # also when reading fails: the list says which rows led to it
        if is_main():
            _write_skipped(skipped_file, skipped)
    if config.stage_split:
        parts = [_with_share(part, stage_share(part.records, config.stage_split, stage, stages)) for part in parts]
    if not eval_parts:
        parts = [_with_heldout(part, config.eval_fraction) for part in parts]
    heldout = [record for part in eval_parts for record in part.records]
    heldout += [record for part in parts for record in part.heldout]
    parts = [_without_leaks(part, heldout, kept_apart) for part in parts]
    report: dict[str, Any] = {
        "stage": stage,
        "kind": kind,
        "template": template.name,
        "datasets": [part.counts() for part in parts],
        "evaluation_datasets": [
            {"path": part.spec.path, "read": part.read, **_noted(part.notes)} for part in eval_parts
        ],
        "dropped_leaks": sum(part.leaked for part in parts),
        "skipped": {"rows": len(skipped), "by_reason": dict(Counter(row.reason for row in skipped).most_common())},
    }
    _check_not_empty(kind, parts, report, eval_parts, stage, config)
    kept = [part for part in parts if part.records]
    records = blend([part.records for part in kept], [part.spec.weight for part in kept], seed)
    if not records:
        raise DataError(
            f"the weights leave no training row for stage {stage}: "
            + ", ".join(f"{part.spec.path} has {len(part.records)} rows x weight {part.spec.weight:g}" for part in kept)
        )
    train, train_report = _tokens(records, tokenizer, template, config, cache_dir)
    evaluation, eval_report = _tokens(heldout, tokenizer, template, config, cache_dir)
    report["train"] = {**train_report.as_dict(), "categories": _category_counts(train)}
    report["evaluation"] = {**eval_report.as_dict(), "categories": _category_counts(evaluation)}
    if is_main():
        text = json.dumps(report, ensure_ascii=False, indent=2)
        with replaced_file(report_dir / f"{report_name}.json") as part_file:
            part_file.write_text(text + "\n", encoding="utf-8", errors="backslashreplace")
    for part in [*parts, *eval_parts]:
        for line in _warnings(kind, part):
            logger.warning(line)
    fingerprint = f"{train_report.key} {eval_report.key}"
    train = [_with_source(row, record) for row, record in zip(train, records, strict=True)]
    evaluation = [_with_source(row, record) for row, record in zip(evaluation, heldout, strict=True)]
    keys = frozenset(str(record.meta["prompt_key"]) for record in [*records, *heldout])
    return StageData(train, evaluation, report, fingerprint, _summary(report, config, skipped_file), keys)


def _with_source(row: Tokenized, record: Record) -> Tokenized:
    """A ranking with the file of its record; other rows as they are."""
    if not isinstance(row, TokenizedRanking):
        return row
    return replace(row, source=str(record.meta["source"]).rpartition(":")[0])


def reads_special_tokens(template: Template, tokenizer: Any) -> bool:
    """Whether the template itself writes special tokens of this tokenizer, which must then be read as such."""
    written = template.render("a") + template.render("a", "b")
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    special = {*tokenizer.all_special_tokens, *(token.content for token in added if token.special)}
    return any(text in written for text in special if text)


def _read_all(
    kind: str, texts: Sequence[str], field: str, template: Template, config: DataConfig, skipped: list[SkippedRow]
) -> list[_Part]:
    """The data sets of one option; an error of their columns says what the option must be."""
    parts = []
    for place, text in enumerate(texts):
        try:
            parts.append(_read(kind, text, template, config, skipped))
        except ColumnsError as error:
            raise error.with_option(field, texts, place) from error
    return parts


def _read(kind: str, text: str, template: Template, config: DataConfig, skipped: list[SkippedRow]) -> _Part:
    spec = DatasetSpec.parse(text)
    notes = ReadingNotes()
    rows = read_rows(spec, config.on_bad_row, skipped)
    records = rows_to_records(
        rows, kind, template=template, spec=spec, on_bad_row=config.on_bad_row, skipped=skipped, notes=notes
    )
    return _Part(spec, records, [], len(records), len(records), notes)


def _with_share(part: _Part, records: list[Record]) -> _Part:
    return replace(part, records=records, after_stage_split=len(records))


def _with_heldout(part: _Part, fraction: float) -> _Part:
    if fraction == 0:
        return part
    train, heldout = hold_out(part.records, fraction)
    return replace(part, records=train, heldout=heldout)


def _without_leaks(part: _Part, heldout: Sequence[Record], further: Collection[str]) -> _Part:
    kept, leaked = drop_leaked(part.records, heldout, further)
    return replace(part, records=kept, leaked=leaked)


def _noted(notes: ReadingNotes) -> dict[str, Any]:
    return {"ignored_columns": dict(notes.ignored_columns), "warnings": dict(notes.warnings)}


def _warnings(kind: str, part: _Part) -> list[str]:
    lines = [f"data: {part.spec.path}: {count} rows: {what}" for what, count in part.notes.warnings.items()]
    names = ", ".join(f"`{column}` ({count} rows)" for column, count in part.notes.ignored_columns.items())
    if names and not part.spec.path.startswith("sample:"):  # whose README says what its columns are
        is_not = "are no part of the prompt, rewards can read them" if kind == "prompt" else "are not used"
        lines.append(f"data: {part.spec.path}: columns that {is_not}: {names}; `columns` maps what should be")
    return lines


def _tokens(
    records: Sequence[Record], tokenizer: Any, template: Template, config: DataConfig, cache_dir: Path
) -> tuple[list[Tokenized], TokenReport]:
    if not records:
        return [], TokenReport()
    limits: dict[str, Any] = {
        "max_prompt_tokens": config.max_prompt_tokens,
        "max_response_tokens": config.max_response_tokens,
        "prompt_has_special_tokens": reads_special_tokens(template, tokenizer),
    }
    return cached_tokens(
        json.dumps(limits),
        tokenizer_fingerprint(tokenizer),
        record_key_parts(records),
        cache_dir=cache_dir,
        make=lambda: tokenize_records(records, tokenizer, **limits),
    )


def _check_not_empty(
    kind: str,
    parts: Sequence[_Part],
    report: dict[str, Any],
    eval_parts: Sequence[_Part],
    stage: str,
    config: DataConfig,
) -> None:
    if not parts:
        raise DataError(f"no data set is named for stage {stage}; name at least one with rows of kind {kind}")
    empty_eval = [part.spec.path for part in eval_parts if not part.records]
    if empty_eval:
        raise DataError(f"no evaluation row of kind {kind} in {', '.join(empty_eval)}{_skip_reasons(report)}")
    if any(part.records for part in parts):
        return
    steps = "; ".join(
        f"{part.spec.path}: {part.read} read, {part.after_stage_split} after stage_split={config.stage_split}, "
        f"{len(part.heldout)} held out (eval_fraction={config.eval_fraction}), {part.leaked} dropped because their "
        "prompt is held out"
        for part in parts
    )
    raise DataError(f"no training row of kind {kind} is left for stage {stage}: {steps}{_skip_reasons(report)}")


def _skip_reasons(report: dict[str, Any]) -> str:
    skipped = report["skipped"]
    if not skipped["rows"]:
        return ""
    reasons = "; ".join(f"{count} x {reason}" for reason, count in list(skipped["by_reason"].items())[:3])
    return f"; {skipped['rows']} rows were skipped ({reasons})"


def _write_skipped(path: Path, skipped: Sequence[SkippedRow]) -> None:
    if not skipped:
        path.unlink(missing_ok=True)
        return
    lines = [json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in skipped]
    # half of a surrogate pair (a file name that is not UTF-8, a column) is written as JSON's own escape of it
    with replaced_file(path) as part_file:
        part_file.write_text("".join(lines), encoding="utf-8", errors="backslashreplace")


def _category_counts(rows: Sequence[Tokenized]) -> dict[str, int]:
    return dict(sorted(Counter(row.category for row in rows).items()))


def _summary(report: dict[str, Any], config: DataConfig, skipped_file: Path) -> list[str]:
    train, evaluation = report["train"], report["evaluation"]
    names = ", ".join(part["path"] for part in report["datasets"])
    lines = [f"data: {train['rows']} rows to train on, {evaluation['rows']} held out, from {names}"]
    means = [f"prompts {train['prompt_tokens'] / train['rows']:.0f}"]
    if train["responses"]:
        means.append(f"responses {train['response_tokens'] / train['responses']:.0f}")
    lines.append(f"data: mean tokens: {', '.join(means)}")
    if train["truncated_prompts"]:
        lines.append(
            f"data: {train['truncated_prompts']} of {train['rows']} prompts were longer than "
            f"max_prompt_tokens={config.max_prompt_tokens} and lost their beginning"
        )
    if train["truncated_responses"]:
        lines.append(
            f"data: {train['truncated_responses']} of {train['responses']} responses were longer than "
            f"max_response_tokens={config.max_response_tokens} and lost their end"
        )
    if train["empty_responses"]:
        lines.append(f"data: {train['empty_responses']} responses hold nothing but the end of sequence")
    if report["dropped_leaks"]:
        lines.append(f"data: {report['dropped_leaks']} training rows dropped because their prompt is held out")
    if report["skipped"]["rows"]:
        lines.append(f"data: {report['skipped']['rows']} rows skipped, listed in {skipped_file}")
    return lines
