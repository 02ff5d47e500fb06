"""The diagnosis of a run as a whole, line by line."""

import json
import os
import time

import pytest

from rlhf.checkpoint.run_lock import RunLock
from rlhf.doctor.checks import OFFLINE
from rlhf.doctor.findings import finding
from rlhf.doctor.monitor import record_stop
from rlhf.doctor.report import NotARunError, StageView, diagnose
from rlhf.doctor.training_checks import reward_model_blind, reward_model_saturated
from tests.support.held_directory import left_behind

STAGES = [
    StageView("first", OFFLINE, ("loss", "absent", "eval_loss")),
    StageView("second", (*OFFLINE, reward_model_saturated, reward_model_blind), ("loss",), unit="iteration"),
    StageView("third", OFFLINE, ()),
]


def write(directory, metrics=None, **files):
    """A stage's directory with its lines of metrics and json files."""
    directory.mkdir(parents=True)
    if metrics is not None:
        (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics), encoding="utf-8")
    for name, content in files.items():
        (directory / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")


def training(losses, **more):
    return [{"step": step, "loss": loss, "learning_rate": 1e-4, **more} for step, loss in enumerate(losses, 1)]


def test_a_run_with_a_finished_stage_and_a_sick_one_that_runs(tmp_path):
    metrics = [{"step": 0, "eval_loss": 3.0, "eval_rows": 52.0}, *training([3.25, 2.5]),
               {"step": 2, "eval_loss": 2.25, "eval_rows": 60.0, "kept": True, "name": "best"}]  # fmt: skip
    write(tmp_path / "first", metrics, result={"seconds": 12.5, "seed": 3, "more": 1},
          data={"skipped": {"rows": 7}, "train": {"rows": 100, "truncated_responses": 6}})  # fmt: skip
    (tmp_path / "first" / "health.jsonl").write_text("")
    (tmp_path / "first" / "config.yaml").write_text("seed: 3\nlora_rank: 8\nprecision: bf16\nlearning_rate: 0.0003\n")
    lines = [*training([2.0] * 10 + [9.0] * 6, accuracy=0.5, eval_rows=52.0), {"loss": 4.0}]
    lines[1]["learning_rate"] = lines[2]["learning_rate"] = 0
    write(
        tmp_path / "second", lines, data={"skipped": {"rows": 0}, "train": {"responses": 100, "truncated_responses": 5}}
    )
    (tmp_path / "second" / "config.yaml").write_text("zero_stage: 2\nkl_coef: 0.1\ncritic_learning_rate: 0.5\n")
    path = tmp_path / "second" / "metrics.jsonl"
    with path.open("a", encoding="utf-8") as file:
        file.write('["no", "object"]\n\n{"ste')
    written = time.time() - 200
    os.utime(path, (written, written))
    more = '{"event": "found", "since": 1, "step": 1, "message": ""}\n{"event": "stopped", "since": 1}\nbroken\n'
    (path.parent / "health.jsonl").write_text(more, encoding="utf-8")
    record_stop(path.parent, finding("not_finite", "critical", 17, 18, "loss is nan"))
    (tmp_path / "third").mkdir()
    left_behind(tmp_path / "third", host="node-2", pid=5, birth="1")
    with RunLock(tmp_path / "second"):
        text = diagnose(tmp_path, STAGES).text()
    assert text.splitlines() == [f"run {tmp_path}", *WHOLE.splitlines()]


WHOLE = """\

first: finished (last line at step 2, seconds 12.5, seed 3)
  loss 3.25 -> 2.5, eval_loss 3 -> 2.25 (n = 60)
  healthy: nothing found by not_finite, learning_rate_zero, too_few_held_out, loss_diverges
  note: data: 7 rows could not be used (skipped_rows.jsonl)
  note: data: 6 of 100 responses are cut at max_response_tokens: they teach not to end
  note: settings: learning_rate 0.0003, precision bf16, lora_rank 8

second: running; last line at iteration 16, written 3 minutes ago
  loss 2 -> 9

  [critical] the learning rate is 0, since iteration 2, last seen at 3 and over (learning_rate_zero)
    measured: learning_rate is 0
    means:    Nothing is learnt; the remaining steps are wasted. Only the last step of a schedule ends at 0.
    try:      a learning_rate above 0, and a schedule as long as the run (a user's deepspeed_config may bring
              its own).

  [critical] the loss has risen far above its start, since iteration 11 (loss_diverges)
    measured: loss 9 over the last 5 lines, 2 over the first 5, 2 in the first
    means:    The steps are too large: training destroys what the model knew.
    try:      a learning rate 3 to 10 times lower, a longer warm-up, max_grad_norm 1.0 or below.

  [critical] a number is not finite, since iteration 17 (not_finite)
    measured: stopped the run: loss is nan
    means:    From here on the weights are, or would be, worthless.
    try:      a lower learning rate, a longer warm-up, bf16 or fp32 in place of fp16; look at the batch that
              did it.

  healthy otherwise: nothing found by too_few_held_out
  note: metrics.jsonl: its last line is half-written (passed over)
  note: metrics.jsonl: 1 lines are no json (passed over): 18
  note: metrics.jsonl: 1 lines have no step (passed over)
  note: health.jsonl: 1 lines are no json (passed over): 3
  note: not checked: reward_model_saturated (no margin), reward_model_blind (no eval_score_std)
  note: settings: critic_learning_rate 0.5, kl_coef 0.1, zero_stage 2

third: incomplete, nothing measured yet

  [critical] the stage has not come to its end, since step 0 (run_incomplete)
    measured: no result.json; process 5 on node-2, since then, is gone; no training state is there
    means:    Nothing runs any more and there is no result: the model is missing, or is that of an evaluation
              on the way.
    try:      the same command with --resume auto (in place of --overwrite): no state was saved, so it begins
              at step 0.

  note: metrics.jsonl is missing
  note: health.jsonl is missing: the findings are from the metrics alone
  note: data.json is missing
  note: config.yaml is missing

diagnosis: incomplete, 4 findings
"""


@pytest.mark.parametrize(("ago", "shown"), [
    (-5, "0 seconds"), (1, "1 seconds"), (119, "119 seconds"), (120, "2 minutes"), (7199, "120 minutes"),
    (7200, "2 hours"), (172_799, "48 hours"), (172_800, "2 days"),
])  # fmt: skip
def test_how_long_ago_a_line_was_written(tmp_path, monkeypatch, ago, shown):
    write(tmp_path / "third", training([2.0]))
    os.utime(tmp_path / "third" / "metrics.jsonl", (1e9, 1e9))
    monkeypatch.setattr("rlhf.doctor.report.time.time", lambda: 1e9 + ago)
    (stage,) = diagnose(tmp_path / "third", STAGES).stages
    assert stage.state == f"incomplete; last line at step 1, written {shown} ago"


def test_a_stage_is_known_by_its_data_where_its_directory_has_another_name(tmp_path):
    write(tmp_path / "moved", training([2.0]), data={"stage": "second"}, result={"seed": 1})
    (stage,) = diagnose(tmp_path / "moved", STAGES).stages
    assert (stage.stage.name, stage.state) == ("second", "finished (last line at iteration 1, seed 1)")
    write(tmp_path / "third", data={"stage": "second"}, health=[])
    (tmp_path / "third" / "health.jsonl").write_text("")
    (stage,) = diagnose(tmp_path / "third", STAGES).stages
    assert (stage.stage.name, stage.state) == ("third", "incomplete, nothing measured yet")
    assert [(found.since, found.step) for found in stage.findings] == [(0, 0)] and stage.quiet == []


@pytest.mark.parametrize(("name", "content", "note"), [
    ("data.json", "[]", []),
    ("data.json", '{"train": []}', []),
    ("data.json", '{"train": [1]}', ["data.json is not as a stage writes it"]),
    ("data.json", '{"train": {}, "skipped": 3}', ["data.json is not as a stage writes it"]),
    ("data.json", '{"train": {"truncated_responses": 5}}', []),
    ("config.yaml", "- learning_rate", ["config.yaml holds no settings"]),
    ("config.yaml", "", ["config.yaml holds no settings"]),
    ("config.yaml", "seed: 3", []),
])  # fmt: skip
def test_what_is_said_of_odd_files(tmp_path, name, content, note):
    write(tmp_path / "third", training([2.0]), result={"seed": 1}, data={})
    (tmp_path / "third" / "health.jsonl").write_text("")
    (tmp_path / "third" / "config.yaml").write_text("kl_coef: 1")
    (tmp_path / "third" / name).write_text(content)
    notes = diagnose(tmp_path, STAGES).stages[2].notes
    assert [each for each in notes if each not in ("settings: kl_coef 1", NOT_CHECKED)] == note


NOT_CHECKED = "not checked: too_few_held_out (no eval_rows)"


def test_what_is_no_directory_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NotARunError, match="file is not a directory"):
        diagnose(tmp_path / "file", STAGES)
