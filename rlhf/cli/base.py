"""`rlhf base DIRECTORY --texts FILE...`: a tokenizer and a small base model from one's own texts."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf.config import ConfigError
from rlhf.data.spec import DataError

if TYPE_CHECKING:
    from rlhf.models.tiny_base import TinyRecipe

SIZES = {
    "vocabulary_size": (8000, "tokens of the vocabulary, the 256 bytes included"),
    "hidden_size": (256, "width of the model"),
    "layers": (6, "layers"),
    "heads": (4, "attention heads"),
    "max_positions": (1024, "tokens of the longest prompt and response together"),
    "row_tokens": (256, "tokens of a training row"),
    "rows_per_step": (8, "rows of an optimizer step"),
    "steps": (3000, "optimizer steps"),
}
"""Option -> (default, help); together 8.9M weights and 6.1M tokens."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `rlhf base`."""
    parser.description = (
        "Train a byte-level BPE tokenizer and a GPT-NeoX on texts and write them to DIRECTORY in the Hugging Face "
        "layout, for --base_model DIRECTORY. The rest of the time is shown as it trains. base.json beside the model "
        "has the held-out loss before and after, in nats per token and per character. Exit status: 0 written, 2 a "
        "wrong command line, texts that cannot be used, or a directory that cannot be written, 130 interrupted; then "
        "nothing is written."
    )
    parser.add_argument("directory", metavar="DIRECTORY", type=Path)
    parser.add_argument(
        "--texts",
        metavar="FILE",
        nargs="+",
        required=True,
        help="text (.txt: a paragraph is a document, or a line where there are no blank lines), Markdown (.md: a "
        "section), rows with a column `text`; gzip or not. Also a mapping as JSON: "
        '{"path": ..., "weight": 0.5, "format": "lines"} (or "paragraphs", "sections"); weight 0.5 takes half of the '
        "documents, 2 takes each twice",
    )
    for name, (default, text) in SIZES.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{text} (default {default})")
    parser.add_argument("--seed", type=int, default=0, help="of weights, order and what a weight draws (default 0)")
    parser.add_argument(
        "--eval_fraction", type=float, default=0.01, help="share of the documents held out (default 0.01); 0 for none"
    )
    parser.add_argument(
        "--precision",
        choices=("fp32", "bf16"),
        default="fp32",
        help="of the matrix products; bf16 is faster on a processor with bf16 instructions (default fp32)",
    )
    threads = os.cpu_count() or 1
    parser.add_argument("--threads", type=int, default=threads, help=f"processor threads (default all, {threads})")


def run(arguments: argparse.Namespace) -> int:
    """Train and write the model; the exit status."""
    from rlhf.data.texts import load_documents
    from rlhf.distributed.log import logger, setup_logging
    from rlhf.models.own_base import build_own_base, check_recipe

    setup_logging()
    try:
        recipe = _recipe(arguments)
        check_recipe(recipe)
        sources = load_documents(arguments.texts, eval_fraction=arguments.eval_fraction, seed=arguments.seed)
        for source in sources:
            logger.info(
                f"{source.path}: {source.found} documents ({source.cut}); {len(source.train)} to train on (weight "
                f"{source.weight:g}), {sum(map(len, source.train))} characters; {len(source.held_out)} held out"
            )
        report = build_own_base(
            sources, arguments.directory, recipe, seed=arguments.seed, bfloat16=arguments.precision == "bf16"
        )
    except (ConfigError, DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"interrupted: {arguments.directory} is not written", file=sys.stderr)
        return 130
    for line in table(report):
        print(line)
    print(f"written to {arguments.directory}; use it with --base_model {arguments.directory}")
    return 0


def _recipe(arguments: argparse.Namespace) -> TinyRecipe:
    from rlhf.models.tiny_base import TinyRecipe

    sizes = {name: getattr(arguments, name) for name in SIZES}
    return TinyRecipe(**sizes, intermediate_size=4 * arguments.hidden_size, threads=arguments.threads)


def table(report: dict[str, Any]) -> list[str]:
    """The held-out losses of a report as lines."""
    lines = [f"{'held-out loss':<32}  {'nats per token':>18}  {'nats per character':>18}"] if report["held_out"] else []
    for name, losses in report["held_out"].items():
        figures = [
            f"{losses['before'][unit]:.3f} -> {losses['after'][unit]:.3f}"
            for unit in ("nats_per_token", "nats_per_character")
        ]
        lines.append(f"{Path(name).name:<32}  {figures[0]:>18}  {figures[1]:>18}")
    return lines
