"""Whole weights for a while under ZeRO-3 on two ranks."""

from __future__ import annotations

import json

import pytest

from tests.support.launch import run_ranks

WORKER = """
import json, sys
import torch
from pathlib import Path
from rlhf.config import EngineConfig, OptimizerConfig
from rlhf.distributed.place import rank
from rlhf.distributed.world import close_world
from rlhf.engine import BatchPlan, whole_weights_of, inference_engine, training_engine
from rlhf.generation.continuous_batching import generate
from rlhf.generation.token_sampling import Sampling
from rlhf.generation.architectures import take_apart
from rlhf.models.loading import load_causal_lm
from rlhf.types import PromptBatch

directory, out, settings = sys.argv[-3:]
FP32 = torch.float32
config = EngineConfig(zero_stage=3, precision="fp32", deepspeed_config=settings)
plan = BatchPlan(4, 2, 2)
mine = rank()
steps = (3, 11)[mine]  # ranks take different numbers of steps: without the block they would wait for each other

def engine_of(name):
    model = load_causal_lm(Path(directory) / name, dtype=FP32)
    return training_engine(model, engine=config, optimizer=OptimizerConfig(learning_rate=1e-2), plan=plan,
                           total_steps=4)

def prompts(rows):
    ids = torch.randint(1, 90, (rows, 7), generator=torch.Generator().manual_seed(rows))
    mask = torch.arange(7) >= torch.arange(rows).unsqueeze(1)
    return PromptBatch(ids, mask, torch.arange(rows) + 10 * mine)

def sample(model):
    return generate(model, prompts(2 + mine), Sampling(steps), eos_token_ids=[95], pad_token_id=0, seed=4)

def train(engine):
    engine.train()
    ids = torch.randint(1, 90, (2, 9), generator=torch.Generator().manual_seed(20 + mine))
    engine.backward(engine(input_ids=ids, labels=ids).loss)
    engine.step()
    engine.eval()

def weights(engine):
    with whole_weights_of(engine):
        return {name: tensor.detach().clone() for name, tensor in engine.module.named_parameters()}

def whole(name, state):
    model = load_causal_lm(Path(directory) / name, dtype=FP32).eval()
    model.load_state_dict(state, strict=False)
    model.tie_weights()
    return model

def counted(engine):
    return [len(hooks) for part in engine.module.modules()
            for hooks in (part._forward_hooks, part._forward_pre_hooks, part._backward_hooks)]

for name in ("gpt_neox", "gpt2"):
    plain, ours = engine_of(name), engine_of(name)
    hooks = counted(ours)
    for _ in range(2):
        ours.eval()
        with whole_weights_of(ours):
            assert (take_apart(ours, capacity=20) is not None) == (name == "gpt_neox")
            rollout = sample(ours)
            held = {key: tensor.detach().clone() for key, tensor in ours.module.named_parameters()}
        assert take_apart(ours, capacity=20) is None  # its hooks are back: a forward is a collective again
        assert counted(ours) == hooks
        assert sum(tensor.numel() for tensor in ours.module.parameters()) == 0  # partitioned
        expected = sample(whole(name, held))
        assert torch.equal(rollout.response_ids, expected.response_ids)
        assert rollout.response_ids.shape[1] == steps
        assert torch.allclose(rollout.logprobs, expected.logprobs, atol=1e-6)
        train(plain)
        train(ours)
    first, second = weights(plain), weights(ours)
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    start = dict(load_causal_lm(Path(directory) / name, dtype=FP32).named_parameters())
    assert min((first[key] - start[key]).abs().max() for key in first) > 1e-3  # two steps were taken

    try:
        with whole_weights_of(ours):
            raise KeyError("stop")
    except KeyError:
        pass
    assert counted(ours) == hooks and sum(tensor.numel() for tensor in ours.module.parameters()) == 0
    frozen = inference_engine(load_causal_lm(Path(directory) / name, dtype=FP32), engine=config, plan=plan)
    with whole_weights_of(frozen):
        rollout = sample(frozen)
    expected = sample(load_causal_lm(Path(directory) / name, dtype=FP32).eval())
    assert torch.equal(rollout.response_ids, expected.response_ids)
Path(out, f"done{mine}").write_text("done")
close_world()
"""


@pytest.mark.parametrize("persistent", [0, 10_000])
def test_two_ranks_sample_apart_and_train_as_without_the_block(persistent, tiny_models, tmp_path):
    """`persistent`: weights below this size stay whole between steps (DeepSpeed keeps small ones)."""
    settings = tmp_path / "settings.json"
    settings.write_text(json.dumps({"zero_optimization": {"stage3_param_persistence_threshold": persistent}}))
    root = tiny_models["gpt_neox"].parent
    done = run_ranks(WORKER, 2, tmp_path, [str(root), str(tmp_path), str(settings)])
    assert done.returncode == 0, done.stdout[-4000:]
    assert (tmp_path / "done0").exists() and (tmp_path / "done1").exists()
