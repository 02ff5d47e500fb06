"""Templates are written and parsed back; what another grammar wrote does not parse."""

import random

import pytest

from rlhf.data.world.grammar import Table, Template, sentences
from rlhf.data.world.particles import attach_wrongly

STAIN = Table.parse("stain", "name remedy*", "커피 | 식초\n피 | 찬물\n땀 | 찬물")
CLOTH = Table.parse("cloth", "name", "셔츠\n이불")
TEMPLATE = Template("[자, |]{cloth}에 묻은 {stain:은} {stain.remedy:으로} 지우세요.", {"stain": STAIN, "cloth": CLOTH})


def written(meaning, **options):
    return {TEMPLATE.write(meaning, random.Random(seed), **options) for seed in range(20)}


def test_every_choice_is_written_with_the_particles_that_fit():
    assert written({"stain": 0, "cloth": 1}) == {
        "자, 이불에 묻은 커피는 식초로 지우세요.",
        "이불에 묻은 커피는 식초로 지우세요.",
    }
    assert TEMPLATE.wordings() == 2


def test_another_meaning_gives_the_facts_alone():
    assert written({"stain": 0, "cloth": 0}, claimed={"stain": 1, "cloth": 1}) == {
        "자, 셔츠에 묻은 커피는 찬물로 지우세요.",
        "셔츠에 묻은 커피는 찬물로 지우세요.",
    }


def test_a_text_is_parsed_to_all_it_may_mean():
    cloth, stain, remedy = TEMPLATE.slots
    assert TEMPLATE.parse("셔츠에 묻은 땀은 찬물로 지우세요.") == {
        cloth: frozenset({0}),
        stain: frozenset({2}),
        remedy: frozenset({1, 2}),
    }
    assert TEMPLATE.mentions == (cloth, stain) and TEMPLATE.claims == (remedy,)


@pytest.mark.parametrize("meaning", [{"stain": stain, "cloth": cloth} for stain in range(3) for cloth in range(2)])
def test_what_is_written_parses_and_what_has_a_wrong_particle_does_not(meaning):
    for text in written(meaning):
        assert TEMPLATE.parse(text) is not None
    for text in written(meaning, joined=attach_wrongly):
        assert TEMPLATE.parse(text) is None


@pytest.mark.parametrize("text", ["셔츠에 묻은 커피는 우유로 지우세요.", "셔츠에 묻은 커피는 식초로", "셔츠.", ""])
def test_other_texts_do_not_parse(text):
    assert TEMPLATE.parse(text) is None


def test_a_slot_that_no_table_has_is_named():
    with pytest.raises(ValueError, match="no table `dish`"):
        _ = Template("{dish}.", {"stain": STAIN}).slots
    with pytest.raises(ValueError, match="has not the 2 forms"):
        Table.parse("stain", "name remedy*", "커피")


def test_sentences_are_cut_behind_their_marks():
    assert sentences(" 네.  정말요? 와! 좋아요") == ["네.", "정말요?", "와!", "좋아요"]
    assert sentences(" \n") == []
