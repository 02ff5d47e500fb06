"""The embedded base model: a byte-level BPE tokenizer and a small GPT-NeoX, trained on the spot.

It stands in for Polyglot-ko where none can be downloaded: the same architecture, end-of-sequence text and spare
vocabulary rows, small enough that two CPU cores pre-train it in a few minutes.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

from rlhf.checkpoint.atomic import replaced_directory
from rlhf.checkpoint.export import save_tokenizer, save_whole_model
from rlhf.config import ConfigError
from rlhf.data.spec import DataError
from rlhf.distributed.collectives import rank_zero_first
from rlhf.distributed.log import logger
from rlhf.distributed.progress import Progress

EOS_TEXT = "<|endoftext|>"
PAD_TEXT = "<|pad|>"
VOCABULARY_MULTIPLE = 64
USUAL_TIME = "four to six minutes on two cores"
"""What the default recipe takes; longer where other work wants the same cores."""


@dataclass(frozen=True)
class TinyRecipe:
    """Every constant of the tiny base; a changed one makes another model under another name.

    The matrices of the layers learn by Muon (Jordan et al. 2024), embeddings and vectors by AdamW: after 358k tokens
    the training loss is 0.95 and 12% of the answers are on the topic, with AdamW alone (at 3e-3) 1.04 and 2%.
    """

    version: int = 2
    vocabulary_size: int = 2000
    hidden_size: int = 128
    layers: int = 4
    heads: int = 4
    intermediate_size: int = 512
    rotary_share: float = 1.0
    max_positions: int = 512
    row_tokens: int = 128
    rows_per_step: int = 8
    steps: int = 2100
    matrix_learning_rate: float = 2e-2
    learning_rate: float = 2e-3
    warmup_steps: int = 50
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0
    threads: int = 2


def build_tiny_base(
    texts: Sequence[str],
    cache_dir: Path,
    *,
    seed: int = 0,
    progress: bool = True,
    recipe: TinyRecipe | None = None,
) -> Path:
    """The directory of the tiny base trained on `texts`, in the Hugging Face layout; trained first if it is not there.

    The same texts, seed and recipe give the same bytes on one machine. Rank 0 trains, other ranks wait.
    Raises DataError when the texts make less than one row of tokens, ConfigError where torch is older than 2.9.
    """
    check_torch()
    recipe = recipe or TinyRecipe()
    path = tiny_base_path(texts, cache_dir, seed=seed, recipe=recipe)

    def make() -> None:
        logger.info(announcement(recipe, path))
        with replaced_directory(path) as part:
            _train_and_save(texts, part, recipe, seed, progress)

    rank_zero_first(path, make)
    return path


def write_untrained_tiny_base(texts: Sequence[str], directory: Path) -> None:
    """Write the tokenizer and the shape of the tiny base with weights that nothing has trained: for checks, in seconds.

    The tokenizer is that of the trained one, so what is tokenised for the one serves the other.
    """
    check_torch()
    tokenizer = recipe_tokenizer(texts, TinyRecipe())
    save_base(untrained_model(TinyRecipe(), tokenizer), tokenizer, directory)


def announcement(recipe: TinyRecipe, path: Path) -> str:
    """What is said before the base is trained: why, how long it takes, that it happens once, and where it is kept."""
    usual = f", {USUAL_TIME}" if recipe == TinyRecipe() else ""
    return (
        f"the embedded base model is not there yet: training it first ({recipe.steps} steps{usual}); this happens "
        f"once, it is kept in {path}"
    )


def tiny_base_path(texts: Sequence[str], cache_dir: Path, *, seed: int = 0, recipe: TinyRecipe | None = None) -> Path:
    """Where `build_tiny_base` keeps the model of these texts, seed and recipe, be it there or not."""
    content = json.dumps([list(texts), asdict(recipe or TinyRecipe()), seed], ensure_ascii=False)
    return cache_dir / f"tiny_base-{hashlib.sha256(content.encode()).hexdigest()[:16]}"


def train_tokenizer(texts: Sequence[str], vocabulary_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of at most `vocabulary_size` tokens with an end of sequence and a separate padding."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=[EOS_TEXT, PAD_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=EOS_TEXT, pad_token=PAD_TEXT)


def recipe_tokenizer(texts: Sequence[str], recipe: TinyRecipe) -> PreTrainedTokenizerFast:
    """The tokenizer of `recipe`, trained on the texts."""
    tokenizer = train_tokenizer(texts, recipe.vocabulary_size)
    tokenizer.model_max_length = recipe.max_positions
    return tokenizer


def token_documents(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> list[list[int]]:
    """The token ids of each text with an end of sequence."""
    return [[*ids, tokenizer.eos_token_id] for ids in tokenizer(list(texts), verbose=False)["input_ids"]]


def _train_and_save(texts: Sequence[str], directory: Path, recipe: TinyRecipe, seed: int, progress: bool) -> None:
    tokenizer = recipe_tokenizer(texts, recipe)
    documents = token_documents(tokenizer, texts)
    with own_random_state(seed, recipe.threads):
        model = untrained_model(recipe, tokenizer)
        losses = fit(model, documents, recipe, "embedded base model", progress=progress)
    logger.info(
        f"tiny base: {weight_count(model) / 1e6:.1f}M weights, {len(texts)} texts, "
        f"{sum(map(len, documents))} tokens; loss {losses[0]:.2f} -> {sum(losses[-20:]) / len(losses[-20:]):.2f}"
    )
    save_base(model, tokenizer, directory)


def weight_count(model: torch.nn.Module) -> int:
    """How many weights a model has."""
    return sum(weight.numel() for weight in model.parameters())


def save_base(model: GPTNeoXForCausalLM, tokenizer: PreTrainedTokenizerFast, directory: Path) -> None:
    """Write the model and its tokenizer in the Hugging Face layout."""
    model.eval()
    save_whole_model(model, directory)
    save_tokenizer(tokenizer, directory)


def untrained_model(recipe: TinyRecipe, tokenizer: PreTrainedTokenizerFast) -> GPTNeoXForCausalLM:
    """A GPT-NeoX of the sizes of `recipe`, its weights drawn from torch's random state."""
    return GPTNeoXForCausalLM(_model_config(recipe, tokenizer))


def _model_config(recipe: TinyRecipe, tokenizer: PreTrainedTokenizerFast) -> GPTNeoXConfig:
    return GPTNeoXConfig(
        # more rows than tokens, as in Polyglot-ko, so that nothing downstream may confuse the two numbers
        vocab_size=(len(tokenizer) // VOCABULARY_MULTIPLE + 1) * VOCABULARY_MULTIPLE,
        hidden_size=recipe.hidden_size,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        intermediate_size=recipe.intermediate_size,
        max_position_embeddings=recipe.max_positions,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": recipe.rotary_share,
        },
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
    )


def fit(
    model: GPTNeoXForCausalLM,
    documents: Sequence[Sequence[int]],
    recipe: TinyRecipe,
    what: str,
    *,
    progress: bool = True,
    bfloat16: bool = False,
) -> list[float]:
    """Causal language modelling on packed rows, shown as `what`; returns the loss of every step.

    `bfloat16` computes the matrix products in it; weights and optimizer states are float32 either way. Raises DataError
    when the documents make less than one row of tokens.
    """
    tokens = sum(map(len, documents))
    if tokens < recipe.row_tokens:
        raise DataError(f"the texts have {tokens} tokens; training needs at least one row of {recipe.row_tokens}")
    optimizers = _optimizers(model, recipe)
    factor = partial(_learning_rate_factor, recipe=recipe)
    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, factor) for optimizer in optimizers]
    rows = _packed_rows(documents, recipe)
    model.train()
    losses = []
    with Progress(recipe.steps, what, "step", shown=progress) as shown:
        for _ in range(recipe.steps):
            input_ids = torch.tensor([next(rows) for _ in range(recipe.rows_per_step)])
            with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
                loss = model(input_ids=input_ids, labels=input_ids).loss
            model.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.max_grad_norm)
            for optimizer, schedule in zip(optimizers, schedules, strict=True):
                optimizer.step()
                schedule.step()
            losses.append(float(loss.detach()))
            shown.advance(loss=losses[-1])
    return losses


def _optimizers(model: GPTNeoXForCausalLM, recipe: TinyRecipe) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for embeddings, head, norms and biases."""
    layers = {id(weight) for weight in model.gpt_neox.layers.parameters() if weight.ndim == 2}
    groups: dict[str, list[torch.nn.Parameter]] = {"layers": [], "embeddings": [], "vectors": []}
    for weight in model.parameters():
        groups["layers" if id(weight) in layers else "embeddings" if weight.ndim > 1 else "vectors"].append(weight)
    return [
        torch.optim.Muon(groups["layers"], lr=recipe.matrix_learning_rate, weight_decay=recipe.weight_decay),
        torch.optim.AdamW(
            [
                {"params": groups["embeddings"], "weight_decay": recipe.weight_decay},
                {"params": groups["vectors"], "weight_decay": 0.0},
            ],
            lr=recipe.learning_rate,
            betas=(0.9, 0.95),
        ),
    ]


def check_torch() -> None:
    """ConfigError where torch is too old to train the base."""
    if not hasattr(torch.optim, "Muon"):
        raise ConfigError(
            f"base models are trained with torch.optim.Muon, which came with torch 2.9; this is torch "
            f"{torch.__version__}: install a newer one, or name a model with base_model"
        )


def _packed_rows(documents: Sequence[Sequence[int]], recipe: TinyRecipe) -> Iterator[list[int]]:
    """Rows of `row_tokens` tokens without end, cut from the documents in a new order each pass."""
    buffer: list[int] = []
    while True:
        for index in torch.randperm(len(documents)).tolist():
            buffer.extend(documents[index])
            while len(buffer) >= recipe.row_tokens:
                yield buffer[: recipe.row_tokens]
                del buffer[: recipe.row_tokens]


def _learning_rate_factor(step: int, recipe: TinyRecipe) -> float:
    if step < recipe.warmup_steps:
        return (step + 1) / recipe.warmup_steps
    done = (step - recipe.warmup_steps) / max(1, recipe.steps - recipe.warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


@contextmanager
def own_random_state(seed: int, threads: int) -> Iterator[None]:
    """Seeded, and on as many threads as the recipe says: sums depend on it, and waiting ranks need none."""
    before = torch.get_num_threads()
    torch.set_num_threads(min(threads, os.cpu_count() or 1))
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            yield
    finally:
        torch.set_num_threads(before)
