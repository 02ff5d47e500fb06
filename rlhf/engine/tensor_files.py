"""Safetensors files written tensor by tensor, as values come: neither memory nor one file grows with the model.

The format's own writer wants all tensors of a file at once, and gives the disk's errors another name and no number.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


@dataclass(frozen=True)
class TensorSource:
    """A tensor to be written: `fetch` gives it on the CPU, or None on ranks that only help to fetch it."""

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    fetch: Callable[[], torch.Tensor | None]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def shards(sources: Iterable[TensorSource], limit: int) -> list[list[TensorSource]]:
    """`sources` in groups of at most `limit` bytes, a larger tensor alone; wide elements first, so that all of them
    lie at multiples of their size."""
    groups: list[list[TensorSource]] = []
    size = limit
    for source in sorted(sources, key=lambda source: -source.dtype.itemsize):
        if not groups or size + source.bytes > limit:
            groups.append([])
            size = 0
        groups[-1].append(source)
        size += source.bytes
    return groups


def write_tensors(
    path: Path,
    sources: Sequence[TensorSource],
    values: Iterator[torch.Tensor | None],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a safetensors file of `sources` with their `values`, taken one at a time."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    end = 0
    for source in sources:
        start, end = end, end + source.bytes
        header[source.key] = {"dtype": DTYPES[source.dtype], "shape": source.shape, "data_offsets": [start, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for value in values:
            assert value is not None, "a rank that only helps to fetch tensors has none to write"
            file.write(value.contiguous().reshape(-1).view(torch.uint8).numpy().data)
