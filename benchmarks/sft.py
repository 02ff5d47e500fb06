"""Supervised fine-tuning: real tokens per second and peak memory, ours beside TRL's SFTTrainer.

python benchmarks/sft.py [--quick] [--rounds N] [--device cuda --dtype bf16 --size 1.3b]

GPT-NeoX of 9M parameters, Korean instructions and short dialogues of 16 to 512 tokens, completion-only loss, global
batch 32 in micro-batches of 8, AdamW. The rows are cut and tokenised once, so neither side's tokenisation is timed.
"""

from __future__ import annotations

from offline import compare
from offline_workloads import PeerSetting, Task

NO_CHECKPOINTING = {"gradient_checkpointing": False}
REBALANCE = {**NO_CHECKPOINTING, "train_sampling_strategy": "batch_rebalance"}
PADDING_FREE = {**NO_CHECKPOINTING, "padding_free": True, "max_length": None}

SFT = Task(
    name="sft",
    kind="response",
    data=[
        {"path": "ko_arena_hard/pairs.jsonl.gz", "columns": {"prompt": "prompt", "response": "chosen"}},
        {
            "path": "hrc_human_rights/humane_right_copus_v1.jsonl.json",
            "columns": {"prompt": "질의", "response": "상담례, 결정례 기반 답변"},
        },
        {"path": "songys_chatbot/ChatbotData.csv", "columns": {"prompt": "Q", "response": "A"}, "weight": 0.25},
    ],
    sample="sample:sft_train",
    peers={
        "no checkpointing": PeerSetting(NO_CHECKPOINTING, note="defaults, gradient checkpointing off"),
        "batch_rebalance": PeerSetting(REBALANCE, note="no checkpointing; steps sorted and cut by cost"),
        "defaults": PeerSetting({}, note="gradient checkpointing on"),
        "padding_free": PeerSetting(PADDING_FREE, note="no checkpointing; sdpa with a block-diagonal mask"),
        "padding_free, batch_rebalance": PeerSetting({**REBALANCE, **PADDING_FREE}, note="no checkpointing"),
        "group_by_length": PeerSetting(
            {**NO_CHECKPOINTING, "train_sampling_strategy": "group_by_length"},
            same_batches=False,
            note="no checkpointing; a step holds rows of one length",
        ),
        "packing": PeerSetting(
            {**NO_CHECKPOINTING, "packing": True}, same_batches=False, note="no checkpointing; bfd, 512 tokens a row"
        ),
    },
)

if __name__ == "__main__":
    compare(SFT)
