"""Particles after every final consonant that Hangul has, beside a table written by hand."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf.data.world.particles import PARTICLES, attach, attach_wrongly

BY_HAND = {
    "물": ("물은", "물이", "물을", "물과", "물로", "물이에요", "물이라", "물이나", "물이랑"),
    "커피": ("커피는", "커피가", "커피를", "커피와", "커피로", "커피예요", "커피라", "커피나", "커피랑"),
    "부산": ("부산은", "부산이", "부산을", "부산과", "부산으로", "부산이에요", "부산이라", "부산이나", "부산이랑"),
    "세제": ("세제는", "세제가", "세제를", "세제와", "세제로", "세제예요", "세제라", "세제나", "세제랑"),
    "붓": ("붓은", "붓이", "붓을", "붓과", "붓으로", "붓이에요", "붓이라", "붓이나", "붓이랑"),
    "닭": ("닭은", "닭이", "닭을", "닭과", "닭으로", "닭이에요", "닭이라", "닭이나", "닭이랑"),
}
NAMES = ("은", "이", "을", "과", "으로", "이에요", "이라", "이나", "이랑")


@pytest.mark.parametrize("word", BY_HAND)
def test_words_by_hand(word):
    assert tuple(attach(word, name) for name in NAMES) == BY_HAND[word]
    assert set(NAMES) == set(PARTICLES)


@given(st.integers(0, 18), st.integers(0, 20), st.integers(0, 27), st.sampled_from(NAMES))
def test_every_final_consonant(initial, vowel, final, particle):
    """Decomposition says whether a syllable is closed; only 으로 looks at which consonant closes it (ㄹ)."""
    word = "말" + chr(0xAC00 + (initial * 21 + vowel) * 28 + final)
    letters = unicodedata.normalize("NFD", word[-1])
    closed = len(letters) == 3
    if particle == "으로" and letters[-1] == "\u11af":
        closed = False
    right, wrong = PARTICLES[particle] if closed else PARTICLES[particle][::-1]
    assert attach(word, particle) == word + right
    assert attach_wrongly(word, particle) == word + wrong


def test_pronouns_change():
    assert [attach(word, "이") for word in ("저", "나", "너")] == ["제가", "내가", "네가"]
    assert attach("저", "을") == "저를" and attach_wrongly("저", "이") == "저가"


@pytest.mark.parametrize("word", ["", "tea", "3", "물 "])
def test_a_word_that_does_not_end_in_hangul_is_refused(word):
    with pytest.raises(ValueError, match="does not end in a Hangul syllable"):
        attach(word, "은")
