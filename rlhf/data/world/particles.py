"""Korean particles and endings, which depend on the last syllable of the word before them."""

from __future__ import annotations

HANGUL = range(0xAC00, 0xD7A4)
FINAL_RIEUL = 8

PARTICLES = {
    "은": ("은", "는"),
    "이": ("이", "가"),
    "을": ("을", "를"),
    "과": ("과", "와"),
    "으로": ("으로", "로"),
    "이에요": ("이에요", "예요"),
    "이라": ("이라", "라"),
    "이나": ("이나", "나"),
    "이랑": ("이랑", "랑"),
}
"""Particle as templates name it -> its form after a final consonant, and after a vowel."""
IRREGULAR = {("저", "이"): "제가", ("나", "이"): "내가", ("너", "이"): "네가"}


def attach(word: str, particle: str) -> str:
    """`word` with the form of `particle` (a key of `PARTICLES`) that its last syllable asks for.

    으로 is 로 after a vowel and after ㄹ. Raises ValueError for a word that does not end in a Hangul syllable.
    """
    if (word, particle) in IRREGULAR:
        return IRREGULAR[word, particle]
    return word + PARTICLES[particle][not _takes_first_form(word, particle)]


def attach_wrongly(word: str, particle: str) -> str:
    """`word` with the form of `particle` that its last syllable forbids."""
    if (word, particle) in IRREGULAR:
        return word + PARTICLES[particle][1]
    return word + PARTICLES[particle][_takes_first_form(word, particle)]


def final_consonant(word: str) -> int:
    """The final consonant of the last syllable as its number in Unicode's order (1 to 27), 0 where there is none."""
    if not word or ord(word[-1]) not in HANGUL:
        raise ValueError(f"{word!r} does not end in a Hangul syllable, so no particle can follow it")
    return (ord(word[-1]) - HANGUL.start) % 28


def _takes_first_form(word: str, particle: str) -> bool:
    final = final_consonant(word)
    return final not in (0, FINAL_RIEUL) if particle == "으로" else final != 0
