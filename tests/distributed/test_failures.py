"""What an exception that ends a rank means."""

from __future__ import annotations

import errno
import re
import subprocess
import sys

import pytest
import torch

from rlhf.distributed import failures
from tests.support.launch import ROOT


def raised(error: BaseException) -> BaseException:
    try:
        raise error
    except BaseException as caught:
        return caught


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer"), "peer"),
        (RuntimeError("[pair.cc:1] Timed out waiting 1800000ms for recv operation to complete"), "peer"),
        (torch.distributed.DistBackendError("NCCL error in: ProcessGroupNCCL.cpp:3385, remote process exited"), "peer"),
        (torch.distributed.DistNetworkError("failed to recv, got 0 bytes"), "peer"),
        (RuntimeError("rank 0 could not make /x: OSError"), "peer"),
        (OSError("rank 0 could not write /x"), "peer"),
        (ValueError("Connection closed by peer"), "bug"),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), "bug"),
        (FileNotFoundError(errno.ENOENT, "No such file", "/x"), "bug"),
        (RuntimeError("CUDA error: out of memory"), "memory"),
        (torch.distributed.DistBackendError("NCCL error: Cuda failure 2 'out of memory'"), "memory"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "memory"),
        (OSError(errno.ENOSPC, "cannot write /x: No space left on device"), "storage"),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), "storage"),
        (OSError(errno.EROFS, "Read-only file system", "/x"), "storage"),
    ],
)
def test_what_an_exception_means(error, kind):
    error = raised(error)
    memory, storage = failures.memory_failure(error), failures.storage_failure(error)
    found = "storage" if storage else "memory" if memory else "peer" if failures.is_consequence(error) else "bug"
    assert found == kind
    wrapped = raised(RuntimeError("saving failed"))
    wrapped.__cause__ = error
    if kind in ("memory", "storage"):
        assert (failures.memory_failure if memory else failures.storage_failure)(wrapped) == memory or storage


def test_a_full_disk_under_safetensors_is_a_full_disk(tmp_path):
    """safetensors raises an error of its own, without an errno."""
    script = f"""
import resource, signal, torch
from safetensors.torch import save_file
from rlhf.distributed.failures import storage_failure
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    save_file({{"a": torch.zeros(10000)}}, {str(tmp_path / "x.safetensors")!r})
except Exception as error:
    assert not isinstance(error, OSError)
    print(storage_failure(error))
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "File too large" in done.stdout and "raise the limit" in done.stdout, done.stderr


def test_the_place_of_an_error_is_the_innermost_line_of_the_project():
    from tests.support.mutants import drawn

    with pytest.raises(TypeError) as caught:
        drawn(0, 1, None)  # fails inside pathlib
    assert re.fullmatch(r"tests/support/mutants\.py:\d+ drawn", failures.place_of(caught.value))
    with pytest.raises(SyntaxError) as elsewhere:
        compile("(", "x", "exec")
    elsewhere.value.__traceback__ = None
    assert failures.place_of(elsewhere.value) == "an unknown place"


def test_a_path_outside_the_project_keeps_its_last_two_parts():
    assert failures.short_path(str(failures.PROJECT / "rlhf" / "types.py")) == "rlhf/types.py"
    assert failures.short_path("/usr/lib/python3/site-packages/torch/nn/module.py") == "nn/module.py"
    assert failures.short_path("/x.py") == "//x.py" and failures.short_path("x.py") == "x.py"


@pytest.mark.parametrize(("error", "told"), [
    (ValueError(" one.\n two"), "ValueError: one"), (ValueError(), "ValueError"), (KeyError("a"), "KeyError: 'a'"),
    (RuntimeError("x" * 400), "RuntimeError: " + "x" * 300),
])  # fmt: skip
def test_an_error_is_told_by_its_type_and_first_line(error, told):
    assert failures.summary_of(error) == told


@pytest.mark.parametrize(("error", "begins"), [
    (RuntimeError("CUDA error: out of memory"), "ran out of device memory: CUDA error: out of memory; lower micro"),
    (torch.OutOfMemoryError("cap"), "ran out of device memory: cap; lower micro_batch_size"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: out of memory"), "ran out of memory: DefaultCPU"),
    (MemoryError(), "ran out of memory: MemoryError; lower micro_batch_size"),
    (ValueError("out of memory"), None), (OSError("CUBLAS_STATUS_ALLOC_FAILED"), None),
])  # fmt: skip
def test_which_memory_ran_out_is_told_from_the_message(error, begins):
    found = failures.memory_failure(error)
    assert found is None if begins is None else found.startswith(begins), found


def test_the_reason_below_a_storage_error_counts():
    low = OSError(errno.EDQUOT, "Disk quota exceeded", "/x")
    high = RuntimeError("saving failed")
    high.__cause__ = low
    expected = "[Errno 122] Disk quota exceeded: '/x': make room in the quota"
    assert failures.storage_failure(high) == failures.storage_failure(low) == expected
    assert failures.storage_failure(OSError(errno.ECONNRESET, "reset")) is None
