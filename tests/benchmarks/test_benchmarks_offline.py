"""The offline and scaling benchmarks on tiny models, ours only: their arithmetic, not their speed."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import offline
import scaling
from dpo import DPO
from kto import KTO
from reward import REWARD
from sft import SFT

TINY = ["--steps", "2", "--warm-up", "1", "--rounds", "1", "--size", "test", "--threads", "1", "--peers"]


@pytest.fixture
def no_real_data(monkeypatch, tmp_path):
    monkeypatch.setenv("RLHF_DATA_DIR", str(tmp_path / "absent"))


@pytest.mark.parametrize("task", [SFT, REWARD, DPO, KTO], ids=["sft", "reward", "dpo", "kto"])
def test_our_side_reports_the_real_tokens_of_its_steps(task, tmp_path, no_real_data, capsys):
    batch = ["--global-batch-size", "4", "--micro-batch-size", "2"]
    payload = offline.compare(task, [*TINY, *batch, "--out-dir", str(tmp_path)])
    assert "measuring on sample:" in capsys.readouterr().err
    written = json.loads((tmp_path / f"{task.name}.json").read_text())
    ours = written["sides"]["ours"]
    (work,) = (tmp_path / ".prepared").iterdir()
    rows, order = json.loads((work / "rows.json").read_text()), json.loads((work / "order.json").read_text())
    assert sorted(index for step in order for index in step) == list(range(8)), "each row once"
    candidates = 1 if task is SFT else 2
    assert all(len(row["candidates"]) == candidates for row in rows)
    by_hand = []
    for step in order:
        count = 0
        for index in step:
            for place, (ids, start) in enumerate(rows[index]["candidates"]):
                assert 0 < start < len(ids) <= offline.MAX_TOKENS
                count += len(ids) if place == 0 or task is not KTO else 0
        by_hand.append(count)
    assert ours["step_tokens"] == by_hand
    assert ours["measured_tokens"] == by_hand[1]
    assert ours["tokens_per_second"] == pytest.approx(by_hand[1] / ours["step_seconds"][1])
    assert 0 < ours["peak_above_imports_bytes"] < ours["peak_bytes"]
    assert written["ratio"] is None and payload["fastest_peer_with_our_result"] is None
    assert (tmp_path / f"{task.name}.md").read_text().startswith("| side | real tokens/s |")


def side(loss, tokens=(10, 12)):
    return {"first_loss": loss, "step_tokens": list(tokens)}


def test_where_the_first_loss_says_nothing_the_later_ones_are_compared():
    """KTO's two sides estimate the KL divergence on other batches, unless a step is one micro-batch."""
    run = offline.Run(steps=2, warm_up=1, rounds=1)
    plain = next(iter(DPO.peers))

    def sides(later):
        return {name: {**side(0.69315), "mean_loss_after_first": value} for name, value in
                (("ours", 0.5), (plain, later))}  # fmt: skip

    for task, later in ((DPO, 0.5005), (KTO, 0.51)):
        compared = sides(later)
        offline.judge(task, run, compared)
        assert compared[plain]["same_result"]
    whole = replace(run, micro_batch_size=run.global_batch_size)
    for task, settings in ((DPO, run), (KTO, whole)):
        with pytest.raises(SystemExit, match="later ones differ by 0.010000 on average"):
            offline.judge(task, settings, sides(0.51))


def test_a_peer_with_another_loss_stops_the_benchmark():
    run = offline.Run(steps=2, warm_up=1, rounds=1)
    plain = next(iter(SFT.peers))
    sides = {"ours": side(9.0), plain: side(9.0005), "padding_free": side(9.1), "packing": side(9.0)}
    offline.judge(SFT, run, sides)
    assert [sides[name]["same_result"] for name in (plain, "padding_free", "packing")] == [True, False, False]
    sides[plain] = side(9.002)
    with pytest.raises(SystemExit, match="do not do the same job"):
        offline.judge(SFT, run, sides)
    sides[plain] = side(9.0, tokens=(10, 13))
    with pytest.raises(SystemExit, match="do not do the same job"):
        offline.judge(SFT, run, sides)


def test_the_rate_is_of_median_seconds_after_the_warm_up():
    run = offline.Run(steps=3, warm_up=1, rounds=3)
    common = {"peak_bytes": 50, "imported_bytes": 20, "first_loss": 1.0, "mean_loss_after_first": 0.5}
    times = [[9.0, 1.0, 2.0], [9.0, 1.5, 8.0], [9.0, 7.0, 3.0]]
    rounds = [{**common, "step_seconds": one, "step_cpu_seconds": [2 * part for part in one]} for one in times]
    found = offline.summary(rounds, run, [100, 30, 60])
    assert found["step_seconds"] == [9.0, 1.5, 3.0]
    assert found["tokens_per_second"] == pytest.approx(90 / 4.5)
    assert found["tokens_per_cpu_second"] == pytest.approx(90 / 9.0)
    assert found["peak_above_imports_bytes"] == 30
    counted_by_the_peer = [{**one, "step_tokens": [80, 50, 40]} for one in rounds]
    assert offline.summary(counted_by_the_peer, run, [100, 30, 60])["tokens_per_second"] == pytest.approx(90 / 4.5)
    assert offline.summary(counted_by_the_peer, run, [1, 1, 1])["measured_tokens"] == 90


def test_a_skewed_batch_has_as_many_tokens_and_a_longer_row():
    even = (64,) * 16
    skewed = scaling.skewed(even)
    assert len(skewed) == 16 and sum(skewed) == 1024 and max(skewed) == 365 and skewed.count(21) == 14


def test_fits_of_known_growth():
    tokens = [100.0, 200.0, 400.0, 800.0]
    assert scaling.exponent(tokens, [0.001 * x for x in tokens]) == pytest.approx(1.0)
    assert scaling.exponent(tokens, [1e-6 * x**2 for x in tokens]) == pytest.approx(2.0)
    assert scaling.linear_r2(tokens, [0.3 + 0.001 * x for x in tokens]) == pytest.approx(1.0)
    assert scaling.linear_r2(tokens, [1.0, 3.0, 3.0, 1.0]) < 0.2
    assert scaling.exponent([5, 5], [1.0, 2.0]) is None and scaling.linear_r2([5, 5], [1.0, 2.0]) is None


TINY_POINT = scaling.Point(
    lengths=(3, 4, 5, 8), response=6, vocabulary=320, hidden=16, layers=1, heads=2, micro_batch_size=2, repeats=1
)


def test_a_ppo_point_counts_its_tokens(tmp_path):
    result = scaling.run_point(TINY_POINT, tmp_path)
    assert result["real_tokens"] == 3 + 4 + 5 + 8 + 4 * 6, "an end rate of 0 never ends a response"
    assert result["padded_tokens"] == 4 * (8 + 6)
    assert result["seconds"].keys() == {"generation", "scoring", "update"}
    assert all(seconds > 0 for seconds in result["seconds"].values())
    assert all(len(times) == 1 for times in result["seconds_of_all"].values()), "the warm-up is left out"
    assert result["phase_bytes"].keys() == {"scoring", "update"}
    assert result["peak_above_imports_bytes"] > 0
    (row,) = scaling.table_rows("batch", [result])
    assert row["scoring tokens/s"] == pytest.approx(44 / result["seconds"]["scoring"])
    memory = scaling.scoring_memory([{**result, "phase_bytes": {"scoring": size}} for size in (0, 3_000_000)])
    assert memory["grid"][0]["batch"] == 4 and memory["grid"][0]["logits_bytes"] == 4 * 320 * 24
    assert memory["largest_over_smallest"] == 3.0


def test_the_end_rate_sets_the_length_of_responses(tmp_path):
    point = replace(TINY_POINT, lengths=(4,) * 32, response=64, end_rate=1 / 4, micro_batch_size=16)
    result = scaling.run_point(point, tmp_path)
    mean = (result["real_tokens"] - 4 * 32) / 32
    assert 2.2 < mean < 6.5, "geometric with mean 4: the mean of 32 has a standard deviation of 0.6"


def test_an_sft_point_counts_its_tokens(tmp_path):
    point = replace(TINY_POINT, stage="sft", lengths=(12, 6, 4, 2), repeats=2)
    result = scaling.run_point(point, tmp_path)
    assert (result["real_tokens"], result["padded_tokens"]) == (24, 48)
    assert len(result["seconds_of_all"]["step"]) == 2 and result["seconds"]["step"] > 0


def test_ranks_merge_to_the_slowest_and_the_largest():
    first = {"seconds": {"update": 2.0}, "phase_bytes": {"update": 5}, "peak_above_imports_bytes": 7}
    second = {"seconds": {"update": 3.0}, "phase_bytes": {"update": 4}, "peak_above_imports_bytes": 9}
    merged = scaling.merge([first, second])
    assert merged["seconds"]["update"] == 3.0 and merged["phase_bytes"]["update"] == 5
    assert merged["peak_above_imports_bytes"] == 9
