"""`rlhf world DIRECTORY`: write the data sets of the embedded world as files, also other ones than `sample:` reads."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from rlhf.checkpoint.atomic import replaced_file
from rlhf.data.world.annotator import Annotator
from rlhf.data.world.datasets import BASE_TEXTS, DATASETS, HELD_OUT_ROWS, ROWS, World, base_texts

BASE = "base"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `rlhf world`."""
    annotator = Annotator()
    parser.description = (
        f"Write {', '.join(DATASETS)} and {BASE} (text for a base model) into DIRECTORY, a JSON object a line. The "
        "held-out files hold combinations of which none occurs in the others. Without options they hold what "
        "`sample:NAME` reads. Exit status: 0 written, 2 a wrong command line, or a directory that cannot be written."
    )
    parser.add_argument("directory", metavar="DIRECTORY", type=Path)
    parser.add_argument("--seed", type=int, default=0, help="another seed, other rows (default 0)")
    parser.add_argument(
        "--rows", metavar="NAME=N", nargs="*", default=[], help="rows of a file, such as preference_train=8000"
    )
    for name, text in (
        ("sharpness", "how well the annotator sees gold"),
        ("length_bias", "how much the annotator likes ten more characters; below 0 fewer"),
        ("agreement_bias", "how much the annotator likes flattery"),
    ):
        default = getattr(annotator, name)
        parser.add_argument(f"--{name}", type=float, default=default, help=f"{text} (default {default:g})")


def run(arguments: argparse.Namespace) -> int:
    """Write the files; the exit status."""
    try:
        _write(arguments, _counts(arguments.rows))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _write(arguments: argparse.Namespace, counts: dict[str, int]) -> None:
    """Write the files. ValueError where there are not so many rows, OSError where the directory cannot be written."""
    annotator = Annotator(arguments.sharpness, arguments.length_bias, arguments.agreement_bias)
    world = World(arguments.seed, annotator)
    for name, count in counts.items():
        path = arguments.directory / f"{name}.jsonl"
        rows = (
            [{"text": text} for text in base_texts(count, arguments.seed)] if name == BASE else world.rows(name, count)
        )
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        with replaced_file(path) as part:
            part.write_text("\n".join([*lines, ""]), encoding="utf-8")
        print(f"{path}: {len(lines)} rows")


def _counts(given: list[str]) -> dict[str, int]:
    """The number of rows of every file. ValueError for a name that is no data set, or a number that is none."""
    counts = {name: (HELD_OUT_ROWS if name.endswith("heldout") else ROWS)[name.partition("_")[0]] for name in DATASETS}
    counts[BASE] = BASE_TEXTS
    for text in given:
        name, _, number = text.partition("=")
        if name not in counts or not number.isdigit() or int(number) < 1:
            raise ValueError(
                f"--rows {text}: needed is NAME=N with N of at least 1 and NAME one of {', '.join(counts)}"
            )
        counts[name] = int(number)
    return counts
