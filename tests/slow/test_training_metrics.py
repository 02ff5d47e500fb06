"""Metrics of two ranks."""

from __future__ import annotations

import json

from tests.support.launch import run_ranks

TWO_RANKS = """
import glob, json, os, sys
import torch
from rlhf.distributed.place import rank
from rlhf.distributed.world import init_world
from rlhf.training.metrics import MeanMeter, MetricsWriter
from rlhf.config import ConfigError, RunConfig
from pathlib import Path

init_world()
meter = MeanMeter()
meter.add({"loss": [6.0, 4.0][rank()], "kl": [1.0, 0.0][rank()]}, [3, 1][rank()])
means = meter.means()
directory = Path(sys.argv[-1]) / f"rank{rank()}"
writer = MetricsWriter(directory, RunConfig(tensorboard=False), stage="sft")
writer.open()
writer.write(1, means)
writer.close()
shared_memory = glob.glob(f"/dev/shm/deepspeed_allreduce_buffer_*_{os.environ['MASTER_PORT']}_*")
found = {"means": means, "wrote": directory.exists(), "shared_memory": shared_memory}
Path(sys.argv[-1], f"found{rank()}.json").write_text(json.dumps(found))
"""


def test_two_ranks_get_the_mean_over_both_and_only_the_first_writes(tmp_path):
    done = run_ranks(TWO_RANKS, 2, tmp_path, [str(tmp_path)])
    assert done.returncode == 0, done.stdout
    for index, wrote in enumerate((True, False)):
        found = json.loads((tmp_path / f"found{index}.json").read_text())
        assert found["means"] == {"loss": 10 / 4, "kl": 1 / 4}
        assert found["wrote"] == wrote
        assert not found["shared_memory"], "memory that outlives the process"
