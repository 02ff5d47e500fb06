"""What both sides of sft.py, reward.py, dpo.py and kto.py are given: a model, rows as token ids, their order."""

from __future__ import annotations

import hashlib
import json
import os
import random
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from rlhf.algorithms.kto import MatchedLabel, with_mismatches
from rlhf.config import DataConfig
from rlhf.data import DatasetSpec, load_stage_data
from rlhf.data.sources import read_rows
from rlhf.engine import BatchPlan
from rlhf.models.scalar import ScalarModel
from rlhf.models.tiny_base import train_tokenizer
from rlhf.training.data_order import DataOrder

MAX_TOKENS = 512
"""Longest row on both sides: half of it for the prompt, half for the response."""
SEED = 1


@dataclass(frozen=True)
class Size:
    """A GPT-NeoX shape; `vocabulary` counts embedding rows, of which the tokenizer uses 64 fewer at most 8,000."""

    hidden: int
    layers: int
    heads: int
    vocabulary: int


SIZES = {
    "9m": Size(hidden=256, layers=6, heads=8, vocabulary=8000),
    "1.3b": Size(hidden=2048, layers=24, heads=16, vocabulary=30080),
    "test": Size(hidden=32, layers=2, heads=2, vocabulary=1024),
}


@dataclass(frozen=True)
class PeerSetting:
    """Arguments of TRL's configuration beyond the shared ones; `same_batches` says that each optimizer step sees the
    rows ours sees, so that its first loss can be compared."""

    arguments: Mapping[str, Any]
    same_batches: bool = True
    note: str = ""


@dataclass(frozen=True)
class Task:
    """One comparison: what rows are read, and the peer's settings by name (the first one must give our loss).

    `algorithm`: of step 3 without sampling, where it is that one's rows. `split_tolerance`: how far the mean loss of
    its later steps may lie apart where a step is several micro-batches, of which the sides make different use.
    """

    name: str
    kind: str
    data: Sequence[Mapping[str, Any]]
    sample: str
    peers: Mapping[str, PeerSetting] = field(default_factory=dict)
    algorithm: str = ""
    split_tolerance: float = 0.0


@dataclass(frozen=True)
class Run:
    """The arithmetic of one run. `warm_up` steps are left out of the timing."""

    steps: int
    warm_up: int
    rounds: int
    global_batch_size: int = 32
    micro_batch_size: int = 8
    size: str = "9m"
    device: str = "cpu"
    dtype: str = "fp32"
    threads: int = 2

    def __post_init__(self) -> None:
        if not 0 < self.warm_up < self.steps:
            raise SystemExit(f"--warm-up {self.warm_up} must be above 0 and below --steps {self.steps}")


def data_specs(task: Task) -> list[str]:
    """The data sets of `task` under RLHF_DATA_DIR, or with a note the embedded samples where that folder is not."""
    folder = os.environ.get("RLHF_DATA_DIR")
    if folder is None:
        print(f"note: RLHF_DATA_DIR is not set; measuring on {task.sample}", file=sys.stderr)
        return [task.sample]
    root = Path(folder)
    missing = [item["path"] for item in task.data if not (root / item["path"]).is_file()]
    if missing:
        print(f"note: {missing[0]} is not under RLHF_DATA_DIR={root}; measuring on {task.sample}", file=sys.stderr)
        return [task.sample]
    return [json.dumps({**item, "path": str(root / item["path"])}, ensure_ascii=False) for item in task.data]


def prepare(task: Task, run: Run, out_dir: Path) -> Path:
    """The directory with `base/` (model, tokenizer), `head.pt`, `rows.json`, `order.json`; made when it is not there.

    `rows.json` lists {"id", "candidates": [[ids, prompt tokens], ...]}, one candidate a row for SFT, best first for
    comparisons, for labelled rows ("good") the response and one to another prompt behind the same one; `order.json`
    holds our trainer's row numbers of every step.
    """
    specs = data_specs(task)
    files = [Path(DatasetSpec.parse(spec).path) for spec in specs]
    stamps = [[path.stat().st_size, path.stat().st_mtime] for path in files if path.is_file()]
    key = json.dumps([specs, stamps, asdict(run), MAX_TOKENS, SEED], ensure_ascii=False)
    work = out_dir / ".prepared" / f"{task.name}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    if not (work / "order.json").is_file():
        work.mkdir(parents=True, exist_ok=True)
        _prepare(task, run, specs, work)
    return work


def _prepare(task: Task, run: Run, specs: Sequence[str], work: Path) -> None:
    size = SIZES[run.size]
    texts = [
        value[:2000]
        for spec in specs
        for row in read_rows(DatasetSpec.parse(spec), "skip", [])
        for value in row.values.values()
        if isinstance(value, str)
    ]
    tokenizer = train_tokenizer(texts, min(8000, size.vocabulary) - 64)
    save_models(size, tokenizer, work)
    half = MAX_TOKENS // 2
    config = DataConfig(on_bad_row="skip", max_prompt_tokens=half, max_response_tokens=half, eval_fraction=0.0)
    data = load_stage_data(
        task.kind,
        specs,
        [],
        config=config,
        stage="sft" if task.kind == "response" else "reward",
        tokenizer=tokenizer,
        seed=SEED,
        cache_dir=work / "tokens",
        report_dir=work,
    )
    wanted = run.steps * run.global_batch_size
    if len(data.train) < wanted:
        raise SystemExit(f"{run.steps} steps need {wanted} rows and the data has {len(data.train)}; lower --steps")
    chosen = random.Random(SEED).sample(data.train, wanted)
    if task.kind == "labelled":
        chosen = with_mismatches(chosen, SEED)
    rows = [_row(example) for example in chosen]
    (work / "rows.json").write_text(json.dumps(rows))
    lengths = [sum(len(ids) for ids, _ in row["candidates"]) for row in rows]
    order = DataOrder(lengths, BatchPlan(run.global_batch_size, run.micro_batch_size, 1), SEED)
    (work / "order.json").write_text(json.dumps([order.indices(step) for step in range(run.steps)]))


def save_models(size: Size, tokenizer: Any, work: Path) -> None:
    """`base/`: a GPT-NeoX with random weights and its tokenizer; `head.pt`: the scalar head both reward models get."""
    torch.manual_seed(1)
    config = GPTNeoXConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        intermediate_size=4 * size.hidden,
        max_position_embeddings=1024,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
    )
    model = GPTNeoXForCausalLM(config)
    model.save_pretrained(work / "base")
    tokenizer.save_pretrained(work / "base")
    head = ScalarModel(model.gpt_neox, seed=1).scalar_head
    torch.save({"weight": head.weight.detach(), "bias": head.bias.detach()}, work / "head.pt")


def _row(example: Any) -> dict[str, Any]:
    if isinstance(example, MatchedLabel):
        candidates = [[list(one.input_ids), one.prompt_tokens] for one in example.candidates]
        return {"id": example.id, "candidates": candidates, "good": example.label.good}
    candidates = getattr(example, "candidates", None)
    if candidates is None:
        return {"id": example.id, "candidates": [[list(example.input_ids), example.prompt_tokens]]}
    ranked = sorted(zip(example.ranks, candidates, strict=True), key=lambda pair: pair[0])
    return {"id": example.id, "candidates": [[list(one.input_ids), one.prompt_tokens] for _, one in ranked]}


def step_tokens(rows: Sequence[Mapping[str, Any]], order: Sequence[Sequence[int]]) -> list[int]:
    """Real tokens of each optimizer step: those of all candidates of its rows, of labelled ones the first alone."""

    def learnt(row: Mapping[str, Any]) -> int:
        return sum(len(ids) for ids, _ in row["candidates"][: 1 if "good" in row else None])

    return [sum(learnt(rows[index]) for index in step) for step in order]
