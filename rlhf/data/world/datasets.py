"""The world's data sets, row by row: what `sample:NAME` reads."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from rlhf.data.world.annotator import Annotator
from rlhf.data.world.grammar import sentences
from rlhf.data.world.judge import judge_response, readings
from rlhf.data.world.situations import CATEGORIES, FRAMES, Situation, draw_situation
from rlhf.data.world.writer import BASE_MIX, PREFERENCE_MIX, SFT_MIX, write_answer

SAME_GOLD = 0.02
"""Answers whose gold is as near as this are not compared."""
ROWS = {"sft": 3000, "preference": 4000, "ranked": 4000, "prompts": 3000}
"""Rows of the training file of each kind."""
HELD_OUT_ROWS = {"sft": 200, "preference": 400, "ranked": 100, "prompts": 100}
RANKED_ANSWERS = 4
EDITED = 0.5
"""The share of comparisons between an answer and others that differ from it in one sentence."""
BASE_TEXTS = 24000
REPEATED = 1000
"""So many prompts in a row that were there already: there are no more of them."""


@dataclass(frozen=True)
class World:
    """Data sets drawn with a seed, their comparisons by an annotator. The same arguments give the same rows."""

    seed: int = 0
    annotator: Annotator = Annotator()

    def rows(self, name: str, count: int | None = None) -> Iterator[dict[str, Any]]:
        """The rows of data set `name` (one of `DATASETS`), `count` of them or as many as the default run has.

        ValueError where there are not so many different prompts.
        """
        kind, _, part = name.partition("_")
        held_out = part == "heldout"
        count = (HELD_OUT_ROWS if held_out else ROWS)[kind] if count is None else count
        chance, repeated = random.Random(f"{self.seed} {name}"), 0
        seen: set[str] = set()
        while len(seen) < count:
            category = CATEGORIES[len(seen) % len(CATEGORIES)]
            situation = draw_situation(chance, held_out=held_out, category=category)
            prompt = situation.prompt(chance)
            repeated = repeated + 1 if prompt in seen else 0
            if repeated == REPEATED:
                raise ValueError(f"{name} has no more than about {len(seen)} different prompts, asked for are {count}")
            if repeated:
                continue
            columns = _WRITERS[kind](self, situation, prompt, chance)
            seen.add(prompt)
            yield {"id": f"{kind}-{len(seen):05}", "category": category, **columns}

    def _compared(self, situation: Situation, count: int, chance: random.Random) -> tuple[list[str], list[int]]:
        """Answers of which no two are as good as each other, and their ranks."""
        answers: dict[str, float] = {}
        edits = chance.random() < EDITED
        while len(answers) < count:
            answer = write_answer(situation, chance, PREFERENCE_MIX)
            if edits and answers:
                answer = _edited(next(iter(answers)), answer, chance)
            gold = judge_response(situation, answer, ended=True).total
            if all(abs(gold - other) > SAME_GOLD for other in answers.values()):
                answers[answer] = gold
        return list(answers), self.annotator.ranks(answers, chance)


def _edited(answer: str, other: str, chance: random.Random) -> str:
    """`answer` with a sentence of `other` in place of one of its kind; `other` where they have no kind in common."""
    parts = sentences(answer)
    pairs = [
        (place, new)
        for place, part in enumerate(parts)
        for new in sentences(other)
        if new not in parts and _says(new) == _says(part) and _says(part)[:1] != ("filler",)
    ]
    if not pairs:
        return other
    place, new = chance.choice(pairs)
    parts[place] = new
    return " ".join(parts)


@functools.lru_cache(maxsize=65536)
def _says(sentence: str) -> tuple[str, ...]:
    """The kind of a sentence with the facts that it states."""
    found = readings(sentence)
    return (found[0].kind, *(slot.fact for slot in found[0].found or ())) if found else ()


def _sft(world: World, situation: Situation, prompt: str, chance: random.Random) -> dict[str, Any]:
    return {"instruction": prompt, "input": "", "output": write_answer(situation, chance, SFT_MIX)}


def _preference(world: World, situation: Situation, prompt: str, chance: random.Random) -> dict[str, Any]:
    answers, ranks = world._compared(situation, 2, chance)
    return {"prompt": prompt, "chosen": answers[ranks.index(0)], "rejected": answers[ranks.index(1)]}


def _ranked(world: World, situation: Situation, prompt: str, chance: random.Random) -> dict[str, Any]:
    answers, ranks = world._compared(situation, RANKED_ANSWERS, chance)
    return {"prompt": prompt, "responses": answers, "ranks": ranks}


def _prompts(world: World, situation: Situation, prompt: str, chance: random.Random) -> dict[str, Any]:
    return {"prompt": prompt}


def base_texts(count: int = BASE_TEXTS, seed: int = 0) -> list[str]:
    """Exchanges of two lines for a base model to read: of all frames alike, and nothing that is held out."""
    chance, frames = random.Random(f"{seed} base"), list(FRAMES.values())
    situations = (draw_situation(chance, held_out=False, frame=frames[row % len(frames)]) for row in range(count))
    return [f"{some.prompt(chance)}\n{write_answer(some, chance, BASE_MIX)}" for some in situations]


_WRITERS: Mapping[str, Callable[[World, Situation, str, random.Random], dict[str, Any]]] = {
    "sft": _sft, "preference": _preference, "ranked": _ranked, "prompts": _prompts,
}  # fmt: skip
DATASETS = tuple(f"{kind}_{part}" for kind in _WRITERS for part in ("train", "heldout"))
"""The names of the data sets."""


@functools.lru_cache(maxsize=16)
def default_rows(name: str) -> tuple[dict[str, Any], ...]:
    """The rows of a data set of the default world."""
    return tuple(World().rows(name))
