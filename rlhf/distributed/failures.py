"""What an exception that ends a rank means: memory ran out, the disk refused, or another rank is gone."""

from __future__ import annotations

import errno
import re
import traceback
from collections.abc import Iterator
from pathlib import Path

import torch

PROJECT = Path(__file__).parents[2]
_MEMORY_HINT = (
    "lower micro_batch_size or micro_batch_tokens (while PPO samples or scores: generation_batch_size, "
    "scoring_batch_tokens), turn on gradient_checkpointing, raise zero_stage, use offload or more devices; all of "
    "these learn the same"
)
_CPU_MEMORY = re.compile(
    r"DefaultCPUAllocator: (can't allocate|not enough) memory|Cannot allocate memory|std::bad_alloc"
)
_DEVICE_MEMORY = re.compile(r"out of memory|CUBLAS_STATUS_ALLOC_FAILED|cudaErrorMemoryAllocation|hipErrorOutOfMemory")
_PEER_GONE = re.compile(
    r"Connection (closed|reset|refused)|Broken pipe|Timed out waiting|[Tt]imeout caused pair closure|Socket Timeout"
    r"|NCCL error|nccl(Remote|System|Internal)Error|NCCL communicator was aborted|failed to recv|pair is not connected"
    r"|[Ww]atchdog caught collective"
)
_TOLD_BY_ANOTHER = ("rank 0 could not ", "another rank could not ")
"""How the library's own errors begin on ranks that only hear of a failure of another one."""
_OS_ERROR_NUMBER = re.compile(r"\(os error (\d+)\)")
_STORAGE_HINTS = {
    errno.ENOSPC: "make room on the disk",
    errno.EDQUOT: "make room in the quota",
    errno.EFBIG: "raise the limit on file sizes (ulimit -f)",
    errno.EROFS: "the file system is mounted read-only; look at dmesg, or choose another directory",
    errno.EACCES: "give this user the permission, or choose another directory",
    errno.EPERM: "give this user the permission, or choose another directory",
    errno.EIO: "the disk reports an error; look at dmesg",
    errno.ESTALE: "the network disk has lost the file; mount it anew",
}


def memory_failure(error: BaseException) -> str | None:
    """What ran out of memory, with what to do; None where `error` is about something else."""
    for each in _chain(error):
        text = str(each)
        if isinstance(each, torch.OutOfMemoryError) or (
            isinstance(each, RuntimeError) and _DEVICE_MEMORY.search(text) and not _CPU_MEMORY.search(text)
        ):
            return f"ran out of device memory: {_first_line(each)}; {_MEMORY_HINT}"
        if isinstance(each, MemoryError) or (isinstance(each, RuntimeError | OSError) and _CPU_MEMORY.search(text)):
            return f"ran out of memory: {_first_line(each) or 'MemoryError'}; {_MEMORY_HINT}"
    return None


def storage_failure(error: BaseException) -> str | None:
    """Why the disk refused (full, read-only, not permitted), with what to do; None for any other error.

    `safetensors` reports it with an error of its own that ends in "(os error 28)".
    """
    for each in _chain(error):
        number = each.errno if isinstance(each, OSError) else None
        if number is None and type(each).__name__ == "SafetensorError":
            found = _OS_ERROR_NUMBER.search(str(each))
            number = int(found[1]) if found else None
        if number in _STORAGE_HINTS:
            return f"{_first_line(each)}: {_STORAGE_HINTS[number]}"
    return None


def is_consequence(error: BaseException) -> bool:
    """Whether `error` only tells that another rank is gone, silent, or has failed itself."""
    return any(
        isinstance(each, torch.distributed.DistError)
        or (isinstance(each, RuntimeError) and _PEER_GONE.search(str(each)))
        or (isinstance(each, RuntimeError | OSError) and str(each).startswith(_TOLD_BY_ANOTHER))
        for each in _chain(error)
    )


def place_of(error: BaseException) -> str:
    """The innermost line of this project that `error` went through, such as `rlhf/engine/factory.py:85 _check`."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if Path(frame.filename).is_relative_to(PROJECT)] or list(frames)
    return f"{short_path(own[-1].filename)}:{own[-1].lineno} {own[-1].name}" if own else "an unknown place"


def short_path(path: str) -> str:
    """A file's path inside this project, or its last two parts outside of it."""
    file = Path(path)
    return str(file.relative_to(PROJECT)) if file.is_relative_to(PROJECT) else "/".join(file.parts[-2:])


def summary_of(error: BaseException) -> str:
    """Type and first line of `error`."""
    text = _first_line(error)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300].rstrip(".") if lines else ""


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """`error` and those it was raised from."""
    while error is not None:
        yield error
        error = error.__cause__
