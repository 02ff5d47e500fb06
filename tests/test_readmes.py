"""README.md and README.ko.md say the same: sections, commands, links and figures are alike, in order."""

import re
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)
NUMBER = re.compile(r"(?<![\w.])[+-]?\d[\d.,]*\d|\d")


def sections(name):
    return re.split(r"^## ", (ROOT / name).read_text(encoding="utf-8"), flags=re.MULTILINE)


def test_the_two_readmes_have_the_same_commands_and_output():
    blocks = [BLOCK.findall((ROOT / name).read_text(encoding="utf-8")) for name in ("README.md", "README.ko.md")]
    assert len(blocks[0]) >= 8 and blocks[0] == blocks[1]


def test_the_two_readmes_have_the_same_figures_options_and_links_in_every_section():
    both = [sections(name) for name in ("README.md", "README.ko.md")]
    assert len(both[0]) == len(both[1])
    for english, korean in zip(*both, strict=True):
        title = english.splitlines()[0]
        prose = [BLOCK.sub("", text) for text in (english, korean)]
        for pattern in (NUMBER, re.compile(r"`[^`]+`"), re.compile(r"\]\(([^)]+)\)")):
            found = [Counter(pattern.findall(text)) for text in prose]
            found = [counts - Counter({"README.md": 1, "README.ko.md": 1}) for counts in found]
            assert found[0] == found[1], (title, found[0] - found[1], found[1] - found[0])
