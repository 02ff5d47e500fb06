"""The loops: data order, gradient accumulation, evaluation, and what is kept."""

from __future__ import annotations

import dataclasses
import json
import math
import time

import pytest
import torch
import transformers
from safetensors.torch import load_file

import rlhf.training.data_order
import rlhf.training.metrics
import rlhf.training.offline
from rlhf.algorithms.config import RewardConfig, SFTConfig
from rlhf.algorithms.reward import RewardTrainer
from rlhf.algorithms.sft import SFTTrainer
from rlhf.config import BatchConfig
from rlhf.engine import BatchPlan
from rlhf.models.scalar import ScalarModel
from rlhf.training.data_order import DataOrder, planned_steps
from rlhf.training.nonfinite import NonFiniteError
from rlhf.training.step import accumulate_step, learning_rate
from rlhf.types import TokenizedRanking, TokenizedResponse
from tests.support.local_engine import LocalEngine
from tests.support.on_policy import context, stage_data


def on_rank(monkeypatch, rank, world):
    for module in (rlhf.training.data_order, rlhf.training.offline):
        monkeypatch.setattr(module, "rank", lambda: rank)


# --------------------------------------------------------------------------------------------------- order


def test_every_example_comes_once_per_epoch_and_no_batch_is_partial():
    order = DataOrder([1] * 10, BatchPlan(4, 2, 1), seed=3)
    stream = [index for step in range(10) for index in order.indices(step)]  # 40 positions: 4 epochs, 10 batches
    assert all(len(order.indices(step)) == 4 for step in range(10))
    assert all(stream.count(index) == 4 for index in range(10))
    # the third batch holds the last two of the first epoch and the first two of the second
    first_epoch = [*order.indices(0), *order.indices(1)]
    assert set(range(10)) - set(first_epoch) <= set(order.indices(2))


def test_epochs_and_seeds_shuffle_differently_and_a_step_can_be_asked_for_in_any_order():
    order = DataOrder([1] * 64, BatchPlan(8, 8, 1), seed=1)
    first = [order.indices(step) for step in range(8)]
    second = [order.indices(step) for step in range(8, 16)]
    assert first != second and first != sorted(first)
    assert [order.indices(step) for step in range(8)] == first  # going back: resuming must find the same batches
    assert [DataOrder([1] * 64, BatchPlan(8, 8, 1), seed=2).indices(step) for step in range(8)] != first


def test_steps_of_whole_and_broken_epochs():
    def steps(examples, epochs, size, max_steps=0):
        return planned_steps(examples, BatchConfig(epochs=epochs, max_steps=max_steps), size)

    assert [steps(10, epochs, 4) for epochs in (0.1, 0.4, 1.0, 2.0, 3.0)] == [1, 1, 3, 5, 8]
    assert steps(10, 0.1 + 0.2, 10) == 1  # 0.30000000000000004 * 10 is 3 examples
    assert steps(100, 1.1, 10) == 11  # 1.1 * 100 is above 110 in floating point
    assert steps(10, 1.0, 4, max_steps=7) == 7


def test_no_example_is_an_error():
    with pytest.raises(ValueError, match="the data set is empty"):
        DataOrder([], BatchPlan(4, 4, 1), seed=0)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_the_ranks_micro_batches_are_a_partition_of_the_global_batch(monkeypatch, world):
    lengths = torch.randint(1, 50, (37,), generator=torch.Generator().manual_seed(0)).tolist()
    plan = BatchPlan(16, 2, world)
    for step in range(4):
        whole = DataOrder(lengths, plan, seed=5).indices(step)
        assert whole == DataOrder(lengths, BatchPlan(16, 2, 1), seed=5).indices(step)
        seen, counts = [], set()
        for rank in range(world):
            on_rank(monkeypatch, rank, world)
            parts = DataOrder(lengths, plan, seed=5).micro_batches(step)
            budget = 2 * max(lengths[index] for index in whole)
            assert len(parts) <= plan.accumulation_steps
            assert all(sum(lengths[index] for index in part) <= budget for part in parts)
            counts.add(len(parts))
            seen += [index for part in parts for index in part]
        assert sorted(seen) == sorted(whole)
        assert len(counts) == 1  # collectives: every rank has as many forward passes


def test_micro_batches_hold_rows_of_like_length(monkeypatch):
    on_rank(monkeypatch, 0, 1)
    lengths = list(range(1, 17))  # 136 tokens; four rows of the longest are 64
    parts = DataOrder(lengths, BatchPlan(16, 4, 1), seed=0).micro_batches(0)
    assert [[lengths[index] for index in part] for part in parts] == [
        [16, 15, 14], [13, 12, 11, 10], [9, 8, 7, 6, 5, 4, 3, 2, 1],
    ]  # fmt: skip
    parts = DataOrder(lengths, BatchPlan(16, 4, 1, micro_batch_tokens=100), seed=0).micro_batches(0)
    assert [sum(lengths[index] for index in part) for part in parts] == [70, 66]


# ----------------------------------------------------------------------------------------------- one step


class Line(torch.nn.Module):
    """y = w x, with the loss of a micro-batch the sum of y."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(2.0))


def take_step(parts, plan, *, name="loss"):
    line = LocalEngine(Line(), plan, lr=0.5)
    loss = accumulate_step(
        line,
        [torch.tensor(part) for part in parts],
        count=lambda batch: float(batch.numel()),
        loss_sum=lambda batch: (line.module.weight * batch).sum(),
        step=7,
        name=name,
    )
    return loss, line


def test_the_loss_and_the_gradient_are_the_mean_over_the_global_batch_not_the_mean_of_means():
    loss, line = take_step([[1.0, 2.0, 3.0], [10.0]], BatchPlan(2, 1, 1))
    assert loss == pytest.approx(2.0 * 16 / 4)
    assert len(line.gradients) == 1
    assert line.gradients[0]["weight"].item() == pytest.approx(16 / 4)  # the mean of means would be (2 + 10) / 2
    assert line.module.weight.item() == pytest.approx(2.0 - 0.5 * 4)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_stops_the_run_before_the_update(bad):
    plan = BatchPlan(2, 1, 1)
    line = LocalEngine(Line(), plan)
    with pytest.raises(
        NonFiniteError,
        match=rf"value loss is not finite at step 7 \(its part of rank 0: {bad}; first in micro-batch 2 of 2 on rank 0",
    ):
        accumulate_step(
            line,
            [torch.tensor([1.0]), torch.tensor([bad])],
            count=lambda batch: 1.0,
            loss_sum=lambda batch: (line.module.weight * batch).sum(),
            step=7,
            name="value loss",
        )
    assert line.gradients == [] and line.module.weight.item() == 2.0


def test_the_batch_whose_loss_is_not_finite_is_kept_and_the_doctor_told(tiny_models, tmp_path):
    rows = sft_rows(4)
    trainer = sft_trainer(tiny_models["gpt2"], tmp_path, rows, [], micro=4, max_steps=1)
    next(trainer.engine.module.parameters()).data.fill_(math.nan)
    path = tmp_path / "nonfinite_batch_rank0.safetensors"
    with pytest.raises(NonFiniteError, match=rf"sft loss is not finite at step 1 .*the batch is in {path}"):
        trainer.fit()
    kept = [row for name, tensor in load_file(path).items() if name.endswith("input_ids") for row in tensor.tolist()]
    # without the padding, which is the token that ends a response too
    kept = [row[: 1 + max(index for index, token in enumerate(row) if token)] for row in kept]
    assert sorted(kept) == sorted(list(row.input_ids[:-1]) for row in rows)
    stop = json.loads((tmp_path / "health.jsonl").read_text().splitlines()[-1])
    assert (stop["event"], stop["check"], stop["at"]) == ("stopped", "not_finite", 1)


@pytest.mark.parametrize("bad", [None, "weight"])
def test_the_error_of_a_loss_says_whether_a_weight_is_to_blame(bad):
    plan = BatchPlan(1, 1, 1)
    model = torch.nn.ModuleDict({"first": Line(), "second": Line()})
    if bad:
        model["second"].weight.data.fill_(math.nan)
    with pytest.raises(
        NonFiniteError,
        match="the weight second.weight is not finite already" if bad else "all weights are finite",
    ):
        accumulate_step(
            LocalEngine(model, plan),
            [torch.tensor(1.0 if bad else math.inf)],
            count=lambda batch: 1.0,
            loss_sum=lambda batch: (model["first"].weight * model["second"].weight * batch).sum(),
            step=7,
        )


def test_a_batch_in_which_nothing_counts_is_an_error():
    with pytest.raises(ValueError, match="step 7: no element of the batch counts for policy loss"):
        take_step([[], []], BatchPlan(2, 1, 1), name="policy loss")


# ----------------------------------------------------------------------------------------------------- SFT


def response(ids, prompt_tokens=1):
    return TokenizedResponse(id=str(ids), input_ids=tuple(ids), prompt_tokens=prompt_tokens)


def sft_rows(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 9, (count,), generator=generator).tolist()
    return [response([*torch.randint(1, 90, (n - 1,), generator=generator).tolist(), 0], 2) for n in lengths]


def sft_trainer(path, tmp_path, train, evaluation, *, micro=2, lr=0.05, exported=None, loss_on="response", **batch):
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    plan = BatchPlan(4, micro, 1)
    eval_every_steps = batch.pop("eval_every_steps", 0)
    return SFTTrainer(
        LocalEngine(model, plan, lr=lr),
        stage_data(train, evaluation),
        SFTConfig(loss_on=loss_on, eval_every_steps=eval_every_steps),
        pad_token_id=0,
        plan=plan,
        total_steps=planned_steps(len(train), BatchConfig(**batch), plan.global_batch_size),
        export=(lambda: exported.append(True)) if exported is not None else (lambda: None),
        context=context(tmp_path, "sft", log_every_steps=1),
    )


def mean_loss(model, rows, *, from_prompt=False):
    """Nats per label, row by row without padding."""
    total, count = 0.0, 0
    with torch.no_grad():
        for row in rows:
            logprobs = model(torch.tensor([row.input_ids])).logits[0].double().log_softmax(-1)
            for t in range(1 if from_prompt else row.prompt_tokens, len(row.input_ids)):
                total -= logprobs[t - 1, row.input_ids[t]].item()
                count += 1
    return total / count


@pytest.mark.parametrize("micro", [1, 2, 4])
def test_sft_evaluation_is_the_mean_over_tokens_for_every_batch_size(tiny_models, tmp_path, micro):
    rows = sft_rows(7)
    trainer = sft_trainer(tiny_models["gpt2"], tmp_path, rows, rows, micro=micro, max_steps=1)
    found = trainer.evaluate()
    expected = mean_loss(trainer.engine.module, rows)
    assert found["eval_loss"] == pytest.approx(expected, rel=1e-5)
    assert found["eval_perplexity"] == pytest.approx(math.exp(expected), rel=1e-4)


@pytest.mark.parametrize(("world", "count", "fill"), [(2, 7, 0), (2, 1, 1), (4, 3, 1)])
def test_sft_evaluation_over_ranks_counts_no_row_twice(tiny_models, tmp_path, monkeypatch, world, count, fill):
    """With fewer rows than ranks the last of them fills up, and is in the mean once."""
    rows, packed, filling = sft_rows(count), [], 0
    monkeypatch.setattr(rlhf.training.metrics, "all_reduce_sum", lambda tensor: packed.append(tensor.clone()) or tensor)
    for rank in range(world):
        on_rank(monkeypatch, rank, world)
        trainer = sft_trainer(tiny_models["gpt2"], tmp_path, rows, rows, max_steps=1)
        trainer.plan = BatchPlan(2 * world, 2, world)
        filling += [counted for _, counted in trainer.evaluation_batches()].count(0)
        trainer.evaluate()
    assert filling == fill
    total, tokens = sum(packed)[0].tolist()  # the sum and the count that each rank hands to the reduction
    assert tokens == sum(len(row.input_ids) - row.prompt_tokens for row in rows)
    assert total / tokens == pytest.approx(mean_loss(trainer.engine.module, rows), rel=1e-5)


def test_sft_on_the_whole_text_counts_the_prompt_too(tiny_models, tmp_path):
    rows = sft_rows(5)
    trainer = sft_trainer(tiny_models["gpt_neox"], tmp_path, rows, rows, loss_on="whole_text", max_steps=1)
    expected = mean_loss(trainer.engine.module, rows, from_prompt=True)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)
    assert abs(expected - mean_loss(trainer.engine.module, rows)) > 1e-2


def test_sft_learns_logs_and_keeps_the_best_model(tiny_models, tmp_path):
    rows, exported = sft_rows(8), []
    trainer = sft_trainer(
        tiny_models["gpt_neox"], tmp_path, rows, rows, exported=exported, epochs=3.0, eval_every_steps=2
    )
    before = mean_loss(trainer.engine.module, rows)
    outcome = trainer.fit()
    assert trainer.total_steps == 6
    assert outcome["before"]["eval_loss"] == pytest.approx(before, rel=1e-5)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    evaluations = [(line["step"], line["eval_loss"]) for line in lines if "eval_loss" in line]
    assert [step for step, _ in evaluations] == [0, 2, 4, 6]
    assert {line["eval_rows"] for line in lines if "eval_loss" in line} == {8.0}
    progress = [(line["step"], line["eval_progress"]) for line in lines if "eval_loss" in line]
    assert progress == [(step, step / progress[-1][0]) for step, _ in progress], "0 at the start, 1 at the end"
    best_step, best = min(evaluations[1:], key=lambda item: item[1])
    assert outcome["after"]["eval_loss"] == best < before
    assert outcome["best_step"] == best_step and 1 <= len(exported) <= 3
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6]
    assert outcome["after"]["eval_loss"] == pytest.approx(mean_loss(trainer.engine.module, rows), rel=1e-5)


def test_a_line_has_the_means_of_the_steps_since_the_last_one(tiny_models, tmp_path):
    """Every second of five steps, and after the last."""
    every, found = {}, {}
    for log_every_steps, lines in ((1, every), (2, found)):
        directory = tmp_path / str(log_every_steps)
        trainer = sft_trainer(tiny_models["gpt2"], directory, sft_rows(8), [], max_steps=5)
        trainer.run.log_every_steps = log_every_steps
        trainer.fit()
        for line in map(json.loads, (directory / "metrics.jsonl").read_text().splitlines()):
            lines[line["step"]] = line
    assert list(found) == [0, 2, 4, 5]
    assert set(found[2]) == {"step", "seconds", "loss", "learning_rate", "gradient_norm"}
    assert found[2]["learning_rate"] == pytest.approx(0.05)
    for last, steps in ((2, (1, 2)), (4, (3, 4)), (5, (5,))):
        for name in ("loss", "gradient_norm"):
            assert found[last][name] == pytest.approx(sum(every[step][name] for step in steps) / len(steps))


def test_a_model_that_gets_worse_is_not_the_one_that_is_kept(tiny_models, tmp_path):
    rows, exported = sft_rows(8), []
    trainer = sft_trainer(tiny_models["gpt2"], tmp_path, rows, rows, lr=0.0, max_steps=3, eval_every_steps=1)
    losses = iter([5.0, 3.0, 1.0, 2.0])
    trainer.evaluate = lambda: {"eval_loss": next(losses)}
    trainer.export = lambda: exported.append(trainer.engine.gradients.__len__())
    outcome = trainer.fit()
    assert exported == [1, 2]  # after the first and the second step, not after the third
    assert outcome["best_step"] == 2 and outcome["after"] == {"eval_loss": 1.0}


@pytest.mark.parametrize(("full_at", "best_step"), [((1, 2), 3), ((2,), 3), ((3,), None)])
def test_a_model_that_could_not_be_written_is_not_the_best_one(tiny_models, tmp_path, full_at, best_step):
    """The last evaluation is better than the first, which counts where the second could not be written. A full disk
    ends a run at its last step alone."""
    rows, tried = sft_rows(8), []
    trainer = sft_trainer(tiny_models["gpt2"], tmp_path, rows, rows, lr=0.0, max_steps=3, eval_every_steps=1)
    losses = iter([5.0, 4.0, 3.0, 3.5 if full_at == (2,) else 2.0])
    trainer.evaluate = lambda: {"eval_loss": next(losses)}

    def export():
        tried.append(len(trainer.engine.gradients))
        if tried[-1] in full_at:
            raise OSError(28, "no space left on device")

    trainer.export = export
    if best_step is None:
        with pytest.raises(OSError, match="no space left"):
            trainer.fit()
    else:
        assert trainer.fit()["best_step"] == best_step
    assert tried == [1, 2, 3]


def test_the_seconds_of_a_run_are_those_it_took_and_those_before_it_was_resumed(tiny_models, tmp_path):
    trainer = sft_trainer(tiny_models["gpt2"], tmp_path / "first", sft_rows(4), [], max_steps=1)
    began = time.perf_counter()
    seconds = trainer.fit()["seconds"]
    assert 0 < seconds <= time.perf_counter() - began
    resumed = sft_trainer(tiny_models["gpt2"], tmp_path / "second", sft_rows(4), [], max_steps=2)
    trainer.meter.add({"loss": 6.0}, 2)
    resumed.load_state({**trainer.state(), "seconds": 1000.0}, [trainer.rank_state()], {})
    assert 1000 < resumed.seconds < 1000 + time.perf_counter() - began
    assert resumed.meter.means() == {"loss": 3.0}  # and the sums since the last line of metrics


def test_without_evaluation_data_the_last_model_is_exported_once(tiny_models, tmp_path):
    exported = []
    outcome = sft_trainer(tiny_models["gpt2"], tmp_path, sft_rows(4), [], exported=exported, max_steps=2).fit()
    assert exported == [True] and outcome["best_step"] == 2
    assert outcome["before"] == outcome["after"] == {"eval_rows": 0.0}
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["eval_rows"]) for line in lines if "eval_rows" in line] == [(0, 0.0)]


@pytest.mark.parametrize(("world", "rows"), [(1, 5), (2, 5), (2, 8), (4, 3)])
def test_evaluation_batches_cover_the_data_once_over_all_ranks(tiny_models, tmp_path, monkeypatch, world, rows):
    examples = [response([index + 1] * (index + 2)) for index in range(rows)]
    seen, counts = [], set()
    for rank in range(world):
        on_rank(monkeypatch, rank, world)
        trainer = sft_trainer(tiny_models["gpt2"], tmp_path, examples, examples, max_steps=1)
        trainer.plan = BatchPlan(2 * world, 2, world)
        batches = list(trainer.evaluation_batches())
        counts.add(len(batches))
        seen += [int(batch.input_ids[row, 0]) for batch, counted in batches for row in range(counted)]
    assert sorted(seen) == list(range(1, rows + 1))
    assert len(counts) == 1  # a rank that came short would leave the others waiting


# -------------------------------------------------------------------------------------------------- reward


def ranking(*candidates, ranks, category=""):
    rows = tuple(response(candidate) for candidate in candidates)
    return TokenizedRanking(id="r", candidates=rows, ranks=ranks, category=category)


RANKINGS = [
    ranking([5, 6, 7], [5, 9], ranks=(0, 1), category="b"),
    ranking([8, 3, 3, 3, 0], [8, 4], [8, 2, 0], ranks=(1, 0, 2), category="a"),
    ranking([11, 12], [11, 13, 14], ranks=(1, 0), category="b"),
]


def reward_trainer(path, tmp_path, *, micro=1, lr=0.1, **config):
    model = ScalarModel.from_base(path, dtype=torch.float32, seed=4).eval()
    plan = BatchPlan(3, micro, 1)
    return RewardTrainer(
        LocalEngine(model, plan, lr=lr),
        stage_data(RANKINGS, RANKINGS),
        RewardConfig(**config),
        pad_token_id=0,
        plan=plan,
        total_steps=6,
        export=lambda: None,
        context=context(tmp_path, "reward", log_every_steps=1),
    )


def scores_alone(model, example):
    with torch.no_grad():
        rows = [torch.tensor([candidate.input_ids]) for candidate in example.candidates]
        return [model(row, torch.ones_like(row))[0, -1].item() for row in rows]


@pytest.mark.parametrize("micro", [1, 3])
def test_reward_evaluation_equals_scores_of_each_response_alone(tiny_models, tmp_path, micro):
    trainer = reward_trainer(tiny_models["gpt_neox"], tmp_path, micro=micro)
    losses, correct, by_category = [], [], {"a": [], "b": []}
    for example in RANKINGS:
        scores, pairs = scores_alone(trainer.engine.module, example), []
        for i, better in enumerate(example.ranks):
            for j, worse in enumerate(example.ranks):
                if better < worse:
                    pairs.append(math.log1p(math.exp(scores[j] - scores[i])))
                    correct.append(float(scores[i] > scores[j]))
                    by_category[example.category].append(correct[-1])
        losses.append(sum(pairs) / len(pairs))
    with torch.no_grad():
        found = trainer.evaluate()
    assert found["eval_loss"] == pytest.approx(sum(losses) / 3, abs=1e-5)
    assert found["eval_accuracy"] == pytest.approx(sum(correct) / len(correct))
    assert (found["eval_rows"], found["eval_pairs"]) == (3, 5)
    for name, values in by_category.items():
        assert found["by_category"][name]["accuracy"] == pytest.approx(sum(values) / len(values))
        assert found["by_category"][name]["pairs"] == len(values)


@pytest.mark.parametrize("use_margins", [False, True])
def test_margins_count_where_they_are_asked_for_and_nowhere_else(tiny_models, tmp_path, use_margins):
    trainer = reward_trainer(tiny_models["gpt2"], tmp_path, use_margins=use_margins)
    example, margin = RANKINGS[0], 1.5
    better, worse = scores_alone(trainer.engine.module, example)
    loss = trainer.loss_sum(trainer.collate([dataclasses.replace(example, margin=margin)]))
    expected = math.log1p(math.exp(worse - better + margin * use_margins))
    assert loss.item() == pytest.approx(expected, abs=1e-5)
    means = trainer.meter.means()  # what the log says of training: without the margins of the data
    assert means["margin"] == pytest.approx(better - worse, abs=1e-5) and means["accuracy"] == float(better > worse)


def test_reward_evaluation_knows_each_ranking_and_its_prompt_on_every_rank(tiny_models, tmp_path, monkeypatch):
    """Three ranks for four rankings of three prompts, rows that only fill up left out."""
    monkeypatch.setattr("rlhf.algorithms.reward.all_gather_rows", lambda tensor: tensor)
    examples = [*RANKINGS, ranking([5, 6, 6], [5, 1], ranks=(0, 1), category="a")]
    found = []
    for rank in range(3):
        on_rank(monkeypatch, rank, 3)
        trainer = reward_trainer(tiny_models["gpt2"], tmp_path)
        trainer.plan = BatchPlan(3, 1, 3)
        with torch.no_grad():
            rows = trainer._score_all(examples)
        found += zip(
            *(column.tolist() for column in (rows.groups, rows.prompts, rows.ranks, rows.lengths)), strict=True
        )
    numbers = [0, 1, 2, 0]  # the fourth ranking has the first one's prompt
    expected = [
        (group, numbers[group], rank, len(candidate.input_ids) - 1)
        for group, example in enumerate(examples)
        for rank, candidate in zip(example.ranks, example.candidates, strict=True)
    ]
    assert sorted(found) == sorted(expected)


def test_reward_model_learns_the_rankings(tiny_models, tmp_path):
    trainer = reward_trainer(tiny_models["gpt2"], tmp_path)
    outcome = trainer.fit()
    assert outcome["after"]["eval_loss"] < outcome["before"]["eval_loss"]
    assert len(trainer.engine.gradients) == 6


def test_reward_gradients_do_not_depend_on_the_split_into_micro_batches(tiny_models, tmp_path):
    found = []
    for micro in (1, 3):
        trainer = reward_trainer(tiny_models["llama"], tmp_path, micro=micro)
        trainer.total_steps = 1
        trainer.fit()
        found.append(trainer.engine.gradients[0])
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], atol=1e-5, rtol=1e-4)


# --------------------------------------------------------------------------------------------------- rest


def test_learning_rate():
    module = torch.nn.Linear(4, 2)
    assert learning_rate(LocalEngine(module, BatchPlan(1, 1, 1), lr=0.25)) == 0.25
