"""Each sickness provoked for real in a trainer on tiny models, and found; a healthy run raises nothing.

Models are random and train in plain torch (tests/support/local_engine.py): what is broken is named in each test.
"""

from __future__ import annotations

import json
import math
import random
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
import transformers
from safetensors.torch import load_file

import rlhf.algorithms.ppo as ppo
import rlhf.generation.actor_backend
from rlhf.algorithms.config import PPOBatchConfig, PPOConfig, RewardConfig, SFTConfig
from rlhf.algorithms.reward import RewardTrainer
from rlhf.algorithms.sft import SFTTrainer
from rlhf.checkpoint.atomic import write_json
from rlhf.checkpoint.export import export_scalar_model, full_state_dict
from rlhf.cli.__main__ import main
from rlhf.config import EngineConfig, OptimizerConfig
from rlhf.engine import BatchPlan, training_engine
from rlhf.models.scalar import ScalarModel
from rlhf.training.metrics import MeanMeter
from rlhf.training.nonfinite import NonFiniteError
from rlhf.training.scoring import response_logprobs
from rlhf.training.step import accumulate_step
from rlhf.types import TokenizedPrompt, TokenizedRanking, TokenizedResponse
from tests.support.launch import run_ranks
from tests.support.local_engine import LocalEngine, LocalModels
from tests.support.on_policy import FunctionReward, context, ppo_trainer, reward_of, stage_data
from tests.support.tiny_models import save_tiny_model

EOS = 1
"""What ends a response: a random model says it often enough."""


def load(path):
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def even_score(rollout, texts):
    """A reward that can be learnt and is not length: the share of even tokens."""
    even = (rollout.response_ids % 2 == 0) & rollout.response_mask
    return 4 * even.sum(1).float() / rollout.response_mask.sum(1).clamp(min=1) - 2


def length_score(rollout, texts):
    return 0.1 * rollout.response_mask.sum(1).float()


@pytest.fixture
def make_ppo(tiny_models, tokenizer, tmp_path):
    def make(*, actor=None, scorer=even_score, iterations=6, lr=0.02, seed=1, rollout=16, tokens=24,
             held_out=32, **config):  # fmt: skip
        plan = BatchPlan(rollout, rollout, 1)
        path = tiny_models["gpt_neox"]
        critic = ScalarModel.from_base(path, dtype=torch.float32, seed=1)
        actor = load(path) if actor is None else actor
        engine = LocalModels(actor, critic, load(actor.config._name_or_path or path), plan)
        engine.actor.module.generation_config.eos_token_id = EOS
        for part in (engine.actor, engine.critic):
            part.optimizer.param_groups[0]["lr"] = lr
        generator = torch.Generator().manual_seed(seed)
        prompts = [
            TokenizedPrompt(str(i), tuple(torch.randint(2, 90, (4,), generator=generator).tolist()), f"prompt {i}")
            for i in range(2 * rollout)
        ]
        return ppo_trainer(
            engine, FunctionReward(scorer), prompts, prompts[:held_out], tokenizer=tokenizer, plan=plan,
            directory=tmp_path / "ppo", new_tokens=tokens, seed=seed,
            config=PPOConfig(eval_samples_per_prompt=1, **config),
            batch=PPOBatchConfig(rollout_batch_size=rollout, max_steps=iterations),
        )  # fmt: skip

    return make


def found_in(trainer):
    """The findings of a run, which must be those of its files too."""
    summary = trainer.health.summary()
    found = {one["check"]: one for one in summary["findings"]}
    assert summary["healthy"] == (not found)
    assert main(["doctor", str(trainer.directory)]) == 3, "a trainer by itself leaves no result"
    write_json(trainer.directory / "result.json", {"health": summary})  # as a stage's main does
    assert main(["doctor", str(trainer.directory)]) == (1 if found else 0)
    path = trainer.directory / "health.jsonl"
    told = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    assert {event["check"] for event in told} == set(found)
    return found


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_healthy_run_raises_nothing(make_ppo, seed):
    trainer = make_ppo(seed=seed, iterations=8, temperature=0.9)
    trainer.fit()
    assert found_in(trainer) == {}


class DropoutOn(LocalModels):
    """Leaves the actor in training mode where its updates run."""

    @contextmanager
    def updating(self, engine):
        engine.train()
        yield
        engine.eval()


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_dropout_left_on(make_ppo, tokenizer, tmp_path, dropout):
    names = ("resid_pdrop", "embd_pdrop", "attn_pdrop")
    path = save_tiny_model(tmp_path / "actor", "gpt2", tokenizer, **dict.fromkeys(names, dropout))
    trainer = make_ppo(actor=load(path), iterations=1)
    trainer.engine.__class__ = DropoutOn
    trainer.fit()
    found = found_in(trainer)
    assert set(found) == ({"ratio_not_one"} if dropout else set())
    if dropout:
        assert found["ratio_not_one"]["since"] == 1 and found["ratio_not_one"]["severity"] == "critical"


def test_dropout_of_a_new_adapters_size_is_seen_in_float32_only_by_its_exactness(make_ppo, tokenizer, tmp_path):
    """Dropout too small for the limits of 16 bits: a run whose sampling is exact has tighter ones."""
    path = save_tiny_model(tmp_path / "actor", "gpt2", tokenizer, resid_pdrop=0.0, embd_pdrop=2e-3, attn_pdrop=0.0)
    trainer = make_ppo(actor=load(path), iterations=1, rollout=32)
    trainer.engine.__class__ = DropoutOn
    trainer.fit()
    assert set(found_in(trainer)) == {"ratio_not_one"}
    line = json.loads((trainer.directory / "metrics.jsonl").read_text().splitlines()[1])
    assert line["log_ratio_first_mean"] < 0.05 and abs(line["ratio_first"] - 1) < 0.02


def test_sampled_at_another_temperature_than_scored(make_ppo, monkeypatch):
    original = rlhf.generation.actor_backend.generate

    def colder(actor, prompts, sampling, **options):
        return original(actor, prompts, replace(sampling, temperature=0.7), **options)

    monkeypatch.setattr(rlhf.generation.actor_backend, "generate", colder)
    trainer = make_ppo(iterations=1)
    trainer.fit()
    assert set(found_in(trainer)) == {"sampling_mismatch"}


def test_updated_at_another_temperature_than_scored(make_ppo, monkeypatch):
    def colder(model, rollout, sampling):
        return response_logprobs(model, rollout, replace(sampling, temperature=0.9))

    monkeypatch.setattr(ppo, "response_logprobs", colder)
    trainer = make_ppo(iterations=1)
    trainer.fit()
    assert "ratio_not_one" in found_in(trainer)


def test_labels_shifted_by_one(make_ppo, monkeypatch):
    def shifted(model, rollout, sampling):
        return response_logprobs(model, rollout, sampling).roll(1, dims=1)

    monkeypatch.setattr(ppo, "response_logprobs", shifted)
    trainer = make_ppo(iterations=1)
    trainer.fit()
    assert "ratio_not_one" in found_in(trainer)
    line = json.loads((trainer.directory / "metrics.jsonl").read_text().splitlines()[1])
    assert line["log_ratio_first_max"] > 1


def test_a_huge_learning_rate(make_ppo):
    trainer = make_ppo(iterations=5, kl_coef=0.0)
    trainer.engine.actor.optimizer.param_groups[0]["lr"] = 50.0
    trainer.fit()
    found = found_in(trainer)
    assert {"kl_explodes", "repetition"} <= set(found)  # it says one thing again and again
    assert min(found[name]["since"] for name in found) > 1


def test_a_reference_at_another_temperature_makes_the_kl_negative(make_ppo, monkeypatch):
    """Sampled cold, the actor scored warm and the reference cold: the reference likes these tokens better."""
    original = rlhf.generation.actor_backend.generate

    def colder(actor, prompts, sampling, **options):
        return original(actor, prompts, replace(sampling, temperature=0.7), **options)

    monkeypatch.setattr(rlhf.generation.actor_backend, "generate", colder)
    trainer = make_ppo(iterations=4, lr=1e-4, rollout=32)
    reference = trainer.engine.reference
    plain = trainer.rollouts.sampling
    trainer.rollouts._logprobs = lambda model, part: response_logprobs(
        model, part, replace(plain, temperature=0.7) if model is reference else plain
    )
    trainer.fit()
    assert "kl_negative" in found_in(trainer)


def test_a_reward_of_length_only(make_ppo):
    trainer = make_ppo(iterations=5, scorer=length_score)
    trainer.fit()
    found = found_in(trainer)
    assert "score_is_length" in found and "length_exploited" not in found


def test_a_learning_rate_of_0(make_ppo):
    trainer = make_ppo(iterations=3, lr=0.0)
    trainer.fit()
    assert {"learning_rate_zero"} == set(found_in(trainer))


def test_a_learning_rate_that_moves_nothing(make_ppo):
    trainer = make_ppo(iterations=9, lr=1e-12)
    trainer.fit()
    assert {"kl_dead"} == set(found_in(trainer))


def test_constant_advantages(make_ppo):
    """No response is better than another, no KL penalty, and a value function that says 0."""
    trainer = make_ppo(iterations=3, scorer=lambda rollout, texts: torch.zeros(len(rollout)), kl_coef=0.0)
    with torch.no_grad():
        trainer.engine.critic.module.scalar_head.weight.zero_()
    trainer.fit()
    assert {"advantages_equal", "scores_alike"} == set(found_in(trainer))


def test_an_actor_that_has_one_answer(make_ppo):
    """Its logits grow tenfold in the middle of the run."""
    trainer = make_ppo(iterations=7, lr=1e-4)
    original = trainer.make_experience

    def make_experience(iteration):
        if iteration == 4:
            with torch.no_grad():
                trainer.engine.actor.module.get_output_embeddings().weight.mul_(10)
        return original(iteration)

    trainer.make_experience = make_experience
    trainer.fit()
    found = found_in(trainer)
    assert {"entropy_collapse", "kl_explodes"} <= set(found)
    assert found["entropy_collapse"]["since"] == 4


def test_scores_the_reward_model_never_gave(make_ppo):
    trainer = make_ppo(iterations=3)
    trainer.rollouts.reward.training_range = {"minimum": -5.0, "maximum": -1.0}
    trainer.fit()
    assert set(found_in(trainer)) == {"score_out_of_range"}


# ------------------------------------------------------------------------------------------- not finite


def test_scores_that_are_not_finite_stop_the_run_and_name_row_and_prompt(make_ppo):
    def scorer(rollout, texts):
        scores = even_score(rollout, texts)
        scores[[text == "prompt 5" for text in texts]] = math.nan
        return scores

    trainer = make_ppo(scorer=scorer, iterations=2)  # two iterations see all 32 prompts
    with pytest.raises(NonFiniteError, match="engine reward: scores.*1 of 16 rows, first row.*'5'.*prompt 5") as error:
        trainer.fit()
    kept = load_file(trainer.directory / "nonfinite_batch_rank0.safetensors")
    assert kept["0.prompt_ids"][0].tolist() == list(trainer.prompts.train[5].input_ids)
    assert str(trainer.directory / "nonfinite_batch_rank0.safetensors") in str(error.value)
    assert main(["doctor", str(trainer.directory)]) == 3


@pytest.mark.parametrize("engine_name", ["actor", "critic"])
def test_a_weight_that_is_not_finite_stops_an_update_and_names_engine_and_weight(make_ppo, engine_name):
    trainer = make_ppo()
    experience = trainer.make_experience(1)
    engine = getattr(trainer.engine, engine_name)
    name, weight = list(engine.module.named_parameters())[3]
    with torch.no_grad():
        weight.view(-1)[0] = math.inf
    before = {key: value.clone() for key, value in engine.module.state_dict().items()}
    with pytest.raises(NonFiniteError, match=rf"engine {engine_name}: .* loss is not finite at step 1.*{name}"):
        trainer.update(experience, 1)
    assert all(torch.equal(value, before[key]) for key, value in engine.module.state_dict().items())
    kept = load_file(trainer.directory / "nonfinite_batch_rank0.safetensors")
    assert kept["0.rollout.response_ids"].shape == experience.rollout.response_ids.shape


def response(*ids):
    return TokenizedResponse(id=str(ids), input_ids=ids, prompt_tokens=1)


def sft_trainer(path, tmp_path, *, lr=0.05, steps=6, held_out=32):
    plan = BatchPlan(4, 2, 1)
    rows = [response(5 + i, 7, 9 + i, 11, 0) for i in range(8)]
    return SFTTrainer(
        LocalEngine(load(path), plan, lr=lr), stage_data(rows, (4 * rows)[:held_out]), SFTConfig(), pad_token_id=0,
        plan=plan,
        total_steps=steps, export=lambda: None, context=context(tmp_path / "sft", "sft", log_every_steps=1),
    )  # fmt: skip


def test_a_nan_loss_stops_sft_before_a_weight_changes(tiny_models, tmp_path):
    trainer = sft_trainer(tiny_models["gpt2"], tmp_path)
    original, calls = trainer.loss_sum, []

    def loss_sum(batch):
        if torch.is_grad_enabled():  # not an evaluation
            calls.append(batch)
        return original(batch) * (math.nan if len(calls) == 6 and torch.is_grad_enabled() else 1.0)

    trainer.loss_sum = loss_sum
    with pytest.raises(NonFiniteError, match=r"sft loss is not finite at step \d.*first in micro-batch \d of 2"):
        trainer.fit()
    assert all(bool(weight.isfinite().all()) for weight in trainer.engine.module.parameters())


def test_a_gradient_that_is_not_finite_under_a_finite_loss_names_the_parameter(tiny_models, tmp_path):
    engine = LocalEngine(load(tiny_models["gpt2"]), BatchPlan(4, 2, 1))
    name, weight = list(engine.module.named_parameters())[5]
    weight.register_hook(lambda gradient: gradient * math.inf)
    before = weight.clone()
    ids = torch.tensor([[5, 6, 7]])
    with pytest.raises(NonFiniteError, match=rf"engine sft: the gradient of loss is not finite at step 3 .*{name}"):
        accumulate_step(
            engine, [ids], count=lambda batch: 1.0, loss_sum=lambda batch: engine(batch).logits.square().sum(), step=3,
            engine_name="sft", directory=tmp_path,
        )  # fmt: skip
    assert torch.equal(weight, before) and engine.gradients == []
    assert torch.equal(load_file(tmp_path / "nonfinite_batch_rank0.safetensors")["0"], ids)
    told = json.loads((tmp_path / "health.jsonl").read_text())
    assert told["event"] == "stopped" and told["check"] == "not_finite" and name in told["message"]


@pytest.mark.parametrize(("zero_stage", "precision"), [(0, "fp32"), (1, "fp32"), (2, "bf16"), (3, "fp32"), (0, "bf16")])
def test_a_real_engine_stops_before_a_weight_changes_and_names_the_parameter(tmp_path, zero_stage, precision):
    """DeepSpeed leaves such a step out, or in float32 without ZeRO would take it: the run stops either way."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 1))
    model[1].weight.register_hook(lambda gradient: gradient * trouble)
    plan = BatchPlan(2, 1, 1)
    settings = EngineConfig(zero_stage=zero_stage, precision=precision)
    engine = training_engine(
        model, engine=settings, optimizer=OptimizerConfig(learning_rate=1e-2), plan=plan, total_steps=4
    )
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    batches = [torch.ones(1, 4, dtype=dtype), 2 * torch.ones(1, 4, dtype=dtype)]

    def step(number):
        meter = MeanMeter()
        loss = accumulate_step(
            engine, batches, count=len, loss_sum=lambda batch: engine(batch).float().square().sum(), step=number,
            engine_name="sft", directory=tmp_path, meter=meter,
        )  # fmt: skip
        return loss, meter.means()

    trouble = 1.0
    first, metrics = step(1)
    norm = metrics["gradient_norm"]
    assert 0 < norm < math.inf
    before = full_state_dict(engine)
    trouble = math.nan
    with pytest.raises(NonFiniteError, match=r"engine sft: the gradient of loss is not finite at step 2 .*1\.weight"):
        step(2)
    assert all(torch.equal(value, before[name]) for name, value in full_state_dict(engine).items())
    assert load_file(tmp_path / "nonfinite_batch_rank0.safetensors").keys() == {"0", "1"}


def test_in_fp16_an_overflow_is_deepspeeds_to_handle(tiny_models):
    """A step left out while the loss scale is searched for: no error, and no norm, which would not be finite."""

    class Overflows(LocalEngine):
        def fp16_enabled(self):
            return True

        def step(self):
            self.optimizer.overflow = True
            self.optimizer.zero_grad()

    engine = Overflows(load(tiny_models["gpt2"]), BatchPlan(4, 2, 1))
    next(iter(engine.module.parameters())).register_hook(lambda gradient: gradient * math.inf)
    meter, ids = MeanMeter(), torch.tensor([[5, 6, 7]])
    options = {"count": len, "step": 1, "meter": meter}
    loss = accumulate_step(engine, [ids], loss_sum=lambda batch: engine(batch).logits.square().sum(), **options)
    assert math.isfinite(loss) and meter.means() == {}
    with pytest.raises(NonFiniteError, match="loss is not finite"):
        accumulate_step(engine, [ids], loss_sum=lambda batch: engine(batch).logits.sum() * math.nan, **options)


ONE_BAD_RANK = """
import sys
import torch
from pathlib import Path
from rlhf.config import EngineConfig, OptimizerConfig
from rlhf.distributed.place import rank
from rlhf.engine import BatchPlan, training_engine
from rlhf.training.nonfinite import NonFiniteError
from rlhf.training.step import accumulate_step

directory = Path(sys.argv[-1])
engine = training_engine(
    torch.nn.Linear(4, 1), engine=EngineConfig(precision="fp32"), optimizer=OptimizerConfig(), plan=BatchPlan(2, 1, 2),
    total_steps=2,
)
batch = torch.full((1, 4), float("nan") if rank() == 1 else 1.0)
try:
    accumulate_step(engine, [batch], count=len, loss_sum=lambda part: engine(part).sum(), step=3, engine_name="actor",
                    directory=directory)
except NonFiniteError as error:
    (directory / f"rank{rank()}.txt").write_text(str(error))
"""


def test_a_loss_that_is_not_finite_on_one_rank_stops_both_and_names_it(tmp_path):
    done = run_ranks(ONE_BAD_RANK, 2, tmp_path, [tmp_path])
    assert done.returncode == 0, done.stdout[-2000:]
    for rank in (0, 1):
        error = (tmp_path / f"rank{rank}.txt").read_text()
        assert "engine actor: loss is not finite at step 3 (its part of rank 1: nan" in error
    assert load_file(tmp_path / "nonfinite_batch_rank1.safetensors")["0"].isnan().all()
    assert len((tmp_path / "health.jsonl").read_text().splitlines()) == 1


# ------------------------------------------------------------------------------------- the other trainers


def test_a_healthy_sft_run_raises_nothing(tiny_models, tmp_path):
    trainer = sft_trainer(tiny_models["gpt2"], tmp_path, steps=12)
    trainer.fit()
    assert found_in(trainer) == {}


def test_sft_at_a_huge_learning_rate(tiny_models, tmp_path):
    trainer = sft_trainer(tiny_models["gpt2"], tmp_path, lr=2.0, steps=10)
    trainer.fit()
    assert "loss_diverges" in found_in(trainer)


def test_sft_at_a_learning_rate_of_0(tiny_models, tmp_path):
    trainer = sft_trainer(tiny_models["gpt2"], tmp_path, lr=0.0)
    trainer.fit()
    assert set(found_in(trainer)) == {"learning_rate_zero"}


def pair(first, chosen, rejected):
    """One pair of responses to the prompt `first`."""
    rows = tuple(response(first, *ids) for ids in (chosen, rejected))
    return TokenizedRanking(id=str(first), candidates=rows, ranks=(0, 1))


DISTINCT = [
    pair(5 + i, chosen, rejected)
    for i in range(36)
    for chosen, rejected in [[((7, 0), (8, 9, 0)), ((7, 9, 0), (8, 0))][i % 2]]
]
"""Pairs of 36 prompts that a model tells apart at once; every second time the better response is the longer one."""


def reward_trainer(model, tmp_path, *, steps, rows=DISTINCT, held_out=DISTINCT, lr=0.05):
    plan = BatchPlan(4, 4, 1)
    return RewardTrainer(
        LocalEngine(model, plan, lr=lr), stage_data(rows, held_out), RewardConfig(), pad_token_id=0, plan=plan,
        total_steps=steps, export=lambda: None, context=context(tmp_path / "reward", "reward", log_every_steps=1),
    )  # fmt: skip


def test_a_saturated_reward_model_and_a_healthy_one(tiny_models, tmp_path):
    """What is right by a margin of 4 is so by 80 under a head 20 times as large: a loss of 0 that says nothing."""
    model = ScalarModel.from_base(tiny_models["gpt2"], dtype=torch.float32, seed=4).eval()
    healthy = reward_trainer(model, tmp_path / "healthy", steps=12)
    healthy.fit()
    assert found_in(healthy) == {}
    with torch.no_grad():
        model.scalar_head.weight.mul_(20)
    saturated = reward_trainer(model, tmp_path / "saturated", steps=4)
    saturated.fit()
    assert set(found_in(saturated)) == {"reward_model_saturated"}


def test_a_reward_model_that_says_the_same_of_everything(tiny_models, tmp_path):
    model = ScalarModel.from_base(tiny_models["gpt2"], dtype=torch.float32, seed=4).eval()
    with torch.no_grad():
        model.scalar_head.weight.zero_()
    model.scalar_head.weight.requires_grad_(False)
    trainer = reward_trainer(model, tmp_path, steps=3)
    trainer.fit()
    assert set(found_in(trainer)) == {"reward_model_blind", "reward_model_at_chance"}  # a tie is right by half


def by_length(count, seed):
    """Pairs of random tokens whose better response is the longer one, nine times in ten."""
    draw = random.Random(seed)
    rows = []
    for number in range(count):
        short, long = ([draw.randrange(10, 90) for _ in range(length)] for length in (2, 12))
        better, worse = (long, short) if number % 10 else (short, long)
        rows.append(pair(draw.randrange(2, 90), better, worse))
    return rows


def test_a_reward_model_that_learns_length(tiny_models, tmp_path):
    model = ScalarModel.from_base(tiny_models["gpt2"], dtype=torch.float32, seed=4).eval()
    rows, held_out = by_length(80, seed=1), by_length(60, seed=2)
    trainer = reward_trainer(model, tmp_path, steps=40, rows=rows, held_out=held_out)
    trainer.fit()
    assert trainer.outcome["after"]["eval_accuracy"] > 0.8
    found = found_in(trainer)
    assert set(found) == {"reward_model_is_shortcut"}
    assert "choosing the longer response 0.900" in found["reward_model_is_shortcut"]["message"]


def test_a_reward_model_on_two_held_out_pairs(tiny_models, tmp_path):
    model = ScalarModel.from_base(tiny_models["gpt2"], dtype=torch.float32, seed=4).eval()
    trainer = reward_trainer(model, tmp_path, steps=12, held_out=DISTINCT[:2])
    trainer.fit()
    assert trainer.outcome["after"]["eval_accuracy"] == 1.0
    assert set(found_in(trainer)) == {"too_few_held_out"}


def test_a_reward_model_of_labels_that_say_nothing(tiny_models, tmp_path):
    model = ScalarModel.from_base(tiny_models["gpt2"], dtype=torch.float32, seed=4).eval()
    rows = [
        pair(
            row.candidates[0].input_ids[0],
            *(each.input_ids[1:] for each in row.candidates[:: 1 - 2 * (number // 2 % 2)]),
        )
        for number, row in enumerate(DISTINCT)
    ]
    trainer = reward_trainer(model, tmp_path, steps=4, rows=rows, held_out=rows)
    trainer.fit()
    assert set(found_in(trainer)) == {"reward_model_at_chance"}


def test_an_actor_that_is_taught_the_opposite(make_ppo):
    """What is held out is scored by the opposite of what is trained on: its score falls."""
    trainer = make_ppo(iterations=8, rollout=32, kl_coef=0.0)
    trainer.engine.actor.optimizer.param_groups[0]["lr"] = 1.0
    plain, evaluate = trainer.rollouts.reward.function, trainer.evaluate

    def evaluated(iteration):
        trainer.rollouts.reward.function = lambda rollout, texts: -plain(rollout, texts)
        try:
            return evaluate(iteration)
        finally:
            trainer.rollouts.reward.function = plain

    trainer.evaluate = evaluated
    outcome = trainer.fit()
    assert outcome["after"]["score"] < outcome["before"]["score"]
    found = found_in(trainer)
    assert set(found) == {"score_below_start"}
    assert "SD of the first scores" in found["score_below_start"]["message"]


def test_nothing_held_out(make_ppo, tiny_models, tmp_path):
    for trainer in (
        make_ppo(iterations=1, held_out=0),
        sft_trainer(tiny_models["gpt2"], tmp_path, steps=2, held_out=0),
    ):
        trainer.fit()
        assert set(found_in(trainer)) == {"too_few_held_out"}


def test_a_reward_model_keeps_the_range_of_its_scores_and_a_critic_from_it_does_not(tiny_models, tokenizer, tmp_path):
    untrained = ScalarModel.from_base(tiny_models["gpt2"], dtype=torch.float32, seed=4).eval()
    trainer = reward_trainer(untrained, tmp_path, steps=4)
    trainer.fit()
    mean, std = trainer.calibrate()
    model = trainer.engine.module
    model.set_normalisation(mean, std)
    export_scalar_model(trainer.engine, tokenizer, tmp_path / "model")
    loaded = ScalarModel.from_pretrained(tmp_path / "model", dtype=torch.float32)
    known = reward_of(loaded, tokenizer).training_range
    rows = [candidate.input_ids for example in trainer.train for candidate in example.candidates]
    with torch.no_grad():
        scores = [float(loaded(ids, torch.ones_like(ids))[0, -1]) for row in rows
                  for ids in [torch.tensor([row])]]  # fmt: skip
    assert known["responses"] == len(rows)
    assert known["minimum"] == pytest.approx(min(scores), abs=1e-3)
    assert known["maximum"] == pytest.approx(max(scores), abs=1e-3)
    assert known["quantiles"]["0.5"] in [pytest.approx(score, abs=1e-3) for score in scores]
    export_scalar_model(loaded, tokenizer, tmp_path / "critic")
    assert ScalarModel.from_pretrained(tmp_path / "critic", dtype=torch.float32).score_range is None
