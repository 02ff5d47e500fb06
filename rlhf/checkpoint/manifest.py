"""The manifest of a directory: size and digest of each file, written last, so that damage is found when it is read."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rlhf.checkpoint.atomic import sync_directory, sync_file, walk
from rlhf.distributed.place import rank, world_size

FORMAT_VERSION = 1
"""Of the manifest and the layout of a directory with one; raised when an older reader would misread a newer one."""
MANIFEST = "manifest.json"

FileDigests = dict[str, dict[str, Any]]
"""Path from the directory -> {"bytes": size, "sha256": hex digest}."""


def file_names(directory: Path) -> list[str]:
    """The path of every file below `directory`, the largest first, so that shares of the list are of like size."""
    paths = [Path(folder) / name for folder, _, names in walk(directory) for name in names]
    sizes = {str(path.relative_to(directory)): path.stat().st_size for path in paths}
    return sorted(sizes, key=lambda name: (-sizes[name], name))


def file_digest(path: Path, *, durable: bool = False) -> dict[str, Any]:
    """Size and sha256 of a file; `durable` waits first until its bytes are on the disk."""
    with path.open("rb") as file:
        if durable:
            os.fsync(file.fileno())
        return {"bytes": os.fstat(file.fileno()).st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def durable_digests(directory: Path) -> FileDigests:
    """Digests of this rank's share of the files below `directory`, synced first; all ranks' shares are all files."""
    return {name: file_digest(directory / name, durable=True) for name in _share(file_names(directory))}


def write_manifest(directory: Path, files: FileDigests, **facts: Any) -> None:
    """Write the manifest and wait until it and every directory are on the disk; for one process.

    Raises OSError where `files` are not those that are there, as when ranks do not share the disk.
    """
    if unlike := set(file_names(directory)) ^ files.keys():
        raise OSError(f"the ranks do not see the same files in {directory}: {sorted(unlike)}; is it a shared disk?")
    manifest = {"format_version": FORMAT_VERSION, **facts, "files": files}
    path = directory / MANIFEST
    path.write_text(json.dumps({**manifest, "sha256": _seal(manifest)}, indent=1), encoding="utf-8")
    sync_file(path)
    for folder, _, _ in walk(directory):
        sync_directory(folder)


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of `directory`; ValueError with a sentence where there is none that this release can trust."""
    path = directory / MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
        version = manifest.get("format_version")
        if version == FORMAT_VERSION and manifest.pop("sha256") == _seal(manifest):
            return manifest
    except OSError as error:
        raise ValueError(f"{MANIFEST}: {error.strerror or error}") from error
    except (ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"{MANIFEST} is damaged ({type(error).__name__}: {error})") from error
    if version != FORMAT_VERSION:
        raise ValueError(f"its format version is {version!r} and this release reads {FORMAT_VERSION}")
    raise ValueError(f"{MANIFEST} is damaged (it does not hold what was saved)")


def damages(directory: Path, files: FileDigests) -> list[str]:
    """What is wrong with this rank's share of the manifest's `files`, a sentence each."""
    found = []
    for name in _share(files):
        try:
            there = file_digest(directory / name)
        except OSError as error:
            found.append(f"{name}: {error.strerror or error}")
            continue
        if there["bytes"] != files[name]["bytes"]:
            found.append(f"{name} has {there['bytes']} bytes and was saved with {files[name]['bytes']}")
        elif there["sha256"] != files[name]["sha256"]:
            found.append(f"{name} does not hold the bytes that were saved (another sha256)")
    return found


def _share(names: Iterable[str]) -> list[str]:
    return list(names)[rank() :: world_size()]


def _seal(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
