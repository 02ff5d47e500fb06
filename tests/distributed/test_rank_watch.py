"""Two real ranks over gloo: one that dies, fails or hangs ends both with one message; a signal stops both in order."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rlhf.config import RunConfig
from rlhf.distributed import failures, peers, rank_board, rank_watch, verdict
from rlhf.distributed.rank_board import RankBoard, own_record, process_state
from rlhf.distributed.sign_of_life import SILENT_SECONDS
from tests.support.launch import ROOT, run_ranks
from tests.support.rank_worker import SAVED_AT, TIMEOUT_MINUTES, TROUBLE_AT

WORKER = ROOT / "tests" / "support" / "rank_worker.py"
DEATH_SECONDS = 10.0
"""Within which the job ends after a rank died (stated in docs)."""
HANG_SECONDS = TIMEOUT_MINUTES * 60 + 15.0


class Ranks:
    """Two ranks of a scenario: their directory, what they said, their exit codes, and how long they took."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.codes: list[int] = []
        self.seconds = 0.0

    @property
    def output(self) -> str:
        return (self.directory / "output").read_text(encoding="utf-8")

    def pid(self, number: int) -> int:
        record = RankBoard(self.directory / ".ranks").read(number)
        assert record is not None
        return record.pid

    def wait_for_step(self, least: int = SAVED_AT, timeout: float = 60) -> None:
        board = RankBoard(self.directory / ".ranks")
        until = time.monotonic() + timeout
        while time.monotonic() < until:
            records = [board.read(number) for number in (0, 1)]
            if all(record is not None and record.beats >= least for record in records):
                return
            time.sleep(0.05)
        raise AssertionError(f"no step {least} within {timeout} s: {self.output}")


@pytest.fixture(scope="module")
def server() -> Iterator[subprocess.Popen[str]]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(name, None)
    process = subprocess.Popen(
        [sys.executable, str(WORKER)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    )
    yield process
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


@pytest.fixture
def ranks(server, tmp_path) -> Callable[..., Ranks]:
    """Run two ranks through a scenario; `act` is called once both train."""

    def run(scenario: str, act: Callable[[Ranks], None] | None = None) -> Ranks:
        found = Ranks(tmp_path)
        server.stdin.write(f"{tmp_path} {scenario}\n")
        server.stdin.flush()
        started = time.monotonic()
        if act is not None:
            found.wait_for_step()
            started = time.monotonic()
            act(found)
        found.codes = [int(code) for code in server.stdout.readline().split()]
        found.seconds = time.monotonic() - started
        return found

    return run


def the_message(ranks: Ranks) -> str:
    """The one message; anything else that was said fails."""
    lines = [line for line in ranks.output.splitlines() if line]
    assert len(lines) == 1 and lines[0].startswith("error: "), ranks.output
    return lines[0]


GO_ON = f"The last training state is that of step {SAVED_AT}: go on with --resume auto."


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_ends_the_other_with_one_message(ranks, victim):
    pids = []

    def kill(found: Ranks) -> None:
        pids.append(found.pid(victim))
        os.kill(pids[0], signal.SIGKILL)

    done = ranks("train", kill)
    message = the_message(done)
    assert f"rank {victim} (pid {pids[0]} on " in message and "was killed after step " in message
    assert message.endswith(GO_ON)
    assert done.codes[victim] == -signal.SIGKILL and done.codes[1 - victim] == verdict.EXIT_RANK_LOST
    assert done.seconds < DEATH_SECONDS


@pytest.mark.parametrize(
    ("scenario", "cause"),
    [
        ("cuda_memory", "ran out of device memory: CUDA out of memory. Tried to allocate 20.00 GiB; lower micro_batch"),
        ("memory", "ran out of memory: [enforce fail at alloc_cpu"),
        ("python_memory", "ran out of memory: MemoryError; lower micro_batch"),
    ],
)
def test_memory_that_runs_out_in_one_rank_is_one_message(ranks, scenario, cause):
    done = ranks(scenario)
    message = the_message(done)
    assert "error: rank 1 (pid " in message and cause in message and message.endswith(GO_ON)
    assert f"after step {TROUBLE_AT - 1}, in tests/support/rank_worker.py:" in message
    assert done.codes == [verdict.EXIT_RANK_LOST] * 2 and done.seconds < DEATH_SECONDS


def test_a_crash_inside_a_library_is_named(ranks):
    done = ranks("crash")
    message = the_message(done)
    assert "error: rank 1 (pid " in message and "crashed " in message and ": Segmentation fault" in message
    assert done.codes == [verdict.EXIT_RANK_LOST, -signal.SIGSEGV] and done.seconds < DEATH_SECONDS


@pytest.mark.parametrize(("scenario", "speaker"), [("bug", 1), ("all_bug", 0)])
def test_a_bug_shows_its_traceback_exactly_once(ranks, scenario, speaker):
    done = ranks(scenario)
    assert done.output.count("Traceback") == 1 and done.output.count(f"ValueError: a bug of rank {speaker}\n") == 1
    errors = [line for line in done.output.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and f"rank {speaker} (pid " in errors[0] and "ValueError: a bug of rank" in errors[0]
    assert done.codes == [verdict.EXIT_BUG] * 2 and done.seconds < DEATH_SECONDS


def test_a_users_mistake_on_one_rank_is_said_whichever_rank_it_is(ranks):
    done = ranks("user_error")
    assert the_message(done) == "error: this file is on one machine only"
    assert done.codes == [verdict.EXIT_USER] * 2


def test_a_rank_that_hangs_is_named_and_the_waiting_one_is_not(ranks):
    done = ranks("hang")
    message = the_message(done)
    assert "no progress for 0.03 minutes" in message and "; the others wait for it" in message
    hung = f"hangs after step {TROUBLE_AT - 1}, in tests/support/rank_worker.py:"
    assert "rank 1 (pid " in message and hung in message
    assert "rank 0" not in message and message.endswith(GO_ON)
    assert done.codes == [verdict.EXIT_RANK_LOST] * 2 and done.seconds < HANG_SECONDS


def test_a_stopped_rank_is_named_and_killed(ranks):
    done = ranks("train", lambda found: os.kill(found.pid(1), signal.SIGSTOP))
    message = the_message(done)
    assert "rank 1 (pid " in message and "is stopped (by SIGSTOP" in message and "rank 0" not in message
    assert done.codes == [verdict.EXIT_RANK_LOST, -signal.SIGKILL] and done.seconds < HANG_SECONDS


def test_a_pause_of_both_ranks_is_no_hang(ranks):
    def pause(found: Ranks) -> None:
        pids = [found.pid(number) for number in (0, 1)]
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        time.sleep(TIMEOUT_MINUTES * 60 + 2)
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
        time.sleep(1.5)
        os.kill(pids[0], signal.SIGTERM)

    done = ranks("train", pause)
    assert done.codes == [0, 0] and "error" not in done.output


def test_a_deadlock_of_all_ranks_ends(ranks):
    done = ranks("all_hang")
    message = the_message(done)
    assert "rank 0 (pid " in message and "; rank 1 (pid " in message and message.count(" hangs ") == 2
    assert done.codes == [verdict.EXIT_RANK_LOST] * 2 and done.seconds < HANG_SECONDS


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_one_rank_stops_both_after_the_same_step(ranks, number):
    def ask(found: Ranks) -> None:
        for _ in range(2):  # a launcher repeats it, and that changes nothing
            os.kill(found.pid(1), number)

    done = ranks("train", ask)
    assert done.codes == [0, 0], done.output
    steps = {(done.directory / f"stopped_{rank}").read_text() for rank in (0, 1)}
    assert len(steps) == 1
    step = int(steps.pop())
    sentence = f"stopped at step {step} by {number.name}; training state saved in {done.directory}; go on with --resume"
    assert sentence in done.output and "error" not in done.output
    noted = json.loads((done.directory / "stopped.json").read_text())
    assert noted == {"step": step, "signal": number.name, "saved": True}


def test_a_file_stops_ranks_that_no_signal_reaches(ranks):
    done = ranks("train", lambda found: (found.directory / ".ranks" / "stop").write_text("SIGHUP"))
    assert done.codes == [0, 0] and "by SIGHUP; training state saved" in done.output


def test_a_second_interrupt_ends_at_once_even_inside_a_collective(ranks):
    def interrupt_twice(found: Ranks) -> None:
        pid = found.pid(0)
        os.kill(found.pid(1), signal.SIGSTOP)  # so that the first one waits for a step that does not end
        for _ in range(2):
            os.kill(pid, signal.SIGINT)
            time.sleep(1.2)

    done = ranks("train", interrupt_twice)
    assert done.codes == [verdict.EXIT_INTERRUPTED, -signal.SIGKILL]
    errors = [line for line in done.output.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "error: interrupted after step " in errors[0] and errors[0].endswith(GO_ON)
    assert "Traceback" not in done.output and not (done.directory / "stopped.json").exists()


def test_a_second_interrupt_is_a_keyboard_interrupt_where_the_main_thread_is_free(watch):
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGINT)  # the same one, handed on by a launcher
    time.sleep(1.1)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)


# ------------------------------------------------------------------------------------------ the real launcher


def test_under_the_launcher_a_killed_rank_ends_the_job_with_its_name(tmp_path):
    script = f"""
import os, signal, sys, threading
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from tests.support import rank_worker
if os.environ["RANK"] == "1":
    threading.Timer(3.0, os.kill, (os.getpid(), signal.SIGKILL)).start()
rank_worker.main(Path({str(tmp_path)!r}), "train")
"""
    done = run_ranks(script, 2, tmp_path / "script", timeout=90)
    assert done.returncode != 0
    assert done.stdout.count("error: ") == 1 and "Traceback" not in done.stdout, done.stdout
    assert "error: rank 1 (pid " in done.stdout and "was killed after step " in done.stdout


# ------------------------------------------------------------------------------------------------ one process


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


def test_a_later_process_of_the_same_pid_is_not_the_rank(tmp_path):
    record = own_record(0)
    assert process_state(record) in ("R", "S", "D")
    assert process_state(replace(record, process_started=record.process_started + 1)) == ""
    assert process_state(replace(record, pid=2**22 + 1)) == ""


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


def test_one_verdict_only(tmp_path):
    board = RankBoard(tmp_path / "board")
    board.clear()
    assert board.verdict(9) is None
    assert board.claim_verdict(3) and not board.claim_verdict(2)
    assert board.verdict(9) == 3
    board.clear()
    assert board.verdict(9) is None and board.claim_verdict(2)


def test_a_long_or_korean_text_fits_into_a_record(tmp_path):
    board = RankBoard(tmp_path)
    record = replace(own_record(3), beat="단계 " * 500, place="x" * 5000)
    board.write(record)
    board.write(replace(record, beat="짧다", pulse=2))
    assert (board.read(3).beat, board.read(3).pulse) == ("짧다", 2)
    assert (tmp_path / "rank_00003.json").stat().st_size == rank_board._RECORD_BYTES


# ------------------------------------------------------------------------------------- what an exception means


def raised(error: BaseException) -> BaseException:
    try:
        raise error
    except BaseException as caught:
        return caught


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer"), "peer"),
        (RuntimeError("[pair.cc:1] Timed out waiting 1800000ms for recv operation to complete"), "peer"),
        (torch.distributed.DistBackendError("NCCL error in: ProcessGroupNCCL.cpp:3385, remote process exited"), "peer"),
        (torch.distributed.DistNetworkError("failed to recv, got 0 bytes"), "peer"),
        (RuntimeError("rank 0 could not make /x: OSError"), "peer"),
        (OSError("rank 0 could not write /x"), "peer"),
        (ValueError("Connection closed by peer"), "bug"),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), "bug"),
        (FileNotFoundError(errno.ENOENT, "No such file", "/x"), "bug"),
        (RuntimeError("CUDA error: out of memory"), "memory"),
        (torch.distributed.DistBackendError("NCCL error: Cuda failure 2 'out of memory'"), "memory"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "memory"),
        (OSError(errno.ENOSPC, "cannot write /x: No space left on device"), "storage"),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), "storage"),
        (OSError(errno.EROFS, "Read-only file system", "/x"), "storage"),
    ],
)
def test_what_an_exception_means(error, kind):
    error = raised(error)
    memory, storage = failures.memory_failure(error), failures.storage_failure(error)
    found = "storage" if storage else "memory" if memory else "peer" if failures.is_consequence(error) else "bug"
    assert found == kind
    wrapped = raised(RuntimeError("saving failed"))
    wrapped.__cause__ = error
    if kind in ("memory", "storage"):
        assert (failures.memory_failure if memory else failures.storage_failure)(wrapped) == memory or storage


def test_a_full_disk_under_safetensors_is_a_full_disk(tmp_path):
    """safetensors raises an error of its own, without an errno."""
    script = f"""
import resource, signal, torch
from safetensors.torch import save_file
from rlhf.distributed.failures import storage_failure
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    save_file({{"a": torch.zeros(10000)}}, {str(tmp_path / "x.safetensors")!r})
except Exception as error:
    assert not isinstance(error, OSError)
    print(storage_failure(error))
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "File too large" in done.stdout and "raise the limit" in done.stdout, done.stderr
