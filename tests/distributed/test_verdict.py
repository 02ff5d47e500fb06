"""Which thread of a process ends it, and what it says: each case in a process of its own, which ends."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SETTING = """
import sys
import threading
from pathlib import Path
from rlhf.distributed.peers import Peers
from rlhf.distributed.rank_board import RankBoard, own_record
from rlhf.distributed.sign_of_life import SignOfLife
from rlhf.distributed.verdict import JobVerdict

board = RankBoard(Path(sys.argv[1]))
board.clear()
verdict = JobVerdict(Peers(SignOfLife(board, own_record(0), threading.get_ident())))
"""


def ended(directory: Path, code: str) -> tuple[int, str, str]:
    """The status, output and errors of a process that runs `code` with a `verdict` and its `board`."""
    words = [sys.executable, "-c", SETTING + code, str(directory / "board")]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("late", ["verdict.follow()", "verdict.end_job('rank 1 is silent')"])
def test_the_watching_thread_lets_a_main_thread_that_fails_end_the_process(tmp_path, late):
    status, out, error = ended(
        tmp_path,
        f"""
try:
    verdict.fail("the disk is full", 5, "trace\\n")
finally:
    {late}
    print("cleaned up")
""",
    )
    assert (status, out) == (5, "cleaned up\n")
    assert error == "trace\nerror: the disk is full\n"


def test_a_job_that_another_rank_has_ended_is_left_with_its_code_and_without_a_word(tmp_path):
    status, out, error = ended(tmp_path, "board.claim_verdict(9)\nverdict.follow()\nprint('still here')")
    assert (status, out, error) == (9, "", "")
    status, out, error = ended(tmp_path, "board.claim_verdict(9)\nverdict.fail('too late', 5, '')")
    assert (status, out, error) == (9, "", "")
    assert ended(tmp_path, "verdict.follow()\nprint('still here')")[:2] == (0, "still here\n")
