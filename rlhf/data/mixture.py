"""Mix data sets by weight, and split them by prompt so that no prompt is on two sides.

Every split hashes the prompt (`meta["prompt_key"]`), never its position: adding, removing or reordering rows, other
data sets or other seeds move no prompt from one part to another.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import TypeVar

from rlhf.data.row_values import prompt_key
from rlhf.data.spec import DataError
from rlhf.types import Record

_STAGE_SALT = "stage"
_HOLD_OUT_SALT = "hold-out"

RecordT = TypeVar("RecordT", bound=Record)


def split_by_prompt(records: Sequence[RecordT], shares: Sequence[float], seed_text: str = "") -> list[list[RecordT]]:
    """The records in `len(shares)` parts of about those proportions, each in the order given.

    The part of a prompt depends on the prompt, `shares` and `seed_text` alone. Splits with different `seed_text` are
    independent. A share of 0 gets nothing. Raises DataError for shares that are negative, not finite, or all 0.
    """
    if not shares or any(not math.isfinite(share) or share < 0 for share in shares) or sum(shares) <= 0:
        raise DataError(f"shares {list(shares)} must be numbers of at least 0, not all 0")
    total = math.fsum(shares)
    bounds = [bound / total for bound in accumulate(shares)]
    last = max(index for index, share in enumerate(shares) if share > 0)
    parts: list[list[RecordT]] = [[] for _ in shares]
    for record in records:
        place = text_place(_key(record), seed_text)
        part = next((index for index in range(last) if place < bounds[index]), last)
        parts[part].append(record)
    return parts


def stage_share(records: Sequence[RecordT], stage_split: str, stage: str, stages: Sequence[str]) -> list[RecordT]:
    """The records of one stage where one corpus feeds them all: `stage_split` has a share for each, "2,4,4".

    Raises DataError for a text that is not one number for each stage, or a stage whose share is 0.
    """
    if stage not in stages:
        raise DataError(f"stage {stage!r} is not one of {', '.join(stages)}")
    wrong = DataError(
        f"stage_split={stage_split!r} must be {len(stages)} numbers of at least 0 for {', '.join(stages)}, "
        f"such as {','.join('2' * len(stages))}"
    )
    try:
        shares = [float(part) for part in stage_split.split(",")]
    except ValueError:
        raise wrong from None
    if len(shares) != len(stages) or any(not math.isfinite(share) or share < 0 for share in shares):
        raise wrong
    place = list(stages).index(stage)
    if shares[place] == 0:
        raise DataError(f"stage_split={stage_split!r} leaves nothing to the stage {stage}; give it a share above 0")
    return split_by_prompt(records, shares, _STAGE_SALT)[place]


def hold_out(records: Sequence[RecordT], fraction: float) -> tuple[list[RecordT], list[RecordT]]:
    """Training and held-out records, about `fraction` of the prompts in the latter.

    Independent of `stage_share`, so that the two compose: a held-out prompt of one stage is held out in all. A small
    data set may have no prompt, or every prompt, on one side. Raises DataError for a fraction outside [0, 1).
    """
    if not 0 <= fraction < 1:
        raise DataError(f"the held-out fraction must be in [0, 1), not {fraction}")
    if fraction == 0:
        return list(records), []
    heldout, train = split_by_prompt(records, (fraction, 1 - fraction), _HOLD_OUT_SALT)
    return train, heldout


def blend(datasets: Sequence[Sequence[RecordT]], weights: Sequence[float], seed: int) -> list[RecordT]:
    """One list of several data sets, of which data set i gives round(weights[i] * len) records, halves rounded up.

    Weight 0.5 is a half drawn by `seed`, 2.5 is two copies and a half; copies get ids of their own (`id@2`). Where all
    weights are 1 the data sets follow one another unchanged; otherwise the result is shuffled by `seed`.
    Raises DataError for weights that are not one number above 0 a data set.
    """
    if len(weights) != len(datasets):
        raise DataError(f"{len(weights)} weights for {len(datasets)} data sets")
    for weight in weights:
        if not math.isfinite(weight) or weight <= 0:
            raise DataError(f"the weight of a data set must be a number above 0, not {weight}")
    if all(weight == 1 for weight in weights):
        return [record for dataset in datasets for record in dataset]
    mixed: list[RecordT] = []
    for index, (dataset, weight) in enumerate(zip(datasets, weights, strict=True)):
        mixed.extend(_copy(dataset[position], copy) for copy, position in drawn(len(dataset), weight, seed, index))
    random.Random(f"{seed}/blend").shuffle(mixed)
    return mixed


def drawn(rows: int, weight: float, seed: int, index: int) -> Iterator[tuple[int, int]]:
    """What data set `index` of `rows` rows gives at `weight`: copy (from 0) and position of round(weight * rows) rows.

    Whole copies come first, then the rest, drawn by `seed` and `index`, in the order of the rows.
    """
    copies, rest = divmod(math.floor(weight * rows + 0.5), rows) if rows else (0, 0)
    for copy in range(copies):
        yield from ((copy, position) for position in range(rows))
    yield from ((copies, position) for position in sorted(random.Random(f"{seed}/{index}").sample(range(rows), rest)))


def drop_leaked(
    train: Sequence[RecordT], heldout: Sequence[RecordT], further: Collection[str] = ()
) -> tuple[list[RecordT], int]:
    """The training records whose prompt is not held out, nor among the keys `further`, and how many were dropped.

    Used where the user names files of their own for both: the held-out set stays as it is published, and what leaked
    from it leaves the training set.
    """
    held = {_key(record) for record in heldout}.union(further)
    kept = [record for record in train if _key(record) not in held]
    return kept, len(train) - len(kept)


def _key(record: Record) -> str:
    key = record.meta.get("prompt_key")
    return key if isinstance(key, str) else prompt_key(record.prompt)


def text_place(text: str, salt: str) -> float:
    """A number in [0, 1) that depends on the two texts alone, on every machine and Python."""
    digest = hashlib.sha256(f"{salt}\0{text}".encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def _copy(record: RecordT, copy: int) -> RecordT:
    return record if copy == 0 else replace(record, id=f"{record.id}@{copy + 1}")
