"""The signals that ask a rank to stop: the main thread handles them late, the watching thread hears them at once."""

from __future__ import annotations

import os
import select
import signal
import socket
import threading
import time
from types import FrameType
from typing import Any

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopSignals:
    """SIGTERM and SIGINT of this process, from `listen` to `close`."""

    def __init__(self) -> None:
        self.number = 0
        """The signal that asked this rank to stop; 0 for none."""
        self._interrupts = {"main": 0.0, "thread": 0.0}
        """When each of the two threads saw an interrupt last."""
        self._reader, self._writer = socket.socketpair()
        self._handlers: dict[int, Any] = {}
        self._wakeup = -1

    def listen(self) -> None:
        """Take the signals over; outside of the main thread they cannot be, and are left as they are."""
        if threading.current_thread() is threading.main_thread():
            self._handlers = {number: signal.signal(number, self._on_signal) for number in STOP_SIGNALS}
            self._writer.setblocking(False)
            self._wakeup = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
            # a pool ends its workers with SIGTERM: they must obey at once, and their signals are not this rank's
            os.register_at_fork(after_in_child=self.give_back)

    def give_back(self) -> None:
        """Let the signals do what they did before `listen`."""
        if self._handlers:
            signal.set_wakeup_fd(self._wakeup)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}

    def close(self) -> None:
        """Free what `wait` needs; nobody may be waiting."""
        self._reader.close()
        self._writer.close()

    def ask_to_stop(self, number: int) -> None:
        """Note a signal; 0 changes nothing, also not one that comes in while this is called."""
        if number:
            self.number = self.number or number

    def wait(self, seconds: float) -> bytes | None:
        """For the watching thread: the numbers of the signals that come within `seconds`, None where none does."""
        if select.select([self._reader], [], [], seconds)[0]:
            return self._reader.recv(64)
        return None

    def wake(self) -> None:
        """Let `wait` return now, with a number that is no signal."""
        self._writer.send(b"\0")

    def hear(self, numbers: bytes) -> bool:
        """For the watching thread: note what `wait` returned; whether a second interrupt is among it."""
        again = False
        for number in numbers:
            if number in STOP_SIGNALS:
                self.ask_to_stop(number)
            again |= self._interrupted_again(number, "thread")
        return again

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
