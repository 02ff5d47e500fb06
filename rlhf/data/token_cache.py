"""Tokenised rows kept on disk under a key of everything they depend on.

Rows are stored as flat integer arrays in a safetensors file: loading executes nothing.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from rlhf.checkpoint.atomic import replaced_file
from rlhf.data.spec import DataError
from rlhf.data.tokenize import Tokenized, TokenReport
from rlhf.distributed.collectives import rank_zero_first
from rlhf.types import (
    LabelledRecord,
    PreferenceRecord,
    PromptRecord,
    RankedRecord,
    Record,
    ResponseRecord,
    TokenizedLabel,
    TokenizedPrompt,
    TokenizedRanking,
    TokenizedResponse,
)

FORMAT_VERSION = 3
"""Part of every key; raised when tokenisation or this file format changes meaning."""

MakeRows = Callable[[], tuple[list[Tokenized], TokenReport]]


def cached_tokens(
    *key_parts: str | Iterable[str], cache_dir: Path, make: MakeRows
) -> tuple[list[Tokenized], TokenReport]:
    """The rows and report of `make()`, read from `cache_dir` when they are there under the same key.

    The report's `key` is a digest of `key_parts`, which are all that the rows depend on: strings, or iterables of
    strings such as `record_key_parts(...)`.
    Rank 0 makes and writes the file atomically, other ranks wait for it. Raises DataError for a damaged file.
    """
    key = _digest(key_parts)
    path = cache_dir / f"tokens-{key}.safetensors"

    def write() -> None:
        rows, report = make()
        arrays = _to_arrays(rows, report)
        digest = np.frombuffer(_content_digest(arrays), dtype=np.uint8).copy()
        with replaced_file(path) as part:
            save_file({**arrays, "digest": digest}, part)

    rank_zero_first(path, write)
    try:
        arrays = load_file(path)
        whole = arrays.pop("digest", np.empty(0, dtype=np.uint8)).tobytes() == _content_digest(arrays)
    except SafetensorError as error:
        raise DataError(f"token cache {path} is damaged ({error}); delete it and run again") from error
    if not whole:
        raise DataError(f"token cache {path} is damaged (not what was written); delete it and run again")
    rows, report = _from_arrays(arrays)
    return rows, dataclasses.replace(report, key=key)


def record_key_parts(records: Sequence[Record]) -> Iterator[str]:
    """Everything of each record that its tokenised row depends on, as text."""
    for record in records:
        values: list[Any] = [record.id, record.prompt, str(record.meta.get("category") or "")]
        values += [bool(record.meta.get("special_tokens"))]
        if isinstance(record, ResponseRecord):
            values += ["response", record.response]
        elif isinstance(record, PreferenceRecord):
            values += ["pair", record.chosen, record.rejected, record.margin]
        elif isinstance(record, RankedRecord):
            values += ["ranked", record.responses, record.ranks]
        elif isinstance(record, LabelledRecord):
            values += ["label", record.response, record.good]
        elif isinstance(record, PromptRecord):
            values += ["prompt", record.messages, record.columns]
        yield json.dumps(values, ensure_ascii=False)


def tokenizer_fingerprint(tokenizer: Any, *, without: Collection[str] = ()) -> str:
    """A sha256 of what the tokenizer does: its serialised backend, or its vocabulary, and its special tokens.

    Special tokens in `without` are left out, as if the tokenizer did not know them.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        content = json.loads(backend.to_str())
        content["truncation"] = content["padding"] = None  # traces of earlier calls, no part of the tokenizer
        content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] not in without]
    else:
        content = sorted(tokenizer.get_vocab().items())
    special = {name: str(value) for name, value in tokenizer.special_tokens_map.items() if str(value) not in without}
    text = json.dumps([type(tokenizer).__name__, content, special], ensure_ascii=False, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _digest(key_parts: Sequence[str | Iterable[str]]) -> str:
    digest = hashlib.sha256(f"format {FORMAT_VERSION}".encode())
    for part in key_parts:
        for text in [part] if isinstance(part, str) else part:
            encoded = text.encode("utf-8", "surrogatepass")
            digest.update(f"\n{len(encoded)}:".encode())
            digest.update(encoded)
        digest.update(b"\nend of part")
    return digest.hexdigest()[:32]


def _content_digest(arrays: dict[str, np.ndarray]) -> bytes:
    digest = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.digest()


def _to_arrays(rows: Sequence[Tokenized], report: TokenReport) -> dict[str, np.ndarray]:
    sequences: list[TokenizedPrompt | TokenizedResponse] = []
    groups, ranks = [0], list[int]()
    for row in rows:
        if isinstance(row, TokenizedRanking):
            sequences.extend(row.candidates)
            ranks.extend(row.ranks)
        elif isinstance(row, TokenizedLabel):
            sequences.append(row.response)
            ranks.append(int(not row.good))
        else:
            sequences.append(row)
        groups.append(len(sequences))
    lengths = np.array([len(sequence.input_ids) for sequence in sequences], dtype=np.int64)
    facts = {
        "kind": type(rows[0]).__name__ if rows else "",
        "report": report.as_dict(),
        "ids": [row.id for row in rows],
        "categories": [row.category for row in rows],
        "prompts": [[row.text, row.messages, row.columns] for row in rows if isinstance(row, TokenizedPrompt)],
    }
    return {
        "tokens": np.array([token for sequence in sequences for token in sequence.input_ids], dtype=np.int32),
        "offsets": np.concatenate([[0], lengths.cumsum()]).astype(np.int64),
        "prompt_tokens": np.array(
            [sequence.prompt_tokens for sequence in sequences if isinstance(sequence, TokenizedResponse)],
            dtype=np.int32,
        ),
        "groups": np.array(groups, dtype=np.int64),
        "ranks": np.array(ranks, dtype=np.int32),
        "margins": np.array([row.margin for row in rows if isinstance(row, TokenizedRanking)], dtype=np.float64),
        "facts": np.frombuffer(json.dumps(facts).encode(), dtype=np.uint8).copy(),
    }


def _from_arrays(arrays: dict[str, np.ndarray]) -> tuple[list[Tokenized], TokenReport]:
    facts = json.loads(arrays["facts"].tobytes())
    tokens, offsets = _shared_integers(arrays["tokens"]), arrays["offsets"].tolist()
    prompt_tokens, groups = arrays["prompt_tokens"].tolist(), arrays["groups"].tolist()
    ranks, margins = arrays["ranks"].tolist(), arrays["margins"].tolist()
    rows: list[Tokenized] = []
    for index, (row_id, category) in enumerate(zip(facts["ids"], facts["categories"], strict=True)):
        first, last = groups[index], groups[index + 1]
        sequences = [tuple(tokens[offsets[place] : offsets[place + 1]]) for place in range(first, last)]
        if facts["kind"] == TokenizedPrompt.__name__:
            text, messages, columns = facts["prompts"][index]
            rows.append(TokenizedPrompt(row_id, sequences[0], text, category, tuple(messages), columns))
            continue
        responses = tuple(
            TokenizedResponse(row_id, sequence, prompt_tokens[place], category)
            for place, sequence in zip(range(first, last), sequences, strict=True)
        )
        if facts["kind"] == TokenizedResponse.__name__:
            rows.append(responses[0])
        elif facts["kind"] == TokenizedLabel.__name__:
            rows.append(TokenizedLabel(responses[0], ranks[first] == 0))
        else:
            rows.append(TokenizedRanking(row_id, responses, tuple(ranks[first:last]), margins[index], category))
    return rows, TokenReport(**facts["report"])


def _shared_integers(tokens: np.ndarray) -> np.ndarray:
    """Token ids as Python integers, one object per id rather than one per token (a quarter of the memory)."""
    table = np.arange(int(tokens.max()) + 1 if len(tokens) else 0).astype(object)
    return table[tokens]
