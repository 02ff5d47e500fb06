"""KTO: real tokens per second and peak memory, ours beside TRL's KTOTrainer.

python benchmarks/kto.py [--quick] [--rounds N] [--device cuda --dtype bf16 --size 1.3b]

The rows of `dpo.py`, the better responses as good ones, the worse ones as bad ones. Both sides put the same response to
another prompt beside each, whose tokens do not count. TRL estimates the KL divergence in every micro-batch anew, ours
once for the step, so that later losses agree to 0.02 only; with one micro-batch (`--micro-batch-size 32`) to 0.001.
"""

from __future__ import annotations

from dpo import DPO, PEERS
from offline import compare
from offline_workloads import Task

KTO = Task(
    name="kto", kind="labelled", algorithm="kto", data=DPO.data, sample=DPO.sample, peers=PEERS, split_tolerance=0.02
)

if __name__ == "__main__":
    compare(KTO)
