"""The random generators of a rank to a file and back: Python's, numpy's, torch's on the CPU and on its device."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save

from rlhf.distributed.log import logger


def rng_state() -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The state of every generator: tensors, and the few scalars beside them as JSON."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    tensors = {
        "python": torch.tensor(words, dtype=torch.int64),
        "numpy": torch.from_numpy(np.asarray(keys).astype(np.int64)),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        tensors["cuda"] = torch.cuda.get_rng_state()  # of the device this rank has set
    return tensors, {"python": [version, gauss], "numpy": [name, int(position), int(has_gauss), float(cached)]}


def restore_rng_state(tensors: dict[str, torch.Tensor], scalars: dict[str, Any]) -> None:
    """Set every generator to what `rng_state` returned; one of a device that is not there any more is passed over."""
    version, gauss = scalars["python"]
    random.setstate((version, tuple(tensors["python"].tolist()), gauss))
    name, position, has_gauss, cached = scalars["numpy"]
    np.random.set_state((name, tensors["numpy"].numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(tensors["torch"])
    if "cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["cuda"])


def save_rng(directory: Path, rank: int) -> None:
    """Write this rank's generators into `directory`."""
    tensors, scalars = rng_state()
    _file(directory, rank).write_bytes(save(tensors, metadata={"scalars": json.dumps(scalars)}))


def load_rng(directory: Path, rank: int, *, seed: int, step: int) -> bool:
    """Set this rank's generators to those in `directory`; False where the saved world had no such rank.

    Its generators are then seeded from (seed, rank, step), the same at every attempt, and the log says so.
    """
    path = _file(directory, rank)
    if path.is_file():
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
            restore_rng_state(tensors, json.loads(file.metadata()["scalars"]))
        return True
    digest = hashlib.sha256(f"{seed} {rank} {step}".encode()).digest()
    random.seed(int.from_bytes(digest[:8], "big"))
    np.random.seed(int.from_bytes(digest[8:12], "big"))
    torch.manual_seed(int.from_bytes(digest[12:19], "big"))  # of every device, too
    logger.warning(
        "rank %d has no random state of its own in %s, which was saved by fewer ranks; seeded from seed %d, the rank "
        "and step %d",
        *(rank, directory, seed, step),
    )
    return False


def _file(directory: Path, rank: int) -> Path:
    return directory / f"rng-{rank:05d}.safetensors"
