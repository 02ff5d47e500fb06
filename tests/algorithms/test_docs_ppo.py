"""The step by hand in docs/ppo.md prints what the page says, and what arithmetic without torch gives."""

from __future__ import annotations

import contextlib
import io
import math
import re
from pathlib import Path

import pytest

PAGE = (Path(__file__).parents[2] / "docs" / "ppo.md").read_text(encoding="utf-8")
SECTION = PAGE.partition("## One step by hand")[2].partition("\n## ")[0]


def printed() -> str:
    (code,) = re.findall(r"```python\n(.*?)```", SECTION, flags=re.DOTALL)
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(code, {})
    return out.getvalue().strip()


def test_the_page_shows_what_the_block_prints() -> None:
    (shown,) = re.findall(r"```\n(tensor.*?)\n```", SECTION, flags=re.DOTALL)
    assert printed() == shown


def test_the_step_is_five_lines() -> None:
    body = SECTION.partition("old, old_v = ")[2].partition("\n\n")[2].partition("\n\nprint(")[0]
    assert len(body.splitlines()) == 5


def step_by_arithmetic() -> list[list[float]]:
    """The same step from the equations of the page, row by row: Ziegler eq. 2, GAE, the gradients at ratio 1."""
    old, count, new_logprobs, new_values = -math.log(4), 5, [], []
    for score, reference in ((1.0, (-1.0, -1.5, -2.0)), (-0.5, (-1.2, -1.4))):
        rewards = [-0.1 * (old - ref) for ref in reference]
        rewards[-1] += score
        advantages = [sum(0.95 ** (later - t) * rewards[later] for later in range(t, len(rewards)))
                      for t in range(len(rewards))]  # fmt: skip
        for advantage in advantages:  # V = 0, so the returns are the advantages
            up, down = advantage / count * 0.75, -advantage / count * 0.25  # d logprob / d logits = 1 - p, -p
            new_logprobs.append(up - math.log(math.exp(up) + 3 * math.exp(down)))
            new_values.append(advantage / count)
    return [new_logprobs, new_values]


def test_the_numbers_are_those_of_the_equations() -> None:
    lines = [[float(number) for number in re.findall(r"-?\d+\.\d+", line)] for line in printed().splitlines()]
    assert lines == [pytest.approx(expected, abs=6e-5) for expected in step_by_arithmetic()]
    assert all(logprob > -math.log(4) for logprob in lines[0][:3]) and all(
        logprob < -math.log(4) for logprob in lines[0][3:]
    )
