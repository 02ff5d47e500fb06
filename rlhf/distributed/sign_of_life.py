"""What a rank tells of itself: that its process runs, and how far its main thread has come."""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from rlhf.distributed.failures import short_path
from rlhf.distributed.rank_board import RankBoard, RankRecord

SILENT_SECONDS = 8.0
"""A process that shows no pulse for this long is stopped, swapped out, or on a machine that is gone."""
_STANDARD_LIBRARY = str(Path(os.__file__).parent)


class SignOfLife:
    """This rank's record on the board; written by the watching thread, which looks at the main thread's stack."""

    def __init__(self, board: RankBoard, record: RankRecord, main_thread: int) -> None:
        self.board = board
        self.record = record
        self.seconds = 0.0
        """How long this process has run; see `count_seconds`."""
        self.unwritten = False
        """Whether the disk refused the last record: the others may count this rank as silent."""
        self._main_thread = main_thread
        self._counted_at = time.monotonic()
        self._seen: Any = None
        self._progress_at = 0.0

    def count_seconds(self) -> None:
        """Count the time this process ran; while it was stopped as a whole it could not see anybody's pulse."""
        now = time.monotonic()
        self.seconds += min(now - self._counted_at, SILENT_SECONDS / 2)
        self._counted_at = now

    def show(self, beats: int, text: str) -> None:
        """Write the record anew; `beats` and `text` are what the main thread has said of its progress."""
        stack = _stack(sys._current_frames().get(self._main_thread))
        seen = (beats, [(id(frame.f_code), frame.f_lasti) for frame in stack])
        if seen != self._seen:
            self._seen, self._progress_at = seen, self.seconds
        self.record = dataclasses.replace(
            self.record,
            pulse=self.record.pulse + 1,
            beats=beats,
            beat=text,
            still_seconds=self.seconds - self._progress_at,
            place=_place(stack),
            in_collective=any("/torch/distributed/" in frame.f_code.co_filename for frame in stack[:6]),
        )
        try:
            self.board.write(self.record)
            self.unwritten = False
        except OSError:
            self.unwritten = True


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
