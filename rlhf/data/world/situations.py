"""Situations: a frame with a meaning. What a prompt says is parsed back to the situation it was written from."""

from __future__ import annotations

import functools
import random
import zlib
from dataclasses import dataclass

from rlhf.data.world.conversation import CONVERSATION
from rlhf.data.world.frames import Frame, Question
from rlhf.data.world.grammar import Meaning
from rlhf.data.world.harmful import HARMFUL
from rlhf.data.world.instruction import INSTRUCTION
from rlhf.data.world.law import LAW

FRAMES = {frame.name: frame for frame in (*CONVERSATION, *HARMFUL, *INSTRUCTION, *LAW)}
"""Every kind of situation by name."""
CATEGORIES = tuple(dict.fromkeys(frame.category for frame in FRAMES.values()))
HELD_OUT_ONE_IN = 10
"""One in so many combinations is held out of every training text."""


@dataclass(frozen=True)
class Situation:
    """What a prompt says: a frame, the number of its question, and an entry for each of its tables."""

    frame: Frame
    question: int
    meaning: Meaning

    @property
    def asked(self) -> Question:
        """The question that is asked."""
        return self.frame.questions[self.question]

    @property
    def combination(self) -> tuple[str, ...]:
        """What decides the right answer: frame, question and the entries that facts belong to."""
        entries = [f"{name}={self.meaning[name]}" for name in self.frame.deciding]
        return (self.frame.name, str(self.question), *entries)

    @property
    def held_out(self) -> bool:
        """Whether the combination is one that training never sees."""
        return zlib.crc32("|".join(self.combination).encode()) % HELD_OUT_ONE_IN == 0

    def prompt(self, chance: random.Random) -> str:
        """One way to say it."""
        return chance.choice(self.frame.prompt_templates[self.question]).write(self.meaning, chance)


def draw_situation(
    chance: random.Random, *, held_out: bool, category: str | None = None, frame: Frame | None = None
) -> Situation:
    """A situation at random: a category first, then a frame of it (unless one is given), its question and entries."""
    if frame is None:
        category = category or chance.choice(CATEGORIES)
        frame = chance.choice([frame for frame in FRAMES.values() if frame.category == category])
    while True:
        meaning = {name: chance.randrange(len(table)) for name, table in frame.by_name.items()}
        situation = Situation(frame, chance.randrange(len(frame.questions)), meaning)
        if situation.held_out == held_out:
            return situation


@functools.lru_cache(maxsize=65536)
def read_situation(prompt: str) -> Situation | None:
    """The situation that a prompt says; None for a text that the world's grammar does not write.

    Tables that the wording leaves out have entry 0.
    """
    text = " ".join(prompt.split())
    for frame in FRAMES.values():
        for question, templates in enumerate(frame.prompt_templates):
            for template in templates:
                found = template.parse(text)
                if found is not None:
                    meaning = dict.fromkeys(frame.by_name, 0)
                    meaning.update({slot.table: min(entries) for slot, entries in found.items()})
                    return Situation(frame, question, meaning)
    return None


def number_of_prompts() -> int:
    """How many different prompts the world can say."""
    return sum(frame.prompts() for frame in FRAMES.values())
