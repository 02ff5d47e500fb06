"""Ranks: the world they make, their collectives, which of them died, and how a job ends."""

from rlhf.distributed.collectives import (
    all_gather_rows,
    all_reduce_max,
    all_reduce_sum,
    any_rank,
    raise_on_all,
    rank_zero_first,
)
from rlhf.distributed.log import logger, setup_logging
from rlhf.distributed.progress import Progress
from rlhf.distributed.world import close_world, free_port, init_world, is_main, rank, seed_everything, world_size

__all__ = [
    "Progress",
    "all_gather_rows",
    "all_reduce_max",
    "all_reduce_sum",
    "any_rank",
    "close_world",
    "free_port",
    "init_world",
    "is_main",
    "logger",
    "raise_on_all",
    "rank",
    "rank_zero_first",
    "seed_everything",
    "setup_logging",
    "world_size",
]
