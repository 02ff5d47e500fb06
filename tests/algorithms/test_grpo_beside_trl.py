"""GRPO's advantages and the gradient of its loss, beside TRL 1.x's own code on the same rollout."""

from __future__ import annotations

import os
from collections import defaultdict
from types import SimpleNamespace

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import pytest
import torch
import transformers
from trl import GRPOTrainer

from rlhf.algorithms.config import PPOBatchConfig, PPOConfig
from rlhf.engine import BatchPlan
from rlhf.training.metrics import MeanMeter
from rlhf.types import TokenizedPrompt
from tests.support.local_engine import LocalModels
from tests.support.on_policy import FunctionReward, ppo_trainer

TEMPERATURE, BETA, SAMPLES = 0.7, 0.3, 4
ENDS = list(range(25))
"""Ids that end a response: a quarter of the vocabulary, so that lengths differ."""


def noisy(model, scale, seed):
    """`model` with other weights."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=generator)
    return model


def even_tokens(rollout, texts):
    """A score that differs between the responses to a prompt."""
    return ((rollout.response_ids % 2 == 0) & rollout.response_mask).sum(1).float()


@pytest.fixture(params=[True, False], ids=["kl times ratio", "kl alone"])
def trainer(request, tiny_models, tokenizer, tmp_path):
    def load():
        return transformers.AutoModelForCausalLM.from_pretrained(tiny_models["gpt_neox"], dtype=torch.float32).eval()

    plan, actor = BatchPlan(16, 4, 1), load()
    actor.generation_config.eos_token_id = ENDS
    prompts = [TokenizedPrompt(str(row), tuple(range(5 + row, 9 + 2 * row)), f"prompt {row}") for row in range(4)]
    return ppo_trainer(
        LocalModels(actor, None, noisy(load(), 0.05, 3), plan),
        FunctionReward(even_tokens),
        prompts,
        tokenizer=tokenizer,
        plan=plan,
        directory=tmp_path,
        config=PPOConfig(
            advantage="grpo",
            kl_coef=BETA,
            kl_ratio=request.param,
            temperature=TEMPERATURE,
            missing_eos_penalty=1.0,
        ),
        batch=PPOBatchConfig(rollout_batch_size=4, samples_per_prompt=SAMPLES, max_steps=1),
    )


def trl_advantages(scores):
    """As `GRPOTrainer._generate_and_score_completions` has them with `scale_rewards="group"`."""
    grouped = scores.view(-1, SAMPLES)
    return ((grouped - grouped.mean(1, keepdim=True)) / (grouped.std(1, keepdim=True) + 1e-4)).flatten()


def trl_loss(model, experience, advantages, vocabulary, *, kl_ratio):
    """`GRPOTrainer._compute_loss`, with nothing around it but what it reads.

    The model's rows beyond the tokenizer's `vocabulary` are never sampled, and count in no probability of ours.
    """

    def logprobs(model, ids, mask, kept, **_):
        positions = (mask.long().cumsum(1) - 1).clamp(min=0)
        logits = model(input_ids=ids, attention_mask=mask.long(), position_ids=positions).logits[:, -kept - 1 : -1]
        logits = logits[..., :vocabulary]
        found = (logits / TEMPERATURE).log_softmax(-1)
        return found.gather(2, ids[:, -kept:, None]).squeeze(2), -(found.exp() * found).sum(-1), None

    alone = SimpleNamespace(gather=lambda value: value, reduce=lambda value, reduction: value)
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=logprobs, aux_loss_enabled=False, top_entropy_quantile=1.0,
        off_policy_mask_threshold=None, importance_sampling_level="token", beta=BETA, loss_type="grpo",
        args=SimpleNamespace(use_bias_correction_kl=kl_ratio, delta=None), epsilon_low=0.2, epsilon_high=0.2,
        use_vllm=False, model=SimpleNamespace(training=True), current_gradient_accumulation_steps=1,
        _entropy_bonus_enabled=False, accelerator=alone, _metrics={"train": defaultdict(list)},
    )  # fmt: skip
    rollout = experience.rollout
    inputs = {
        "prompt_ids": rollout.prompt_ids,
        "prompt_mask": rollout.prompt_mask,
        "completion_ids": rollout.response_ids,
        "completion_mask": rollout.response_mask.long(),
        "advantages": advantages,
        "old_per_token_logps": rollout.logprobs,
        "ref_per_token_logps": experience.ref_logprobs,
    }
    return GRPOTrainer._compute_loss(trainer, model, inputs)


def test_advantages_and_gradients_are_those_of_trl(trainer):
    experience = trainer.make_experience(1)
    mask, actor = experience.rollout.response_mask, trainer.engine.actor.module
    lengths = mask.sum(1)
    assert len(set(lengths.tolist())) > 1, "responses of one length tell no mean from another"
    ended = torch.isin(experience.rollout.response_ids.gather(1, lengths[:, None] - 1).squeeze(1), torch.tensor(ENDS))
    advantages = trl_advantages(experience.scores - (~ended).float())
    assert advantages.abs().max() > 0.5
    torch.testing.assert_close(experience.advantages, advantages[:, None] * mask, atol=1e-5, rtol=1e-5)

    noisy(actor, 0.05, 5)  # as after some steps: ratios are not 1 and some are clipped
    meter = MeanMeter()
    parts = [experience.rows(slice(start, start + 4)).trimmed() for start in range(0, 16, 4)]
    trainer.actor_step(parts, meter)
    gradients = trainer.engine.actor.gradients[-1]
    assert 0 < meter.means()["clip_fraction"] < 1

    with torch.no_grad():  # back to where that step began
        for name, parameter in actor.named_parameters():
            parameter += trainer.engine.actor.optimizer.param_groups[0]["lr"] * gradients[name]
    vocabulary = len(trainer.rollouts.tokenizer)
    loss = trl_loss(actor, experience, advantages, vocabulary, kl_ratio=trainer.config.kl_ratio)
    loss.backward()
    for name, parameter in actor.named_parameters():
        torch.testing.assert_close(
            gradients[name], parameter.grad, atol=2e-6, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )
