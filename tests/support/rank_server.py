"""Ranks forked from a process that has loaded torch, deepspeed and transformers once.

A program on two ranks spends most of its time on imports: the launcher's, and those of each rank. What is tested here
is what ranks do together; that the launcher starts and ends them is tested with the stages' scripts and in
tests/slow/test_distributed_ranks.py. Reads a job (JSON, a line) from standard input, answers with its exit status.
"""

from __future__ import annotations

import gc
import json
import os
import runpy
import signal
import sys
import time
from pathlib import Path
from typing import Any

FAILED_GRACE_SECONDS = 5.0
"""How long the other ranks may go on once one has failed: the launcher kills them too."""


def serve() -> None:
    """Run jobs until standard input ends."""
    import deepspeed  # noqa: F401
    import transformers  # noqa: F401

    import rlhf.algorithms.ppo
    import rlhf.engine  # noqa: F401

    threads = os.listdir("/proc/self/task")
    assert len(threads) == 1, f"{len(threads)} threads: a fork would take only one of them"
    gc.freeze()
    for line in sys.stdin:
        job = json.loads(line)
        ranks: dict[int, int] = {}
        for rank in range(job["world"]):
            pid = os.fork()
            if pid == 0:
                return run(job, rank)
            ranks[pid] = rank
        print(json.dumps(wait(ranks, job["timeout"])), flush=True)


def run(job: dict[str, Any], rank: int) -> None:
    """Be rank `rank` of a job, to the end of the process."""
    os.setpgid(0, 0)
    output = os.open(job["output"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    for stream, target in ((os.open(os.devnull, os.O_RDONLY), 0), (output, 1), (output, 2)):
        os.dup2(stream, target)
    os.environ.clear()
    os.environ.update(job["environment"])
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(job["world"]))
    os.chdir(job["directory"])
    sys.argv = [job["script"], f"--local_rank={rank}", *job["arguments"]]
    sys.path[0] = str(Path(job["script"]).parent)
    runpy.run_path(job["script"], run_name="__main__")


def wait(ranks: dict[int, int], timeout: float) -> dict[str, Any]:
    """The first exit status that is not 0, once every rank has ended; all are killed after `timeout` seconds."""
    until, failed, late = time.monotonic() + timeout, 0, False
    while ranks:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            if time.monotonic() > until:
                late = late or not failed
                for each in ranks:
                    os.killpg(each, signal.SIGKILL)
            time.sleep(0.02)
            continue
        del ranks[pid]
        code = os.waitstatus_to_exitcode(status)
        if code != 0 and not failed:
            failed, until = code, min(until, time.monotonic() + FAILED_GRACE_SECONDS)
    return {"returncode": failed, "late": late}


if __name__ == "__main__":
    serve()
