"""Files and directories that are there whole or not at all: written beside their place, synced, renamed.

For a moment there lie beside `model`: `.model.part-1f3a5b7c` while it is written, `.model.replaced-...` with what was
there before, `.model.removed-...` while it is deleted. `remove_leftovers` clears away what a killed process left.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rlhf.distributed.log import logger
from rlhf.distributed.place import is_main

_LEFTOVER = re.compile(r"\.(.+)\.(part|replaced|removed)-[0-9a-f]+")


@contextmanager
def replaced_file(path: Path) -> Iterator[Path]:
    """Yield the name of a file to be written; it takes the place of `path` when the block ends without an error.

    Until then the old file stays, and it stays after an error. Raises OSError where the disk refuses.
    """
    path = Path(path).absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    part = beside(path, "part")
    try:
        yield part
        sync_file(part)
        part.replace(path)
        sync_directory(path.parent)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def replaced_directory(directory: Path) -> Iterator[Path]:
    """Yield an empty directory to be filled; it takes the place of `directory` when the block ends without an error.

    Until then the old directory stays, and it stays after an error. Raises OSError where the disk refuses.
    """
    directory = Path(directory).absolute()
    directory.parent.mkdir(parents=True, exist_ok=True)
    part = beside(directory, "part")
    part.mkdir()
    try:
        yield part
        for folder, _, names in walk(part):
            for name in names:
                sync_file(Path(folder) / name)
            sync_directory(folder)
        put_in_place(part, directory)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Replace `path` by `content` as JSON that people can read (indented, Korean as it is); rank 0 alone writes."""
    if is_main():
        with replaced_file(path) as part:
            part.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def put_in_place(part: Path, directory: Path) -> None:
    """Rename the directory `part`, which is on the disk, to `directory`; what was there is removed afterwards."""
    old = beside(directory, "replaced")
    if directory.exists():
        directory.rename(old)
    try:
        part.rename(directory)
    except OSError:
        if old.exists():
            old.rename(directory)
        raise
    sync_directory(directory.parent)
    _remove(old)


def beside(path: Path, kind: str) -> Path:
    """A new hidden name in the directory of `path`; `kind` is "part", "replaced" or "removed"."""
    return path.with_name(f".{path.name}.{kind}-{secrets.token_hex(4)}")


def remove_leftovers(directory: Path) -> None:
    """Remove what a killed process left beside the entries of `directory`; what it had replaced gets its name back.

    For a directory that no other process writes to. What the disk refuses to rename is logged and stays.
    """
    for entry in entries(directory):
        leftover = _LEFTOVER.fullmatch(entry.name)
        if leftover is None:
            continue
        place = directory / leftover[1]
        if leftover[2] == "replaced" and not place.exists():
            try:
                entry.rename(place)
            except OSError as error:
                logger.error("%s cannot be renamed to %s: %s", entry, place, error)
        else:
            _remove(entry)


def entries(directory: Path) -> list[Path]:
    """What lies in `directory`; nothing where there is no such directory. Raises OSError where it cannot be read."""
    try:
        return list(directory.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []


def walk(directory: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """`os.walk` that raises OSError for what it cannot read, rather than to pass over it."""

    def stop(error: OSError) -> None:
        raise error

    return os.walk(directory, onerror=stop)


def sync_file(path: Path) -> None:
    """Wait until the bytes of a file are on the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_directory(directory: Path | str) -> None:
    """Wait until the names in `directory` are on the disk."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    """Delete a file or directory that nobody looks for by its name any more; what cannot be deleted stays."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
        return
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        logger.warning("%s cannot be removed: %s", path, error)
