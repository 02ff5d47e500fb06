"""How the processes of a job end together: one rank says why, and all leave with its exit code."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from typing import NoReturn

from tqdm import tqdm

from rlhf.distributed.exit_codes import EXIT_RANK_LOST
from rlhf.distributed.peers import Peers
from rlhf.distributed.place import is_main, world_size
from rlhf.distributed.rank_board import process_state

KILL_AFTER_SECONDS = 3.0
"""What the rank that ends the job leaves the others on its machine to go by themselves."""


class JobVerdict:
    """Ends this process with its job, by the first of its threads that has a reason to."""

    def __init__(self, peers: Peers) -> None:
        self.peers = peers
        self.board = peers.board
        self._ending = threading.Lock()
        """Held by the one thread of this process that ends it."""

    def follow(self) -> None:
        """Leave when another rank has ended the job; for the watching thread."""
        code = self.board.verdict(EXIT_RANK_LOST)
        if code is not None and self._ending.acquire(blocking=False):
            exit_now(code)

    def end_job(self, sentence: str, code: int = EXIT_RANK_LOST) -> None:
        """End the job from the watching thread; returns where the main thread is about to end this process."""
        if not self._ending.acquire(blocking=False):
            return
        if self.board.claim_verdict(code):
            with contextlib.suppress(OSError, ValueError):
                # past the progress bars' lock, which a stuck thread may hold
                print(f"\nerror: {sentence}", file=sys.stderr, flush=True)
            self._kill_the_stuck()
        exit_now(self.board.verdict(code) or code)

    def fail(self, sentence: str, code: int, error_trace: str) -> NoReturn:
        """End the job from the main thread; one rank prints `sentence`, and `error_trace` above it."""
        if not is_main():
            time.sleep(0.3)  # where all ranks fail alike, it is rank 0 that says so
        self._ending.acquire()
        if self.board.claim_verdict(code):
            say(f"{error_trace}error: {sentence}")
        else:
            code = self.board.verdict(code) or code
        if world_size() > 1:
            exit_now(code)
        sys.exit(code)

    def _kill_the_stuck(self) -> None:
        """Kill ranks of this machine that do not go by themselves: a stopped process, or one deep inside a library."""
        until = time.monotonic() + KILL_AFTER_SECONDS
        near = self.peers.on_this_machine()
        while any(process_state(peer) for peer in near) and time.monotonic() < until:
            time.sleep(0.1)
        for peer in near:
            if process_state(peer):
                with contextlib.suppress(OSError):
                    os.kill(peer.pid, signal.SIGKILL)


def say(text: str) -> None:
    """Print `text` on standard error, above a progress bar rather than into it."""
    with contextlib.suppress(OSError, ValueError):
        tqdm.write(text, file=sys.stderr)
        sys.stderr.flush()


def exit_now(code: int) -> NoReturn:
    """End the process now: interpreter and libraries would wait for collectives that never return."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)
