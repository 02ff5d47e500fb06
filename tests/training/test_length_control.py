"""Length control in the trainer: what is learnt, what is saved, and what scores afterwards."""

from __future__ import annotations

import json
import math

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from rlhf.algorithms.config import RewardConfig
from rlhf.algorithms.cross_prompt import cross_prompt_pairs
from rlhf.algorithms.reward import RewardTrainer, length_balance
from rlhf.checkpoint.export import export_scalar_model
from rlhf.checkpoint.fingerprint import model_fingerprint
from rlhf.config import ModelConfig
from rlhf.engine import BatchPlan
from rlhf.models.lora import apply_lora
from rlhf.models.merge import merge_adapter
from rlhf.models.odin import OdinModel
from rlhf.models.scalar import ScalarModel
from rlhf.types import Rollout, TokenizedRanking, TokenizedResponse
from tests.support.local_engine import LocalEngine
from tests.support.on_policy import context, responses_to, reward_of, stage_data

EOS, GOOD, BAD = 0, 11, 12
FILLERS = range(20, 40)


def made_up_rankings(count, seed, *, bias, candidates=2):
    """Rankings by an annotator who sees quality and, `bias` logits for each token, length.

    A response is GOOD or BAD and then 2 to 12 fillers. Gold is whether it is GOOD, which length says nothing of.
    """
    generator = torch.Generator().manual_seed(seed)

    def number(low, high):
        return int(torch.randint(low, high, (1,), generator=generator))

    rows = []
    for index in range(count):
        responses = []
        while len({response[0] for response in responses}) < 2:  # one GOOD and one BAD at least
            responses = [
                (GOOD if number(0, 2) else BAD, *(number(20, 40) for _ in range(number(2, 13))), EOS)
                for _ in range(candidates)
            ]
        liked = [2.0 * (response[0] == GOOD) + bias * len(response) for response in responses]
        liked = torch.tensor(liked) - torch.rand(candidates, generator=generator).log().neg().log()  # Gumbel: Luce
        places = (-liked).argsort().argsort().tolist()
        prompt = (number(41, 60), number(41, 60))
        made = tuple(TokenizedResponse(str(index), prompt + each, 2) for each in responses)
        rows.append(TokenizedRanking(str(index), made, tuple(places)))
    return rows


def by_gold(rankings):
    """The same responses ranked by gold alone."""
    return [
        TokenizedRanking(row.id, row.candidates, tuple(int(each.input_ids[2] == BAD) for each in row.candidates))
        for row in rankings
    ]


def trainer_of(path, tmp_path, train, evaluation, *, micro=16, batch=16, steps=1, lr=3e-3, added=(), **config):
    kind = OdinModel if config.get("length_control") == "odin" else ScalarModel
    plan = BatchPlan(batch, micro, 1)
    engine = LocalEngine(kind.from_base(path, dtype=torch.float32, seed=4).eval(), plan)
    engine.optimizer = torch.optim.Adam(engine.module.parameters(), lr=lr)
    return RewardTrainer(
        engine, stage_data(train, evaluation), RewardConfig(**config), pad_token_id=EOS, plan=plan, total_steps=steps,
        export=lambda: None, context=context(tmp_path, "reward", log_every_steps=10), added=added,
        balance=length_balance([*train, *added]) if config.get("length_control") == "balance" else None,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------- what is learnt


def trained(tiny_models, tmp_path, *, bias, candidates=2, **config):
    """Accuracy on gold's pairs where the better one is the shorter and the longer one, and the correlation."""
    train = made_up_rankings(256, 11, bias=bias, candidates=candidates)
    held_out = made_up_rankings(200, 12, bias=bias, candidates=candidates)
    trainer = trainer_of(tiny_models["gpt2"], tmp_path, train, held_out, steps=48, **config)
    trainer.fit()
    trainer.evaluation = by_gold(held_out)
    with torch.no_grad():
        length = trainer.evaluate()["shortcuts"]["length"]
    return length["chosen_less"]["accuracy"], length["chosen_more"]["accuracy"], length["correlation_within"]["value"]


@pytest.mark.parametrize(("bias", "candidates"), [(0.5, 2), (-0.5, 2), (0.5, 4)])
def test_length_control_finds_quality_where_the_annotator_likes_a_length(tiny_models, tmp_path, bias, candidates):
    """Accuracy of gold's pairs in which the annotator's taste speaks against gold's choice; either taste."""
    against, following = {}, {}
    for control in ("none", "balance", "calibrate", "odin"):
        shorter, longer, within = trained(
            tiny_models, tmp_path / control, bias=bias, candidates=candidates, length_control=control
        )
        against[control] = shorter if bias > 0 else longer
        following[control] = within * math.copysign(1, bias)
    assert against["none"] < 0.65 and following["none"] > 0.4
    for control in ("balance", "calibrate", "odin"):
        assert against[control] > against["none"] + 0.15, (control, against)
        assert abs(following[control]) < following["none"] - 0.2, (control, following)


def test_responses_of_other_prompts_are_told_from_a_prompts_own(tiny_models, tmp_path):
    """The own response begins with the prompt's first token plus 1: nothing in the pairs themselves asks to look."""

    def row(index, length):
        prompt = (41 + index % 10, 60)
        responses = ((prompt[0] - 40, *[GOOD] * length, EOS), (prompt[0] - 40, *[BAD] * length, EOS))
        made = tuple(TokenizedResponse(str(index), prompt + each, 2) for each in responses)
        return TokenizedRanking(str(index), made, (0, 1))

    rows = [row(index, 2 + index % 5) for index in range(80)]
    other = cross_prompt_pairs(rows, 1.0, seed=9)
    found = {}
    for share in (0.0, 2.0):
        added = cross_prompt_pairs(rows, share, seed=1)
        trainer = trainer_of(tiny_models["gpt2"], tmp_path / str(share), rows, other, steps=60, lr=1e-2, added=added)
        assert (
            trainer.calibration_examples()
            == trainer_of(tiny_models["gpt2"], tmp_path / "plain", rows, other).calibration_examples()
        ), "the added rows are nothing to calibrate on"
        found[share] = trainer.fit()["after"]["eval_accuracy"]
    assert found[2.0] > found[0.0] + 0.2 and found[2.0] > 0.75, found


# ---------------------------------------------------------------------------------------------------- balance


def test_the_balanced_loss_counts_every_pair_by_its_weight(tiny_models, tmp_path, caplog):
    """Of rankings of three, row by row without padding; each side has half of what is learnt from."""
    rows = made_up_rankings(40, 3, bias=0.8, candidates=3)
    with caplog.at_level("INFO", logger="rlhf"):
        trainer = trainer_of(tiny_models["gpt2"], tmp_path, rows, rows, length_control="balance")
    assert any("length_control=balance: " in message for message in caplog.messages)
    balanced = trainer.balance
    sides = {1: 0.0, -1: 0.0}
    expected = 0.0
    for row in rows:
        with torch.no_grad():
            ids = [torch.tensor([each.input_ids]) for each in row.candidates]
            scores = [trainer.engine.module(each, torch.ones_like(each))[0, -1].item() for each in ids]
        pairs = [(i, j) for i in range(3) for j in range(3) if row.ranks[i] < row.ranks[j]]
        for i, j in pairs:
            difference = len(row.candidates[i].input_ids) - len(row.candidates[j].input_ids)
            weight = balanced.weights(torch.tensor([difference])).item()
            expected += weight * math.log1p(math.exp(scores[j] - scores[i])) / len(pairs)
            if difference:
                sides[1 if difference > 0 else -1] += weight / len(pairs)
    assert sides[1] == pytest.approx(sides[-1], rel=1e-5)
    assert trainer.loss_sum(trainer.collate(rows)).item() == pytest.approx(expected, rel=1e-4)
    with torch.no_grad():
        assert trainer.evaluate()["eval_loss"] == pytest.approx(expected / 40, rel=1e-4), "held-out pairs weigh alike"


# --------------------------------------------------------------------------------------------------- calibrate


@pytest.fixture(scope="module")
def calibrated(tiny_models, tokenizer, tmp_path_factory):
    """A trainer whose model was exported with a length curve, and where."""
    place = tmp_path_factory.mktemp("calibrated")
    train, held_out = made_up_rankings(128, 4, bias=0.8), made_up_rankings(60, 5, bias=0.8)
    trainer = trainer_of(tiny_models["gpt2"], place, train, held_out, steps=16, length_control="calibrate",
                         calibration_rows=100)  # fmt: skip
    trainer._export = lambda: export_scalar_model(trainer.engine, tokenizer, place / "model")
    trainer.fit()
    return trainer, place / "model"


def rollout_of(responses):
    width = max(len(each.input_ids) - 2 for each in responses)
    ids = torch.zeros(len(responses), width, dtype=torch.long)
    mask = torch.zeros(len(responses), width, dtype=torch.bool)
    for place, each in enumerate(responses):
        ids[place, : each.response_tokens] = torch.tensor(each.input_ids[2:])
        mask[place, : each.response_tokens] = True
    prompts = torch.tensor([each.input_ids[:2] for each in responses])
    return Rollout(prompts, torch.ones_like(prompts, dtype=torch.bool), ids, mask, torch.zeros(mask.shape))


def test_the_saved_model_scores_with_the_curve_taken_off(calibrated, tokenizer):
    """As PPO scores; mean 0 and variance 1 on the best calibration responses, and the range, after the correction."""
    trainer, place = calibrated
    loaded = ScalarModel.from_pretrained(place, dtype=torch.float32).eval()
    reward = reward_of(loaded, tokenizer)
    rows = [each for row in trainer.calibration_examples() for each in row.candidates]
    best = torch.tensor([rank == 0 for row in trainer.calibration_examples() for rank in row.ranks])
    scores = reward.score(responses_to(rollout_of(rows), tokenizer)).scores
    assert scores[best].mean().item() == pytest.approx(0, abs=1e-4)
    assert scores[best].std(unbiased=False).item() == pytest.approx(1, abs=1e-4)
    known = reward.training_range
    assert (known["minimum"], known["maximum"]) == pytest.approx((scores.min().item(), scores.max().item()), abs=1e-4)
    lengths = torch.tensor([each.response_tokens for each in rows])
    curve = loaded.length_curve
    loaded.length_curve = None
    raw = reward.score(responses_to(rollout_of(rows), tokenizer)).scores
    torch.testing.assert_close(scores, raw - curve.at(lengths))
    of_two = lengths.view(-1, 2).float()
    within = [  # of two responses to a prompt what differs is their halved difference
        torch.corrcoef(
            torch.stack([(each - each.mean(1, keepdim=True)).flatten() for each in (of_two, said.view(-1, 2))])
        )
        for said in (raw, scores)
    ]
    assert within[0][0, 1] > 0.4 and abs(within[1][0, 1]) < 0.1


def test_evaluation_measures_the_corrected_scores(calibrated):
    trainer, place = calibrated
    with torch.no_grad():
        found = trainer.evaluate()
    raw = trainer_of_same(trainer)
    assert abs(found["eval_score_length_correlation"]) < 0.35 and raw["eval_score_length_correlation"] > 0.5
    assert (place / "length_curve.json").is_file()


def trainer_of_same(trainer):
    """The evaluation of the same model without a curve."""
    trainer.config.length_control = "none"
    with torch.no_grad():
        found = trainer.evaluate()
    trainer.config.length_control = "calibrate"
    return found


def pairs_tokenizer(tokenizer):
    """The letters of `tokenizer` under other numbers, and some pairs of letters as one token."""
    letters = sorted(token for token in tokenizer.get_vocab() if token != tokenizer.eos_token)
    merges = [("h", "e"), ("l", "l"), ("t", "h"), ("s", "o")]
    words = ["</s>", *letters, *("".join(pair) for pair in merges)]
    core = Tokenizer(models.BPE(vocab={word: number for number, word in enumerate(words)}, merges=merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", pad_token="</s>")


def test_a_reward_model_of_another_tokenizer_counts_its_own_tokens(calibrated, tokenizer):
    """The curve is one over the reward model's tokens, of which there are more than of the actor's."""
    _, place = calibrated
    other_tokenizer = pairs_tokenizer(tokenizer)
    loaded = ScalarModel.from_pretrained(place, dtype=torch.float32).eval()
    reward = reward_of(loaded, tokenizer, other_tokenizer)
    assert not reward.same_tokenizer
    ids = [other_tokenizer.encode(text, add_special_tokens=False) for text in ("hellothere", "so")]
    given = responses_of(ids, other_tokenizer)
    scores = reward.score(given).scores
    expected = [len("hellothere") + 1, len("so") + 1]
    assert given.rollout.response_mask.sum(1).tolist() != expected
    curve, loaded.length_curve = loaded.length_curve, None
    torch.testing.assert_close(reward.score(given).scores - curve.at(torch.tensor(expected)), scores)
    loaded.length_curve = curve


def responses_of(ids, tokenizer):
    width = max(map(len, ids)) + 1
    rows = torch.zeros(len(ids), width, dtype=torch.long)
    mask = torch.zeros(len(ids), width, dtype=torch.bool)
    for place, each in enumerate(ids):
        rows[place, : len(each) + 1] = torch.tensor([*each, tokenizer.eos_token_id])
        mask[place, : len(each) + 1] = True
    prompts = torch.ones(len(ids), 1, dtype=torch.long)
    rollout = Rollout(prompts, prompts.bool(), rows, mask, torch.zeros(mask.shape))
    return responses_to(rollout, tokenizer, ["a", "b"], eos_ids=[tokenizer.eos_token_id])


def test_a_critic_has_no_curve_and_a_reward_model_keeps_it(calibrated, tokenizer, tmp_path):
    trainer, place = calibrated
    critic = ScalarModel.from_pretrained(place, dtype=torch.float32, as_critic=True)
    assert critic.length_curve is None
    again = ScalarModel.from_pretrained(place, dtype=torch.float32)
    for name, model in (("critic", critic), ("reward", again)):
        export_scalar_model(model, tokenizer, tmp_path / name)
    assert not (tmp_path / "critic" / "length_curve.json").exists()
    saved = [json.loads((each / "length_curve.json").read_text()) for each in (place, tmp_path / "reward")]
    assert saved[0] == saved[1] == again.length_curve.content()
    text = (place / "length_curve.json").read_text()
    assert text.startswith('{\n  "places": [\n    ') and text.endswith("\n  ]\n}\n"), "a file for people too"
    assert "length_curve.json" in model_fingerprint(str(place)), "PPO on another curve is another run"


def test_a_merged_adapter_keeps_its_curve(tiny_models, tokenizer, tmp_path):
    model = ScalarModel.from_base(tiny_models["gpt2"], dtype=torch.float32)
    model = apply_lora(model, ModelConfig(lora_rank=2), seed=1)
    trainer = trainer_of(
        tiny_models["gpt2"], tmp_path, made_up_rankings(16, 6, bias=1.0), [], length_control="calibrate"
    )
    trainer.engine = LocalEngine(model, BatchPlan(4, 4, 1))
    model.set_normalisation(*trainer.calibrate())
    export_scalar_model(trainer.engine, tokenizer, tmp_path / "adapter")
    merge_adapter(tmp_path / "adapter", tmp_path / "merged", torch.float32)
    curves = [
        ScalarModel.from_pretrained(tmp_path / name, dtype=torch.float32).length_curve for name in ("adapter", "merged")
    ]
    assert curves[0] is not None and curves[0] == curves[1]


# -------------------------------------------------------------------------------------------------------- odin


@pytest.mark.parametrize("micro", [1, 4, 12])
def test_odins_gradient_is_that_of_its_equation_however_the_batch_is_split(tiny_models, tmp_path, micro):
    """L = BT(r_Q + r_L) + 0.7 (|rho(r_Q, len)| - rho(r_L, len)) + 0.3 |cos(W_Q, W_L)| over all rows at once."""
    rows = made_up_rankings(12, 7, bias=0.5, candidates=3)
    trainer = trainer_of(
        tiny_models["llama"], tmp_path, rows, rows, micro=micro, batch=12, length_control="odin", odin_length_coef=0.7,
        odin_orthogonality_coef=0.3, use_margins=True,
    )  # fmt: skip
    model = trainer.engine.module
    quality, length, tokens, ranking = [], [], [], torch.zeros(())
    for row in rows:
        ids = [torch.tensor([each.input_ids]) for each in row.candidates]
        said = [model(each, torch.ones_like(each)) for each in ids]
        mine = [values[0][0, -1] + values[1][0, -1] for values in said]
        pairs = [(i, j) for i in range(3) for j in range(3) if row.ranks[i] < row.ranks[j]]
        ranking = ranking + sum(torch.log1p((mine[j] - mine[i]).exp()) for i, j in pairs) / len(pairs) / 12
        quality += [values[0][0, -1] for values in said]
        length += [values[1][0, -1] for values in said]
        tokens += [each.response_tokens for each in row.candidates]
    of_quality, of_length = (
        torch.corrcoef(torch.stack([torch.stack(values), torch.tensor(tokens).float()]))[0, 1]
        for values in (quality, length)
    )
    heads = model.scalar_head.weight
    cosine = torch.cosine_similarity(heads[0], heads[1], dim=0)
    loss = ranking + 0.7 * (of_quality.abs() - of_length) + 0.3 * cosine.abs()
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    expected = dict(zip((name for name, _ in model.named_parameters()), gradients, strict=True))
    trainer.writer.open()
    measured = trainer._step(1)
    trainer.writer.close()
    assert measured == pytest.approx(loss.item() + 0.7, rel=1e-4), "never negative, for the doctor: 1 is added to -rho"
    for name, gradient in trainer.engine.gradients[0].items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-5, rtol=1e-3)
    line = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert line["quality_length_correlation"] == pytest.approx(of_quality.item(), abs=1e-5)
    assert line["length_head_correlation"] == pytest.approx(of_length.item(), abs=1e-5)


def test_odin_saves_the_quality_head_alone_as_an_ordinary_reward_model(tiny_models, tokenizer, tmp_path):
    rows = made_up_rankings(12, 8, bias=0.5)
    trainer = trainer_of(tiny_models["gpt2"], tmp_path, rows, rows, length_control="odin")
    model = trainer.engine.module
    assert torch.equal(
        model.scalar_head.weight[:1],
        ScalarModel.from_base(tiny_models["gpt2"], dtype=torch.float32, seed=4).scalar_head.weight,
    ), "the quality head starts as that of a plain reward model"
    model.set_normalisation(*trainer.calibrate())
    export_scalar_model(trainer.engine, tokenizer, tmp_path / "model")
    saved = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "model", dtype=torch.float32)
    assert saved.score.weight.shape[0] == 1
    loaded = ScalarModel.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    ids = torch.tensor([rows[0].candidates[0].input_ids])
    with torch.no_grad():
        quality = model(ids, torch.ones_like(ids))[0][0, -1]
        found = loaded(ids, torch.ones_like(ids))[0, -1]
    assert found.item() == pytest.approx((quality.item() - model.score_mean) / model.score_std, abs=1e-5)


def test_odins_look_ahead_draws_the_dropout_that_the_learning_pass_has(tiny_models, tmp_path):
    """With dropout, too, the value of the loss is that of the pass that learns."""
    rows = made_up_rankings(8, 9, bias=0.5)
    trainer = trainer_of(tiny_models["gpt2"], tmp_path, rows, rows, micro=2, batch=8, length_control="odin")
    for module in trainer.engine.module.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    trainer.engine.module.train()
    batches = [trainer.collate(rows[start : start + 2]) for start in range(0, 8, 2)]
    torch.manual_seed(3)
    trainer.before_step(batches)
    with torch.no_grad():
        quality = torch.cat([trainer.heads(batch)[0] for batch in batches])
    tokens = torch.cat([batch.lengths for batch in batches]).float()
    seen = trainer.pulls[id(batches[0])][0].correlations[0]
    assert seen == pytest.approx(torch.corrcoef(torch.stack([quality, tokens]))[0, 1].item(), abs=1e-5)
