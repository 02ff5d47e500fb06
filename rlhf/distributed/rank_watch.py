"""Each rank watches the others: one that dies, fails or hangs ends the whole job with one message; a signal stops it.

A thread in every rank looks at the board of signs of life (`rank_board`) once a second. Whoever finds the reason for an
end first says it, and every rank leaves with its exit code (`verdict`), also out of a collective that never returns.
"""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import json
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn, TextIO

import torch

from rlhf.config import RunConfig
from rlhf.distributed.collectives import all_reduce_max
from rlhf.distributed.exit_codes import EXIT_INTERRUPTED
from rlhf.distributed.log import logger
from rlhf.distributed.peers import Peers
from rlhf.distributed.place import is_main, rank, world_size
from rlhf.distributed.rank_board import RankBoard, RankRecord, own_record
from rlhf.distributed.sign_of_life import SignOfLife
from rlhf.distributed.stop_signals import StopSignals
from rlhf.distributed.verdict import JobVerdict
from rlhf.distributed.world import init_world

LOOK_SECONDS = 1.0
"""Between two looks at the board, up to 16 ranks; many ranks look less often, so that the disk is not kept busy."""
LOST_PATIENCE_SECONDS = 20.0
"""How long a rank that lost its connection waits for the board to say who died."""


class Stopped(Exception):
    """A rank was asked to stop: `step` was finished, and the training state saved under `directory` where `saved`."""

    def __init__(self, step: int, directory: Path, *, saved: bool) -> None:
        self.step = step
        self.directory = directory
        self.saved = saved
        asked = _watch.signals.number if _watch is not None else 0
        self.signal_name = signal.Signals(asked).name if asked else "a request"
        state = f"training state saved in {directory}; go on with --resume auto" if saved else "no training state saved"
        super().__init__(f"stopped at step {step} by {self.signal_name}; {state}")


class RankWatch:
    """The thread that watches, and what the main thread tells it."""

    def __init__(self, directory: Path, timeout_minutes: float) -> None:
        self.directory = directory
        self.timeout_seconds = timeout_minutes * 60
        self.board = RankBoard(directory / ".ranks")
        self.own = SignOfLife(self.board, own_record(rank()), threading.get_ident())
        self.peers = Peers(self.own)
        self.verdict = JobVerdict(self.peers)
        self.signals = StopSignals()
        self.progress = (0, "")
        """Beats so far, and the last one's text."""
        self.saved_step: int | None = None
        self.connection_lost = False
        """Whether the main thread has lost its connection to other ranks."""
        self.closed = True
        self._thread = threading.Thread(target=self._keep_looking, name="rank-watch", daemon=True)
        self._told_to_stop = False
        self._crash_file: TextIO | None = None

    @property
    def record(self) -> RankRecord:
        """Who this rank is, and its last sign of life."""
        return self.own.record

    def start(self, device: torch.device | str) -> None:
        """Begin to watch; a collective, because rank 0 first clears away what an earlier run left."""
        if is_main():
            self.board.clear()
            (self.directory / "stopped.json").unlink(missing_ok=True)
        all_reduce_max(0, device)
        self.board.write(self.record)
        if not faulthandler.is_enabled():
            self._crash_file = self.board.crash_file(self.record.rank).open("w")
            faulthandler.enable(self._crash_file)
        self.signals.listen()
        self.closed = False
        self._thread.start()

    def close(self) -> None:
        """Leave the watch in good order: this rank's end is no death from now on."""
        if self.closed:
            return
        self.closed = True
        self.signals.give_back()
        self.signals.wake()
        self._thread.join()
        self.signals.close()
        if self._crash_file is not None:
            faulthandler.disable()
            self._crash_file.close()
            self.board.crash_file(self.record.rank).unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.board.write(dataclasses.replace(self.record, pulse=self.record.pulse + 1, finished=True))

    # ----------------------------------------------------------------------------------------- the watching thread

    def _keep_looking(self) -> None:
        interval = max(LOOK_SECONDS, LOOK_SECONDS * world_size() / 16)
        while not self.closed:
            heard = self.signals.wait(interval)
            if heard is not None:
                if self.signals.hear(heard):
                    self._end_interrupted()
            elif not self.closed:
                self._look()

    def _look(self) -> None:
        self.own.count_seconds()
        self.own.show(*self.progress)
        self.verdict.follow()
        found = self.peers.find_death(connection_lost=self.connection_lost)
        found = found or self.peers.find_hang(self.timeout_seconds)
        if found is not None:
            self.verdict.end_job(f"{found}.{self.where_to_resume()}")
        self.signals.ask_to_stop(self.board.stop_request())
        if self.signals.number and not self._told_to_stop:
            self._told_to_stop = True
            logger.warning(
                "%s: finishing this step, then saving and stopping; a second interrupt (Ctrl-C) ends at once",
                signal.Signals(self.signals.number).name,
            )

    def _end_interrupted(self) -> None:
        """End the job unless the main thread, which gets the same interrupt, does so first."""
        if world_size() == 1 and hasattr(sys, "ps1"):
            return  # a notebook: its other variables are worth more than a second's wait
        for _ in range(20):
            time.sleep(0.05)
            if self.closed:
                return
        self.verdict.end_job(f"interrupted {self.where()}.{self.where_to_resume()}", EXIT_INTERRUPTED)

    # ------------------------------------------------------------------------------------------------ how it ends

    def where(self) -> str:
        """`after step 12`, of this rank."""
        beats, text = self.progress
        return dataclasses.replace(self.record, beats=beats, beat=text).progress

    def where_to_resume(self) -> str:
        """A sentence on the last training state, as far as this run knows of one."""
        if self.saved_step is not None:
            return f" The last training state is that of step {self.saved_step}: go on with --resume auto."
        return " No training state has been saved yet." if self.progress[0] else ""

    def fail(self, sentence: str, code: int, error_trace: str = "") -> NoReturn:
        """End the whole job with `sentence`, which one rank prints, and with `error_trace` above it."""
        self.verdict.fail(sentence, code, error_trace)

    def wait_for_cause(self) -> None:
        """Let the thread find out who is gone, and end the process; returns when it has not found out."""
        self.connection_lost = True
        time.sleep(LOST_PATIENCE_SECONDS)


_watch: RankWatch | None = None
"""The watch of this process: signals and exit are a process's, and the loops only say `beat`."""


@contextmanager
def watched_ranks(directory: Path, run: RunConfig, device: torch.device | str | None = None) -> Iterator[None]:
    """Watch the ranks of the stage that writes into `directory` (on a disk all of them see), and heed signals.

    A collective at the start; `device` is that of the collectives (this rank's where it is not named). Call it once the
    directory is known to be this run's alone. Leaves `stopped.json` in `directory` when the body raises Stopped.
    """
    global _watch
    _watch = None  # an error before the board is this run's own must not be written on it
    watch = RankWatch(directory, run.rank_timeout_minutes)
    watch.start(init_world() if device is None else device)
    _watch = watch
    try:
        yield
    except Stopped as stop:
        if is_main():
            content = {"step": stop.step, "signal": stop.signal_name, "saved": stop.saved}
            with contextlib.suppress(OSError):  # a full disk: the stop is in good order all the same
                (directory / "stopped.json").write_text(json.dumps(content) + "\n", encoding="utf-8")
        watch.close()
        raise
    except (Exception, KeyboardInterrupt):
        if world_size() == 1:
            watch.close()
        raise  # the others are still watched: this error may come of the death of one of them
    except BaseException:
        watch.close()
        raise
    watch.close()


def beat(text: str) -> None:
    """Show progress: what the main thread has done last, such as `step 12`. Costs nothing; the thread passes it on."""
    if _watch is not None and not _watch.closed:
        _watch.progress = (_watch.progress[0] + 1, text)


def current_watch() -> RankWatch | None:
    """The watch of this process, also after it was left by an error; None where none has begun."""
    return _watch


def note_saved(step: int) -> None:
    """Remember that the training state of `step` is on disk, for the message of a job that ends."""
    if _watch is not None:
        _watch.saved_step = step


def stop_requested(device: torch.device | str = "cpu") -> bool:
    """True on every rank when one was asked to stop (SIGTERM, SIGINT, the file `.ranks/stop`). A collective."""
    if _watch is None or _watch.closed:
        return False
    asked = all_reduce_max(_watch.signals.number, device)
    _watch.signals.ask_to_stop(asked)
    return asked > 0
