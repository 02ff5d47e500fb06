"""A base model from one's own texts: the embedded base's training with other sizes, measured on held-out documents."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GPTNeoXForCausalLM, PreTrainedTokenizerFast

from rlhf.checkpoint.atomic import replaced_directory, write_json
from rlhf.config import ConfigError, require_at_least
from rlhf.data.texts import Documents
from rlhf.distributed.log import logger
from rlhf.models.tiny_base import (
    TinyRecipe,
    check_torch,
    fit,
    own_random_state,
    recipe_tokenizer,
    save_base,
    token_documents,
    untrained_model,
    weight_count,
)

REPORT = "base.json"
"""Beside the model: what it was trained on, how, and its held-out loss."""
SMALLEST_VOCABULARY = 258
"""Tokens of the 256 bytes, the end of sequence and the padding."""
EVALUATION_ROWS = 16
"""Rows of one forward pass of the evaluation."""


@dataclass(frozen=True)
class HeldOut:
    """The held-out documents of one data set as token ids, and how many characters they are."""

    path: str
    documents: Sequence[Sequence[int]]
    characters: int

    @property
    def tokens(self) -> int:
        """How many tokens they are, ends included."""
        return sum(map(len, self.documents))


@dataclass(frozen=True)
class Loss:
    """A held-out loss: nats per token, and per character, which compares models of different vocabularies."""

    nats_per_token: float
    nats_per_character: float


def check_recipe(recipe: TinyRecipe) -> None:
    """ConfigError for sizes that make no model, or one that cannot train."""
    positive = ("hidden_size", "layers", "heads", "steps", "rows_per_step", "threads")
    require_at_least(recipe, 1, *positive)
    require_at_least(recipe, 2, "row_tokens")
    require_at_least(recipe, SMALLEST_VOCABULARY, "vocabulary_size")
    if recipe.hidden_size % (2 * recipe.heads):
        raise ConfigError(
            f"hidden_size={recipe.hidden_size} must be an even number for each of heads={recipe.heads}: a multiple of "
            f"{2 * recipe.heads}"
        )
    if recipe.row_tokens > recipe.max_positions:
        raise ConfigError(
            f"row_tokens={recipe.row_tokens} is more than max_positions={recipe.max_positions}: a row must fit into "
            "the positions of the model; lower the one or raise the other"
        )


def build_own_base(
    sources: Sequence[Documents],
    directory: Path,
    recipe: TinyRecipe,
    *,
    seed: int = 0,
    bfloat16: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Train a tokenizer and a model on the documents of `sources` and save them in `directory`; the report (REPORT).

    The directory appears when all is done. The same documents, recipe and seed give the same weights on one machine.
    Raises ConfigError for sizes that make no model, where `directory` is there and not empty, and where torch is older
    than 2.9; DataError where the documents make less than a row of tokens; OSError where the disk refuses.
    """
    check_torch()
    check_recipe(recipe)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ConfigError(f"{directory} is there and not empty; name another directory, or remove it first")
    started = time.perf_counter()
    with replaced_directory(directory) as part:
        report = _train_and_save(sources, part, recipe, seed, bfloat16, progress)
        report["seconds"] = round(time.perf_counter() - started, 1)
        write_json(part / REPORT, report)
    return report


def _train_and_save(
    sources: Sequence[Documents], directory: Path, recipe: TinyRecipe, seed: int, bfloat16: bool, progress: bool
) -> dict[str, Any]:
    texts = [document for source in sources for document in source.train]
    logger.info("training a tokenizer of %d tokens on %d documents", recipe.vocabulary_size, len(texts))
    tokenizer = recipe_tokenizer(texts, recipe)
    documents = token_documents(tokenizer, texts)
    held_out = [_held_out(source, tokenizer) for source in sources if source.held_out]
    with own_random_state(seed, recipe.threads):
        model = untrained_model(recipe, tokenizer)
        before = held_out_losses(model, held_out, recipe)
        tokens, seen = sum(map(len, documents)), recipe.steps * recipe.rows_per_step * recipe.row_tokens
        logger.info(
            f"{weight_count(model) / 1e6:.1f}M weights, {len(tokenizer)} tokens in the vocabulary; training on "
            f"{tokens} tokens {seen / max(1, tokens):.2f} times over"
        )
        losses = fit(model, documents, recipe, "base model", progress=progress, bfloat16=bfloat16)
        after = held_out_losses(model, held_out, recipe)
    save_base(model, tokenizer, directory)
    return {
        "weights": weight_count(model),
        "vocabulary": len(tokenizer),
        "training_tokens": tokens,
        "tokens_seen": seen,
        "training_loss": {"first": round(losses[0], 4), "last_20": round(sum(losses[-20:]) / len(losses[-20:]), 4)},
        "held_out": {name: {"before": asdict(before[name]), "after": asdict(after[name])} for name in before},
        "held_out_tokens": sum(part.tokens for part in held_out),
        "held_out_characters": sum(part.characters for part in held_out),
        "texts": [_described(source) for source in sources],
        "recipe": asdict(recipe),
        "precision": "bf16" if bfloat16 else "fp32",
        "seed": seed,
    }


def _described(source: Documents) -> dict[str, Any]:
    return {
        "path": source.path,
        "documents": source.found,
        "cut": source.cut,
        "weight": source.weight,
        "training_documents": len(source.train),
        "training_characters": sum(map(len, source.train)),
        "held_out_documents": len(source.held_out),
    }


def _held_out(source: Documents, tokenizer: PreTrainedTokenizerFast) -> HeldOut:
    return HeldOut(source.path, token_documents(tokenizer, source.held_out), sum(map(len, source.held_out)))


ALL = "all"
"""Of `held_out_losses`: the documents of all data sets together."""


def held_out_losses(model: GPTNeoXForCausalLM, held_out: Sequence[HeldOut], recipe: TinyRecipe) -> dict[str, Loss]:
    """The loss of all held-out documents (ALL) and of those of each data set; nothing where none are held out.

    Packed into rows as in training, in a fixed order, in float32; the first token of a row is not predicted. Per
    character is per token times tokens (ends included) over characters.
    """
    sums = {part.path: _nats(model, part.documents, recipe.row_tokens) for part in held_out}
    losses = {}
    for name, parts in ((ALL, list(held_out)), *((part.path, [part]) for part in held_out)):
        predicted = sum(sums[part.path][1] for part in parts)
        if predicted:
            per_token = sum(sums[part.path][0] for part in parts) / predicted
            tokens, characters = sum(part.tokens for part in parts), sum(part.characters for part in parts)
            losses[name] = Loss(round(per_token, 4), round(per_token * tokens / characters, 4))
    return losses


@torch.no_grad()
def _nats(model: GPTNeoXForCausalLM, documents: Sequence[Sequence[int]], row_tokens: int) -> tuple[float, int]:
    """The summed loss of the documents in rows of `row_tokens`, and how many tokens were predicted."""
    model.eval()
    nats, predicted = 0.0, 0
    for rows in _batches([token for document in documents for token in document], row_tokens):
        input_ids = torch.tensor(rows)
        count = input_ids[:, 1:].numel()
        nats += float(model(input_ids=input_ids, labels=input_ids).loss) * count
        predicted += count
    return nats, predicted


def _batches(tokens: list[int], row_tokens: int) -> Iterator[list[list[int]]]:
    """All tokens as rows of `row_tokens`, EVALUATION_ROWS at a time; what is left at the end is a shorter row."""
    rows = [tokens[start : start + row_tokens] for start in range(0, len(tokens), row_tokens)]
    whole = [row for row in rows if len(row) == row_tokens]
    for start in range(0, len(whole), EVALUATION_ROWS):
        yield whole[start : start + EVALUATION_ROWS]
    if rows and 1 < len(rows[-1]) < row_tokens:
        yield [rows[-1]]
