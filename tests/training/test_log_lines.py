"""What the log shows of an evaluation, and of samples: the figures that matter, and what was asked."""

from __future__ import annotations

import json
import logging

import pytest

from rlhf.data.rendered import asked
from rlhf.doctor.checks import NEEDS
from rlhf.pipeline.stages import STAGES
from rlhf.training.rollouts import sample_table
from rlhf.types import TokenizedPrompt
from tests.algorithms.test_ppo_checklist import make_trainer  # noqa: F401  (a fixture)
from tests.algorithms.test_preference import preference_trainer
from tests.training.test_trainer import reward_trainer, sft_rows, sft_trainer


@pytest.mark.parametrize("stage", list(STAGES))
def test_an_evaluation_shows_the_figures_of_the_stages_row_and_records_all(
    stage,
    tiny_models,
    tmp_path,
    make_trainer,  # noqa: F811
    caplog,
):
    rows = sft_rows(4)
    trainer = {
        "sft": lambda: sft_trainer(tiny_models["gpt2"], tmp_path, rows, rows, max_steps=1),
        "reward": lambda: reward_trainer(tiny_models["gpt2"], tmp_path),
        "ppo": lambda: make_trainer(iterations=1),
        "offline": lambda: preference_trainer(tiny_models, tmp_path, "dpo"),
    }[stage]()
    with caplog.at_level(logging.INFO, logger="rlhf"):
        trainer.fit()
    row = STAGES[stage]
    lines = [line for line in caplog.messages if line.startswith(f"{stage} {row.unit} 0: ")]
    assert len(lines) == 1
    shown = [part.partition("=")[0] for part in lines[0].split(": ", 1)[1].split()]
    recorded = json.loads((trainer.directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert shown == [name for name in row.logged if name in recorded][:5]
    unseen = {"eval_gold", "eval_held_out_score"}  # prompts of the embedded world, or a second reward model, have them
    unseen |= {"eval_eos_rate"} if stage == "offline" else set()  # where prompts are named to be sampled
    assert set(row.logged) - set(shown) <= unseen
    lines = (trainer.directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    written = {name for line in lines for name in json.loads(line)}
    assert set(row.curves) <= written, "what the doctor shows is written"
    needed = {name for check in row.checks for name in NEEDS.get(check.__name__, ())}
    assert needed <= written | {"scores_outside_range", " or ".join(sorted(unseen))}, "and what it looks at"


def prompt(text, *messages):
    turns = tuple({"role": role, "content": content} for role, content in messages)
    return TokenizedPrompt("1", (1,), text, messages=turns)


RENDERED = "아래는 작업을 설명하는 명령어입니다.\n\n### 명령어:\n날씨를 알려줘.\n\n### 응답:\n"


def test_a_sample_shows_what_was_asked_without_its_template():
    assert asked(prompt(RENDERED, ("user", "날씨를 알려줘."))) == "날씨를 알려줘."
    assert (
        asked(prompt("...", ("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c\n\n입력"))) == "c\n\n입력"
    )
    assert asked(prompt(RENDERED)) == "날씨를 알려줘.", "a row that came with the markers of a template"
    assert asked(prompt("\n\nHuman: hi\n\nAssistant: yes\n\nHuman: why?\n\nAssistant:")) == "hi\nyes\nwhy?"
    assert asked(prompt("물음")) == "물음"


def test_samples_of_an_evaluation_keep_what_the_actor_was_given(make_trainer, caplog):  # noqa: F811
    trainer = make_trainer()
    first = TokenizedPrompt("0", (5, 6, 7), RENDERED, messages=({"role": "user", "content": "날씨를 알려줘."},))
    with caplog.at_level(logging.INFO, logger="rlhf"):
        found = trainer.rollouts.evaluate([first], copies=2, shown=1, further=lambda scored: {})
    (sample,) = found["samples"]
    assert (sample["prompt"], sample["rendered_prompt"]) == ("날씨를 알려줘.", RENDERED)
    assert f"[{sample['score']:+.2f}] 날씨를 알려줘.\n" in caplog.messages[-1] and "###" not in caplog.messages[-1]


def test_long_samples_take_a_line_each():
    sample = {"prompt": "처음 " + "가" * 300, "response": "나\n" * 300, "score": 1.0}
    prompt_line, response_line = sample_table([sample]).splitlines()
    assert prompt_line.startswith("  [+1.00] 처음 가") and response_line.startswith("          -> 나 나")
    assert all(line.endswith("...") for line in (prompt_line, response_line))
    assert len(prompt_line) == len("  [+1.00] ") + 110 and len(response_line) == len("          -> ") + 110
    parts = {"ends": 1.0, "length_curve": -0.25}
    assert sample_table([{**sample, "parts": parts}]).startswith("  [+1.00: ends +1.00, length_curve -0.25] 처음 가")
    whole = sample_table([{"prompt": "가" * 110, "response": "나" * 111, "score": 1.0}]).splitlines()
    assert whole[0].endswith("가" * 110) and whole[1].endswith(" " + "나" * 107 + "...")
