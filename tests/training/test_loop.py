"""What every loop does around its steps: lines, the log, states, a stop, and what `fit` returns."""

from __future__ import annotations

import json
import signal

import pytest
import torch

from rlhf.config import RunConfig
from rlhf.distributed.rank_watch import Stopped, current_watch, watched_ranks
from rlhf.doctor.checks import OFFLINE
from rlhf.training.loop import Loop, RunContext
from rlhf.training.resume import TrainingStates


class Counting(Loop):
    """Steps that have a loss of their number; a line of metrics every third step has the mean since the last one."""

    device = torch.device("cpu")

    def __init__(self, directory, *, total_steps=20, logged=(), stop_after=0, states=True, **run):
        config = RunConfig(output_dir=str(directory), tensorboard=False, **run)
        kept = TrainingStates(directory / "states", config, {"seed": 1}) if states else None
        super().__init__(RunContext("count", config, directory, OFFLINE, kept, logged), total_steps=total_steps)
        self.stop_after, self.broken = stop_after, False

    def engines(self):
        return {}

    def export(self):
        if self.broken:
            raise OSError(28, "no space left on device")

    def fit(self):
        done = self.begin()
        if done == 0:
            self.outcome = {"before": -1}
        for step in range(done + 1, self.total_steps + 1):
            self.meter.add({"loss": 2.0 * step}, 2)
            if step % 3 == 0:
                self.record(step, self.meter.means())
            if step == self.stop_after:
                current_watch().signals.ask_to_stop(signal.SIGTERM)
            self.end_step(step)
        return self.ended()


def lines(directory):
    found = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in found]


def test_a_run_that_is_stopped_saves_its_state_and_goes_on_where_it_was(tmp_path):
    """In the middle of the steps that a line of metrics sums over, and at a step whose state is not due."""
    with watched_ranks(tmp_path, RunConfig()), pytest.raises(Stopped, match="stopped at step 5 by SIGTERM") as stopped:
        Counting(tmp_path, stop_after=5, save_every_steps=4).fit()
    assert (stopped.value.step, stopped.value.saved, stopped.value.directory) == (5, True, tmp_path)
    assert lines(tmp_path) == [(3, 2.0)]
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "loss": 99}\n')  # of a process that died after its last state
    loop = Counting(tmp_path, save_every_steps=4, resume="auto")
    outcome = loop.fit()
    assert loop.writer._lines._file is None, "closed, and its last events of TensorBoard with it"
    assert lines(tmp_path) == [(3, 2.0), (6, 5.0), (9, 8.0), (12, 11.0), (15, 14.0), (18, 17.0)]
    assert outcome.pop("seconds") > 0
    assert outcome == {"before": -1, "health": {"healthy": True, "lines": 6, "findings": []}}
    assert loop.states.store.steps()[-1] == 20


@pytest.mark.parametrize(("states", "keep_last"), [(True, 0), (False, 2)])
def test_a_run_that_keeps_no_states_is_stopped_without_one(tmp_path, states, keep_last):
    with watched_ranks(tmp_path, RunConfig()), pytest.raises(Stopped, match="no training state saved") as stopped:
        Counting(tmp_path, stop_after=4, states=states, keep_last=keep_last).fit()
    assert not stopped.value.saved and not list(tmp_path.glob("states/step-*"))
    assert lines(tmp_path) == [(3, 2.0)]


def test_the_watch_knows_the_step_and_the_state_that_is_saved(tmp_path):
    with watched_ranks(tmp_path, RunConfig()):
        watch = current_watch()
        Counting(tmp_path, total_steps=7, save_every_steps=3, resume="never").fit()
        assert watch.progress == (8, "step 7") and watch.saved_step == 7, "the start and seven steps"
        watch.saved_step = None
        assert Counting(tmp_path, total_steps=7, resume="auto", save_every_steps=3).begin() == 7
        assert watch.progress == (9, "step 7") and watch.saved_step == 7
    with watched_ranks(tmp_path / "new", RunConfig()):
        assert Counting(tmp_path / "new", states=False).begin() == 0
        assert current_watch().saved_step is None and current_watch().progress == (1, "step 0")


FIGURES = {f"eval_{letter}": index / 8 for index, letter in enumerate("abcdefg")}


@pytest.mark.parametrize(("logged", "shown"), [
    ((), "eval_a=0.0000  eval_b=0.1250  eval_c=0.2500  eval_d=0.3750  eval_e=0.5000  eval_f=0.6250  eval_g=0.7500"),
    (("eval_g", "eval_a", "eval_x", "eval_b"), "eval_g=0.7500  eval_a=0.0000  eval_b=0.1250"),
    (tuple(FIGURES), "eval_a=0.0000  eval_b=0.1250  eval_c=0.2500  eval_d=0.3750  eval_e=0.5000"),
    (("eval_x",), None),
])  # fmt: skip
def test_the_log_shows_five_of_the_figures_that_matter_and_the_file_has_all(tmp_path, caplog, logged, shown):
    loop = Counting(tmp_path, total_steps=8, logged=logged, states=False)
    loop.begin()
    with caplog.at_level("INFO", logger="rlhf"):
        loop.record_evaluation(6, FIGURES)
    assert [text for text in caplog.messages if text.startswith("count")] == [f"count step 6: {shown}"] * bool(shown)
    (line,) = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert line.pop("seconds") >= 0 and line == {"step": 6, **FIGURES, "eval_progress": 0.75}
    assert loop.health.lines == 1


def test_an_export_that_fails_ends_a_run_at_its_last_step_alone(tmp_path, caplog):
    loop = Counting(tmp_path, states=False)
    assert loop.exported(last=False) and loop.exported(last=True)
    loop.broken = True
    assert not loop.exported(last=False)
    assert "training goes on, the next export tries again" in caplog.text
    with pytest.raises(OSError, match="no space left"):
        loop.exported(last=True)
