"""The configuration reference: it is up to date, complete, and says what the parser really does."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from rlhf.cli.config_reference import default_text, field_docstrings, reference, type_text
from rlhf.config import OptimizerConfig
from rlhf.pipeline.stages import STAGES, parse_stage

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "configuration.md"


def rows_of(page: str) -> dict[tuple[str, str], list[str]]:
    """(section, field) -> cells of its table row."""
    rows, section = {}, ""
    for line in page.splitlines():
        if line.startswith("## "):
            section = line.removeprefix("## ")
        elif line.startswith("| `"):
            cells = [cell.strip() for cell in line.replace("\\|", "\0").strip("|").split("|")]
            rows[section, cells[0].strip("`")] = [cell.replace("\0", "|") for cell in cells]
    return rows


def test_page_is_what_the_generator_prints() -> None:
    command = [sys.executable, "-m", "rlhf.cli.config_reference"]
    printed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True, encoding="utf-8").stdout
    assert PAGE.read_text(encoding="utf-8") == printed, (
        "docs/configuration.md is out of date: python -m rlhf.cli.config_reference > docs/configuration.md"
    )


def test_every_field_of_every_stage_stands_in_the_page_with_its_stages() -> None:
    rows = rows_of(PAGE.read_text(encoding="utf-8"))
    listed = {
        (stage, name)
        for (_, name), cells in rows.items()
        for stage in cells[1].replace("all", ", ".join(STAGES)).split(", ")
    }
    wanted = {
        (stage, item.name)
        for stage, row in STAGES.items()
        for config_class in row.config_classes().values()
        for item in dataclasses.fields(config_class)
    }
    assert listed == wanted


@pytest.mark.parametrize(
    "config_class",
    sorted({c for row in STAGES.values() for c in row.config_classes().values()}, key=lambda c: c.__name__),
)
def test_every_field_has_a_docstring_that_says_something(config_class: type) -> None:
    texts = field_docstrings(config_class)
    for item in dataclasses.fields(config_class):
        text = texts[item.name]
        assert len(text.split()) >= 2, f"{config_class.__name__}.{item.name}: {text!r} says too little"
        assert text.endswith((".", ")")), f"{config_class.__name__}.{item.name}: {text!r} is not a sentence"


def test_a_field_without_docstring_is_an_error_that_names_it() -> None:
    @dataclass
    class Bare(OptimizerConfig):
        momentum: float = 0.9
        nesterov: bool = False
        """Nesterov's momentum instead of the plain one."""

    with pytest.raises(ValueError, match=r"Bare\.momentum has no docstring"):
        field_docstrings(Bare)


def test_own_docstring_wins_and_others_are_inherited() -> None:
    @dataclass
    class Narrow(OptimizerConfig):
        adam_eps: float = 1e-3
        """A wide epsilon,
        over two lines."""

    texts = field_docstrings(Narrow)
    assert texts["adam_eps"] == "A wide epsilon, over two lines."
    assert texts["weight_decay"] == field_docstrings(OptimizerConfig)["weight_decay"]


def test_stages_that_differ_are_told_apart() -> None:
    @dataclass
    class Wide(OptimizerConfig):
        adam_eps: float = 1e-3
        """Wider than usual for this stage."""

    rows = rows_of(reference({"sft": [OptimizerConfig], "reward": [OptimizerConfig], "ppo": [Wide]}))
    name, stages, kind, default, meaning = rows["Optimizer", "adam_eps"]
    assert (stages, kind) == ("all", "float")
    assert default == "`1e-8`<br>In ppo: `0.001`"
    assert meaning.endswith("<br>In ppo: Wider than usual for this stage.")
    assert rows["Optimizer", "adam_betas"][3] == "`[0.9, 0.95]`"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "unset"),
        ([], "empty"),
        (True, "`true`"),
        (3e-4, "`0.0003`"),
        (5e-5, "`5e-5`"),
        ("none", "`none`"),
        (1e12, "`1e12`"),
    ],
)
def test_default_text(value: object, text: str) -> None:
    assert default_text(value) == text


def test_type_text() -> None:
    assert type_text('Literal["none", "8bit"]') == type_text(Literal["none", "8bit"]) == "`none`, `8bit`"
    assert type_text("str | None") == "str"
    assert type_text(int) == "int"


def test_the_introduction_is_true_of_the_parser(tmp_path: Path) -> None:
    config = tmp_path / "my.yaml"
    config.write_text(
        "zero_stage: 2\nkl_coef: 0.3\nsft:\n  zero_stage: 1\n  sft_data:\n    - a.jsonl\n"
        "    - {path: b.csv, weight: 0.3}\n",
        encoding="utf-8",
    )
    sft = parse_stage("sft", ["--config", str(config), "--no_tensorboard", "--lora_targets", "q_proj", "v_proj"])
    assert (sft.run.tensorboard, sft.engine.zero_stage, sft.model.lora_targets) == (False, 1, ["q_proj", "v_proj"])
    assert sft.data.sft_data == ["a.jsonl", '{"path": "b.csv", "weight": 0.3}']
    ppo = parse_stage("ppo", ["--config", str(config), "--kl_coef", "0.05", "--tensorboard", "false"])
    assert (ppo.run.tensorboard, ppo.engine.zero_stage, ppo.ppo.kl_coef) == (False, 2, 0.05)
