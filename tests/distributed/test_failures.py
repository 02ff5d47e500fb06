"""What an exception that ends a rank means."""

from __future__ import annotations

import errno
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
