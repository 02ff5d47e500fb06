"""The PPO benchmark: its count of operations against a hand count, its summary, and a short run of our side."""

import importlib
import json
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture()
def benchmark(monkeypatch):
    """Import a module of `benchmarks/` as its scripts do."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


def test_necessary_operations_equal_a_hand_count(benchmark):
    flops = benchmark("flops")
    shape = flops.Shape(hidden=2, layers=1, heads=1, intermediate=3, vocabulary=5)
    # Weights of a block: q, k, v, output 4 * 2 * 2 = 16, feed-forward 2 * 2 * 3 = 12; together 28, 56 operations a
    # token. Attention: scores and mixture, 2 * 2 operations each per attended position: 8.
    # 2 prompt and 2 response tokens. 3 tokens through the blocks: 3 * 56 + 8 * (1 + 2 + 3) = 216.
    # Head: 2 * 2 * 5 = 20 for each of 2 response positions: 40. Scalar head: 4 for each position.
    # The reward model reads all 4: 4 * 56 + 8 * 10 = 304, and one scalar head.
    generation = 216 + 40
    scoring = (216 + 40) + (216 + 8) + (304 + 4)
    update = 3 * (216 + 40) + 3 * (216 + 8)
    assert flops.necessary_flops(shape, [(2, 2)], 1) == {
        "generation": generation, "scoring": scoring, "update": update, "total": generation + scoring + update,
    }  # fmt: skip
    twice = flops.necessary_flops(shape, [(2, 2), (2, 2)], 4)
    assert (twice["generation"], twice["scoring"]) == (2 * generation, 2 * scoring)
    assert twice["update"] == 2 * 4 * update


def test_decoding_attends_as_the_whole_sequence_does(benchmark):
    """Prefill and single steps, added up token by token, are the forward pass that `necessary_flops` counts."""
    flops = benchmark("flops")
    shape = flops.Shape(hidden=8, layers=3, heads=2, intermediate=16, vocabulary=11)
    prompt, response = 5, 4
    block = 4 * 8 * 8 + 2 * 8 * 16
    by_token = sum(3 * (2 * block + 4 * 8 * (position + 1)) for position in range(prompt + response - 1))
    assert flops.necessary_flops(shape, [(prompt, response)], 1)["generation"] == by_token + response * 2 * 8 * 11


def test_parameters_are_those_of_the_model(benchmark):
    transformers = pytest.importorskip("transformers")
    shape = benchmark("flops").Shape(hidden=16, layers=2, heads=2, intermediate=24, vocabulary=30)
    model = transformers.GPTNeoXForCausalLM(
        transformers.GPTNeoXConfig(
            vocab_size=30, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24
        )
    )
    assert sum(parameter.numel() for parameter in model.parameters()) == shape.parameters


def test_repeats_leave_the_warm_up_out(benchmark):
    repeats = benchmark("measure").Repeats.after_warm_up([9.0, 1.0, 4.0, 2.0], warm_up=1)
    assert (repeats.seconds, repeats.median, repeats.min, repeats.max) == ((1.0, 4.0, 2.0), 2.0, 1.0, 4.0)
    with pytest.raises(ValueError, match="repeat more often"):
        benchmark("measure").Repeats.after_warm_up([1.0], warm_up=1)


def test_peak_memory_is_seen_after_it_is_gone(benchmark):
    measure = benchmark("measure")
    size = 200 * 2**20
    measure.reset_peak_rss()
    before = measure.current_rss_bytes()
    held = torch.ones(size // 4)
    del held
    assert measure.peak_rss_bytes() - before > 0.9 * size
    measure.reset_peak_rss()
    assert measure.peak_rss_bytes() - before < 0.5 * size


def test_a_report_says_where_it_was_measured(benchmark, tmp_path):
    measure = benchmark("measure")
    rows = [{"name": "a", "speed": 1234.5}, {"name": "b", "ratio": 0.123456}]
    json_path, markdown_path = measure.write_report("report", {"answer": 42}, rows, tmp_path)
    content = json.loads(json_path.read_text())
    assert content["answer"] == 42 and content["table"] == rows
    assert content["machine"]["torch"] and content["machine"]["commit"] and content["machine"]["threads"] > 0
    lines = markdown_path.read_text().splitlines()
    assert lines[0] == "| name | speed | ratio |"
    assert lines[2:4] == ["| a | 1234 | - |", "| b | - | 0.123 |"]
