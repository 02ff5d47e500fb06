"""What differs between two answers, word by word, as HTML."""

from __future__ import annotations

import difflib
import html
import re

MOST_WORDS = 600
"""Longer texts are shown as they are: comparing takes the square of their length."""
LEAST_ALIKE = 0.25
"""Share of words in common below which all would be marked, and nothing is."""


def marked(before: str, after: str) -> tuple[str, str]:
    """The two texts as HTML, what only one of them has within <del> and <ins>, unless that is nearly all."""
    first, second = _words(before), _words(after)
    if max(len(first), len(second)) > MOST_WORDS:
        return html.escape(before), html.escape(after)
    sides: tuple[list[str], list[str]] = ([], [])
    matcher = difflib.SequenceMatcher(None, first, second, autojunk=False)
    if matcher.ratio() < LEAST_ALIKE:
        return html.escape(before), html.escape(after)
    for tag, start, end, other_start, other_end in matcher.get_opcodes():
        for side, words, name in (
            (sides[0], first[start:end], "del"),
            (sides[1], second[other_start:other_end], "ins"),
        ):
            text = html.escape("".join(words))
            if text:
                side.append(text if tag == "equal" else f"<{name}>{text}</{name}>")
    return "".join(sides[0]), "".join(sides[1])


def _words(text: str) -> list[str]:
    """Words with the white space behind them."""
    return re.findall(r"\s*\S+\s*|\s+", text)
