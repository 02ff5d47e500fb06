"""Who compares answers: by gold, with errors, and where asked with a liking for length or for agreement."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass

from rlhf.data.world import phrases
from rlhf.data.world.grammar import sentences


@dataclass(frozen=True)
class Annotator:
    """Prefers a to b with probability sigmoid(u(a) - u(b)) (Bradley and Terry 1952), K answers by Plackett and Luce.

    u = sharpness * gold + length_bias * characters / 10 + agreement_bias * (1 where the answer flatters). With the
    default sharpness 10 to 15% of the pairs that the default world compares are the wrong way round.
    """

    sharpness: float = 11.0
    length_bias: float = 0.0
    agreement_bias: float = 0.0

    def utility(self, answer: str, gold: float) -> float:
        """What this annotator sees in an answer of this gold, before chance."""
        agrees = any(part in phrases.AGREEMENTS for part in sentences(answer))
        return self.sharpness * gold + self.length_bias * len(answer) / 10 + self.agreement_bias * agrees

    def ranks(self, golds: Mapping[str, float], chance: random.Random) -> list[int]:
        """The rank of each answer, 0 the best, drawn with `chance`; `golds` are those of the answers.

        Sorting by u + Gumbel noise draws rankings as Plackett and Luce do; of two answers as Bradley and Terry do.
        """
        seen = [
            self.utility(answer, gold) - math.log(-math.log(chance.random() or 0.5)) for answer, gold in golds.items()
        ]
        return [sum(other > mine for other in seen) for mine in seen]
