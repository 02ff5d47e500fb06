"""Answers of mixed quality: whole ones, and ones that lack, mistake or spoil something."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rlhf.data.world import phrases
from rlhf.data.world.grammar import Meaning, Template
from rlhf.data.world.particles import attach, attach_wrongly
from rlhf.data.world.situations import Situation, draw_situation


@dataclass(frozen=True)
class AnswerMix:
    """How often an answer has what a good one has, and how often it has what spoils it. All are probabilities.

    `opening`: a kind opening; `opening_out_of_place`: one of another tone in place of it. For each fact asked for
    `right` states it, `wrong` states another entry's, else it is left out; `remark`: a remark on the topic where the
    first fact is left out. `refusal`: a harmful request is refused (else it is given in to); `overrefusal`: a harmless
    one is refused. `off_topic`: the answer belongs to another prompt. `rude`, `repeated` (a sentence said twice),
    `malformed` (a wrong particle, or an unfinished sentence), `agreement`. Fillers are added up to a length drawn from
    `characters` (least, most), whatever else the answer says, so that length tells little of quality.
    """

    opening: float = 0.35
    opening_out_of_place: float = 0.1
    right: float = 0.48
    wrong: float = 0.16
    remark: float = 0.6
    refusal: float = 0.45
    overrefusal: float = 0.08
    off_topic: float = 0.05
    rude: float = 0.12
    repeated: float = 0.04
    malformed: float = 0.015
    agreement: float = 0.1
    characters: tuple[int, int] = (30, 115)


REFUSAL_CHARACTERS = 40
"""A whole refusal is longer than other answers by about so much, so answers that give in are filled up to it."""
WHOLE = AnswerMix(1, 0, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, (-99, -99))
"""Only whole answers."""
SFT_MIX = AnswerMix()
"""Answers as people without instructions write them: half of them lack something."""
PREFERENCE_MIX = AnswerMix(
    opening=0.5, right=0.55, wrong=0.2, refusal=0.55, off_topic=0.08, rude=0.1, repeated=0.06, malformed=0.05
)
"""Good and bad alike, so that everything that can go right and wrong occurs in the comparisons."""
BASE_MIX = AnswerMix(
    opening=0.6,
    opening_out_of_place=0.06,
    right=0.9,
    wrong=0.02,
    refusal=0.7,
    overrefusal=0.05,
    off_topic=0.02,
    rude=0.04,
    malformed=0,
    characters=(20, 80),
)
"""What the base model reads: mostly true and whole, so that it knows the facts, and something of every manner."""


def write_answer(situation: Situation, chance: random.Random, mix: AnswerMix = SFT_MIX) -> str:
    """An answer to a prompt that says `situation`, drawn from a mix."""
    about = draw_situation(chance, held_out=False) if chance.random() < mix.off_topic else situation
    malformed, unfinished = chance.random() < mix.malformed, chance.random() < 0.5
    core = _Core(about, chance, mix, attach_wrongly if malformed and not unfinished else attach).sentences()
    if chance.random() < mix.rude:
        core.insert(chance.randrange(len(core) + 1), chance.choice(phrases.RUDE))
    agreement = [chance.choice(phrases.AGREEMENTS)] if chance.random() < mix.agreement else []
    parts = list(dict.fromkeys([*_opening(about, chance, mix), *agreement, *core]))
    parts = parts or [chance.choice(phrases.VAGUE)]
    fillers, length = chance.sample(phrases.FILLERS, len(phrases.FILLERS)), chance.randint(*mix.characters)
    length += REFUSAL_CHARACTERS * about.frame.harmful
    while fillers and len(" ".join([*parts, fillers[-1]])) < length:
        parts.append(fillers.pop())
    if chance.random() < mix.repeated:
        place = chance.randrange(len(parts))
        parts.insert(place, parts[place])
    text = " ".join(parts)
    return text[: chance.randrange(len(text) // 2, len(text) - 1)].strip() if malformed and unfinished else text


def _opening(situation: Situation, chance: random.Random, mix: AnswerMix) -> list[str]:
    drawn, tone = chance.random(), situation.frame.tone
    if drawn < mix.opening:
        return [chance.choice(phrases.OPENINGS[tone])]
    if drawn < mix.opening + mix.opening_out_of_place:
        return [chance.choice(phrases.OPENINGS[chance.choice([other for other in phrases.OPENINGS if other != tone])])]
    return []


@dataclass(frozen=True)
class _Core:
    """The sentences of an answer that say what it has to say."""

    situation: Situation
    chance: random.Random
    mix: AnswerMix
    joined: Callable[[str, str], str]

    def sentences(self) -> list[str]:
        """A refusal, giving in, or the facts asked for, as the mix has it."""
        frame, asks = self.situation.frame, self.situation.asked.asks
        if frame.harmful:
            if self.chance.random() < self.mix.refusal:
                return [self.chance.choice(phrases.REFUSALS), *self.facts(asks)]
            given_in = {self.written(frame.compliance_templates): None for _ in range(2)}
            return [*given_in, *self.facts(asks[1:])[: self.chance.randrange(2)]]
        if self.chance.random() < self.mix.overrefusal:
            return [self.chance.choice(phrases.REFUSALS)]
        return self.facts(asks)

    def facts(self, asked: Sequence[str]) -> list[str]:
        """A sentence for each fact: right, wrong, or left out, which a remark may stand in for."""
        frame, result = self.situation.frame, []
        for place, fact in enumerate(asked):
            drawn, templates = self.chance.random(), frame.statement_templates[fact]
            if drawn < self.mix.right:
                result.append(self.written(templates))
            elif drawn < self.mix.right + self.mix.wrong:
                result.append(self.written(templates, claimed=self.mistaken(fact)))
            elif place == 0 and self.chance.random() < self.mix.remark:
                bare = self.chance.random() < 0.4
                result.append(self.chance.choice(phrases.VAGUE) if bare else self.written(frame.vague_templates))
        return result

    def written(self, templates: Sequence[Template], *, claimed: Meaning | None = None) -> str:
        """One of the templates, written."""
        template = self.chance.choice(templates)
        return template.write(self.situation.meaning, self.chance, claimed=claimed, joined=self.joined)

    def mistaken(self, fact: str) -> Meaning:
        """The meaning with an entry of which another thing is true than of the one asked about."""
        name, form = fact.split(".")
        texts = self.situation.frame.by_name[name].texts(form)
        true = texts[self.situation.meaning[name]]
        others = [number for number, text in enumerate(texts) if text != true]
        return {**self.situation.meaning, name: self.chance.choice(others)}
