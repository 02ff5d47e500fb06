"""The training states of a run on disk: whole or absent, verified when read, removed once newer ones are there."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from rlhf.checkpoint.atomic import beside, entries, put_in_place, remove_leftovers, sync_directory
from rlhf.checkpoint.manifest import damages, durable_digests, file_digest, read_manifest, write_manifest
from rlhf.config import ConfigError
from rlhf.distributed.collectives import all_gather_rows
from rlhf.distributed.log import logger
from rlhf.distributed.place import is_main, rank, world_size

CONTENT = "state.json"
_STATE = re.compile(r"step-(\d{8,})")

Write = Callable[[Path], None]


@dataclass(frozen=True)
class SavedState:
    """A whole training state: `path` holds what `world_size` ranks wrote, `content` is the JSON given to `save`."""

    step: int
    path: Path
    world_size: int
    content: dict[str, Any]


class StateDirectory:
    """The directory with the training states of one run, a subdirectory such as `step-00000120` each.

    All ranks share `directory` (one machine or a shared disk) and only one run uses it at a time (see
    `rlhf.checkpoint.run_lock`). The newest `keep_last` states stay, and for good those whose step is a multiple of
    `keep_every` (0: none). `device` is where the ranks' messages to one another travel.
    """

    def __init__(
        self, directory: Path, *, keep_last: int = 2, keep_every: int = 0, device: torch.device | str = "cpu"
    ) -> None:
        self.directory = Path(directory).absolute()
        self.keep_last = keep_last
        self.keep_every = keep_every
        self.device = device

    def save(self, step: int, content: Mapping[str, Any], *writers: Write) -> bool:
        """Write the state of `step`; False on every rank where the disk refused it on one. A collective.

        Each writer is called on every rank with a directory to write into, files of a name that no other rank uses.
        A writer that holds collectives does them before it touches a file: an OSError then keeps no rank waiting,
        since the other writers are called all the same. It is logged as an error, no half of the state remains, the
        earlier ones stay, and training can continue. Any other exception is raised on every rank. `content` (rank 0's)
        is kept as JSON. States of a later step, of a run that was resumed from an earlier one, are removed.
        """
        if self.keep_last < 1:
            raise ValueError(f"keep_last={self.keep_last}: where no state is kept none can be saved")
        try:
            part = Path(self._everywhere(lambda: self._begin(step), main_only=True)[0])
            self._everywhere(lambda: _call_all(writers, part))
            shares = self._everywhere(lambda: durable_digests(part))
            files = {name: digest for share in shares for name, digest in share.items()}
            self._everywhere(lambda: self._commit(part, step, content, files), main_only=True)
        except _RefusedError as refusal:
            if is_main():
                self._report(step, refusal)
            return False
        else:
            if is_main():
                self._prune(step)
            return True
        finally:
            if is_main():
                with suppress(OSError):  # the next save cleans up before it writes
                    remove_leftovers(self.directory)

    def newest(self) -> SavedState | None:
        """The newest state that is whole, None where there is none; every rank gets the same. A collective.

        Every byte is checked against the manifest, each rank reading its share. A damaged state is named in an error
        of the log and the one before is tried. Raises ConfigError where the directory cannot be listed.
        """

        def found() -> list[int]:
            remove_leftovers(self.directory)
            return self.steps()

        try:
            steps = self._everywhere(found, main_only=True)[0]
        except _RefusedError as refusal:
            raise ConfigError(
                f"the training states in {self.directory} cannot be listed ({refusal}): make the directory readable, "
                "or start anew with --resume never"
            ) from refusal
        for step in reversed(steps):
            state, wrong = self._verified(step)
            if state is not None:
                return state
            if is_main():
                logger.error("the training state %s cannot be used: %s", self._path(step), "; ".join(wrong))
        if steps and is_main():
            logger.error("none of the training states in %s can be used", self.directory)
        return None

    def steps(self) -> list[int]:
        """Steps with a state, in order, damaged ones included. No collective; OSError where it cannot be listed."""
        named = (_STATE.fullmatch(entry.name) for entry in entries(self.directory))
        return sorted(int(match[1]) for match in named if match)

    def clear(self, *, keep_permanent: bool) -> bool:
        """Remove the states (`keep_permanent`: but for those of `keep_every`); False where one could not be removed.

        No collective: rank 0 does it, the others pass.
        """
        if not is_main():
            return True
        going = self._listed()
        if going is None:
            return False
        done = [self._set_aside(step) for step in going if not (keep_permanent and self._permanent(step))]
        with suppress(OSError):  # what is hidden by now is none of the states
            remove_leftovers(self.directory)
            self.directory.rmdir()  # where it is empty
        return all(done)

    def _everywhere(self, work: Callable[[], Any], *, main_only: bool = False) -> list[Any]:
        """What `work` returned on every rank, in rank order, as JSON; `main_only`: None but for rank 0.

        Where it raised on one, every rank raises: _RefusedError when the disk was the reason on all that failed, else
        the failed rank its own error and the others one that names it.
        """
        message: dict[str, Any] = {"result": None}
        failure: Exception | None = None
        if is_main() or not main_only:
            try:
                message["result"] = work()
            except Exception as error:  # raised again below, after the other ranks have been told
                failure = error
                message = {"failed": f"rank {rank()}: {type(error).__name__}: {error}", "disk": _of_the_disk(error)}
        line = bytearray(json.dumps(message).encode() + b"\n")
        rows = all_gather_rows(torch.frombuffer(line, dtype=torch.uint8).to(self.device))
        messages = [json.loads(text) for text in rows.cpu().numpy().tobytes().splitlines()]
        failed = [entry for entry in messages if "failed" in entry]
        if not failed:
            return [entry["result"] for entry in messages]
        sentence = "; ".join(entry["failed"] for entry in failed)
        if all(entry["disk"] for entry in failed):
            raise _RefusedError(sentence) from failure
        if failure is not None and not _of_the_disk(failure):
            raise failure
        raise RuntimeError(f"another rank could not do its part of a training state: {sentence}")

    def _begin(self, step: int) -> str:
        """Make the directory that `step` is written into, under a name that no rank of a dead run still writes to."""
        remove_leftovers(self.directory)
        missing = [folder for folder in (self.directory, *self.directory.parents) if not folder.exists()]
        self.directory.mkdir(parents=True, exist_ok=True)
        for folder in missing:
            sync_directory(folder.parent)
        part = beside(self._path(step), "part")
        part.mkdir()
        return str(part)

    def _commit(self, part: Path, step: int, content: Mapping[str, Any], files: dict[str, Any]) -> None:
        """Seal the files in `part` with a manifest and let it take the state's name."""
        (part / CONTENT).write_text(json.dumps(content, indent=1), encoding="utf-8")
        files = {**files, CONTENT: file_digest(part / CONTENT, durable=True)}
        write_manifest(part, files, step=step, world_size=world_size())
        put_in_place(part, self._path(step))

    def _verified(self, step: int) -> tuple[SavedState | None, list[str]]:
        """The state of `step`, or None and what is wrong with it."""
        path = self._path(step)

        def read() -> dict[str, Any]:
            try:
                manifest = read_manifest(path)
                if manifest["step"] != step:
                    raise ValueError(f"it was saved as that of step {manifest['step']}")
                return manifest
            except ValueError as error:
                return {"wrong": str(error)}

        manifest = self._everywhere(read, main_only=True)[0]
        if "wrong" in manifest:
            return None, [manifest["wrong"]]
        shares = self._everywhere(lambda: damages(path, manifest["files"]))
        wrong = [sentence for share in shares for sentence in share]
        if wrong:
            return None, wrong
        content = self._everywhere(lambda: json.loads((path / CONTENT).read_bytes()), main_only=True)[0]
        return SavedState(step, path, manifest["world_size"], content), []

    def _report(self, step: int, refusal: Exception) -> None:
        steps = self._listed()
        left = f"the one of step {steps[-1]} stays" if steps else "there is no earlier one that could be named"
        logger.error(
            "the training state of step %d was NOT saved in %s: %s; %s; training goes on, the next save tries again",
            *(step, self.directory, refusal, left),
        )

    def _prune(self, step: int) -> None:
        steps = self._listed() or []
        last = [past for past in steps if past <= step][-self.keep_last :]
        for other in steps:
            if other > step or (other not in last and not self._permanent(other)):
                self._set_aside(other)

    def _listed(self) -> list[int] | None:
        """`steps`, or None and an error in the log."""
        try:
            return self.steps()
        except OSError as error:
            logger.error("the training states in %s cannot be listed: %s", self.directory, error)
            return None

    def _set_aside(self, step: int) -> bool:
        """Take a state's name away in one move, so that a kill during its deletion leaves no half of it."""
        path = self._path(step)
        try:
            path.rename(beside(path, "removed"))
        except OSError as error:
            logger.error("the old training state %s cannot be removed: %s", path, error)
            return False
        return True

    def _permanent(self, step: int) -> bool:
        return self.keep_every > 0 and step % self.keep_every == 0

    def _path(self, step: int) -> Path:
        return self.directory / f"step-{step:08d}"


class _RefusedError(Exception):
    """The disk refused a state; raised on every rank."""


def _of_the_disk(error: Exception) -> bool:
    """True for an OSError, and for one that safetensors passes on as its own."""
    if isinstance(error, SafetensorError):
        return re.search(r"I/O error|IoError", str(error)) is not None
    return isinstance(error, OSError)


def _call_all(writers: Iterable[Write], part: Path) -> None:
    """Call every writer, also after one failed: other ranks wait in its collectives. Raises the first failure."""
    failures = []
    for write in writers:
        try:
            write(part)
        except Exception as error:  # raised below
            failures.append(error)
    if failures:
        raise failures[0]
