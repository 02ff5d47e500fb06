"""Every generation backend on two real ranks under ZeRO-3 that have unequally much to do."""

from __future__ import annotations

import json

from tests.support.launch import run_ranks

WORKER = """
import sys
import torch
from pathlib import Path
from rlhf.config import EngineConfig, OptimizerConfig
from rlhf.distributed.place import rank
from rlhf.distributed.world import close_world
from rlhf.engine import BatchPlan, training_engine
from rlhf.generation.backend import BACKENDS, make_backend
from rlhf.generation.token_sampling import Sampling
from rlhf.models.loading import load_causal_lm
from rlhf.types import PromptBatch
from tests.support.local_engine import LocalEngine

directory, out, settings = sys.argv[-3:]
mine = rank()

def prompts(rows):
    ids = torch.randint(1, 90, (rows, 7), generator=torch.Generator().manual_seed(rows))
    mask = torch.arange(7) >= torch.arange(rows).unsqueeze(1)
    return PromptBatch(ids, mask, torch.arange(rows) + 10 * mine)

for architecture in ("gpt_neox", "gpt2"):
    plain = load_causal_lm(Path(directory) / architecture, dtype=torch.float32).eval()
    engine = training_engine(
        load_causal_lm(Path(directory) / architecture, dtype=torch.float32),
        engine=EngineConfig(zero_stage=3, precision="fp32", deepspeed_config=settings),
        optimizer=OptimizerConfig(), plan=BatchPlan(4, 2, 2), total_steps=4,
    )
    engine.eval()
    for name in BACKENDS:
        found = []
        for actor in (engine, LocalEngine(plain, BatchPlan(1, 1, 1))):
            backend = make_backend(name, actor, eos_ids=[95, *range(1, 40 * mine)], pad_token_id=0, seed=4, slots=2)
            for iteration in (1, 2):
                backend.sync()
                # one rank has two rows that never end, the other three rows that end soon and fewer tokens at most
                found.append(backend.generate(prompts(2 + mine), Sampling((11, 5)[mine]), iteration=iteration))
        for ours, expected in zip(found[:2], found[2:], strict=True):
            assert torch.equal(ours.response_ids, expected.response_ids), (architecture, name)
            assert torch.allclose(ours.logprobs, expected.logprobs, atol=1e-6)
        assert sum(tensor.numel() for tensor in engine.module.parameters()) == 0  # partitioned again
        if mine == 0:
            assert found[0].response_mask.sum(1).tolist() == [11, 11]
Path(out, f"done{mine}").write_text("done")
close_world()
"""


def test_ranks_need_not_take_equally_many_steps(tiny_models, tmp_path):
    settings = tmp_path / "settings.json"  # or DeepSpeed keeps weights as small as these whole after their first use
    settings.write_text(json.dumps({"zero_optimization": {"stage3_param_persistence_threshold": 0}}))
    done = run_ranks(WORKER, 2, tmp_path, [str(tiny_models["gpt_neox"].parent), str(tmp_path), str(settings)])
    assert done.returncode == 0, done.stdout[-4000:]
    assert (tmp_path / "done0").exists() and (tmp_path / "done1").exists()
