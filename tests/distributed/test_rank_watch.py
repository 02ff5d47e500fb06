"""The watch of one rank: its signals, its sign of life, and what it makes of the others' (real ranks: tests/slow)."""

from __future__ import annotations

import errno
import faulthandler
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from rlhf.config import RunConfig
from rlhf.distributed import peers, rank_watch
from rlhf.distributed.rank_board import RankBoard, own_record
from rlhf.distributed.sign_of_life import SILENT_SECONDS


def test_a_second_interrupt_is_a_keyboard_interrupt_where_the_main_thread_is_free(watch):
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGINT)  # the same one, handed on by a launcher
    time.sleep(1.1)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)


@pytest.fixture
def watch(tmp_path, monkeypatch) -> Iterator[rank_watch.RankWatch]:
    """A watch whose thread does not look by itself."""
    monkeypatch.setattr(rank_watch, "LOOK_SECONDS", 1000.0)
    with rank_watch.watched_ranks(tmp_path, RunConfig(), "cpu"):
        yield rank_watch.current_watch()


def test_a_watch_ends_with_its_block_and_gives_the_handlers_back(tmp_path):
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    (tmp_path / "stopped.json").write_text("{}")
    with pytest.raises(ZeroDivisionError), rank_watch.watched_ranks(tmp_path, RunConfig(), "cpu"):
        assert not (tmp_path / "stopped.json").exists(), "a stage that starts is not a stopped one"
        assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] != before
        os.kill(os.getpid(), signal.SIGTERM)
        assert rank_watch.stop_requested()
        1 / 0  # noqa: B018
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before
    assert not rank_watch.stop_requested(), "the next run in this process is not asked to stop"
    assert RankBoard(tmp_path / ".ranks").read(0).finished


def test_the_ranks_meet_on_the_named_device_or_on_their_own(tmp_path, monkeypatch):
    met: list[str] = []
    monkeypatch.setattr(rank_watch, "init_world", lambda: torch.device("cuda:3"))
    monkeypatch.setattr(rank_watch, "all_reduce_max", lambda value, device: met.append(str(device)) or value)
    for device in ("cpu", None):
        with rank_watch.watched_ranks(tmp_path, RunConfig(), device):
            pass
    assert met == ["cpu", "cuda:3"]


def test_a_watch_looks_by_itself_until_it_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(rank_watch, "LOOK_SECONDS", 0.02)
    board = RankBoard(tmp_path / ".ranks")
    with rank_watch.watched_ranks(tmp_path, RunConfig(), "cpu"):
        first, until = board.read(0).pulse, time.monotonic() + 20
        while board.read(0).pulse < first + 3 and time.monotonic() < until:
            time.sleep(0.01)
        assert board.read(0).pulse >= first + 3


def test_a_signal_is_told_once_and_nothing_is_told_without_one(watch, caplog):
    def told():
        watch._look()
        return sum("finishing this step" in message for message in caplog.messages)

    assert told() == 0
    os.kill(os.getpid(), signal.SIGTERM)
    assert [told(), told()] == [1, 1]


def test_a_watch_ends_in_good_order_though_its_directory_was_removed(tmp_path):
    faulthandler.disable()  # pytest's own, in whose place the watch puts one that writes to a file
    try:
        with rank_watch.watched_ranks(tmp_path / "run", RunConfig(), "cpu"):
            assert faulthandler.is_enabled()
            shutil.rmtree(tmp_path / "run")
        assert not faulthandler.is_enabled()
    finally:
        faulthandler.enable(sys.__stderr__)


def test_a_forked_worker_ends_at_the_signal_its_parent_would_only_note(watch):
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writer, b"ready")
        time.sleep(30)
        os._exit(0)
    os.read(reader, 5)
    os.kill(child, signal.SIGTERM)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
    assert not rank_watch.stop_requested(), "the worker's signal is not the rank's"


def stand_still(watch: rank_watch.RankWatch, seconds: float = 100) -> str | None:
    for _ in range(2):
        watch.own.seconds += seconds
        watch.own.show(*watch.progress)
    return watch.peers.find_hang(watch.timeout_seconds)


def test_signs_of_life_need_no_free_space(watch, monkeypatch):
    """A board that cannot be written accuses nobody; one that can again starts from there."""
    watch.progress, watch.timeout_seconds = (1, "step 1"), 60
    with monkeypatch.context() as full:
        full.setattr(watch.board, "write", lambda record: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
        assert stand_still(watch) is None
    assert "rank 0 (pid" in stand_still(watch)
    assert stand_still(watch, seconds=20) is None, "20 seconds are no hang"
    watch.timeout_seconds = 0
    assert stand_still(watch) is None, "0 waits for ever"


def test_loading_may_take_any_time(watch):
    watch.timeout_seconds = 60
    assert stand_still(watch) is None
    watch.progress = (1, "step 1")
    assert stand_still(watch) is not None


def test_memory_kills_of_the_system_are_told_from_other_ones(tmp_path, watch, monkeypatch):
    monkeypatch.setattr(peers, "world_size", lambda: 2)
    child = subprocess.Popen(["sleep", "0"])
    peer = replace(own_record(1), pid=child.pid, process_started=1, beats=3, beat="step 3", pulse=1)
    child.wait()
    watch.board.write(peer)
    assert "was killed after step 3 without a word" in watch.peers.find_death(connection_lost=False)
    monkeypatch.setattr(peers, "memory_kills", lambda: watch.peers._memory_kills + 1)
    assert "was killed after step 3 by the system, because memory ran out" in watch.peers.find_death(
        connection_lost=False
    )
    watch.board.write(replace(peer, finished=True))
    assert watch.peers.find_death(connection_lost=False) is None


def test_a_rank_of_another_machine_is_gone_only_when_silent_and_the_connection_lost(watch, monkeypatch):
    monkeypatch.setattr(peers, "world_size", lambda: 2)
    watch.board.write(replace(own_record(1), host="elsewhere", pid=2**22 + 1, pulse=7, beats=1, beat="step 1"))
    assert watch.peers.find_death(connection_lost=False) is None
    watch.own.seconds += SILENT_SECONDS + 1
    assert watch.peers.find_death(connection_lost=False) is None, "a machine may be slow"
    found = watch.peers.find_death(connection_lost=True)
    assert "rank 1 (pid 4194305 on elsewhere) gives no sign of life any more" in found
