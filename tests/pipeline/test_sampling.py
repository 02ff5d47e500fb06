"""Data sets of a model's own responses: which ones are written, that training reads them, and how a job goes on."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

import rlhf.pipeline.sampling as sampling
from rlhf.cli.sample import main
from rlhf.config import ConfigError, DataConfig
from rlhf.data.stage_data import load_stage_data
from rlhf.models.loading import load_tokenizer
from rlhf.pipeline.sampling import SamplingJob, formed, sample_dataset
from rlhf.rewards.reward import RewardError
from rlhf.types import RewardOutput, Rollout

TURNS = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "1"}, {"role": "user", "content": "two"}]
ROW = {"id": "a", "prompt": "ask", "messages": [{"role": "user", "content": "ask"}], "responses": ["x", "y", "z"],
       "scores": [0.5, 2.0, -1.0], "ended": [True, True, True]}  # fmt: skip


def test_what_is_written_of_a_prompt():
    said = {"role": "assistant", "content": "y"}
    assert formed(ROW, "best") == {"id": "a", "messages": [*ROW["messages"], said], "score": 2.0}
    assert formed(ROW, "pairs") == {
        "id": "a", "prompt": "ask", "chosen": "y", "rejected": "z", "score_chosen": 2.0, "score_rejected": -1.0,
    }  # fmt: skip
    assert formed(ROW, "all") == {"id": "a", "prompt": "ask", "responses": ["x", "y", "z"], "scores": [0.5, 2.0, -1.0]}
    cut = {**ROW, "ended": [True, False, True]}
    assert formed(cut, "best")["score"] == 0.5 and formed(cut, "all")["responses"] == ["x", "z"]
    twice = {**ROW, "responses": ["y", "x", "y"], "ended": [True, False, True]}
    assert formed(twice, "best")["score"] == 0.5 and formed(twice, "pairs") is None and formed(twice, "all") is None
    assert formed({**ROW, "ended": [False] * 3}, "best") is None
    alike = {**ROW, "scores": [1.0, 1.0, 1.0]}
    assert formed(alike, "pairs") is None and formed(alike, "best")["score"] == 1.0
    longer = {**ROW, "messages": TURNS}
    assert formed(longer, "pairs")["prompt"] == TURNS == formed(longer, "all")["prompt"]
    assert formed(longer, "pairs")["rejected"] == [{"role": "assistant", "content": "z"}]
    rendered = {**ROW, "messages": [], "prompt": "### 질문: ask"}
    assert formed(rendered, "best") == {"id": "a", "prompt": "### 질문: ask", "response": "y", "score": 2.0}


@pytest.fixture
def job(tiny_models, tmp_path, monkeypatch):
    """A job over four prompts, in batches of two, whose reward is how many letters differ. The untrained model ends no
    response: they are taken for ended."""
    monkeypatch.setattr(sampling, "_ended", lambda rollout, _: torch.ones(len(rollout), dtype=torch.bool))
    prompts = [{"prompt": text} for text in ("ab", "cde", "f", "ghij")]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, prompts)) + "\n")
    (tmp_path / "reward.py").write_text("def score(prompts, responses):\n    return [len(set(r)) for r in responses]\n")

    def make(**changes) -> SamplingJob:
        return SamplingJob(**{
            "models": [str(tiny_models["gpt_neox"])], "prompts": [str(tmp_path / "prompts.jsonl")],
            "output": tmp_path / "out.jsonl", "rewards": [f"{tmp_path / 'reward.py'}:score"], "samples": 3, "rows": 6,
            "max_response_tokens": 8, "cache_dir": tmp_path / "cache", **changes,
        })  # fmt: skip

    return make


def test_a_response_has_ended_where_its_last_token_says_so():
    ids = torch.tensor([[5, 0, 0], [5, 6, 7], [0, 5, 0], [0, 0, 0]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 1], [1, 1, 0], [0, 0, 0]]).bool()
    rollout = Rollout(ids, mask, ids, mask, torch.zeros(4, 3))
    assert sampling._ended(rollout, [0]).tolist() == [True, False, False, False]


def rows_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_the_best_of_all_are_written_and_training_reads_each_form(job, tmp_path, tiny_models):
    everything = job(form="all")
    report = sample_dataset(everything)
    rows = rows_of(everything.output)
    assert [row["prompt"] for row in rows] == ["ab", "cde", "f", "ghij"] and report["prompts"] == report["written"] == 4
    assert all(2 <= len(row["responses"]) <= 3 for row in rows)
    assert [row["scores"] for row in rows] == [[len(set(text)) for text in row["responses"]] for row in rows]
    assert report["mean_best_score"] == pytest.approx(sum(max(row["scores"]) for row in rows) / 4)
    assert report["eos_rate"] == 1
    assert not everything.parts.exists()
    sample_dataset(job(form="best", output=tmp_path / "best.jsonl"))
    assert [row["messages"][-1]["content"] for row in rows_of(tmp_path / "best.jsonl")] == [
        row["responses"][row["scores"].index(max(row["scores"]))] for row in rows
    ]
    sample_dataset(job(form="pairs", output=tmp_path / "pairs.jsonl"))
    pairs = rows_of(tmp_path / "pairs.jsonl")
    assert len(pairs) == sum(len(set(row["scores"])) > 1 for row in rows) > 0
    tokenizer = load_tokenizer(str(tiny_models["gpt_neox"]))
    for name, kind, count in (
        ("out", "comparison", None),
        ("best", "response", 4),
        ("pairs", "comparison", len(pairs)),
    ):
        data = load_stage_data(
            kind, [str(tmp_path / f"{name}.jsonl")], [], config=DataConfig(eval_fraction=0.0), stage="sft", seed=1,
            tokenizer=tokenizer, cache_dir=tmp_path / "cache", report_dir=tmp_path,
        )  # fmt: skip
        assert len(data.train) == count if count else len(data.train) >= len(pairs)


def test_an_interrupted_job_goes_on_and_ends_with_the_same_file(job, tmp_path, monkeypatch):
    whole = job(output=tmp_path / "whole.jsonl")
    sample_dataset(whole)
    made = sampling._drawer
    drawn = []

    def failing(*given):
        draw = made(*given)

        def once(batch, index):
            if index == 1 and not drawn.count("stopped"):
                drawn.append("stopped")
                raise KeyboardInterrupt
            drawn.append(index)
            return draw(batch, index)

        return once

    monkeypatch.setattr(sampling, "_drawer", failing)
    with pytest.raises(KeyboardInterrupt):
        sample_dataset(job())
    assert not job().output.exists() and drawn == [0, "stopped"]
    sample_dataset(job())
    assert drawn == [0, "stopped", 1]
    assert job().output.read_bytes() == whole.output.read_bytes()


def test_several_models_answer_each_prompt(job, tmp_path, tiny_models):
    """The first gives what it gives alone, a copy of it other responses, another model its own."""
    first, other = (str(tiny_models[name]) for name in ("gpt_neox", "llama"))
    copy = str(shutil.copytree(first, tmp_path / "copy"))
    sample_dataset(job(form="all", output=tmp_path / "alone.jsonl"))
    sample_dataset(job(models=[first, copy, other], form="all"))
    rows, alone = rows_of(job().output), rows_of(tmp_path / "alone.jsonl")
    assert len(rows) == len(alone) == 4
    for row, before in zip(rows, alone, strict=True):
        said = before["responses"]
        assert row["responses"][: len(said)] == said and len(row["scores"]) == len(row["responses"]) > len(said) + 3
    with pytest.raises(ConfigError, match="names .*gpt_neox.* twice: raise samples"):
        job(models=[first, first])
    assert job(models=[first, other], samples=1, form="pairs").samples == 1


def test_diverse_beams_take_the_place_of_sampling(job):
    sample_dataset(job(form="all", diversity=2.0))
    first = job().output.read_bytes()
    job().output.unlink()
    sample_dataset(job(form="all", diversity=2.0, seed=9))  # no chance in it
    assert job().output.read_bytes() == first
    assert all(len(set(row["responses"])) == 3 for row in rows_of(job().output))


def test_batches_of_another_job_are_not_mixed_in(job, monkeypatch):
    monkeypatch.setattr(sampling, "_drawer", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        sample_dataset(job())
    with pytest.raises(ConfigError, match="holds batches of another job .* remove it, or choose another --output"):
        sample_dataset(job(temperature=0.5))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"samples": 0}, "samples=0 must be at least 1"),
        ({"samples": 1, "form": "pairs"}, "at least 2 with form=pairs"),
        ({"models": []}, "models is empty"), ({"diversity": 0.0}, "diversity=0.0 must be above 0"),
        ({"diversity": 1.0, "temperature": 0.7}, "diversity=1.0 with samples=3, temperature=0.7"),
        ({"diversity": 1.0, "samples": 1, "form": "best"}, "diversity=1.0 with samples=1"),
        ({"rows": 0}, "rows=0"), ({"temperature": 0.0}, "temperature=0.0 must be above 0"),
        ({"form": "worst"}, "form='worst' is not one of best, pairs, all"), ({"rewards": []}, "rewards is empty"),
        ({"rewards": ["reward_model"]}, "needs --reward_model"),
        ({"rewards": ['{"name": "ends", "normalize": "fixed"}']}, "normalize of ends goes over the rollouts"),
    ],
)  # fmt: skip
def test_what_cannot_be_sampled_is_told(job, changes, told):
    with pytest.raises(ConfigError, match=told):
        sample_dataset(job(**changes))


def test_a_name_that_is_no_jsonl_is_refused(job, tmp_path):
    with pytest.raises(ConfigError, match="give a name that ends in .jsonl"):
        job(output=tmp_path / "out.csv")


def test_a_score_that_is_not_finite_names_the_prompt(job, monkeypatch):
    monkeypatch.setattr(sampling, "_reward", lambda *_: NotFinite())
    with pytest.raises(RewardError, match="gave inf for a response to prompt"):
        sample_dataset(job())


class NotFinite:
    training_range = None

    def score(self, responses):
        return RewardOutput(torch.full((len(responses),), float("inf")))


def test_the_command_says_what_it_wrote_and_what_is_wrong(job, capsys, tmp_path):
    made = job()
    words = [*made.models, "--prompts", *made.prompts, "--output", str(made.output), "--rewards", *made.rewards]
    words += ["--samples", "3", "--rows", "6", "--max_response_tokens", "8", "--cache_dir", str(made.cache_dir)]
    assert main(words) == 0
    assert f"{made.output}: 4 rows of 4 prompts; score +" in capsys.readouterr().out
    assert main([*words, "--rewards", "lenght"]) == 2
    assert "error: rewards: 'lenght' is not a reward" in capsys.readouterr().err
