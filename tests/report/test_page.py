"""The HTML report: what it says of finished, running and half-written runs, and of several beside one another."""

from __future__ import annotations

import base64
import json
import re
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest
from matplotlib import font_manager  # noqa: F401  (its cache is made once, not within a test)

from rlhf.cli.report import main
from rlhf.pipeline import stage_run
from rlhf.pipeline.stages import STAGES
from rlhf.report import page
from rlhf.report.charts import MOST_POINTS, Chart, Line, curves, picture, thinned
from rlhf.report.differences import marked
from rlhf.report.run_record import read_run
from tests.support.results import made_up_results, write_results


class Reader(HTMLParser):
    """The texts of a page, what it refers to, and whether its elements are closed in order."""

    VOID = {"meta", "img", "input", "br"}

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[str] = []
        self.links: list[str] = []
        self.pictures: dict[str, str] = {}
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.links += [found[name] for name in ("src", "href") if name in found]
        if tag == "img":
            self.pictures[found["alt"]] = base64.b64decode(found["src"].partition(",")[2]).decode()
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] != ["style"] and self.open[-1:] != ["script"]:
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


def made_up_run(directory, *, learning_rate=0.001):
    """A finished run of three stages, with what the report reads beside the results."""
    results = made_up_results()
    results["ppo"]["peak_memory_bytes"] = {"host": 3 * 2**30, "device": 0}
    write_results(directory, results)
    for stage, metric in (("sft", "loss"), ("reward", "accuracy"), ("ppo", "score")):
        place = directory / stage
        lines = [
            {"step": step, "seconds": step / 10, metric: 1 / (step + 1), f"eval_{metric}": 0.5} for step in range(5)
        ]
        lines[-1] |= {"seconds_generation": 3.0, "seconds_update": 1.0, "score/ends": 0.25, "score/my_rule": 0.5}
        (place / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        config = f"learning_rate: {learning_rate}\noutput_dir: {directory}\nseed: 3\nmax_grad_norm: 1.0\n"
        (place / "config.yaml").write_text(config)
        data = {"train": {"rows": 10, "responses": 20, "prompt_tokens": 50, "response_tokens": 240,
                          "truncated_prompts": 1, "truncated_responses": 2},
                "skipped": {"rows": 4}, "datasets": [{"path": "mine.jsonl"}]}  # fmt: skip
        (place / "data.json").write_text(json.dumps(data))
        start = {"time": "2026-11-22T10:00:00", "device": "A processor", "processes": 2, "revision": "abc1234+"}
        (place / "starts.jsonl").write_text(json.dumps(start) + "\n")
    by_category = {
        "일상 대화": {"accuracy": 0.9, "accuracy_low": 0.8, "accuracy_high": 0.95, "length_baseline_accuracy": 0.5}
    }
    share = {"accuracy": 0.7, "low": 0.6, "high": 0.8, "pairs": 40}
    length = {"matched": share, "chosen_more": share, "chosen_less": {**share, "accuracy": None, "low": None}}
    evaluation = {
        "by_category": by_category,
        "histogram": {"edges": [0.0, 1.0, 2.0], "chosen": [1, 3], "rejected": [4, 0]},
        "calibration": {"bins": [{"confidence": 0.6, "accuracy": 0.5, "pairs": 4}], "error": 0.1},
        "shortcuts": {"verdict": "the score follows length", "notes": ["and the opening"], "length": length},
    }
    (directory / "reward" / "evaluation.json").write_text(json.dumps(evaluation))
    return directory


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return made_up_run(tmp_path_factory.mktemp("runs") / "first")


def rendered(*directories):
    text = page.report_page([read_run(directory, STAGES.values()) for directory in directories])
    return Reader(text), text


def test_a_finished_run_is_told_in_one_file_that_needs_nothing_else(run, capsys):
    assert main([str(run)]) == 0
    path = run / "report.html"
    assert str(path) in capsys.readouterr().out and path.stat().st_size < 3_000_000
    reader = Reader(path.read_text(encoding="utf-8"))
    assert all(link.startswith(("#", "data:")) for link in reader.links)
    assert all(f'id="{link[1:]}"' in path.read_text() for link in reader.links if link.startswith("#"))
    for part in ("held-out accuracy 0.850 112", "일상 대화 0.900 80", "the score follows length", "and the opening",
                 "of like length 0.700 0.600 to 0.800 40", "learning_rate 0.001 1e-5", "mine.jsonl", "12.000",
                 "A processor, 2 processes", "code abc1234+", "generation 75% update 25%", "3.000", "-0.50",
                 "+1.25"):  # fmt: skip
        assert part in reader.text, part
    assert "output_dir" not in reader.text and "max_grad_norm" not in reader.text, "what is the default says nothing"
    assert {"SFT: loss, nats per token", "reward: accuracy", "PPO: score", "PPO: parts of the score",
            "accuracy by category", "held-out scores",
            "calibration (expected error 0.100)"} <= reader.pictures.keys()  # fmt: skip
    assert (
        "my rule" in reader.pictures["PPO: parts of the score"]
        and "일상 대화" in reader.pictures["accuracy by category"]
    )
    assert not list(run.glob(".report*"))


def test_what_a_model_wrote_is_text_and_no_markup(run, tmp_path):
    results = made_up_results()
    evil = "</script><script>alert(1)</script><img src=x onerror=alert(1)>"
    results["ppo"]["samples"][0] |= {"prompt": evil, "sft": f"{evil} 하나 둘", "ppo": f"{evil} 하나 셋"}
    write_results(tmp_path, results)
    reader, text = rendered(tmp_path)
    assert "<script>alert" not in text and "<img src=x" not in text
    assert text.count("<script>") == 1 and evil in reader.text


def test_a_run_that_goes_or_died_is_told_as_far_as_it_came(run, tmp_path):
    stage = tmp_path / "ppo"
    stage.mkdir()
    (stage / "metrics.jsonl").write_text('{"step": 1, "score": 0.5}\n{"step": 2, "score": 0.25}\n{"step": 3, "sc')
    (stage / "config.yaml").write_text("learning_rate: [")
    (stage / "data.json").write_text("{")
    (stage / "result.json").write_text("")
    reader, _ = rendered(tmp_path)
    for part in ("PPO: incomplete", "its last line is half-written", "no result yet", "config.yaml cannot be read",
                 "data.json cannot be read", "--resume auto"):  # fmt: skip
        assert part in reader.text, part
    assert "PPO: score" in reader.pictures
    single, _ = rendered(stage)
    assert "PPO: score" in single.pictures


def test_results_of_another_release_are_told_as_far_as_they_are_known(tmp_path):
    results = made_up_results()
    del results["reward"]["accuracy_low"], results["reward"]["mean_margin"], results["ppo"]["eos_rate_after"]
    results["ppo"]["samples"] = None
    write_results(tmp_path, results)
    reader, _ = rendered(tmp_path)
    assert "held-out accuracy 0.850 112" in reader.text and "held-out score 0.100 1.300" in reader.text
    assert "Answers to held-out prompts" not in reader.text


def change(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_what_cannot_be_shown_costs_its_part_and_is_named(tmp_path):
    run, other = made_up_run(tmp_path / "run"), made_up_run(tmp_path / "other")
    change(run / "ppo" / "result.json", lambda found: found.update(gold={"before": 0.5}, peak_memory_bytes=[1]))
    change(run / "ppo" / "result.json", lambda found: found["samples"][0].pop("score_ppo"))
    change(run / "reward" / "evaluation.json", lambda found: found["shortcuts"].pop("length"))
    change(run / "reward" / "evaluation.json", lambda found: found["histogram"].pop("edges"))
    change(run / "reward" / "evaluation.json", lambda found: found["calibration"].update(bins=[{}]))
    change(run / "ppo" / "data.json", lambda data: data["train"].update(prompt_tokens="x"))
    change(other / "ppo" / "result.json", lambda found: found["samples"][0].update(score_ppo=None))
    change(other / "reward" / "evaluation.json", lambda found: found["histogram"].update(edges=[0, float("nan"), 1]))
    told = {
        run: ("verdict", "answers", "audit of the reward model", "reward model: histogram", "reward model: calibration",
              "data", "time and memory"),
        other: ("answers", "reward model: histogram"),
    }  # fmt: skip
    for directory, names in told.items():
        reader, _ = rendered(directory)
        assert all(f"{name}: cannot be shown" in reader.text for name in names)
        assert reader.text.count("cannot be shown") == len(names) and "SFT: loss, nats per token" in reader.pictures


def test_names_are_no_formulas_and_half_a_character_is_no_error(tmp_path):
    run = made_up_run(tmp_path / "a$x_$")
    change(
        run / "reward" / "evaluation.json",
        lambda found: found["by_category"].update({"$x_$": found["by_category"]["일상 대화"]}),
    )
    change(run / "ppo" / "result.json", lambda result: result["samples"][0].update(prompt="half \ud83d"))
    (run / "sft" / "metrics.jsonl").write_text('{"step": 1, "seconds": null, "loss": 1.0}\n')
    path = page.write_report([read_run(run, STAGES.values())], tmp_path / "out.html")
    reader = Reader(path.read_text(encoding="utf-8"))
    assert "$x_$" in reader.pictures["accuracy by category"] and "cannot be shown" not in reader.text
    other = made_up_run(tmp_path / "b")
    both, _ = rendered(run, other)
    assert "a$x_$" in both.pictures["PPO: score"]


def test_a_stage_started_alone_ends_with_a_report_and_never_because_of_it(tmp_path, monkeypatch, caplog):
    run = made_up_run(tmp_path / "run")
    (run / "report.html").unlink(missing_ok=True)
    stage = SimpleNamespace(stage="sft")
    monkeypatch.setattr("sys.argv", ["main.py", "--output_dir", str(run)])
    stage_run._write_run_report(stage)
    assert (run / "report.html").is_file()
    monkeypatch.setattr(page, "report_page", lambda runs: 1 / 0)
    stage_run._write_run_report(stage)
    assert "no report: ZeroDivisionError" in caplog.text


def test_several_runs_lie_over_one_another_with_what_differs(run, tmp_path, capsys):
    other = made_up_run(tmp_path / "first", learning_rate=0.002)
    output = tmp_path / "both.html"
    assert main([str(run), str(other), "--output", str(output)]) == 0
    reader = Reader(output.read_text(encoding="utf-8"))
    names = [f"{each.parent.name}/first" for each in (run, other)]
    assert f"stage field {names[0]} {names[1]} SFT learning_rate 0.001 0.002" in reader.text
    assert "seed" not in reader.text.partition("What differs.")[2]
    assert f"after training {names[0]} {names[1]} held-out loss 2.000 2.000" in reader.text
    assert all(name in reader.pictures["PPO: score"] for name in names)
    assert f"({names[0]}, {names[1]})" in capsys.readouterr().out


def test_what_is_no_run_is_refused(tmp_path, capsys):
    assert main([str(tmp_path / "nowhere")]) == 2
    assert "is not a directory" in capsys.readouterr().err
    assert main([str(tmp_path)]) == 2
    assert "is not the directory of a run" in capsys.readouterr().err


def test_a_report_that_cannot_be_written_is_an_error(run, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main([str(run), "--output", str(tmp_path / "file" / "report.html")]) == 1
    assert "cannot be written" in capsys.readouterr().err


def test_answers_beyond_the_limit_are_left_out_from_the_middle(run, tmp_path, monkeypatch):
    results = made_up_results()
    sample = results["ppo"]["samples"][0]
    results["ppo"]["samples"] = [{**sample, "prompt": f"Q{number}", "score_ppo": float(number)} for number in range(9)]
    write_results(tmp_path, results)
    size = len(json.dumps(results["ppo"]["samples"][0], ensure_ascii=False).encode())
    monkeypatch.setattr(page, "SAMPLE_BYTES", 4 * size + 4)
    reader, text = rendered(tmp_path)
    assert re.findall(r'class="prompt">(Q\d)', text) == ["Q8", "Q7", "Q1", "Q0"]
    assert "5 whose score changed least are left out" in reader.text


# -------------------------------------------------------------------------------------------------- its parts


def test_what_only_one_of_two_answers_has_is_marked():
    assert marked("나는 밥을 먹어요.", "나는 국을 먹어요.") == (
        "나는 <del>밥을 </del>먹어요.",
        "나는 <ins>국을 </ins>먹어요.",
    )
    assert marked("a < b c d", "a < b c") == ("a &lt; b <del>c d</del>", "a &lt; b <ins>c</ins>")
    assert marked("same", "same") == ("same", "same")
    assert marked("one two three four", "five six seven eight") == ("one two three four", "five six seven eight")
    assert marked("", "new") == ("", "new")


def test_curves_are_what_was_trained_and_what_was_evaluated():
    metrics = [
        {"step": 0, "eval_loss": 3.0, "eval_part/a": 1.0},
        {"step": 1, "loss": 2.0, "part/a": 4.0, "part/a/fallback": 9.0, "part/b": float("nan")},
        {"step": 2, "loss": None, "eval_loss": 1.0, "kl": 5.0},
    ]
    found = curves(Chart("", ("loss", "part/", "missing")), metrics)
    assert [(each.name, each.evaluated, list(each.points)) for each in found] == [
        ("loss", False, [(1.0, 2.0)]),
        ("loss", True, [(0.0, 3.0), (2.0, 1.0)]),
        ("part/a", False, [(1.0, 4.0)]),
        ("part/a", True, [(0.0, 1.0)]),
    ]
    along = curves(Chart("", ("loss",), along="kl"), [*metrics, {"step": 3, "kl": 7.0, "loss": 0.5}])
    assert [list(each.points) for each in along] == [[(7.0, 0.5)]]


def test_of_many_points_the_means_are_drawn():
    points = [(float(number), float(number % 2)) for number in range(2 * MOST_POINTS + 1)]
    found = thinned(points)
    assert len(found) == 267 and found[0] == (1.0, 1 / 3) and found[-1] == (799.0, 1 / 3)
    assert thinned(points[:5]) == points[:5] and thinned([]) == []


def test_a_picture_shows_findings_where_they_began_and_is_the_same_every_time():
    line = Line("run", [{"step": step, "loss": 1.0 + step} for step in range(4)], [(2, "loss_explodes")])
    chart = Chart("loss", ("loss",))
    drawn = picture(chart, [line], unit="step")
    text = base64.b64decode(drawn.partition(",")[2]).decode()
    assert drawn.startswith("data:image/svg+xml;base64,") and "loss_explodes" in text and "DejaVu" not in text
    assert picture(chart, [line], unit="step") == drawn
    assert picture(Chart("", ("nothing",)), [line], unit="step") is None
    constant = Line("run", [{"step": step, "loss": 1.0} for step in range(4)])
    assert picture(Chart("", ("loss",), varying=True), [constant], unit="step") is None
