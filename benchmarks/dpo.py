"""DPO: real tokens per second and peak memory, ours beside TRL's DPOTrainer.

python benchmarks/dpo.py [--quick] [--rounds N] [--device cuda --dtype bf16 --size 1.3b]

The model, the pairs and the arithmetic of `reward.py`. Our reference is asked once before training, as TRL's is with
`precompute_ref_log_probs`; neither is part of a step's seconds. TRL's default asks it at every step.
"""

from __future__ import annotations

from offline import compare
from offline_workloads import PeerSetting, Task
from reward import REWARD

NO_CHECKPOINTING = {"gradient_checkpointing": False}
PRECOMPUTED = {**NO_CHECKPOINTING, "precompute_ref_log_probs": True}
PEERS = {
    "reference precomputed": PeerSetting(PRECOMPUTED, note="gradient checkpointing off"),
    "live reference": PeerSetting(NO_CHECKPOINTING, note="defaults, gradient checkpointing off"),
    "defaults": PeerSetting({}, note="live reference, gradient checkpointing on"),
}
DPO = Task(name="dpo", kind="comparison", algorithm="dpo", data=REWARD.data, sample=REWARD.sample, peers=PEERS)

if __name__ == "__main__":
    compare(DPO)
