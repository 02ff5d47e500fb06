"""The details that make PPO for language models right, one test or a pointer to it for each.

Each is a detail that a published implementation got wrong; the issue that shows it is named in the test. Numbers are
used in the names of the tests: `test_07_...` is detail 7. `ELSEWHERE` points to tests that live beside what they test;
`test_every_detail_has_its_test` fails when one of them goes away. Where nothing else is said, models are random,
float32, in evaluation mode, and pad is eos.
"""

from __future__ import annotations

import ast
import copy
import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
import transformers

from rlhf.algorithms.advantages import ESTIMATORS, Estimator, EstimatorInput, gae
from rlhf.algorithms.config import PPOBatchConfig, PPOConfig, PPOOptimizerConfig
from rlhf.algorithms.policy_loss import KLController, shape_rewards
from rlhf.algorithms.ppo import EmptyRolloutError, PPOExperience
from rlhf.config import ConfigError, EngineConfig, ModelConfig
from rlhf.data import collate_responses
from rlhf.engine import BatchPlan, RLHFEngine
from rlhf.generation.continuous_batching import generate
from rlhf.generation.token_sampling import Sampling
from rlhf.models.scalar import ScalarModel
from rlhf.numerics.logprobs import logprobs_from_logits
from rlhf.pipeline.stages import parse_stage
from rlhf.training.metrics import MeanMeter
from rlhf.training.scoring import label_loss, response_logprobs, response_values
from rlhf.types import PromptBatch, Rollout, TokenizedPrompt, TokenizedResponse
from tests.support.local_engine import LocalModels
from tests.support.on_policy import FunctionReward, context, ppo_trainer, responses_to, reward_of, stage_data
from tests.support.tiny_models import TOKENS, save_tiny_model

TESTS = Path(__file__).parents[1]
ELSEWHERE = {
    16: ("models/test_models.py", ["test_head_starts_small_with_zero_bias", "test_saved_scores_come_back_bit_for_bit"]),
    22: ("slow/test_two_ranks.py", ["test_two_ranks_equal_one"]),
    24: (
        "models/test_lora.py",
        ["test_a_target_that_matches_nothing_lists_the_names", "test_an_empty_adapter_is_never_saved"],
    ),
    26: ("models/test_models.py", ["test_a_padded_vocabulary_stays_as_it_is"]),
    27: ("models/test_models.py", ["test_token_type_ids_never_reach_the_model"]),
}
ABSOLUTE_AND_ROTARY = ("gpt2", "opt", "gpt_neox", "llama")
EOS = 0
PROMPTS = ([5, 9, 3], [7], [4, 4, 8, 2, 6], [30, 31])
RESPONSES = ([11, 12, 13, EOS], [14], [15, 16, EOS], [EOS])


def functions_of(file: str | Path) -> set[str]:
    tree = ast.parse((TESTS / file).read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def test_every_detail_has_its_test():
    here = functions_of(Path(__file__))
    for number in range(1, 29):
        if number in ELSEWHERE:
            file, names = ELSEWHERE[number]
            assert set(names) <= functions_of(file), f"detail {number}: {file} lacks {set(names) - functions_of(file)}"
        else:
            assert any(name.startswith(f"test_{number:02d}_") for name in here), f"detail {number} has no test"


# ------------------------------------------------------------------------------------------------- fixtures


def load(path) -> torch.nn.Module:
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def rollout_of(prompts=PROMPTS, responses=RESPONSES, *, more_left=0, more_right=0) -> Rollout:
    """A rollout padded with eos, with so many more columns of nothing but padding on either side."""
    rows, width, length = len(prompts), max(map(len, prompts)) + more_left, max(map(len, responses)) + more_right
    prompt_ids, response_ids = torch.full((rows, width), EOS), torch.full((rows, length), EOS)
    prompt_mask = torch.zeros(rows, width, dtype=torch.bool)
    response_mask = torch.zeros(rows, length, dtype=torch.bool)
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        prompt_ids[row, width - len(prompt) :] = torch.tensor(prompt)
        prompt_mask[row, width - len(prompt) :] = True
        response_ids[row, : len(response)] = torch.tensor(response)
        response_mask[row, : len(response)] = True
    return Rollout(prompt_ids, prompt_mask, response_ids, response_mask, torch.zeros(rows, length))


def letter_score(rollout: Rollout, texts: list[str]) -> torch.Tensor:
    """A reward that a model can learn: how many of the response's tokens have an even id, less half its length."""
    even = (rollout.response_ids % 2 == 0) & rollout.response_mask
    return even.sum(1).float() - 0.5 * rollout.response_mask.sum(1)


def prompt_examples(count: int) -> list[TokenizedPrompt]:
    generator = torch.Generator().manual_seed(2)
    lengths = torch.randint(2, 9, (count,), generator=generator).tolist()
    rows = [tuple(torch.randint(1, 90, (n,), generator=generator).tolist()) for n in lengths]
    return [TokenizedPrompt(id=str(index), input_ids=row, text=f"prompt {index}") for index, row in enumerate(rows)]


@pytest.fixture
def make_trainer(tiny_models, tokenizer, tmp_path):
    """A PPOTrainer over plain torch models, or over the engine that is handed in."""

    def make(
        *, architecture="gpt_neox", engine=None, plan=None, rollout=8, ppo_epochs=1, new_tokens=6, scorer=letter_score,
        ptx=(), reference_noise=0.0, iterations=2, actor_eos=None, critic_warmup_iterations=0, samples_per_prompt=1,
        prompts=0, **config,
    ):  # fmt: skip
        plan = plan or BatchPlan(rollout, 4, 1)
        if engine is None:
            reference = load(tiny_models[architecture])
            with torch.no_grad():
                generator = torch.Generator().manual_seed(9)
                for parameter in reference.parameters():
                    parameter += reference_noise * torch.randn(parameter.shape, generator=generator)
            critic = ScalarModel.from_base(tiny_models[architecture], dtype=torch.float32, seed=1)
            engine = LocalModels(load(tiny_models[architecture]), critic, reference, plan)
        named = copy.deepcopy(tokenizer)
        if actor_eos is not None:
            named.eos_token = named.convert_ids_to_tokens(actor_eos)
            engine.actor.module.generation_config.eos_token_id = actor_eos
        examples = prompt_examples(prompts or rollout)
        return ppo_trainer(
            engine,
            FunctionReward(scorer),
            examples,
            examples[:3],
            tokenizer=named,
            plan=plan,
            directory=tmp_path / "ppo",
            new_tokens=new_tokens,
            ptx=ptx,
            config=PPOConfig(critic_warmup_iterations=critic_warmup_iterations, **config),
            batch=PPOBatchConfig(
                rollout_batch_size=rollout,
                samples_per_prompt=samples_per_prompt,
                ppo_epochs=ppo_epochs,
                max_steps=iterations,
            ),
        )

    return make


def first_rollout(trainer):
    """The scored rollout of the first iteration, once more: the same prompts and random numbers."""
    return trainer.rollouts.run([trainer.prompts.train[index] for index in trainer.order.indices(0)], 1)


# -------------------------------------------------------------------------------- masks, padding, positions


def test_01_eos_stays_in_the_loss_where_pad_is_eos(tiny_models):
    """DeepSpeedExamples#490, #464: masking by `ids != pad` drops eos and the model never learns to stop."""
    rows = [
        TokenizedResponse(id="a", input_ids=(5, 6, 7, EOS), prompt_tokens=2),
        TokenizedResponse(id="b", input_ids=(8, 9, 10, 11, 12, EOS), prompt_tokens=3),
    ]
    batch = collate_responses(rows, pad_id=EOS)
    assert batch.labels.tolist() == [[-100, -100, 7, EOS, -100, -100], [-100, -100, -100, 11, 12, EOS]]
    assert batch.attention_mask.tolist() == [[True] * 4 + [False] * 2, [True] * 6]
    model = load(tiny_models["gpt2"])
    with torch.no_grad():
        loss = label_loss(model, batch)
        expected = 0.0
        for row in rows:
            logprobs = model(torch.tensor([row.input_ids])).logits[0].double().log_softmax(-1)
            expected -= sum(logprobs[t - 1, row.input_ids[t]] for t in range(row.prompt_tokens, len(row.input_ids)))
    assert loss.item() == pytest.approx(float(expected), rel=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(("more_left", "more_right"), [(0, 0), (3, 0), (0, 2), (4, 5)])
def test_02_padding_on_either_side_changes_neither_logprobs_values_nor_scores(
    tiny_models, tokenizer, more_left, more_right
):
    actor = load(tiny_models["gpt_neox"])
    critic = ScalarModel.from_base(tiny_models["gpt_neox"], dtype=torch.float32, seed=3).eval()
    rollout = rollout_of(more_left=more_left, more_right=more_right)
    logprobs, values = response_logprobs(actor, rollout, Sampling(1)), response_values(critic, rollout)
    scores = reward_of(critic, tokenizer).score(responses_to(rollout, tokenizer)).scores
    for row, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        alone = rollout_of([prompt], [response])
        assert not (~alone.prompt_mask).any() and not (~alone.response_mask).any()  # no padding to go wrong
        n = len(response)
        torch.testing.assert_close(
            logprobs[row, :n], response_logprobs(actor, alone, Sampling(1))[0], atol=2e-5, rtol=1e-5
        )
        torch.testing.assert_close(values[row, :n], response_values(critic, alone)[0], atol=2e-5, rtol=1e-5)
        ids = torch.tensor([prompt + response])
        torch.testing.assert_close(scores[row], critic(ids, torch.ones_like(ids))[0, -1], atol=2e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("architecture", ABSOLUTE_AND_ROTARY)
def test_03_positions_do_not_count_padding_on_absolute_and_rotary_models(tiny_models, tokenizer, architecture):
    """trl#469, OpenRLHF#217: many models number positions with `arange` when they are not told.

    Rotary attention sees differences of positions only: there the test holds the mask and the responses' positions
    (right-padded prompts would tear them from their prompt); on GPT-2 and OPT it holds the absolute ones.
    """
    actor = load(tiny_models[architecture])
    critic = ScalarModel.from_base(tiny_models[architecture], dtype=torch.float32, seed=3).eval()
    few, many = rollout_of(), rollout_of(more_left=7, more_right=3)
    mask = few.response_mask
    width = mask.shape[1]
    for quantity in (
        lambda rollout: response_logprobs(actor, rollout, Sampling(1)),
        lambda rollout: response_values(critic, rollout),
    ):
        torch.testing.assert_close(quantity(few)[mask], quantity(many)[:, :width][mask], atol=3e-5, rtol=1e-5)
    reward = reward_of(critic, tokenizer)
    scores = [reward.score(responses_to(rollout, tokenizer)).scores for rollout in (few, many)]
    torch.testing.assert_close(*scores, atol=3e-5, rtol=1e-5)
    alone = torch.tensor([PROMPTS[1] + RESPONSES[1]])
    expected = actor(alone).logits[0, 0].log_softmax(-1)[14]
    torch.testing.assert_close(response_logprobs(actor, many, Sampling(1))[1, 0], expected, atol=3e-5, rtol=1e-5)


class Table(torch.nn.Module):
    """A bigram model of three tokens: the distribution of the next one depends on the last one alone."""

    PROBABILITIES = torch.tensor([[0.2, 0.3, 0.5], [0.6, 0.3, 0.1], [0.25, 0.5, 0.25]])

    def forward(self, input_ids, attention_mask=None, use_cache=False):
        return transformers.modeling_outputs.CausalLMOutput(logits=self.PROBABILITIES.log()[input_ids])


def test_04_logits_of_one_position_score_the_token_of_the_next():
    """Prompt (0, 1), response (2, 2, 0): 0.1 after 1, 0.25 after 2, 0.25 after 2; worked by hand."""
    rollout = rollout_of([[0, 1], [2]], [[2, 2, 0], [1, 0]])
    logprobs = response_logprobs(Table(), rollout, Sampling(1))
    expected = torch.tensor([[0.1, 0.25, 0.25], [0.5, 0.6, 1.0]]).log()
    mask = rollout.response_mask
    torch.testing.assert_close(logprobs[mask], expected[mask])
    # at temperature 0.5 every probability is squared and normalised anew
    squared = torch.tensor([0.01 / 0.46, 0.0625 / 0.375, 0.0625 / 0.375]).log()
    torch.testing.assert_close(response_logprobs(Table(), rollout, Sampling(1, temperature=0.5))[0], squared)


# ----------------------------------------------------------------------------- sampling and scoring are one


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["gpt_neox", "llama", "gpt2", "opt", "qwen2", "gemma"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_05_what_samples_is_what_scores(tiny_models, architecture, temperature):
    """trl#256, #1161: log-probabilities captured while sampling, with a cache, are those of a fresh forward."""
    model = load(tiny_models[architecture])
    prompts = rollout_of()
    batch = PromptBatch(prompts.prompt_ids, prompts.prompt_mask, torch.arange(4))
    rollout = generate(
        model, batch, Sampling(10, temperature=temperature), eos_token_ids=[*range(0, 90, 9)], pad_token_id=EOS, seed=5
    )
    lengths = rollout.response_mask.sum(1)
    assert len(set(lengths.tolist())) > 1  # ragged, so that the cache has holes
    fresh = response_logprobs(model, rollout, Sampling(10, temperature=temperature))
    torch.testing.assert_close(rollout.logprobs, fresh * rollout.response_mask, atol=5e-5, rtol=1e-4)


@pytest.mark.parametrize("option", ["top_k", "top_p"])
def test_05_a_filter_that_would_change_the_policy_is_refused_with_the_reason(option):
    with pytest.raises(ConfigError, match="scores the distribution it samples from, which a filter would change"):
        parse_stage("ppo", [f"--{option}", "1"])


def test_06_temperature_divides_actor_old_actor_and_reference_alike(make_trainer):
    """trl#4159. With the reference equal to the actor the KL is 0 at every temperature, and the ratio is 1."""
    trainer = make_trainer(temperature=0.7)
    metrics = trainer.update(trainer.make_experience(1), 1)
    assert metrics["ratio_first"] == pytest.approx(1, abs=1e-5)
    assert abs(metrics["kl_per_token"]) < 1e-6
    assert metrics["sampling_logprob_error"] < 1e-4
    other = make_trainer(temperature=0.7, reference_noise=0.05)
    rollout = other.make_experience(1).rollout
    fresh = logprobs_from_logits(
        other.engine.reference(
            input_ids=torch.cat([rollout.prompt_ids, rollout.response_ids], 1),
            attention_mask=torch.cat([rollout.prompt_mask, rollout.response_mask], 1).long(),
        ).logits[:, rollout.prompt_ids.shape[1] - 1 : -1, :TOKENS],
        rollout.response_ids,
        0.7,
    )
    mask = rollout.response_mask
    torch.testing.assert_close(first_rollout(other).ref_logprobs[mask], fresh[mask].detach(), atol=5e-5, rtol=1e-4)


@pytest.fixture(scope="module")
def reward_directory(tiny_models, tokenizer, tmp_path_factory):
    from rlhf.checkpoint.export import export_scalar_model

    path = tmp_path_factory.mktemp("reward") / "model"
    export_scalar_model(ScalarModel.from_base(tiny_models["gpt2"], dtype=torch.float32, seed=5), tokenizer, path)
    return path


def real_engine(actor, reward, plan, *, total_steps=4, zero_critic_head=False, **model):
    return RLHFEngine.build(
        actor,
        critic_model=reward,
        reward_model=reward,
        model=ModelConfig(**model),
        engine=EngineConfig(precision="fp32"),
        optimizer=PPOOptimizerConfig(learning_rate=1e-3),
        critic_learning_rate=1e-3,
        plan=plan,
        total_steps=total_steps,
        zero_critic_head=zero_critic_head,
    )


@pytest.mark.parametrize(
    "model",
    [{}, {"model_dropout": 0.1}, {"lora_rank": 2, "lora_dropout": 0.3}, {"gradient_checkpointing": True}],
    ids=["saved_dropout", "model_dropout", "lora_dropout", "checkpointing"],
)
def test_07_ratio_is_1_and_kl_0_on_the_first_minibatch_whatever_the_models_dropout(
    make_trainer, reward_directory, tokenizer, tmp_path, model
):
    dropout = {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1}
    actor = save_tiny_model(tmp_path / "actor", "gpt2", tokenizer, **dropout)
    plan = BatchPlan(4, 2, 1)
    engine = real_engine(actor, reward_directory, plan, **model)
    before = [part.training for part in engine.actor.modules()]
    trainer = make_trainer(engine=engine, plan=plan, rollout=8)
    experience = trainer.make_experience(1)
    assert [part.training for part in engine.actor.modules()] == before
    assert trainer.experience_metrics["sampling_logprob_error"] < 1e-4
    assert abs(trainer.experience_metrics["kl_per_token"]) < 1e-5
    meter, first = MeanMeter(), trainer.minibatches(experience, 1, 0)[0]
    trainer.actor_step(first, meter)
    seen = meter.means()
    assert seen["ratio"] == pytest.approx(1, abs=1e-5)
    assert abs(seen["approx_kl"]) < 1e-6 and seen["clip_fraction"] == 0
    assert [part.training for part in engine.actor.modules()] == before
    metrics = trainer.update(trainer.make_experience(2), 2)
    assert metrics["ratio_first"] == pytest.approx(1, abs=1e-5)


def test_08_log_softmax_runs_in_float32_whatever_the_models_dtype():
    """OpenRLHF PR#634: a log-softmax in bf16 is wrong by about 0.03 nats."""
    logits = torch.randn(4, 6, 300, generator=torch.Generator().manual_seed(0)).mul(6).bfloat16()
    ids = torch.randint(0, 300, (4, 6), generator=torch.Generator().manual_seed(1))
    found = logprobs_from_logits(logits, ids, 0.9)
    exact = (logits.double() / 0.9).log_softmax(-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, atol=2e-5, rtol=0)
    in_bf16 = (logits / 0.9).log_softmax(-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)
    assert (in_bf16.double() - exact).abs().max() > 1e-2  # the tolerance above tells the two apart


# ------------------------------------------------------------------------------------------ scores, rewards


def test_09_text_ends_at_eos_and_what_does_not_end_is_penalised(make_trainer):
    """The scorer sees each response as it ended; one without eos loses 1.5; short ones are learnt from too."""
    seen = []

    def scorer(rollout, texts):
        seen.extend(ids[mask].tolist() for ids, mask in zip(rollout.response_ids, rollout.response_mask, strict=True))
        return torch.full((len(rollout),), 2.0)

    trainer = make_trainer(scorer=scorer, rollout=16, missing_eos_penalty=1.5, kl_coef=0.0, new_tokens=40, actor_eos=1)
    experience = trainer.make_experience(1)
    rollout = experience.rollout
    answers = [ids[mask].tolist() for ids, mask in zip(rollout.response_ids, rollout.response_mask, strict=True)]
    ended = [answer[-1] == 1 for answer in answers]
    assert any(ended) and not all(ended)
    assert all(1 not in answer[:-1] for answer in answers)
    assert all(len(answer) == 40 for answer, end in zip(answers, ended, strict=True) if not end)
    assert sorted(map(len, answers))[0] < 10  # a short one
    assert sorted(seen) == sorted(answers)  # nobody is left out, and nobody is scored with more than was said
    assert experience.scores.tolist() == [2.0] * 16
    assert experience.rewards.sum(1).tolist() == [2.0 if end else 0.5 for end in ended]
    assert trainer.experience_metrics["eos_rate"] == pytest.approx(sum(ended) / 16)


def test_09_the_penalty_of_a_missing_end_is_not_clipped_away():
    mask = torch.ones(2, 2, dtype=torch.bool)
    zeros = torch.zeros(2, 2)
    rewards = shape_rewards(
        torch.tensor([9.0, -9.0]), zeros, zeros, mask, kl_coef=0.1, score_clip=5.0, penalties=torch.tensor([1.0, 1.0])
    )
    assert rewards.tolist() == [[0, 4], [0, -6]]


def test_the_overlong_penalty_is_taken_off_the_last_token_after_the_clip(make_trainer):
    """Beside that of a missing end; responses of 40 tokens at most, a penalty over the last 10 of them."""
    settings = {"rollout": 16, "kl_coef": 0.0, "new_tokens": 40, "actor_eos": 1, "score_clip": 0.01}
    trainer = make_trainer(missing_eos_penalty=0.5, overlong_penalty=2.0, overlong_buffer_tokens=10, **settings)
    experience = trainer.make_experience(1)
    ends = set()
    for ids, mask, score, rewards in zip(
        experience.rollout.response_ids, experience.rollout.response_mask, experience.scores, experience.rewards,
        strict=True,
    ):  # fmt: skip
        tokens = int(mask.sum())
        ended = int(ids[tokens - 1]) == 1
        expected = max(-0.01, min(0.01, score.item())) - 2.0 * max(0, tokens - 30) / 10 - 0.5 * (not ended)
        assert rewards.sum().item() == pytest.approx(expected, abs=1e-5) == rewards[tokens - 1].item()
        ends.add("over" if tokens > 30 else "under")
    assert ends == {"over", "under"}, "the responses do not show both"


def test_09_every_eos_of_the_models_generation_settings_ends_a_response(make_trainer):
    """Chat models end with another token than the tokenizer's eos (Llama 3, Gemma)."""
    trainer = make_trainer(rollout=16, kl_coef=0.0, new_tokens=40)
    trainer.rollouts.eos_ids = trainer.rollouts.backend.eos_ids = sorted({EOS, *range(1, 30)})
    rollout = trainer.make_experience(1).rollout
    last = [int(ids[mask][-1]) for ids, mask in zip(rollout.response_ids, rollout.response_mask, strict=True)]
    assert all(token < 30 for token in last)
    assert trainer.experience_metrics["eos_rate"] == 1.0


def test_10_the_score_lands_on_the_last_real_token():
    """trl#3750, DeepSpeedExamples#672: not on the first pad, not in the last column."""
    mask = torch.tensor([[True, True, True], [True, False, False], [True, True, False]])
    zeros = torch.zeros(3, 3)
    rewards = shape_rewards(torch.tensor([1.0, 2.0, 3.0]), zeros, zeros, mask, kl_coef=0.1)
    assert rewards.tolist() == [[0, 0, 1], [2, 0, 0], [0, 3, 0]]


def test_10_the_score_of_a_sampled_rollout_is_at_each_eos(make_trainer):
    trainer = make_trainer(rollout=16, kl_coef=0.0, new_tokens=40, score_clip=0.0, actor_eos=1)
    experience = trainer.make_experience(1)
    for row, mask in enumerate(experience.rollout.response_mask.tolist()):
        expected = [0.0] * len(mask)
        expected[sum(mask) - 1] = experience.scores[row].item()
        assert experience.rewards[row].tolist() == expected
    assert len(set(experience.rollout.response_mask.sum(1).tolist())) > 2


def test_11_kl_counts_over_response_tokens_only_and_the_score_is_clipped_before_it():
    mask = torch.tensor([[True, True, False]])
    logprobs = torch.tensor([[-1.0, -2.0, math.nan]])
    ref_logprobs = torch.tensor([[-3.0, -1.5, -40.0]])
    rewards = shape_rewards(torch.tensor([9.0]), logprobs, ref_logprobs, mask, kl_coef=10.0, score_clip=5.0)
    assert rewards.tolist() == [[-20.0, 5 + 5.0, 0.0]]  # clipping afterwards would have cut 20 and 14 down to 5
    low = shape_rewards(torch.tensor([-9.0]), logprobs, ref_logprobs, mask, kl_coef=0.0, score_clip=5.0)
    assert low.tolist() == [[0.0, -5.0, 0.0]]


def test_11_the_penalty_is_the_exact_kl_in_expectation():
    """All four one-token responses, weighted by their probability: the sum of rewards is -coef * KL(actor || ref)."""
    actor = torch.tensor([0.4, 0.3, 0.2, 0.1]).double()
    reference = torch.tensor([0.1, 0.2, 0.3, 0.4]).double()
    exact = float((actor * (actor / reference).log()).sum())
    for estimator in ("k1", "k3"):
        rewards = shape_rewards(
            torch.zeros(4).double(), actor.log().unsqueeze(1), reference.log().unsqueeze(1),
            torch.ones(4, 1, dtype=torch.bool), kl_coef=0.5, kl_estimator=estimator,
        )  # fmt: skip
        assert float((actor * rewards[:, 0]).sum()) == pytest.approx(-0.5 * exact, rel=1e-9)
    assert exact > 0.3


def test_12_adaptive_kl_table_worked_by_hand():
    """Target 6, horizon 10000, 500 responses a time, start 0.1 (Ziegler et al., section 2.2)."""
    controller = KLController(0.1, target=6.0, horizon=10_000)
    coefficient = 0.1
    for observed, error in [(6.0, 0.0), (6.6, 0.1), (60.0, 0.2), (5.4, -0.1), (0.0, -0.2), (-3.0, -0.2)]:
        controller.update(observed, 500)
        coefficient *= 1 + error * 500 / 10_000
        assert controller.value == pytest.approx(coefficient, rel=1e-12)
    assert coefficient == pytest.approx(0.1 * 1.005 * 1.01 * 0.995 * 0.99 * 0.99)


def test_12_the_controller_sees_the_kl_that_was_observed(make_trainer):
    """trlx#361. The observed KL is the mean over responses of log pi - log ref, not that of the loss or of a token."""
    trainer = make_trainer(kl_target=3.0, kl_horizon=100, reference_noise=0.05)
    experience = trainer.make_experience(1)
    rollout = experience.rollout
    difference = (rollout.logprobs - first_rollout(trainer).ref_logprobs).double() * rollout.response_mask
    observed = float(difference.sum() / len(rollout))
    error = min(max(observed / 3.0 - 1, -0.2), 0.2)
    assert trainer.update(experience, 1)["kl_coef"] == pytest.approx(0.1)  # the coefficient that was in force
    assert trainer.kl.value == pytest.approx(0.1 * (1 + error * 8 / 100), rel=1e-6)
    assert trainer.kl.value != 0.1


def brute_force_advantages(rewards, values, gamma, lam):
    """The sum over k of (gamma lam)^k delta_{t+k}, term by term (arXiv 1506.02438, eq. 16)."""
    steps = len(rewards)
    following = [*values[1:], 0.0]
    deltas = [rewards[t] + gamma * following[t] - values[t] for t in range(steps)]
    return [sum((gamma * lam) ** k * deltas[t + k] for k in range(steps - t)) for t in range(steps)]


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (0.99, 0.0)])
@pytest.mark.parametrize("garbage", [1e6, math.nan, -math.inf])
def test_13_gae_against_brute_force_over_ragged_lengths_with_garbage_behind_them(gamma, lam, garbage):
    """verl#6362: padded values must not reach the last token's next value, which is 0."""
    generator = torch.Generator().manual_seed(0)
    rewards = torch.randn(5, 7, generator=generator, dtype=torch.float64)
    values = torch.randn(5, 7, generator=generator, dtype=torch.float64)
    lengths = [7, 4, 1, 6, 0]
    mask = torch.arange(7) < torch.tensor(lengths).unsqueeze(1)
    advantages, returns = gae(
        rewards.masked_fill(~mask, garbage), values.masked_fill(~mask, garbage), mask, gamma=gamma, lam=lam
    )
    for row, length in enumerate(lengths):
        expected = brute_force_advantages(rewards[row, :length].tolist(), values[row, :length].tolist(), gamma, lam)
        assert advantages[row].tolist() == pytest.approx([*expected, *[0.0] * (7 - length)], abs=1e-12)
        plus_values = [a + v for a, v in zip(expected, values[row, :length].tolist(), strict=True)]
        assert returns[row].tolist() == pytest.approx([*plus_values, *[0.0] * (7 - length)], abs=1e-12)


def test_14_whitening_is_over_the_whole_rollout_with_population_variance(make_trainer):
    whitened = make_trainer(whiten_advantages=True).make_experience(1)
    plain = make_trainer(whiten_advantages=False).make_experience(1)
    mask = whitened.rollout.response_mask
    assert torch.equal(whitened.rollout.response_ids, plain.rollout.response_ids)
    chosen = plain.advantages[mask].double()
    expected = (chosen - chosen.mean()) / chosen.var(unbiased=False).sqrt()
    torch.testing.assert_close(whitened.advantages[mask].double(), expected, atol=1e-5, rtol=1e-5)
    assert not whitened.advantages[~mask].any()
    torch.testing.assert_close(whitened.returns, plain.returns)  # the critic learns the returns as they are


def test_14_whitened_rewards_keep_their_mean(make_trainer):
    raw = make_trainer(whiten_rewards=False, whiten_advantages=False).make_experience(1)
    white = make_trainer(whiten_rewards=True, whiten_advantages=False).make_experience(1)
    mask = raw.rollout.response_mask
    before, after = raw.rewards[mask].double(), white.rewards[mask].double()
    assert after.mean().item() == pytest.approx(before.mean().item(), abs=1e-6)
    assert after.var(unbiased=False).item() == pytest.approx(1.0, abs=1e-4)
    assert abs(before.mean()) > 0.01 and abs(before.var(unbiased=False) - 1) > 0.01


# -------------------------------------------------------------------------------------- gradients and splits


def experience_of(rows=8, width=6) -> PPOExperience:
    """Ragged experience whose old log-probabilities are off, so that some ratios are clipped."""
    generator = torch.Generator().manual_seed(4)
    prompts = [torch.randint(1, 90, (int(n),), generator=generator).tolist() for n in range(1, rows + 1)]
    lengths = [1 + (3 * row) % width for row in range(rows)]
    responses = [torch.randint(1, 90, (n,), generator=generator).tolist() for n in lengths]
    rollout = rollout_of(prompts, responses)
    noise = [torch.randn(rollout.response_ids.shape, generator=generator) for _ in range(3)]
    return PPOExperience(
        dataclasses.replace(rollout, logprobs=torch.zeros_like(noise[0])),
        torch.zeros_like(noise[0]), noise[0], torch.zeros_like(noise[0]), noise[1], noise[2], torch.zeros(rows),
    )  # fmt: skip


def gradients_of_one_step(make_trainer, micro, **config):
    plan = BatchPlan(8, micro, 1)
    trainer = make_trainer(plan=plan, **config)
    experience = experience_of()
    current = response_logprobs(trainer.engine.actor, experience.rollout, trainer.rollouts.sampling).detach()
    shift = 0.3 * torch.randn(current.shape, generator=torch.Generator().manual_seed(8))
    experience = dataclasses.replace(
        experience, rollout=dataclasses.replace(experience.rollout, logprobs=current + shift)
    )
    (minibatch,) = trainer.minibatches(experience, 1, 0)
    assert {1: 6, 2: 3, 4: 2, 8: 1}[micro] == len(minibatch)  # short rows go through together
    meter = MeanMeter()
    trainer.actor_step(minibatch, meter)
    trainer.critic_step(minibatch, meter)
    return trainer, experience, trainer.engine.actor.gradients[0], trainer.engine.critic.gradients[0], meter.means()


@pytest.mark.parametrize("micro", [1, 2, 4])
def test_15_the_split_into_micro_batches_changes_no_gradient(make_trainer, micro):
    """trl#583: a mean of micro-batch means weighs tokens of short responses more."""
    whole = gradients_of_one_step(make_trainer, 8, entropy_coef=0.01)
    parts = gradients_of_one_step(make_trainer, micro, entropy_coef=0.01)
    for index in (2, 3):
        assert whole[index].keys() == parts[index].keys()
        for name, gradient in whole[index].items():
            torch.testing.assert_close(parts[index][name], gradient, atol=2e-6, rtol=1e-4)
    assert parts[4] == pytest.approx(whole[4], rel=1e-4)
    assert whole[4]["clip_fraction"] > 0


def test_15_the_gradient_is_that_of_the_token_mean_written_out(make_trainer, tiny_models):
    """max(pg1, pg2) less the entropy bonus, and 0.5 max(clipped, unclipped), over unpadded rows and the token count."""
    _, experience, actor_gradients, critic_gradients, _ = gradients_of_one_step(make_trainer, 4, entropy_coef=0.3)
    actor = load(tiny_models["gpt_neox"])
    critic = ScalarModel.from_base(tiny_models["gpt_neox"], dtype=torch.float32, seed=1).eval()
    policy, value, count = 0.0, 0.0, 0
    rollout = experience.rollout
    for row in range(8):
        prompt = rollout.prompt_ids[row][rollout.prompt_mask[row]].tolist()
        response = rollout.response_ids[row][rollout.response_mask[row]].tolist()
        ids = torch.tensor([prompt + response])
        logits, values = actor(ids).logits[0, :, :TOKENS], critic(ids, torch.ones_like(ids))[0]
        for t, token in enumerate(response):
            at = len(prompt) - 1 + t
            ratio = (logits[at].log_softmax(-1)[token] - rollout.logprobs[row, t]).exp()
            advantage = experience.advantages[row, t]
            clipped = min(max(ratio, torch.tensor(0.8)), torch.tensor(1.2))
            distribution = logits[at].softmax(-1)
            entropy = -(distribution * distribution.log()).sum()
            policy = policy + max(-advantage * ratio, -advantage * clipped) - 0.3 * entropy
            old, target = experience.values[row, t], experience.returns[row, t]
            limited = min(max(values[at], old - 0.2), old + 0.2)
            value = value + 0.5 * max((values[at] - target) ** 2, (limited - target) ** 2)
            count += 1
    (policy / count).backward()
    (value / count).backward()
    for name, parameter in actor.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(actor_gradients[name], parameter.grad, atol=2e-6, rtol=1e-3)
    for name, parameter in critic.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(critic_gradients[name], parameter.grad, atol=2e-6, rtol=1e-3)


def test_21_minibatches_are_reshuffled_every_epoch_and_shared_by_all_ranks(make_trainer, monkeypatch):
    import rlhf.algorithms.ppo as ppo

    def rows(trainer, iteration, epoch):
        minibatches = trainer.minibatches(experience, iteration, epoch)
        return [sorted(float(score) for part in parts for score in part.scores) for parts in minibatches]

    experience = dataclasses.replace(experience_of(), scores=torch.arange(8.0))
    trainer = make_trainer(plan=BatchPlan(4, 2, 1), rollout=8)
    first, second, other = rows(trainer, 1, 0), rows(trainer, 1, 1), rows(trainer, 2, 0)
    for minibatches in (first, second, other):
        assert sorted(sum(minibatches, [])) == list(range(8))  # every row once
    assert first != second and first != other
    shared = make_trainer(plan=BatchPlan(4, 2, 2), rollout=8)
    per_rank = []
    for index in (0, 1):
        monkeypatch.setattr(ppo, "rank", lambda index=index: index)
        per_rank.append(rows(shared, 1, 0))
    assert [sorted(a + b) for a, b in zip(*per_rank, strict=True)] == first


# ---------------------------------------------------------------------------------------- the reward model


def test_17_scores_are_normalised_to_mean_0_and_variance_1_on_the_reference_responses(tiny_models, tokenizer, tmp_path):
    """DeepSpeedExamples#316 for the padding: a long and a short reference response in one batch."""
    from rlhf.algorithms.config import RewardConfig
    from rlhf.algorithms.reward import RewardTrainer
    from rlhf.checkpoint.export import export_scalar_model
    from rlhf.types import TokenizedRanking
    from tests.support.local_engine import LocalEngine

    def example(index):
        best, worse = [index, 20 + index, *range(30, 30 + index)], [index, 50 + index]
        rows = tuple(TokenizedResponse(id="", input_ids=tuple(ids), prompt_tokens=1) for ids in (worse, best))
        return TokenizedRanking(id=str(index), candidates=rows, ranks=(1, 0))

    examples = [example(index) for index in range(1, 8)]
    model = ScalarModel.from_base(tiny_models["gpt2"], dtype=torch.float32, seed=3).eval()
    plan = BatchPlan(4, 2, 1)
    trainer = RewardTrainer(
        LocalEngine(model, plan), stage_data(examples), RewardConfig(calibration_rows=6), pad_token_id=EOS, plan=plan,
        total_steps=1, export=lambda: None, context=context(tmp_path, "reward"),
    )  # fmt: skip
    model.set_normalisation(*trainer.calibrate())
    export_scalar_model(model, tokenizer, tmp_path / "reward")
    saved = ScalarModel.from_pretrained(tmp_path / "reward", dtype=torch.float32).eval()
    reward = reward_of(saved, tokenizer)
    chosen = trainer.calibration_examples()
    assert len(chosen) == 6 and chosen != examples[:6]  # drawn from all of them
    rows = [example.candidates[1].input_ids for example in chosen]
    rollouts = [rollout_of([[row[0]]], [[*row[1:]]]) for row in rows]
    scores = torch.cat([reward.score(responses_to(rollout, tokenizer)).scores for rollout in rollouts])
    assert scores.mean().item() == pytest.approx(0, abs=1e-4)
    assert scores.std(unbiased=False).item() == pytest.approx(1, abs=1e-4)


@torch.no_grad()
def test_18_the_score_is_read_at_eos_where_pad_is_eos(tiny_models, tokenizer):
    """transformers#35352: looking for the first pad, or the last id that is not pad, reads one token early."""
    model = ScalarModel.from_base(tiny_models["llama"], dtype=torch.float32, seed=3).eval()
    scores = reward_of(model, tokenizer).score(responses_to(rollout_of(more_right=2), tokenizer)).scores
    for row, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        ids = torch.tensor([prompt + response])
        values = model(ids, torch.ones_like(ids))[0]
        torch.testing.assert_close(scores[row], values[-1], atol=2e-5, rtol=1e-5)
        assert (values[-1] - values[-2]).abs() > 1e-3


def second_tokenizer(tokenizer):
    """The same letters under other numbers, and another end of sequence."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = [token for token in tokenizer.get_vocab() if token != tokenizer.eos_token]
    vocabulary = {"</s>": 0, "<pad>": 1, **{letter: 2 + i for i, letter in enumerate(sorted(letters, reverse=True))}}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", pad_token="<pad>")


@torch.no_grad()
def test_19_a_reward_model_with_another_tokenizer_scores_the_text(tiny_models, tokenizer):
    """trl#1979. The text is read in the reward model's own ids; only a response that ended gets its end."""
    other = second_tokenizer(tokenizer)
    model = ScalarModel.from_base(tiny_models["gpt2"], dtype=torch.float32, seed=3).eval()
    prompts, responses, ended = ["Hi there", "Q"], ["yes", "no way"], [True, False]
    ids = [tokenizer(text)["input_ids"] for text in responses]
    ids[0].append(tokenizer.eos_token_id)
    rollout = rollout_of([tokenizer(text)["input_ids"] for text in prompts], ids)
    given = responses_to(rollout, tokenizer, prompts)
    scores = reward_of(model, other, tokenizer).score(given).scores
    for row in range(2):
        wanted = [*other(prompts[row])["input_ids"], *other(responses[row])["input_ids"]] + [0] * ended[row]
        wanted = torch.tensor([wanted])
        torch.testing.assert_close(scores[row], model(wanted, torch.ones_like(wanted))[0, -1], atol=2e-5, rtol=1e-5)
    same = reward_of(model, tokenizer)
    assert same.same_tokenizer and not reward_of(model, other, tokenizer).same_tokenizer
    assert (same.score(given).scores - scores).abs().min() > 1e-3  # its own ids, as they are


# ------------------------------------------------------------------------------------- optimizer, adapters


def test_20_adam_epsilon_is_1e_5_and_the_rate_is_annealed(tiny_models, reward_directory):
    """Huang et al., "The N implementation details of RLHF with PPO"."""
    config = PPOOptimizerConfig()
    assert config.adam_eps == 1e-5 and config.lr_schedule == "linear"
    plan = BatchPlan(2, 2, 1)
    engine = real_engine(tiny_models["gpt2"], reward_directory, plan, total_steps=4)
    for part in (engine.actor, engine.critic):
        assert all(group["eps"] == 1e-5 for group in part.optimizer.param_groups)
        rates = []
        for _ in range(4):
            rates.append(part.optimizer.param_groups[0]["lr"])
            ids = torch.tensor([[5, 6], [7, 8]])
            output = part(input_ids=ids, attention_mask=torch.ones_like(ids))
            part.backward(getattr(output, "logits", output).sum() * 1e-3)
            part.step()
        rates.append(part.optimizer.param_groups[0]["lr"])
        assert rates == pytest.approx([1e-3, 0.75e-3, 0.5e-3, 0.25e-3, 0.0])


def test_23_with_lora_the_reference_is_the_base_and_stays_while_adapter_and_value_head_learn(
    make_trainer, tiny_models, reward_directory
):
    plan = BatchPlan(4, 2, 1)
    engine = real_engine(
        tiny_models["gpt_neox"], reward_directory, plan, lora_rank=2, gradient_checkpointing=True, total_steps=100
    )
    assert engine.reference is None
    trainer = make_trainer(engine=engine, plan=plan, rollout=8, ppo_epochs=2)
    rollout = rollout_of()
    with torch.no_grad(), engine.reference_model() as reference:
        before = response_logprobs(reference, rollout, Sampling(1))
        torch.testing.assert_close(before, response_logprobs(load(tiny_models["gpt_neox"]), rollout, Sampling(1)))
    head = engine.critic.module.scalar_head.weight.detach().clone()
    for iteration in (1, 2):
        trainer.update(trainer.make_experience(iteration), iteration)
    with torch.no_grad(), engine.reference_model() as reference:
        torch.testing.assert_close(response_logprobs(reference, rollout, Sampling(1)), before, atol=0, rtol=0)
    with torch.no_grad(), engine.scoring():
        assert (response_logprobs(engine.actor, rollout, Sampling(1)) - before).abs().max() > 1e-4
    assert not torch.equal(engine.critic.module.scalar_head.weight, head)


def test_25_at_ptx_coefficient_0_the_gradient_is_that_of_ppo_alone(make_trainer):
    ptx = [TokenizedResponse(id=str(i), input_ids=(i + 1, 20, 30 + i, EOS), prompt_tokens=1) for i in range(8)]
    without = gradients_of_one_step(make_trainer, 4)[2]
    at_zero = gradients_of_one_step(make_trainer, 4, ptx=ptx, ptx_coef=0.0)[2]
    for name, gradient in without.items():
        assert torch.equal(at_zero[name], gradient)


@pytest.mark.parametrize("micro", [2, 8])
def test_25_the_mixture_adds_its_coefficient_times_the_token_mean_of_the_ptx_loss(make_trainer, tiny_models, micro):
    """InstructGPT, section 3.5: gradient = PPO's + 27.8 times that of the mean loss of the ptx tokens."""
    ptx = [TokenizedResponse(id=str(i), input_ids=(*range(1, 3 + i), EOS), prompt_tokens=1 + i % 2) for i in range(8)]
    without = gradients_of_one_step(make_trainer, micro)[2]
    mixed = gradients_of_one_step(make_trainer, micro, ptx=ptx, ptx_coef=27.8)[2]
    actor = load(tiny_models["gpt_neox"])
    loss, count = 0.0, 0
    for row in ptx:
        logprobs = actor(torch.tensor([row.input_ids])).logits[0].log_softmax(-1)
        for t in range(row.prompt_tokens, len(row.input_ids)):
            loss, count = loss - logprobs[t - 1, row.input_ids[t]], count + 1
    (27.8 * loss / count).backward()
    for name, parameter in actor.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(mixed[name] - without[name], parameter.grad, atol=1e-4, rtol=1e-3)


def ptx_rows_learnt_from(trainer, iterations):
    """The numbers of the ptx rows that the actor reads in those iterations; a row is 89, 88, 87, its number."""
    seen = []

    def note(_, inputs):
        ids = inputs[0].flatten().tolist()
        seen.extend(ids[at + 3] for at in range(len(ids) - 3) if ids[at : at + 3] == [89, 88, 87])

    with trainer.engine.actor.module.gpt_neox.embed_in.register_forward_pre_hook(note):
        for iteration in iterations:
            trainer.update(trainer.make_experience(iteration), iteration)
    return seen


def test_25_every_minibatch_learns_from_further_ptx_rows_also_after_a_resume(make_trainer):
    ptx = [TokenizedResponse(id=str(i), input_ids=(89, 88, 87, i, EOS), prompt_tokens=3) for i in range(1, 17)]
    trainer, resumed = (make_trainer(ptx=ptx, ptx_coef=1.0, plan=BatchPlan(4, 4, 1), iterations=4) for _ in range(2))
    first = ptx_rows_learnt_from(trainer, (1,))
    resumed.load_state(trainer.state(), [trainer.rank_state()], trainer.tensors())
    second = ptx_rows_learnt_from(trainer, (2,))
    assert sorted(first + second) == list(range(1, 17))  # two minibatches of four rows in each iteration: one pass
    assert ptx_rows_learnt_from(resumed, (2,)) == second


def test_25_a_mixture_without_data_and_data_without_a_coefficient_are_refused():
    with pytest.raises(ConfigError, match="ptx_coef=27.8 needs data"):
        parse_stage("ppo", ["--ptx_coef", "27.8"])
    with pytest.raises(ConfigError, match="ptx_data is given and ptx_coef is 0"):
        parse_stage("ppo", ["--ptx_data", "a.jsonl"])


# ------------------------------------------------------------------------------------------- empty rollouts


class AlwaysEnds(torch.nn.Module):
    """An actor that says nothing: eos has all the probability, whatever went before."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.config = model.config

    def forward(self, input_ids, attention_mask, position_ids=None, past_key_values=None, use_cache=False):
        output = self.model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
            past_key_values=past_key_values, use_cache=use_cache,
        )  # fmt: skip
        logits = output.logits * 0.0 - 100.0
        logits[..., EOS] = 100.0
        output.logits = logits
        return output


def test_28_a_rollout_of_empty_responses_is_reported(make_trainer, tiny_models):
    """Every response is eos alone: there is no text to score, and no old batch takes its place."""
    plan = BatchPlan(8, 4, 1)
    critic = ScalarModel.from_base(tiny_models["gpt_neox"], dtype=torch.float32, seed=1)
    silent = AlwaysEnds(load(tiny_models["gpt_neox"]))
    engine = LocalModels(silent, critic, load(tiny_models["gpt_neox"]), plan)
    trainer = make_trainer(engine=engine, plan=plan, iterations=1)
    with pytest.raises(EmptyRolloutError, match="iteration 1.*all 8 responses are empty"):
        trainer.make_experience(1)
    with pytest.raises(EmptyRolloutError):
        trainer.fit()
    assert engine.actor.gradients == []


def test_28_some_empty_responses_are_counted_and_learnt_from(make_trainer):
    trainer = make_trainer(rollout=64, plan=BatchPlan(64, 16, 1), new_tokens=2, actor_eos=1)
    experience = trainer.make_experience(1)
    lengths = experience.rollout.response_mask.sum(1)
    alone = (lengths == 1) & (experience.rollout.response_ids[:, 0] == 1)
    assert 0 < alone.sum() < 64
    assert trainer.experience_metrics["empty_responses"] == pytest.approx(float(alone.float().mean()))


# ------------------------------------------------------------------------------------------- critic's start


def test_29_in_the_warm_up_the_critic_alone_learns(make_trainer):
    """Its values are worth nothing at first; advantages made of them would only shake the actor."""
    trainer = make_trainer(critic_warmup_iterations=2, iterations=3, kl_target=0.1, kl_horizon=10)
    first = [parameter.detach().clone() for parameter in trainer.engine.actor.parameters()]
    for iteration in (1, 2):
        metrics = trainer.update(trainer.make_experience(iteration), iteration)
        assert "policy_loss" not in metrics and "ratio_first" not in metrics and metrics["value_loss"] > 0
        assert trainer.kl.value == 0.1 and trainer.optimizer_step == 0  # nothing to steer, no step of the actor's
    assert all(torch.equal(*pair) for pair in zip(first, trainer.engine.actor.parameters(), strict=True))
    assert len(trainer.engine.critic.gradients) == 2 and trainer.engine.actor.gradients == []
    metrics = trainer.update(trainer.make_experience(3), 3)
    assert metrics["ratio_first"] == pytest.approx(1, abs=1e-5) and trainer.kl.value != 0.1
    assert len(trainer.engine.critic.gradients) == 3 and len(trainer.engine.actor.gradients) == 1


def test_29_the_critics_head_is_zero_unless_a_critic_is_named():
    assert PPOConfig().zero_critic_head and not PPOConfig(critic_init="reward").zero_critic_head
    assert not PPOConfig(critic_model="saved").zero_critic_head
    assert PPOConfig(critic_model="saved", critic_init="zero").zero_critic_head


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_29_a_critic_with_a_zero_head_knows_nothing_and_learns(make_trainer, tiny_models, reward_directory, lora_rank):
    plan = BatchPlan(4, 2, 1)
    engine = real_engine(
        tiny_models["gpt2"], reward_directory, plan, total_steps=100, zero_critic_head=True, lora_rank=lora_rank
    )
    trainer = make_trainer(engine=engine, plan=plan, rollout=8)
    experience = trainer.make_experience(1)
    assert not experience.values.any()
    assert abs(trainer.experience_metrics["explained_variance"]) < 1e-6
    trainer.update(experience, 1)
    assert trainer.make_experience(2).values.abs().max() > 0


# --------------------------------------------------------------------------------------- another estimator


def test_an_estimator_is_one_function_and_one_row(make_trainer, tiny_models, monkeypatch):
    """Each response against the mean of its prompt's responses: no critic, and the rows of one prompt are a group."""
    seen = []

    def against_the_group(given: EstimatorInput):
        seen.append(given)
        total = given.rewards.sum(1)
        group_mean = torch.stack([total[given.groups == group].mean() for group in given.groups])
        return (total - group_mean)[:, None] * given.mask, torch.zeros_like(given.rewards)

    monkeypatch.setitem(ESTIMATORS, "against_the_group", Estimator(against_the_group, False, samples_per_prompt=2))
    plan, actor = BatchPlan(8, 4, 1), load(tiny_models["gpt_neox"]).eval()
    engine = LocalModels(actor, None, load(tiny_models["gpt_neox"]), plan)
    trainer = make_trainer(
        engine=engine, plan=plan, rollout=4, samples_per_prompt=2, advantage="against_the_group",
        whiten_advantages=False, critic_warmup_iterations=3,
    )  # fmt: skip
    experience = trainer.make_experience(1)
    (given,) = seen
    assert given.groups.tolist() == [0, 0, 1, 1, 2, 2, 3, 3] and not given.values.any()
    first, second = experience.rollout.prompt_ids[0::2], experience.rollout.prompt_ids[1::2]
    assert torch.equal(first, second) and len(experience.scores) == 8
    of_response = experience.advantages.sum(1) / experience.rollout.response_mask.sum(1).clamp(min=1)
    assert of_response[0::2].tolist() == pytest.approx((-of_response[1::2]).tolist(), abs=1e-6)
    assert of_response.abs().max() > 0.01
    before = [parameter.detach().clone() for parameter in engine.actor.parameters()]
    metrics = trainer.update(experience, 1)
    assert any(not torch.equal(*pair) for pair in zip(before, engine.actor.parameters(), strict=True))
    assert not any("critic" in name or "value" in name or name == "explained_variance" for name in metrics)


# ---------------------------------------------------------------------------------------------- end to end


def test_ppo_learns_what_the_scorer_rewards(make_trainer, tmp_path):
    """Even token ids score: after a few updates at a large rate the actor's mean score has risen clearly."""
    trainer = make_trainer(
        rollout=32, plan=BatchPlan(16, 8, 1), ppo_epochs=4, iterations=6, kl_coef=0.01, eval_samples_per_prompt=16
    )
    trainer.engine.actor.optimizer.param_groups[0]["lr"] = 0.3
    outcome = trainer.fit()
    lines = [json.loads(line) for line in (tmp_path / "ppo" / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "score" in line]
    scores = [line["score"] for line in lines]
    assert [line["ratio_first"] for line in lines] == pytest.approx([1.0] * 6, abs=1e-4)
    assert sum(scores[-2:]) / 2 > scores[0] + 0.5
    gain = outcome["after"]["score"] - outcome["before"]["score"]
    assert gain > 0.5 and outcome["after"]["score_gain"] == pytest.approx(gain, abs=1e-5)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert len(trainer.engine.actor.gradients) == len(trainer.engine.critic.gradients) == 6 * 4 * 2


def test_evaluation_samples_every_row_anew_and_the_same_way_every_time(make_trainer):
    seen, scored = [], []

    def scorer(rollout, texts):
        seen.append((rollout.prompt_ids.tolist(), rollout.response_ids.tolist(), list(texts)))
        scored.extend(zip(texts, letter_score(rollout, texts).tolist(), strict=True))
        return letter_score(rollout, texts)

    trainer = make_trainer(scorer=scorer, plan=BatchPlan(8, 8, 1), eval_samples_per_prompt=5, new_tokens=12)
    first, second = trainer.evaluate(0), trainer.evaluate(3)
    assert first == second
    assert sum(len(texts) for _, _, texts in seen) == 2 * 3 * 5
    responses = [tuple(row) for _, rows, _ in seen[: len(seen) // 2] for row in rows if row[0] != EOS]
    assert len(set(responses)) == len(responses) > 10  # copies of a prompt draw from streams of their own
    assert [sample["id"] for sample in first["samples"]] == ["0", "1", "2"]
    assert (first["rows"], first["responses"]) == (3, 15)
    for index, prompt in enumerate(trainer.evaluated):
        own = [score for text, score in scored[: len(scored) // 2] if text == prompt.text]
        assert len(own) == 5 and first["prompt_scores"][index] == pytest.approx(sum(own) / 5)
    assert trainer.make_experience(1).scores.shape == (8,)


def test_two_iterations_of_eight_go_through_fourteen_prompts_before_one_comes_a_third_time(make_trainer):
    trainer = make_trainer(prompts=14, rollout=8)
    seen = []
    for iteration in (1, 2):
        rollout = trainer.make_experience(iteration).rollout
        seen += [tuple(ids[mask].tolist()) for ids, mask in zip(rollout.prompt_ids, rollout.prompt_mask, strict=True)]
    assert set(seen) == {row.input_ids for row in trainer.prompts.train} and max(map(seen.count, seen)) == 2


def test_metrics_of_an_iteration_are_token_means_over_all_of_its_minibatches(make_trainer):
    """With a learning rate of 0 nothing moves, so one minibatch of 8 and two of 4 measure the same."""
    found = []
    for size in (8, 4):
        trainer = make_trainer(plan=BatchPlan(size, 2, 1), rollout=8, new_tokens=20, actor_eos=1, ppo_epochs=2)
        for part in (trainer.engine.actor, trainer.engine.critic):
            part.optimizer.param_groups[0]["lr"] = 0.0
        found.append(trainer.update(trainer.make_experience(1), 1))
    for name in ("policy_loss", "value_loss", "value_clip_fraction", "ratio", "approx_kl", "ratio_first"):
        assert found[1][name] == pytest.approx(found[0][name], abs=1e-5), name
    assert found[0]["value_loss"] > 1e-3
