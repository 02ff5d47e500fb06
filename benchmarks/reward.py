"""The reward model: real tokens per second and peak memory, ours beside TRL's RewardTrainer.

python benchmarks/reward.py [--quick] [--rounds N] [--device cuda --dtype bf16 --size 1.3b]

GPT-NeoX of 9M parameters with one score, Korean preference pairs of up to 512 tokens a side, global batch 32 pairs in
micro-batches of 8 pairs, AdamW. Both heads start from the same weights; ours has a bias, which pairs cancel.
"""

from __future__ import annotations

from offline import compare
from offline_workloads import PeerSetting, Task

NO_CHECKPOINTING = {"gradient_checkpointing": False}
LENGTHS_KEPT = {**NO_CHECKPOINTING, "remove_unused_columns": False}
"""The trainer drops the `length` column before the sampler that needs it, unless told to keep all columns."""

REWARD = Task(
    name="reward",
    kind="comparison",
    data=[
        {"path": "ko_arena_hard/pairs.jsonl.gz"},
        {
            "path": "hrc_human_rights/humane_right_copus_v1.jsonl.json",
            "columns": {"prompt": "질의", "chosen": "상담례, 결정례 기반 답변", "rejected": "ChatGPT API 답변"},
        },
    ],
    sample="sample:preference_train",
    peers={
        "no checkpointing": PeerSetting(NO_CHECKPOINTING, note="defaults, gradient checkpointing off"),
        "batch_rebalance": PeerSetting(
            {**LENGTHS_KEPT, "train_sampling_strategy": "batch_rebalance"},
            same_batches=False,
            note="no checkpointing; the mean of unequal micro-batches weighs pairs unequally",
        ),
        "defaults": PeerSetting({}, note="gradient checkpointing on"),
        "group_by_length": PeerSetting(
            {**LENGTHS_KEPT, "train_sampling_strategy": "group_by_length"},
            same_batches=False,
            note="no checkpointing; a step holds pairs of one length",
        ),
    },
)

if __name__ == "__main__":
    compare(REWARD)
