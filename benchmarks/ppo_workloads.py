"""What both sides of `ppo.py` are given: models in directories, prompts as token ids, the batch arithmetic."""

from __future__ import annotations

import json
import math
import random
import shutil
import statistics
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from flops import Shape
from tokenizers import Tokenizer, models, pre_tokenizers

from rlhf.checkpoint.export import export_scalar_model
from rlhf.models.scalar import ScalarModel

EOS, PAD, UNKNOWN, FIRST_WORD = 0, 1, 2, 3
SIZES = {
    "tiny": Shape(32, 2, 2, 64, 200, positions=512),
    "9m": Shape(256, 6, 8, 1024, 8000),
    "1.3b": Shape(2048, 24, 16, 8192, 30080),  # Polyglot-ko-1.3b
}


@dataclass(frozen=True)
class Workload:
    """One row of the table. `ends` says whether the models end their answers.

    Prompt lengths are uniform between the least and the most, or with `skewed_prompts` log-normal as in chats: median a
    quarter of the most, sigma 0.7.
    """

    name: str
    max_new_tokens: int = 64
    ppo_epochs: int = 1
    ends: bool = False
    prompts: int = 32
    min_prompt_tokens: int = 16
    max_prompt_tokens: int = 96
    skewed_prompts: bool = False
    micro_batch_size: int = 8
    learning_rate: float = 1e-6
    kl_coef: float = 0.05


WORKLOADS = {
    "W1": Workload("W1"),
    "W2": Workload("W2", max_new_tokens=192),
    "W3": Workload("W3", max_new_tokens=192, ends=True),
    "W4": Workload("W4", ppo_epochs=4),
}
QUICK = {
    "W1": Workload("W1", max_new_tokens=8, prompts=8, min_prompt_tokens=4, max_prompt_tokens=12, micro_batch_size=4),
    "W3": Workload(
        "W3", max_new_tokens=48, prompts=8, min_prompt_tokens=4, max_prompt_tokens=12, micro_batch_size=4, ends=True
    ),
}


def make_prompts(workload: Workload, shape: Shape, seed: int) -> list[list[int]]:
    """Random token ids with lengths as the workload says; the first prompt has the most."""
    generator = random.Random(seed)
    least, most = workload.min_prompt_tokens, workload.max_prompt_tokens
    if workload.skewed_prompts:
        drawn = (round(most / 4 * math.exp(generator.gauss(0.0, 0.7))) for _ in range(workload.prompts))
        lengths = [min(most, max(least // 4, length)) for length in drawn]
    else:
        lengths = [generator.randint(least, most) for _ in range(workload.prompts)]
    lengths[0] = most
    return [[generator.randrange(FIRST_WORD, shape.vocabulary) for _ in range(length)] for length in lengths]


def make_job(workload: Workload, size: str, work_dir: Path, *, seed: int, quick: bool = False) -> dict[str, Any]:
    """Models and prompts of `workload` as a json-able description; models are kept in `work_dir` and used again."""
    shape = SIZES[size]
    directory = work_dir / f"{size}-{'ends' if workload.ends else 'random'}-seed{seed}"
    if not (directory / "done").is_file():
        shutil.rmtree(directory, ignore_errors=True)
        build_models(directory, shape, seed=seed, ends=workload.ends, quick=quick)
        (directory / "done").touch()
    return {
        "workload": asdict(workload),
        "size": size,
        "shape": asdict(shape),
        "actor": str(directory / "actor"),
        "reward": str(directory / "reward"),
        "prompts": make_prompts(workload, shape, seed),
        "eos_token_id": EOS,
        "pad_token_id": PAD,
        "seed": seed,
    }


def build_models(directory: Path, shape: Shape, *, seed: int, ends: bool, quick: bool) -> None:
    """Write `actor` (a GPT-NeoX) and `reward` (its blocks and a scalar head) into `directory`."""
    torch.manual_seed(seed)
    tokenizer = make_tokenizer(shape)
    model = transformers.GPTNeoXForCausalLM(
        transformers.GPTNeoXConfig(
            vocab_size=shape.vocabulary,
            hidden_size=shape.hidden,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            intermediate_size=shape.intermediate,
            max_position_embeddings=shape.positions,
            bos_token_id=EOS,
            eos_token_id=EOS,
            pad_token_id=PAD,
        )
    )
    suppress(model, [PAD] if ends else [EOS, PAD])
    if ends:
        teach_to_end(model, shape, seed=seed, steps=60 if quick else 200, scale=0.25 if quick else 1.0)
    model.save_pretrained(directory / "actor")
    tokenizer.save_pretrained(directory / "actor")
    reward = ScalarModel.from_base(directory / "actor", dtype=torch.float32, seed=seed)
    export_scalar_model(reward, tokenizer, directory / "reward")


def make_tokenizer(shape: Shape) -> transformers.PreTrainedTokenizerFast:
    """One word per id; padding is not the end-of-sequence token, since TRL tells padding by its id."""
    words = {"<eos>": EOS, "<pad>": PAD, "<unk>": UNKNOWN}
    words.update({f"w{index}": index for index in range(FIRST_WORD, shape.vocabulary)})
    core = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
    )


@torch.no_grad()
def suppress(model: Any, token_ids: list[int]) -> None:
    """Make `token_ids` practically impossible: GPT-NeoX has no bias at its head, so the final norm gets a bias b
    along a unit vector u, and their rows of the head are -u times a number: their logits become -30 or so."""
    norm, head = model.gpt_neox.final_layer_norm, model.get_output_embeddings()
    direction = torch.ones_like(norm.bias) / math.sqrt(len(norm.bias))
    norm.bias.copy_(10.0 * direction)
    head.weight[token_ids] = -3.0 * direction


def teach_to_end(model: Any, shape: Shape, *, seed: int, steps: int, scale: float) -> None:
    """Train head and final norm on random words whose number is drawn from a geometric distribution (mean 45 at
    `scale` 1, so a median of 31), so that the model learns how likely an end is; it has nothing else to learn.

    The chance of an end is then the same everywhere, and the blocks stay as they are: a short training holds for
    answers longer than those it saw.
    """
    generator, words = random.Random(seed + 1), torch.Generator().manual_seed(seed + 2)
    norm, head = model.gpt_neox.final_layer_norm, model.get_output_embeddings()
    optimizer = torch.optim.AdamW([*norm.parameters(), *head.parameters()], lr=1e-3, weight_decay=0.0)
    model.eval()
    for step in range(steps):
        prompts = [generator.randint(round(16 * scale), round(96 * scale)) for _ in range(8)]
        responses = [min(round(192 * scale), 1 + math.floor(generator.expovariate(1 / (45 * scale)))) for _ in prompts]
        ends = [prompt + response for prompt, response in zip(prompts, responses, strict=True)]
        ids = torch.randint(FIRST_WORD, shape.vocabulary, (len(ends), max(ends) + 1), generator=words)
        positions = torch.arange(ids.shape[1]).expand_as(ids)
        ids = torch.where(positions == torch.tensor(ends).unsqueeze(1), EOS, ids)
        states: list[torch.Tensor] = []
        with torch.no_grad():  # what goes into the final norm; causal, so that what follows an end changes nothing
            hook = norm.register_forward_pre_hook(lambda _, inputs, kept=states: kept.append(inputs[0]))
            model.gpt_neox(input_ids=ids)
            hook.remove()
        predicts = (positions >= torch.tensor(prompts).unsqueeze(1) - 1) & (positions < torch.tensor(ends).unsqueeze(1))
        logits = head(norm(states[0][predicts]))
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1.0, (step + 1) / 10) * (1 - step / steps)
        torch.nn.functional.cross_entropy(logits, ids[:, 1:][predicts[:, :-1]]).backward()
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 50 == 0:
            print(f"teaching a model to end its answers: step {step + 1} of {steps}", file=sys.stderr, flush=True)


def length_statistics(lengths: list[int], most: int) -> dict[str, float]:
    """Mean, median and longest of sampled response lengths, and the median as a share of the most there can be."""
    median = statistics.median(lengths)
    return {
        "mean": statistics.fmean(lengths),
        "median": median,
        "longest": max(lengths),
        "median_share_of_maximum": median / most,
    }


def write_job(job: dict[str, Any], path: Path) -> Path:
    """Write a job where a side can read it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(job), encoding="utf-8")
    return path
