"""The monitor's file (what it finds and forgets: test_doctor.py)."""

import json

import pytest

from rlhf.doctor.findings import SICKNESSES, finding
from rlhf.doctor.monitor import HealthMonitor, HealthWatch, record_stop
from tests.doctor.test_doctor import CHECKS, history, lines_of


def test_the_file_is_there_and_empty_from_the_first_line_on_wherever_it_is(tmp_path):
    directory = tmp_path / "runs" / "new" / "ppo"
    HealthMonitor(directory, "ppo", CHECKS["ppo"]).observe(1, history("ppo")[0])
    assert (directory / "health.jsonl").read_text() == ""


def test_the_log_says_what_is_new_worse_and_over_and_the_file_has_all_of_it(tmp_path, caplog):
    monitor = HealthMonitor(tmp_path, "ppo", CHECKS["ppo"])
    with caplog.at_level("INFO", logger="rlhf"):
        for line in lines_of("kl_per_token", [0.1, 1.5, 1.25, 2.5, *[0.1] * 4]):
            monitor.observe(line["step"], line)
    words = SICKNESSES["kl_explodes"]
    advice = f"{words.meaning} Try: {words.remedy}"
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("WARNING", f"doctor: ppo step 3: {words.title} since step 2: KL 1.25 nats per token. {advice}"),
        ("WARNING", f"doctor: ppo step 4: {words.title} since step 2 (worse): KL 2.5 nats per token. {advice}"),
        ("INFO", f"doctor: ppo step 7: over since step 4: {words.title}"),
    ]
    told = {"check": "kl_explodes", "severity": "warning", "since": 2, "meaning": words.meaning, "try": words.remedy}
    assert [json.loads(line) for line in (tmp_path / "health.jsonl").read_text().splitlines()] == [
        {"event": "found", "at": 3, **told, "step": 3, "message": "KL 1.25 nats per token"},
        {"event": "worse", "at": 4, **told, "step": 4, "message": "KL 2.5 nats per token"},
        {"event": "ended", "at": 7, **told, "step": 4, "message": "KL 2.5 nats per token"},
    ]


def test_what_is_gone_for_less_than_three_lines_at_a_time_is_not_over():
    """Two of them: one that is healthy, and one beyond the limit, which alone is no finding."""
    watch = HealthWatch("ppo", CHECKS["ppo"])
    lines = lines_of("kl_per_token", [0.1, *[1.5, 1.5, 0.1] * 3, 0.1, 0.1])
    events = [(line["step"], event) for line in lines for event, _ in watch.look(line["step"], line)]
    assert events == [(3, "found"), (12, "ended")]


SCORE = {"eval_score_std": 1.0, "eval_rows": 40.0, "eval_score_gain_error": 0.1}
ACCURACY = {"eval_rows": 80.0, "eval_pairs": 80.0, "eval_accuracy_high": 1.0, "eval_loss": 1.0,
            "eval_length_baseline_accuracy": 0.75, "eval_shortcut_accuracy": 0.75}  # fmt: skip
OF_THE_MODEL = [
    ("score_below_start", "ppo", {**SCORE, "eval_score": 0.5, "eval_score_gain": -0.5},
     {"eval_score": 1.5, "eval_score_gain": 0.5}),
    ("reward_model_at_chance", "reward", {**ACCURACY, "eval_accuracy": 0.5, "eval_accuracy_low": 0.4},
     {"eval_accuracy": 0.75, "eval_accuracy_low": 0.7}),
    ("reward_model_is_shortcut", "reward",
     {**ACCURACY, "eval_accuracy": 0.75, "eval_accuracy_low": 0.7, "eval_over_shortcut": -0.01,
      "eval_over_shortcut_low": -0.2, "eval_over_shortcut_high": 0.2},
     {"eval_over_shortcut": 0.2, "eval_over_shortcut_low": 0.1}),
]  # fmt: skip


@pytest.mark.parametrize(("check", "stage", "sick", "better"), OF_THE_MODEL)
def test_what_a_later_evaluation_no_longer_shows_of_the_model_leaves_no_trace(check, stage, sick, better):
    watch, told = HealthWatch(stage, CHECKS[stage]), []
    for step, line in ((2, sick), (4, {**sick, **better, "eval_loss": 0.5})):
        told += [(step, event, found.check, found.since) for event, found in watch.look(step, line)]
    assert told == [(2, "found", check, 2), (4, "ended", check, 2)]
    assert watch.summary() == {"healthy": True, "lines": 2, "findings": []}


def test_what_stops_a_run_can_be_read_in_its_file_in_any_language(tmp_path):
    record_stop(tmp_path / "new" / "ppo", finding("not_finite", "critical", 3, 5, "물음 1: nan", advice="다시"))
    text = (tmp_path / "new" / "ppo" / "health.jsonl").read_text(encoding="utf-8")
    assert '"물음 1: nan"' in text and text.endswith("}\n")
    assert json.loads(text) == {
        "event": "stopped", "at": 5, "check": "not_finite", "severity": "critical", "step": 5, "since": 3,
        "message": "물음 1: nan", "meaning": SICKNESSES["not_finite"].meaning, "try": "다시",
    }  # fmt: skip
