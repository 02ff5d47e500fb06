"""The memory table of the presets: published parameter counts, a real key/value cache, and the page that shows it.

Real engines are counted in tests/slow/test_benchmarks_preset_memory.py.
"""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch

from rlhf.generation.fast_decoder import make_fast_decoder
from rlhf.models.loading import load_causal_lm
from rlhf.pipeline.stages import parse_stage
from tests.support.tiny_models import ROWS, tiny_config

ROOT = Path(__file__).parents[2]


@pytest.fixture()
def memory(monkeypatch):
    """The script, as a module."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("preset_memory")


@pytest.mark.parametrize(
    ("name", "published"),
    [  # Llama 2 7B has 6,738,415,616 with 32,000 rows of vocabulary
        ("EleutherAI/polyglot-ko-1.3b", 1_331_810_304),
        ("EleutherAI/polyglot-ko-3.8b", 3_809_974_272),
        ("EleutherAI/polyglot-ko-5.8b", 5_885_059_072),
        ("beomi/llama-2-ko-7b", 6_738_415_616 + 2 * 4096 * (46_336 - 32_000)),
    ],
)
def test_the_architectures_have_the_published_number_of_parameters(memory, name: str, published: int) -> None:
    assert memory.count_parts(memory.ARCHITECTURES[name]).base == published


def test_the_largest_model_has_what_its_sizes_give(memory) -> None:
    """Its card names 12,898,631,680 parameters, 0.04% more than the layers, widths and rows on the same card make."""
    counted = memory.count_parts(memory.ARCHITECTURES["EleutherAI/polyglot-ko-12.8b"]).base
    block = 12 * 5120**2 + 13 * 5120  # matrices; biases 3 + 1 + 4 + 1, two norms of 2
    assert counted == 40 * block + 2 * 30_080 * 5120 + 2 * 5120
    assert counted == pytest.approx(12_898_631_680, rel=5e-4)


def test_the_adapter_of_kullm_has_the_size_worked_by_hand(memory) -> None:
    parts = memory.count_parts(memory.ARCHITECTURES["EleutherAI/polyglot-ko-12.8b"], 8, ("query_key_value",))
    assert parts.adapter == 40 * 8 * (5120 + 3 * 5120)


def test_the_cache_of_a_real_decoder_weighs_what_the_script_says(memory, tiny_models, tmp_path, monkeypatch) -> None:
    name = str(tiny_models["llama"])
    monkeypatch.setitem(memory.ARCHITECTURES, name, tiny_config("llama"))
    options = [
        "--base_model", name, "--precision", "fp32", "--rollout_batch_size", "16", "--generation_batch_size", "3",
        "--max_prompt_tokens", "5", "--max_response_tokens", "40", "--output_dir", str(tmp_path),
    ]  # fmt: skip
    said = memory.stage_memory({stage: parse_stage("ppo", options) for stage in ("reward", "ppo")}, "ppo", 1)
    model = load_causal_lm(name, dtype=torch.float32).eval()
    decoder = make_fast_decoder(model, slots=3, capacity=5 + 40)
    with torch.no_grad():
        decoder.prefill(torch.randint(1, ROWS, (3, 45)), [45] * 3)
    assert sum(layer.untyped_storage().nbytes() for layer in decoder.cache) == said.cache


def test_the_page_holds_the_output_of_the_script(memory) -> None:
    page = (ROOT / "training_scripts" / "configs" / "README.md").read_text(encoding="utf-8")
    table = memory.table(sorted(memory.CONFIGS.glob("*.yaml")))
    assert table in page, "put the output of benchmarks/preset_memory.py into training_scripts/configs/README.md"
    assert all(f"`{path.stem}`" in table for path in memory.CONFIGS.glob("*.yaml"))
    assert "calculated" in page.partition("| preset | devices")[0].rpartition("## ")[2]
