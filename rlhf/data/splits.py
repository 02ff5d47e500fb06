"""Which files of a local directory belong to a split: told by their names, as the `datasets` library tells it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from rlhf.data.spec import DataError

_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
"""A word of a file's name -> the split that it means."""


def files_of_split(directory: Path, files: Sequence[Path], split: str | None) -> list[Path]:
    """The files whose names hold the word of `split`, such as `train-00000.parquet`; "train+test" are both splits.

    Without `split` all files. Raises DataError where they are of several splits then, or some of a split and some of
    none, where no file is of `split`, and where a name holds the words of several splits.
    """
    if split is None:
        named = sorted({name for file in files for name in _words(file) & set(_WORDS.values())})
        if len(named) > 1 and len(files) > 1:
            raise DataError(
                f"{directory}: its files are of the splits {', '.join(named)} ({_names(files)}); "
                f'say which: {{"path": "{directory}", "split": "{named[-1]}"}}, all of them: "{"+".join(named)}"'
            )
        unnamed = [file for file in files if not _words(file) & set(_WORDS.values())]
        if named and unnamed:
            raise DataError(
                f"{directory}: some of its files are of the split {', '.join(named)} and {_names(unnamed)} of none "
                f"({_names(files)}); give the files that are meant, each as a data set of its own, or "
                f'{{"path": "{directory}", "split": "{named[-1]}"}}'
            )
        return list(files)
    chosen: list[Path] = []
    for part in split.split("+"):
        word = part.strip().casefold()
        wanted = _WORDS.get(word, word)
        found = [file for file in files if wanted in _words(file)]
        if not found:
            raise DataError(f"{directory}: no file of the split `{part.strip()}`; its files: {_names(files) or 'none'}")
        for file in found:
            if wanted in _WORDS.values() and len(_words(file) & set(_WORDS.values())) > 1:
                raise DataError(
                    f"{file}: the name holds several splits; name the file itself as `path`, without `split`"
                )
        chosen += [file for file in found if file not in chosen]
    return sorted(chosen)


def _words(file: Path) -> set[str]:
    words = re.split(r"[\W\d_]+", file.name.casefold().partition(".")[0])
    return {_WORDS.get(word, word) for word in words if word}


def _names(files: Sequence[Path]) -> str:
    return ", ".join(file.name for file in files[:8]) + (", ..." if len(files) > 8 else "")
