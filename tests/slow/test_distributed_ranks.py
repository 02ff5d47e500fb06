"""Two real ranks over gloo: one that dies, fails or hangs ends both with one message; a signal stops both in order."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rlhf.distributed import exit_codes
from rlhf.distributed.rank_board import RankBoard
from tests.support.launch import ROOT, launch_ranks
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
    assert done.codes[victim] == -signal.SIGKILL and done.codes[1 - victim] == exit_codes.EXIT_RANK_LOST
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
    assert done.codes == [exit_codes.EXIT_RANK_LOST] * 2 and done.seconds < DEATH_SECONDS


def test_a_crash_inside_a_library_is_named(ranks):
    done = ranks("crash")
    message = the_message(done)
    assert "error: rank 1 (pid " in message and "crashed " in message and ": Segmentation fault" in message
    assert done.codes == [exit_codes.EXIT_RANK_LOST, -signal.SIGSEGV] and done.seconds < DEATH_SECONDS


@pytest.mark.parametrize(("scenario", "speaker"), [("bug", 1), ("all_bug", 0)])
def test_a_bug_shows_its_traceback_exactly_once(ranks, scenario, speaker):
    done = ranks(scenario)
    assert done.output.count("Traceback") == 1 and done.output.count(f"ValueError: a bug of rank {speaker}\n") == 1
    errors = [line for line in done.output.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and f"rank {speaker} (pid " in errors[0] and "ValueError: a bug of rank" in errors[0]
    assert done.codes == [exit_codes.EXIT_BUG] * 2 and done.seconds < DEATH_SECONDS


def test_a_users_mistake_on_one_rank_is_said_whichever_rank_it_is(ranks):
    done = ranks("user_error")
    assert the_message(done) == "error: this file is on one machine only"
    assert done.codes == [exit_codes.EXIT_USER] * 2


def test_a_rank_that_hangs_is_named_and_the_waiting_one_is_not(ranks):
    done = ranks("hang")
    message = the_message(done)
    assert "no progress for 0.03 minutes" in message and "; the others wait for it" in message
    hung = f"hangs after step {TROUBLE_AT - 1}, in tests/support/rank_worker.py:"
    assert "rank 1 (pid " in message and hung in message
    assert "rank 0" not in message and message.endswith(GO_ON)
    assert done.codes == [exit_codes.EXIT_RANK_LOST] * 2 and done.seconds < HANG_SECONDS


def test_a_stopped_rank_is_named_and_killed(ranks):
    done = ranks("train", lambda found: os.kill(found.pid(1), signal.SIGSTOP))
    message = the_message(done)
    assert "rank 1 (pid " in message and "is stopped (by SIGSTOP" in message and "rank 0" not in message
    assert done.codes == [exit_codes.EXIT_RANK_LOST, -signal.SIGKILL] and done.seconds < HANG_SECONDS


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
    assert done.codes == [exit_codes.EXIT_RANK_LOST] * 2 and done.seconds < HANG_SECONDS


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
    assert done.codes == [exit_codes.EXIT_INTERRUPTED, -signal.SIGKILL]
    errors = [line for line in done.output.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "error: interrupted after step " in errors[0] and errors[0].endswith(GO_ON)
    assert "Traceback" not in done.output and not (done.directory / "stopped.json").exists()


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
    done = launch_ranks(script, 2, tmp_path / "script", timeout=90)
    assert done.returncode != 0
    assert done.stdout.count("error: ") == 1 and "Traceback" not in done.stdout, done.stdout
    assert "error: rank 1 (pid " in done.stdout and "was killed after step " in done.stdout


ABORTS_AT_EXIT = """
import atexit, os
from rlhf.distributed.world import init_world
from rlhf.pipeline.stage_run import run_as_script

def main():
    init_world()
    atexit.register(os.abort)
    print("trained", flush=True)

run_as_script(main)
"""


def test_a_library_that_aborts_when_the_interpreter_ends_does_not_fail_a_finished_job(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(ABORTS_AT_EXIT)
    done = launch_ranks(script, 2, tmp_path)
    assert done.returncode == 0 and done.stdout.count("trained") == 2, done.stdout[-2000:]
