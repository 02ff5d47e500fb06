"""Prompts say their situation and nothing else; the world is large, and some of it is never shown to training."""

import random
from collections import Counter

import pytest

from rlhf.data.world.particles import PARTICLES
from rlhf.data.world.situations import (
    CATEGORIES,
    FRAMES,
    Situation,
    draw_situation,
    number_of_prompts,
    read_situation,
)


@pytest.mark.parametrize("name", FRAMES)
def test_a_prompt_is_read_back_as_what_it_was_written_from(name):
    frame, chance = FRAMES[name], random.Random(name)
    for _ in range(300):
        meaning = {table: chance.randrange(len(entries)) for table, entries in frame.by_name.items()}
        situation = Situation(frame, chance.randrange(len(frame.questions)), meaning)
        assert read_situation(situation.prompt(chance)) == situation


@pytest.mark.parametrize(
    "text", ["", "김치찌개", "부산에 뭐가 있나요", "오늘 저가 시험을 망쳤어요. 조언을 좀 해 주세요."]
)
def test_other_texts_say_no_situation(text):
    assert read_situation(text) is None


def test_every_word_takes_every_particle_that_a_template_gives_it():
    for frame in FRAMES.values():
        groups = [*frame.prompt_templates, *frame.statement_templates.values()]
        for template in [template for group in groups for template in group] + frame.vague_templates:
            for slot in template.slots:
                assert slot.particle in ("", *PARTICLES)
                assert len(template._entries[template.slots.index(slot)]) >= 2


def test_there_are_millions_of_prompts():
    drawn = [frame.prompts() for frame in FRAMES.values()]
    assert number_of_prompts() == sum(drawn) > 2_000_000 and min(drawn) > 10_000


def test_what_is_held_out_never_meets_what_is_shown():
    chance = random.Random(3)
    shown = {draw_situation(chance, held_out=False).combination for _ in range(20_000)}
    held = {draw_situation(chance, held_out=True).combination for _ in range(4_000)}
    assert not shown & held
    combinations = sum(frame.combinations() for frame in FRAMES.values())
    assert 0.07 < len(held) / combinations < 0.13
    # every single entry of a deciding table is shown, so that a held-out answer is a new pair of known facts
    for frame in FRAMES.values():
        seen = {name: {c[2 + place] for c in shown if c[0] == frame.name} for place, name in enumerate(frame.deciding)}
        for name in frame.deciding:
            assert len(seen[name]) == len(frame.by_name[name]), (frame.name, name)


def test_categories_are_drawn_alike_or_as_asked():
    chance = random.Random(1)
    drawn = Counter(draw_situation(chance, held_out=False).frame.category for _ in range(4000))
    assert set(drawn) == set(CATEGORIES) == {"conversation", "harmful", "instruction", "law"}
    assert max(drawn.values()) < 1.2 * min(drawn.values())
    assert {draw_situation(chance, held_out=True, category="law").frame.category for _ in range(50)} == {"law"}
