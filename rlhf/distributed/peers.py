"""The other ranks as this one sees them on the board: which of them died, and which one the others wait for."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rlhf.distributed.place import world_size
from rlhf.distributed.processes import memory_kills
from rlhf.distributed.rank_board import RankRecord, process_state, same_machine
from rlhf.distributed.sign_of_life import SILENT_SECONDS, SignOfLife

GONE_MACHINE_SECONDS = 120.0
"""Silence after which a process of another machine counts as gone; a network disk may show old files for a minute."""


class Peers:
    """The ranks beside `own`."""

    def __init__(self, own: SignOfLife) -> None:
        self.own = own
        self.board = own.board
        self._pulses: dict[int, tuple[int, float]] = {}
        self._memory_kills = memory_kills()

    def running(self) -> list[RankRecord]:
        """Those that have shown themselves and have not finished."""
        read = (self.board.read(number) for number in range(world_size()) if number != self.own.record.rank)
        peers = [peer for peer in read if peer is not None and not peer.finished]
        for peer in peers:
            if self._pulses.get(peer.rank, (-1, 0.0))[0] != peer.pulse or self.own.unwritten:
                self._pulses[peer.rank] = (peer.pulse, self.own.seconds)
        return peers

    def on_this_machine(self) -> list[RankRecord]:
        """Those of them whose pid means something here."""
        return [peer for peer in self.running() if same_machine(self.own.record, peer)]

    def find_death(self, *, connection_lost: bool) -> str | None:
        """A sentence on a rank that is gone without having finished; None where all are there.

        Where this rank has lost its connection to others, one that is merely silent counts as gone.
        """
        for peer in self.running():
            elsewhere = not same_machine(self.own.record, peer)
            if not elsewhere and not process_state(peer):
                latest = self.board.read(peer.rank)
                if latest is None or latest.finished or self.board.verdict(0) is not None:
                    continue
                return f"{peer.name} {self._cause_of_death(peer)}"
            patience = SILENT_SECONDS if connection_lost else GONE_MACHINE_SECONDS
            if (connection_lost or elsewhere) and self._silent_seconds(peer) > patience:
                return f"{peer.name} gives no sign of life any more; it was last heard {peer.progress}"
        return None

    def find_hang(self, timeout_seconds: float) -> str | None:
        """A sentence on the ranks at fault when no rank has made progress for `timeout_seconds` (0: for ever)."""
        if world_size() == 1 and hasattr(sys, "ps1"):
            return None  # a person at a notebook or a breakpoint takes any time
        ranks = [self.own.record, *self.running()]
        if not timeout_seconds or self.own.unwritten or not all(each.beats for each in ranks):
            return None  # before training, loading and tokenising may take any time
        if min(each.still_seconds + self._silent_seconds(each) for each in ranks) < timeout_seconds:
            return None
        states = {each.rank: self._stillness(each) for each in ranks}
        guilty = [each for each in ranks if states[each.rank] != "hangs"] or at_fault(ranks)
        parts = []
        for each in sorted(guilty, key=lambda each: each.rank):
            place = f", in {each.place}" if each.place else ""
            parts.append(f"{each.name} {states[each.rank]} {each.progress}{place}")
        rest = "; the others wait for it" if len(guilty) == 1 < len(ranks) else ""
        return f"no progress for {timeout_seconds / 60:g} minutes (rank_timeout_minutes): {'; '.join(parts)}{rest}"

    def _cause_of_death(self, peer: RankRecord) -> str:
        crash = self.board.crash(peer.rank)
        if crash:
            return f"crashed {peer.progress}: {crash}"
        if memory_kills() > self._memory_kills:
            return f"was killed {peer.progress} by the system, because memory ran out (see dmesg)"
        return (
            f"was killed {peer.progress} without a word: by kill -9, or by a limit on memory (see dmesg, "
            "and the limits of the container or the job)"
        )

    def _silent_seconds(self, peer: RankRecord) -> float:
        """Seconds since the last pulse of `peer`; never longer than this rank itself has looked."""
        return self.own.seconds - self._pulses[peer.rank][1] if peer.rank in self._pulses else 0.0

    def _stillness(self, each: RankRecord) -> str:
        if same_machine(self.own.record, each) and process_state(each) in ("T", "t"):
            return "is stopped (by SIGSTOP or a debugger)"
        return "shows no sign of life" if self._silent_seconds(each) > SILENT_SECONDS else "hangs"


def at_fault(ranks: Sequence[RankRecord]) -> list[RankRecord]:
    """Which of `ranks`, all standing still, the others wait for: those outside a collective, else those behind."""
    outside = [each for each in ranks if not each.in_collective]
    if outside and len(outside) < len(ranks):
        return outside
    fewest = min(each.beats for each in ranks)
    return [each for each in ranks if each.beats == fewest]
