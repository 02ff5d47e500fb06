"""A frame is a kind of situation: what a prompt of it says, what is asked, and what can be said in answer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from rlhf.data.world.grammar import Table, Template
from rlhf.data.world.phrases import BEGINNINGS, ENDINGS


@dataclass(frozen=True)
class Question:
    """Wordings of a prompt, and the facts (`table.form`) that a whole answer states."""

    wordings: tuple[str, ...]
    asks: tuple[str, ...]


@dataclass(frozen=True)
class Frame:
    """One kind of situation.

    `tone`: the kind of opening that a kind answer begins with (`rlhf.data.world.phrases.OPENINGS`). `statements`: for
    each fact (`table.form`) the sentences that state it. `vague`: sentences that stay on the topic and state nothing.
    `harmful`: what is asked for must be refused, giving the reason, and led elsewhere; `compliance`: sentences that
    give in. `redirects`: the fact that leads elsewhere, of a harmful frame.
    """

    name: str
    category: str
    tone: str
    tables: tuple[Table, ...]
    questions: tuple[Question, ...]
    statements: Mapping[str, tuple[str, ...]]
    vague: tuple[str, ...]
    compliance: tuple[str, ...] = ()
    redirects: str = ""

    @property
    def harmful(self) -> bool:
        """Whether what is asked for must be refused."""
        return bool(self.redirects)

    @cached_property
    def by_name(self) -> dict[str, Table]:
        """Its tables by name."""
        return {table.name: table for table in self.tables}

    @cached_property
    def deciding(self) -> tuple[str, ...]:
        """The tables whose entries decide what a right answer is: those that have facts."""
        return tuple(table.name for table in self.tables if table.facts)

    def templates(self, texts: Sequence[str]) -> list[Template]:
        """Templates over the tables of this frame."""
        return [Template(text, self.by_name) for text in texts]

    @cached_property
    def prompt_templates(self) -> list[list[Template]]:
        """For each question its wordings, with what a prompt may begin and end with."""
        speech = "rude" if self.category == "harmful" else "polite"
        before, after = (f"[{'|'.join(around[speech])}]" for around in (BEGINNINGS, ENDINGS))
        return [self.templates([before + text + after for text in question.wordings]) for question in self.questions]

    @cached_property
    def statement_templates(self) -> dict[str, list[Template]]:
        """For each fact the sentences that state it."""
        return {fact: self.templates(texts) for fact, texts in self.statements.items()}

    @cached_property
    def vague_templates(self) -> list[Template]:
        """Sentences on the topic that state nothing."""
        return self.templates(self.vague)

    @cached_property
    def compliance_templates(self) -> list[Template]:
        """Sentences that give in to a harmful request."""
        return self.templates(self.compliance)

    def prompts(self) -> int:
        """How many different prompts there are."""
        meanings = {name: len(table) for name, table in self.by_name.items()}
        return sum(
            template.wordings() * math.prod(meanings[table] for table in {slot.table for slot in template.slots})
            for templates in self.prompt_templates
            for template in templates
        )

    def combinations(self) -> int:
        """How many different right answers are asked for: deciding entries and questions."""
        return len(self.questions) * math.prod(len(self.by_name[name]) for name in self.deciding)
