"""Every example in docs/data.md is read as the page says: format, kind and number of records."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from rlhf.data.formats import NAMES, layout_of
from rlhf.data.records import rows_to_records
from rlhf.data.rendered import MARKUPS, markup_of
from rlhf.data.row_formats import ROW_FORMATS
from rlhf.data.sources import read_rows
from rlhf.data.spec import DatasetSpec
from rlhf.data.templates import TEXT_TEMPLATES, load_template
from rlhf.data.text_tables import MISSING_WORDS

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```(jsonl|csv) (\w+) (\w+) (\d+)(?: (\{.*\}))?\n(.*?)```", PAGE, flags=re.DOTALL)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: f"{example[1]}-{example[2]}")
def test_example_is_read_as_the_page_says(example: tuple[str, ...], tmp_path: Path) -> None:
    suffix, row_format, kind, count, columns, content = example
    path = tmp_path / f"example.{suffix}"
    path.write_text(content, encoding="utf-8")
    spec = DatasetSpec(str(path), columns=json.loads(columns or "{}"))
    rows = list(read_rows(spec))
    assert len(rows) == 2
    assert layout_of(rows, kind, spec).format == row_format
    records = rows_to_records(rows, kind, template=load_template("kullm"), spec=spec)
    assert len(records) == int(count)
    prompts = rows_to_records(rows, "prompt", template=load_template("kullm"), spec=spec)
    assert len(prompts) >= 1, "the page says that prompts can be read from every format"


def test_every_format_and_template_is_named_on_the_page() -> None:
    names = set(re.findall(r"`(\w+)`", PAGE))
    assert set(ROW_FORMATS) <= names
    assert set(TEXT_TEMPLATES) <= names


def test_the_page_names_every_column_word_and_marker_that_counts() -> None:
    listed = re.search(r"`columns` maps these names: (.*)\.\n", PAGE)
    assert listed is not None and set(re.findall(r"`(\w+)`", listed.group(1))) == set(NAMES)
    words = re.search(r"The words (.*) alone in a cell", PAGE)
    assert words is not None and set(re.findall(r"`([^`]+)`", words.group(1))) == MISSING_WORDS
    section = PAGE.partition("### Prompts that are already rendered")[2].partition("\n## ")[0]
    for markup in MARKUPS:
        (row,) = [line for line in section.replace("\\|", "¦").splitlines() if line.startswith(f"| {markup.name}")]
        question, answer = (re.findall(r"`([^`]+)`", cell.replace("¦", "|")) for cell in row.split(" | ")[1:])
        for asked in question:
            blank = "\n\n" if markup.name == "Human/Assistant" else ""
            prompt = f"{blank}{asked}\n물음\n\n{answer[0]}"
            assert markup_of(prompt) is markup
    columns = set(re.findall(r"`(\w+)`", PAGE.partition("### Columns beside the prompt")[2].partition("```")[0]))
    assert {column for item in ROW_FORMATS.values() for names in item.optional.values() for column in names} <= (
        columns | {"scores1", "scores2"}
    )


def test_the_readme_counts_the_formats_rightly() -> None:
    counted = re.search(r"(\d+) row formats", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert counted is not None
    assert int(counted.group(1)) == len(ROW_FORMATS)


def test_links_between_the_pages_lead_somewhere() -> None:
    for page in [ROOT / "README.md", *ROOT.glob("docs/*.md"), ROOT / "training_scripts/configs/README.md"]:
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text(encoding="utf-8")):
            if target != "docs/results.md":  # written by a long run
                assert (page.parent / target).exists(), f"{page.name} links to {target}, which is not there"


def test_there_is_an_example_for_each_family_of_formats() -> None:
    assert len(EXAMPLES) >= 14
