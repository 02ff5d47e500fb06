"""The bytes of a data file, and what may be wrong with the file as a whole."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from rlhf.data.spec import DataError

BOM = b"\xef\xbb\xbf"
SAVE_AS_UTF8 = "save the file as UTF-8 (Korean files are often CP949: `iconv -f cp949 -t utf-8`)"
LFS_HEADER = b"version https://git-lfs"


def open_unpacked(path: Path) -> IO[bytes]:
    """The bytes of a file, unpacked where they are gzip data (told by their first two bytes, not by the name)."""
    with path.open("rb") as stream:
        packed = stream.read(2) == b"\x1f\x8b"
    return gzip.open(path, "rb") if packed else path.open("rb")  # type: ignore[return-value]


@contextmanager
def named_file_errors(name: str) -> Iterator[None]:
    """What the disk refuses, and broken gzip data, as a DataError that names the file."""
    try:
        yield
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{name}: broken or cut gzip data ({error}); copy or download the file again") from error
    except OSError as error:
        raise DataError(f"{name}: cannot be read ({error.strerror or error})") from error


def refuse_nothing(head: bytes, name: str) -> None:
    """DataError for a file that begins with `head` and holds no data: empty, or a git-lfs pointer."""
    if not head:
        raise DataError(f"{name}: empty file")
    if head.startswith(LFS_HEADER):
        raise DataError(f"{name}: a git-lfs pointer, not the data; run `git lfs pull` where the file came from")


def refuse_no_text(head: bytes, name: str, needed: str) -> None:
    """DataError for a file that begins with `head` and is UTF-16 or binary; `needed` says what would be read."""
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError(f"{name}: not UTF-8 (it begins with a UTF-16 mark); save it as UTF-8")
    if b"\0" in head:
        raise DataError(f"{name}: a binary file; needed: {needed}, plain or gzip")
