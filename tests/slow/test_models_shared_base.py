"""One shared base on two ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rlhf.models.forward import forward_logits
from rlhf.models.loading import load_causal_lm
from rlhf.models.scalar import ScalarModel
from tests.models import test_shared_base
from tests.models.test_shared_base import FP32, batch
from tests.support.launch import run_ranks

models = test_shared_base.models  # a fixture
TOLERANCE = 2e-4

RANK_SCRIPT = """
import sys
from pathlib import Path
import torch
from rlhf.distributed.place import is_main, world_size
from rlhf.distributed.world import close_world, init_world
from rlhf.models.loading import load_tokenizer
from tests.models.test_shared_base import build, export_all, outputs, run_ppo
base, reward, out, *stages = [item for item in sys.argv[1:] if not item.startswith("--local_rank")]
init_world()
tokenizer = load_tokenizer(base)
for stage in map(int, stages):
    four = build(base, reward, zero_stage=stage, ema_decay=0.5, gradient_checkpointing=True)
    before = outputs(four)
    found = run_ppo(four, tokenizer)
    after = outputs(four)
    assert torch.equal(before["reward"], after["reward"]) and torch.equal(before["reference"], after["reference"])
    if stage == 3:
        shared = {id(p) for p in four.reward.module.parameters()} & {id(p) for p in four.actor.module.parameters()}
        assert len(shared) > 20
    export_all(four, tokenizer, Path(out) / f"{world_size()}-{stage}")
    if is_main():
        torch.save({**found, **after}, Path(out) / f"{world_size()}-{stage}.pt")
        print("stage done", stage, flush=True)
close_world()
"""


@pytest.fixture(scope="module")
def ranks(models, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("shared_ranks")
    for world, stages in ((1, "0"), (2, "0123")):
        arguments = [str(models.base), str(models.reward), str(out), *stages]
        done = run_ranks(RANK_SCRIPT, world, out, arguments)
        assert done.returncode == 0 and f"stage done {stages[-1]}" in done.stdout, done.stdout[-6000:]
    return out


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_two_ranks_on_one_base_give_what_one_gives(zero_stage, ranks):
    wanted, found = torch.load(ranks / "1-0.pt"), torch.load(ranks / f"2-{zero_stage}.pt")
    assert wanted.keys() == found.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, atol=TOLERANCE, rtol=1e-3, msg=name)
    ids, mask = batch()
    directory = ranks / f"2-{zero_stage}"
    with torch.no_grad():
        actor = forward_logits(load_causal_lm(directory / "actor", dtype=FP32).eval(), ids, mask)[mask]
        critic = ScalarModel.from_pretrained(directory / "critic", dtype=FP32).eval()(ids, mask)[mask]
    torch.testing.assert_close(actor, found["actor"], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(critic, found["critic"], atol=1e-5, rtol=1e-4)
    assert (actor - found["reference"]).abs().max() > 10 * TOLERANCE
