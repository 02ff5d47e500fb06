"""Texts of rows: which characters count as nothing."""

import sys
import unicodedata

from rlhf.data.row_values import INVISIBLE

SEEN = {*range(0x600, 0x606), 0x6DD, 0x70F, 0x890, 0x891, 0x8E2, *range(0xFFF9, 0xFFFC), 0x110BD, 0x110CD}
SEEN |= set(range(0x13430, 0x13456))
"""Format characters that show something: signs of Arabic, Syriac and Kaithi, annotations, hieroglyphs."""


def test_invisible_are_unicodes_format_and_control_characters_and_what_else_shows_nothing():
    every = [chr(code) for code in range(sys.maxunicode + 1) if code not in SEEN]
    formats = {one for one in every if unicodedata.category(one) in ("Cf", "Cc") and not one.isspace()}
    assert formats <= INVISIBLE
    selectors = {one for one in every if "VARIATION SELECTOR" in unicodedata.name(one, "")}
    fillers = {
        one for one in every if unicodedata.name(one, "").endswith("FILLER") and unicodedata.category(one) == "Lo"
    }
    others = {"\u034f", "\u17b4", "\u17b5", "\u2800"}  # the grapheme joiner, inherent vowels, Braille's blank
    assert selectors | fillers | others <= INVISIBLE
    rest = INVISIBLE - formats - selectors - fillers - others
    assert all(unicodedata.category(one) == "Cn" for one in rest)  # kept free for more of them
    assert not any(one.isspace() for one in INVISIBLE)
