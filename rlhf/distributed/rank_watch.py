"""Each rank watches the others: one that dies, fails or hangs ends the whole job with one message; a signal stops it.

A thread in every rank looks at the board of signs of life (`rank_board`) once a second. Whoever finds the reason for an
end first says it, and every rank leaves with its exit code, also out of a collective that will never return:

    0  finished, or stopped in good order                    1  a bug, with its traceback
    2  something the user can mend                           130  interrupted a second time
    3  a rank died, hung or ran out of memory (a restart may help)
"""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import json
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, TextIO

import torch
from tqdm import tqdm

from rlhf.config import RunConfig
from rlhf.distributed import all_reduce_max, init_world, is_main, logger, rank, world_size
from rlhf.distributed.failures import short_path
from rlhf.distributed.rank_board import RankBoard, RankRecord, memory_kills, own_record, process_state, same_machine

EXIT_BUG, EXIT_USER, EXIT_RANK_LOST, EXIT_INTERRUPTED = 1, 2, 3, 130
LOOK_SECONDS = 1.0
"""Between two looks at the board, up to 16 ranks; many ranks look less often, so that the disk is not kept busy."""
SILENT_SECONDS = 8.0
"""A process that shows no pulse for this long is stopped, swapped out, or on a machine that is gone."""
GONE_MACHINE_SECONDS = 120.0
"""Silence after which a process of another machine counts as gone; a network disk may show old files for a minute."""
LOST_PATIENCE_SECONDS = 20.0
"""How long a rank that lost its connection waits for the board to say who died."""
KILL_AFTER_SECONDS = 3.0
"""What the rank that ends the job leaves the others on its machine to go by themselves."""
_STANDARD_LIBRARY = str(Path(os.__file__).parent)
_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopped(Exception):
    """A rank was asked to stop: `step` was finished, and the training state saved under `directory` where `saved`."""

    def __init__(self, step: int, directory: Path, *, saved: bool) -> None:
        self.step = step
        self.directory = directory
        self.saved = saved
        self.signal_name = signal.Signals(_watch.signum).name if _watch is not None and _watch.signum else "a request"
        state = f"training state saved in {directory}; go on with --resume auto" if saved else "no training state saved"
        super().__init__(f"stopped at step {step} by {self.signal_name}; {state}")


class RankWatch:
    """This rank's sign of life, and its eye on those of the others."""

    def __init__(self, directory: Path, timeout_minutes: float) -> None:
        self.directory = directory
        self.board = RankBoard(directory / ".ranks")
        self.timeout_seconds = timeout_minutes * 60
        self.record = own_record(rank())
        """Written by the thread alone; what the main thread has to say is in the two that follow."""
        self.progress = (0, "")
        """Beats so far, and the last one's text."""
        self.saved_step: int | None = None
        self.signum = 0
        """The signal that asked this rank to stop; 0 for none."""
        self._interrupts = {"main": 0.0, "thread": 0.0}
        """When each of the two saw an interrupt last."""
        self.lost = False
        """Whether the main thread has lost its connection to other ranks."""
        self.closed = True
        self.ending = threading.Lock()
        """Held by the one thread of this process that ends it."""
        self._main = threading.get_ident()
        self._signal_reader, self._signal_writer = socket.socketpair()
        self._thread = threading.Thread(target=self._keep_looking, name="rank-watch", daemon=True)
        self._seconds = 0.0
        self._looked = time.monotonic()
        self._fingerprint: Any = None
        self._progress_at = 0.0
        self._pulses: dict[int, tuple[int, float]] = {}
        self._unwritten = False
        self._told = False
        self._memory_kills = memory_kills()
        self._crash_file: TextIO | None = None
        self._handlers: dict[int, Any] = {}
        self._wakeup = -1

    # ------------------------------------------------------------------------------------------ start and end

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
        if threading.current_thread() is threading.main_thread():
            self._handlers = {number: signal.signal(number, self._on_signal) for number in _STOP_SIGNALS}
            self._signal_writer.setblocking(False)
            self._wakeup = signal.set_wakeup_fd(self._signal_writer.fileno(), warn_on_full_buffer=False)
            os.register_at_fork(after_in_child=self._leave_forked_worker)
        self.closed = False
        self._thread.start()

    def close(self) -> None:
        """Leave the watch in good order: this rank's end is no death from now on."""
        if self.closed:
            return
        self.closed = True
        self._give_handlers_back()
        self._signal_writer.send(b"\0")
        self._thread.join()
        self._signal_reader.close()
        self._signal_writer.close()
        if self._crash_file is not None:
            faulthandler.disable()
            self._crash_file.close()
            self.board.crash_file(self.record.rank).unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.board.write(dataclasses.replace(self.record, pulse=self.record.pulse + 1, finished=True))

    def _give_handlers_back(self) -> None:
        if self._handlers:
            signal.set_wakeup_fd(self._wakeup)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _leave_forked_worker(self) -> None:
        """A pool ends its workers with SIGTERM: they must obey at once, and their signals are not this rank's."""
        if not self.closed:
            self._give_handlers_back()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.ask_to_stop(number)
        if self._interrupted_again(number, "main"):
            raise KeyboardInterrupt

    def _interrupted_again(self, number: int, seen_by: str) -> bool:
        """Whether `number` is an interrupt after another one, and not the same one handed on by a launcher."""
        before = self._interrupts[seen_by]
        if number == signal.SIGINT:
            self._interrupts[seen_by] = time.monotonic()
        return number == signal.SIGINT and before > 0 and self._interrupts[seen_by] - before > 1

    def ask_to_stop(self, number: int) -> None:
        """Note a signal; 0 changes nothing, also not one that comes in while this is called."""
        if number:
            self.signum = self.signum or number

    # -------------------------------------------------------------------------------------------- the thread

    def _keep_looking(self) -> None:
        interval = max(LOOK_SECONDS, LOOK_SECONDS * world_size() / 16)
        while not self.closed:
            if select.select([self._signal_reader], [], [], interval)[0]:
                self._hear(self._signal_reader.recv(64))
            elif not self.closed:
                self._look()

    def _hear(self, signals: bytes) -> None:
        """Signals as they arrive: the main thread handles them only when it comes back from where it is."""
        for number in signals:
            if number in _STOP_SIGNALS:
                self.ask_to_stop(number)
            if self._interrupted_again(number, "thread"):
                self._end_interrupted()

    def _end_interrupted(self) -> None:
        """End the job unless the main thread, which gets the same interrupt, does so first."""
        if world_size() == 1 and hasattr(sys, "ps1"):
            return  # a notebook: its other variables are worth more than a second's wait
        for _ in range(20):
            time.sleep(0.05)
            if self.closed:
                return
        self._end_job(f"interrupted {self.where()}", EXIT_INTERRUPTED)

    def _look(self) -> None:
        self._count_seconds()
        self._show_sign_of_life()
        code = self.board.verdict(EXIT_RANK_LOST)
        if code is not None:
            self._leave(code)
        found = self._find_death() or self._find_hang()
        if found is not None:
            self._end_job(found)
        self.ask_to_stop(self.board.stop_request())
        if self.signum and not self._told:
            self._told = True
            logger.warning(
                "%s: finishing this step, then saving and stopping; a second interrupt (Ctrl-C) ends at once",
                signal.Signals(self.signum).name,
            )

    def _count_seconds(self) -> None:
        """Count the time this process ran; while it was stopped as a whole it could not see anybody's pulse."""
        now = time.monotonic()
        self._seconds += min(now - self._looked, SILENT_SECONDS / 2)
        self._looked = now

    def _show_sign_of_life(self) -> None:
        frame = sys._current_frames().get(self._main)
        stack = _stack(frame)
        beats, text = self.progress
        fingerprint = (beats, [(id(each.f_code), each.f_lasti) for each in stack])
        if fingerprint != self._fingerprint:
            self._fingerprint, self._progress_at = fingerprint, self._seconds
        self.record = dataclasses.replace(
            self.record,
            pulse=self.record.pulse + 1,
            beats=beats,
            beat=text,
            still_seconds=self._seconds - self._progress_at,
            place=_place(stack),
            in_collective=any("/torch/distributed/" in each.f_code.co_filename for each in stack[:6]),
        )
        try:
            self.board.write(self.record)
            self._unwritten = False
        except OSError:
            self._unwritten = True

    def _peers(self) -> list[RankRecord]:
        """The other ranks that have shown themselves and have not finished."""
        read = (self.board.read(number) for number in range(world_size()) if number != self.record.rank)
        peers = [peer for peer in read if peer is not None and not peer.finished]
        for peer in peers:
            if self._pulses.get(peer.rank, (-1, 0.0))[0] != peer.pulse or self._unwritten:
                self._pulses[peer.rank] = (peer.pulse, self._seconds)
        return peers

    def _silent_seconds(self, peer: RankRecord) -> float:
        """Seconds since `peer`'s last pulse; never longer than this rank itself has looked."""
        return self._seconds - self._pulses[peer.rank][1] if peer.rank in self._pulses else 0.0

    def _find_death(self) -> str | None:
        """A sentence on a rank that is gone without having finished."""
        for peer in self._peers():
            if same_machine(self.record, peer) and not process_state(peer):
                latest = self.board.read(peer.rank)
                if latest is None or latest.finished or self.board.verdict(EXIT_RANK_LOST) is not None:
                    continue
                crash = self.board.crash(peer.rank)
                if crash:
                    cause = f"crashed {peer.progress}: {crash}"
                elif memory_kills() > self._memory_kills:
                    cause = f"was killed {peer.progress} by the system, because memory ran out (see dmesg)"
                else:
                    cause = (
                        f"was killed {peer.progress} without a word: by kill -9, or by a limit on memory (see dmesg, "
                        "and the limits of the container or the job)"
                    )
                return f"{peer.name} {cause}"
            patience = SILENT_SECONDS if self.lost else GONE_MACHINE_SECONDS
            elsewhere = not same_machine(self.record, peer)
            if (self.lost or elsewhere) and self._silent_seconds(peer) > patience:
                return f"{peer.name} gives no sign of life any more; it was last heard {peer.progress}"
        return None

    def _find_hang(self) -> str | None:
        """A sentence on the ranks at fault when no rank has made progress for the time-out."""
        if world_size() == 1 and hasattr(sys, "ps1"):
            return None  # a person at a notebook or a breakpoint takes any time
        ranks = [self.record, *self._peers()]
        if not self.timeout_seconds or self._unwritten or not all(each.beats for each in ranks):
            return None  # before training, loading and tokenising may take any time
        if min(each.still_seconds + self._silent_seconds(each) for each in ranks) < self.timeout_seconds:
            return None
        states = {each.rank: self._stillness(each) for each in ranks}
        guilty = [each for each in ranks if states[each.rank] != "hangs"] or at_fault(ranks)
        parts = []
        for each in sorted(guilty, key=lambda each: each.rank):
            place = f", in {each.place}" if each.place else ""
            parts.append(f"{each.name} {states[each.rank]} {each.progress}{place}")
        minutes = self.timeout_seconds / 60
        rest = "; the others wait for it" if len(guilty) == 1 < len(ranks) else ""
        return f"no progress for {minutes:g} minutes (rank_timeout_minutes): {'; '.join(parts)}{rest}"

    def _stillness(self, each: RankRecord) -> str:
        if same_machine(self.record, each) and process_state(each) in ("T", "t"):
            return "is stopped (by SIGSTOP or a debugger)"
        return "shows no sign of life" if self._silent_seconds(each) > SILENT_SECONDS else "hangs"

    def _end_job(self, sentence: str, code: int = EXIT_RANK_LOST) -> None:
        if not self.ending.acquire(blocking=False):
            return  # the main thread is about to end this process
        if self.board.claim_verdict(code):
            with contextlib.suppress(
                OSError, ValueError
            ):  # past the progress bars' lock, which a stuck thread may hold
                print(f"\nerror: {sentence}.{self.where_to_go_on()}", file=sys.stderr, flush=True)
            self._kill_the_stuck()
        self._exit(self.board.verdict(code) or code)

    def _kill_the_stuck(self) -> None:
        """Kill ranks of this machine that do not go by themselves: a stopped process, or one deep inside a library."""
        until = time.monotonic() + KILL_AFTER_SECONDS
        near = [peer for peer in self._peers() if same_machine(self.record, peer)]
        while any(process_state(peer) for peer in near) and time.monotonic() < until:
            time.sleep(0.1)
        for peer in near:
            if process_state(peer):
                with contextlib.suppress(OSError):
                    os.kill(peer.pid, signal.SIGKILL)

    def _leave(self, code: int) -> None:
        if self.ending.acquire(blocking=False):
            self._exit(code)

    def _exit(self, code: int) -> NoReturn:
        """End the process now: interpreter and libraries would wait for collectives that never return."""
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)

    # ----------------------------------------------------------------------------------- the main thread's end

    def where(self) -> str:
        """`after step 12`, of this rank."""
        beats, text = self.progress
        return dataclasses.replace(self.record, beats=beats, beat=text).progress

    def where_to_go_on(self) -> str:
        """A sentence on the last training state, as far as this run knows of one."""
        if self.saved_step is not None:
            return f" The last training state is that of step {self.saved_step}: go on with --resume auto."
        return " No training state has been saved yet." if self.progress[0] else ""

    def fail(self, sentence: str, code: int, error_trace: str = "") -> NoReturn:
        """End the whole job with `sentence`, which one rank prints, and with `error_trace` above it."""
        if not is_main():
            time.sleep(0.3)  # where all ranks fail alike, it is rank 0 that says so
        self.ending.acquire()
        if self.board.claim_verdict(code):
            say(f"{error_trace}error: {sentence}")
        else:
            code = self.board.verdict(code) or code
        if world_size() > 1:
            self._exit(code)
        sys.exit(code)

    def wait_for_cause(self) -> None:
        """Let the thread find out who is gone, and end the process; returns when it has not found out."""
        self.lost = True
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
    asked = all_reduce_max(_watch.signum, device)
    _watch.ask_to_stop(asked)
    return asked > 0


def at_fault(ranks: Sequence[RankRecord]) -> list[RankRecord]:
    """Which of `ranks`, all standing still, the others wait for: those outside a collective, else those behind."""
    outside = [each for each in ranks if not each.in_collective]
    if outside and len(outside) < len(ranks):
        return outside
    fewest = min(each.beats for each in ranks)
    return [each for each in ranks if each.beats == fewest]


def say(text: str) -> None:
    """Print `text` on standard error, above a progress bar rather than into it."""
    with contextlib.suppress(OSError, ValueError):
        tqdm.write(text, file=sys.stderr)
        sys.stderr.flush()


def _stack(frame: FrameType | None) -> list[FrameType]:
    """Frames from the innermost outwards."""
    frames = []
    while frame is not None:
        frames.append(frame)
        frame = frame.f_back
    return frames


def _place(stack: Sequence[FrameType]) -> str:
    """The innermost line outside of installed libraries."""
    for frame in stack:
        name = frame.f_code.co_filename
        if "site-packages" not in name and not name.startswith(("<", _STANDARD_LIBRARY)):
            return f"{short_path(name)}:{frame.f_lineno} {frame.f_code.co_name}"
    return ""
