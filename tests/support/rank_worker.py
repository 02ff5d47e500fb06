"""Ranks that add up ones until something happens to them.

Under the `deepspeed` launcher: rank_worker.py DIRECTORY SCENARIO is one rank. Without a launcher it is a server that
has imported everything once and forks two ranks for each line `DIRECTORY SCENARIO` of its input (importing torch takes
longer than a scenario); it answers with their exit codes, negative ones for signals.
"""

from __future__ import annotations

import ctypes
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.distributed as dist

from rlhf.config import ConfigError, RunConfig
from rlhf.distributed import rank_watch
from rlhf.distributed.job_exit import run_to_end
from rlhf.distributed.place import free_port
from rlhf.distributed.world import close_world

TIMEOUT_MINUTES = 0.03
STEPS, TROUBLE_AT, SAVED_AT = 3000, 20, 10


def trouble(scenario: str, number: int) -> None:
    """What happens at step TROUBLE_AT; scenarios of one rank happen to rank 1."""
    if number != 1 and not scenario.startswith("all_"):
        return
    if scenario == "cuda_memory":
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nGPU 0 has a capacity of 8 GiB")
    elif scenario == "memory":
        torch.empty(10**15)
    elif scenario == "python_memory":
        raise MemoryError
    elif scenario in ("bug", "all_bug"):
        raise ValueError(f"a bug of rank {number}")
    elif scenario == "user_error":
        raise ConfigError("this file is on one machine only")
    elif scenario == "crash":
        ctypes.string_at(0)
    elif scenario in ("hang", "all_hang"):
        time.sleep(1000)


def train(directory: Path, scenario: str) -> None:
    number = dist.get_rank()
    with rank_watch.watched_ranks(directory, RunConfig(rank_timeout_minutes=TIMEOUT_MINUTES), "cpu"):
        for step in range(1, STEPS + 1):
            if step == TROUBLE_AT:
                trouble(scenario, number)
            total = torch.ones(1)
            dist.all_reduce(total)
            assert total == dist.get_world_size()
            time.sleep(0.01)
            rank_watch.beat(f"step {step}")
            if step == SAVED_AT:
                rank_watch.note_saved(step)
            if rank_watch.stop_requested():
                (directory / f"stopped_{number}").write_text(str(step))
                raise rank_watch.Stopped(step, directory, saved=True)


def main(directory: Path, scenario: str) -> None:
    dist.init_process_group("gloo")
    run_to_end(lambda: train(directory, scenario), (ConfigError,))
    close_world()


def fork_rank(number: int, port: int, directory: Path, scenario: str) -> int:
    child = os.fork()
    if child:
        return child
    os.environ.update(
        RANK=str(number), LOCAL_RANK=str(number), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    output = os.open(directory / "output", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(output, stream)
    code = 0
    try:
        main(directory, scenario)
    except SystemExit as end:
        code = int(end.code or 0)
    sys.stdout.flush()
    os._exit(code)


def serve() -> None:
    for line in sys.stdin:
        directory, scenario = line.split()
        port = free_port()
        ranks = [fork_rank(number, port, Path(directory), scenario) for number in (0, 1)]
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in ranks]
        print(*codes, flush=True)


if __name__ == "__main__":
    if "RANK" in os.environ:
        given = [word for word in sys.argv[1:] if not word.startswith("--local_rank")]
        main(Path(given[0]), given[1])
    else:
        serve()
