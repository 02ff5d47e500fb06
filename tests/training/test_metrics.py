"""Metrics: sums and counts are added, divided once, over micro-batches and ranks; written by rank 0."""

import json
import math
import sys
import threading

import pytest
import torch

from rlhf.config import ConfigError, RunConfig
from rlhf.distributed.log import logger
from rlhf.training.metrics import LineFile, MeanMeter, MetricsWriter

QUIET = RunConfig(tensorboard=False)


def test_micro_batches_weigh_by_their_counts():
    meter = MeanMeter()
    meter.add({"loss": torch.tensor(6.0), "accuracy": 1.0}, 3)
    meter.add({"loss": 4.0}, torch.tensor(1.0))
    meter.add({"accuracy": 0.0}, 1)
    assert meter.means() == {"loss": 10 / 4, "accuracy": 1 / 4}  # not (2 + 4) / 2


def test_means_start_anew_and_nothing_gives_nothing():
    meter = MeanMeter()
    assert meter.means() == {}
    meter.add({"loss": 5.0}, 1)
    assert meter.means() == {"loss": 5.0}
    assert meter.means() == {}
    meter.add({"loss": 1.0}, 1)
    assert meter.means() == {"loss": 1.0}


def test_a_count_of_zero_is_nan_not_a_crash():
    meter = MeanMeter()
    meter.add({"loss": 0.0, "accuracy": 1.0}, 0)
    means = meter.means()
    assert math.isnan(means["loss"]) and math.isnan(means["accuracy"])
    meter.add({"loss": 0.0}, 0)
    meter.add({"accuracy": 1.0}, 2)
    assert meter.means(counted=True) == {"accuracy": 0.5}


def test_sums_are_kept_in_float64_and_without_a_graph():
    meter = MeanMeter()
    weight = torch.ones((), requires_grad=True)
    for _ in range(1000):
        meter.add({"loss": weight * 1e8 + 1}, 1)
    assert meter.means()["loss"] == pytest.approx(float(torch.tensor(1e8) + 1), rel=1e-12)
    meter.add({"x": 2.0**53}, 1)
    meter.add({"x": 1.0}, 1)
    meter.add({"x": 1.0}, 0)
    assert meter.means()["x"] == (2.0**53 + 2) / 2 or meter.means() == {}


def test_one_line_of_json_per_step(tmp_path):
    writer = MetricsWriter(tmp_path / "run", QUIET, stage="sft")
    writer.open()
    writer.write(1, {"loss": 2.5})
    writer.write(10, {"loss": 1.5, "kl": 0.25})
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line.pop("seconds") >= 0 for line in lines] == [True, True]
    assert lines == [{"step": 1, "loss": 2.5}, {"step": 10, "loss": 1.5, "kl": 0.25}]  # on disk before close
    writer.close()


def test_a_run_that_goes_on_cuts_off_what_came_after_its_state(tmp_path):
    """No line twice, none missing, no half line; and the meter goes on with the same sums."""
    writer = MetricsWriter(tmp_path, QUIET, stage="sft")
    writer.open()
    writer.write(1, {"loss": 3.0})
    meter = MeanMeter()
    meter.add({"loss": 0.1}, 1)
    meter.add({"loss": 0.2}, 1)
    position, sums = writer.position(), json.loads(json.dumps(meter.state()))
    writer.write(2, {"loss": 2.0})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')  # a process that was killed while it wrote

    again = MetricsWriter(tmp_path, QUIET, stage="sft")
    again.open(position, seconds=100.0, step=1)
    other = MeanMeter()
    other.load(sums)
    other.add({"loss": 0.3}, 1)
    again.write(2, other.means())
    again.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert lines[1]["loss"] == (0.1 + 0.2 + 0.3) / 3  # to the last digit
    assert lines[1]["seconds"] >= 100.0
    (tmp_path / "metrics.jsonl").unlink()  # by a user who cleans up: no reason to lose the state
    alone = MetricsWriter(tmp_path, QUIET, stage="sft")
    alone.open(10_000)
    alone.write(3, {"loss": 1.0})
    alone.close()
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [3]


@pytest.mark.parametrize(("missing", "said"), [(0, []), (1, ["earlier lines are lost"])])
def test_a_file_that_is_shorter_than_it_was_is_reported_and_one_as_long_is_not(tmp_path, caplog, missing, said):
    path = tmp_path / "metrics.jsonl"
    path.write_text("first\nlost\n")
    lines = LineFile(path)
    with caplog.at_level("ERROR", logger="rlhf"):
        lines.open(11 + missing)
    assert lines.position() == 11
    lines.write("next")
    assert lines.position() == 16 and path.read_text() == "first\nlost\nnext\n"
    lines.close()
    assert [message.split(": ")[1] for message in caplog.messages] == said


def test_lines_wait_for_a_disk_that_is_full(tmp_path, monkeypatch):
    """A real limit: the process may write no file beyond 100 bytes, that of its captured output included."""
    import resource
    import signal

    monkeypatch.setattr(logger, "handlers", [])  # an earlier test may have set up the log, which goes there
    lines = LineFile(tmp_path / "metrics.jsonl")
    lines.open()
    lines.write("a" * 39)
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
        lines.write("b" * 79)  # the first 60 bytes of it fit
        lines.write("c" * 9)
        with pytest.raises(OSError, match="could not be written yet"):
            lines.position()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    lines.write("d")
    assert lines.position() == 40 + 80 + 10 + 2
    lines.close()
    assert (tmp_path / "metrics.jsonl").read_text().split() == ["a" * 39, "b" * 79, "c" * 9, "d"]


def test_tensorboard_events_hold_every_value(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    before = set(threading.enumerate())
    writer = MetricsWriter(tmp_path, RunConfig(tensorboard=True), stage="sft")
    writer.open()
    writer.write(3, {"loss": 0.5})
    writer.write(4, {"loss": 0.25})
    writer.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(3, 0.5), (4, 0.25)]
    assert set(threading.enumerate()) == before  # the thread that writes them has ended


def test_wandb_without_the_package_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # an import of it now fails as if it were not installed
    with pytest.raises(ConfigError, match="wandb_project='p'.*pip install wandb"):
        RunConfig(wandb_project="p")
