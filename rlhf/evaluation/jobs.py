"""`rlhf eval`: a reward model on held-out preferences, or an actor on held-out texts and prompts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from rlhf.algorithms.ranking_metrics import RowNames, ScoredRows, candidate_columns
from rlhf.algorithms.shortcuts import common_openings
from rlhf.config import ConfigError, DataConfig, require_at_least
from rlhf.data.collate import collate_prompts, collate_responses
from rlhf.data.sources import read_rows
from rlhf.data.spec import DataError, DatasetSpec, Row
from rlhf.data.stage_data import StageData, load_stage_data, reads_special_tokens
from rlhf.data.templates import load_template
from rlhf.data.tokenize import TextEncoder
from rlhf.distributed.log import logger
from rlhf.evaluation.generations import generation_statistics
from rlhf.evaluation.gold import measure_gold
from rlhf.evaluation.reward_accuracy import agreement, reward_metrics
from rlhf.evaluation.rewardbench import BenchRow, bench_row, bench_scores, has_bench_shape
from rlhf.generation.backend import make_backend
from rlhf.generation.token_sampling import Sampling
from rlhf.models.directories import check_causal_directory, is_scalar_directory
from rlhf.models.inner_model import eos_token_ids
from rlhf.models.loading import load_causal_lm, load_tokenizer
from rlhf.models.scalar import ScalarModel
from rlhf.numerics.statistics import last_true, score_last
from rlhf.training.scoring import label_loss
from rlhf.types import Responses, TokenizedPrompt, TokenizedRanking

BATCH_TOKENS = 8192
"""Of one forward pass, padding included; at least a row."""


@dataclass(frozen=True)
class EvalJob:
    """What is evaluated on what.

    `data`: preferences for a reward model (or files of RewardBench 2's shape), conversations for an actor. `prompts`:
    what an actor is asked, `samples` times each. `second`: another reward model, to compare with.
    """

    model: str
    data: Sequence[str] = ()
    prompts: Sequence[str] = ()
    second: str | None = None
    template: str = "kullm"
    max_prompt_tokens: int = 256
    max_response_tokens: int = 256
    samples: int = 1
    temperature: float = 1.0
    rows: int = 64
    seed: int = 1
    precision: Literal["fp32", "bf16"] = "fp32"
    cache_dir: Path = Path("runs/.cache")
    report_dir: Path = Path("runs/.cache/evaluation")

    def __post_init__(self) -> None:
        require_at_least(self, 1, "max_prompt_tokens", "max_response_tokens", "samples", "rows")
        if not 0 < self.temperature < math.inf:
            raise ConfigError(f"temperature={self.temperature:g} must be above 0; a small one, 0.01, is nearly greedy")

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return torch.bfloat16 if self.precision == "bf16" else torch.float32

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def evaluate(job: EvalJob) -> dict[str, Any]:
    """What `job` asks for; "kind" says of what kind of model. ConfigError and DataError say what is wrong with it."""
    if is_scalar_directory(job.model):
        return {"kind": "reward model", "model": job.model, **_reward_model(job)}
    check_causal_directory(job.model)
    return {"kind": "actor", "model": job.model, **_actor(job)}


# --------------------------------------------------------------------------------------------------- reward model


def _reward_model(job: EvalJob) -> dict[str, Any]:
    if not job.data:
        raise ConfigError(f"{job.model} is a reward model: name the preferences to judge it by with --data")
    if job.prompts:
        raise ConfigError(f"{job.model} is a reward model and answers no prompts: leave --prompts out")
    if job.second is not None and not is_scalar_directory(job.second):
        raise ConfigError(f"--second {job.second} is no reward model's directory")
    bench = [bench_row(row) for row in _bench_rows(job.data)]
    if bench:
        own = {"rewardbench": bench_scores(bench, _bench_scored(job, job.model, bench))}
        if job.second is None:
            return own
        theirs = bench_scores(bench, _bench_scored(job, job.second, bench))
        return {**own, "second": {"model": job.second, "rewardbench": theirs}}
    first, names, texts = _scored(job, job.model)
    found = reward_metrics(first, names, texts)
    if job.second is None:
        return found
    second, _, _ = _scored(job, job.second)
    return {**found, "second": {"model": job.second, **agreement(first, second)}}


def _bench_rows(specs: Sequence[str]) -> Iterator[Row]:
    """The rows of the files, where the first has RewardBench 2's shape; nothing where it has not."""
    for number, text in enumerate(specs):
        spec = DatasetSpec.parse(text)
        rows = read_rows(spec)
        first = next(rows, None)
        if first is None or not has_bench_shape(first.values):
            if number:
                raise DataError(f"{spec.path} has not the shape of RewardBench 2, as {specs[0]} has: evaluate it alone")
            return
        yield first
        yield from rows


def _scored(job: EvalJob, model: str) -> tuple[ScoredRows, RowNames, list[str]]:
    """All candidates with the scores of the reward model in `model`, in the units of its training where it was saved
    with them, and their texts."""
    tokenizer, module = load_tokenizer(model), _scalar(job, model)
    data = _load(job, "comparison", job.data, tokenizer)
    examples: list[TokenizedRanking] = data.train

    def decode(ids: Sequence[int]) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=True))

    openings, numbered = common_openings(examples, decode)
    categories = sorted({example.category for example in examples})
    names = RowNames(categories, sorted({example.source for example in examples}), numbered)
    candidates = [candidate for example in examples for candidate in example.candidates]
    lengths = torch.tensor([candidate.response_tokens for candidate in candidates])
    scores = _scores(module, [candidate.input_ids for candidate in candidates], tokenizer.pad_token_id)
    if module.length_curve is not None:
        scores = scores - module.length_curve.at(lengths)
    known = module.score_range or {}  # with them a margin is one of Bradley and Terry
    scores = scores * known.get("raw_std", 1.0) + known.get("raw_mean", 0.0)
    rows = ScoredRows(scores=scores, **candidate_columns(examples, names, openings))
    return rows, names, [decode(candidate.input_ids[candidate.prompt_tokens :]) for candidate in candidates]


def _bench_scored(job: EvalJob, model: str, bench: Sequence[BenchRow]) -> list[list[float]]:
    """The scores that `model` gives the responses of each row. What is too long is cut as in training, and counted."""
    tokenizer, module = load_tokenizer(model), _scalar(job, model)
    template = load_template(job.template, tokenizer)
    encoder = TextEncoder(
        tokenizer,
        max_prompt_tokens=job.max_prompt_tokens,
        max_response_tokens=job.max_response_tokens,
        prompt_has_special_tokens=reads_special_tokens(template, tokenizer),
    )
    rows: list[tuple[int, ...]] = []
    lengths: list[int] = []
    cut = {"prompts": 0, "responses": 0}
    for row in bench:
        (prompt,) = encoder.prompts([template.render_messages([{"role": "user", "content": row.prompt}])])
        responses = encoder.responses(list(row.responses), append_eos=True)
        rows += [(*prompt.ids, *response.ids) for response in responses]
        lengths += [len(response.ids) for response in responses]
        cut["prompts"] += prompt.truncated
        cut["responses"] += sum(response.truncated for response in responses)
    if any(cut.values()):
        logger.warning(
            "cut: %d of %d prompts have more than max_prompt_tokens=%d, %d of %d responses more than "
            "max_response_tokens=%d",
            cut["prompts"], len(bench), job.max_prompt_tokens, cut["responses"], len(rows), job.max_response_tokens,
        )  # fmt: skip
    scores = _scores(module, rows, tokenizer.pad_token_id)
    if module.length_curve is not None:
        scores = scores - module.length_curve.at(torch.tensor(lengths))
    parts = scores.split([len(row.responses) for row in bench])
    return [part.tolist() for part in parts]


def _scalar(job: EvalJob, path: str) -> ScalarModel:
    module = ScalarModel.from_pretrained(path, dtype=job.dtype)
    return module.to(job.device).eval().requires_grad_(False)


@torch.no_grad()
def _scores(module: ScalarModel, rows: Sequence[Sequence[int]], pad: int) -> torch.Tensor:
    """Normalised scores [N] float32 on the CPU, in the order of `rows` of token ids."""
    scores = torch.empty(len(rows))
    device = next(module.parameters()).device
    for part in _batches([len(row) for row in rows]):
        longest = max(len(rows[index]) for index in part)
        ids = torch.full((len(part), longest), pad)
        mask = torch.zeros(len(part), longest, dtype=torch.bool)
        for place, index in enumerate(part):
            ids[place, : len(rows[index])], mask[place, : len(rows[index])] = torch.tensor(rows[index]), True
        scores[part] = score_last(module(ids.to(device), mask.to(device)), mask.to(device)).float().cpu()
    return scores


# ---------------------------------------------------------------------------------------------------------- actor


def _actor(job: EvalJob) -> dict[str, Any]:
    if job.second is not None:
        raise ConfigError("--second is another reward model, and this is an actor: leave it out")
    if not job.data and not job.prompts:
        raise ConfigError("nothing to evaluate on: name conversations with --data, prompts with --prompts, or both")
    tokenizer = load_tokenizer(job.model)
    model = load_causal_lm(job.model, dtype=job.dtype).to(job.device).eval().requires_grad_(False)
    found: dict[str, Any] = {}
    if job.data:
        found["perplexity"] = _perplexity(job, model, tokenizer)
    if job.prompts:
        found["generation"] = _generation(job, model, tokenizer)
    return found


@torch.no_grad()
def _perplexity(job: EvalJob, model: Any, tokenizer: Any) -> dict[str, Any]:
    """exp of the mean loss of the responses by token, over all of them and by category."""
    rows = _load(job, "response", job.data, tokenizer).train
    losses: dict[str, float] = {}
    tokens: dict[str, int] = {}
    for part in _batches([len(row.input_ids) for row in rows], by=[row.category for row in rows]):
        batch = collate_responses([rows[index] for index in part], tokenizer.pad_token_id).to(job.device)
        category = rows[part[0]].category
        losses[category] = losses.get(category, 0.0) + float(label_loss(model, batch))
        tokens[category] = tokens.get(category, 0) + sum(rows[index].response_tokens for index in part)
    mean = sum(losses.values()) / sum(tokens.values())
    return {
        "perplexity": math.exp(mean),
        "loss": mean,
        "tokens": sum(tokens.values()),
        "rows": len(rows),
        "by_category": {name: math.exp(losses[name] / tokens[name]) for name in sorted(losses) if len(losses) > 1},
    }


def _generation(job: EvalJob, model: Any, tokenizer: Any) -> dict[str, Any]:
    prompts: list[TokenizedPrompt] = _load(job, "prompt", job.prompts, tokenizer).train
    eos_ids = eos_token_ids(model, tokenizer)
    pad = tokenizer.pad_token_id
    backend = make_backend("own", model, eos_ids=eos_ids, pad_token_id=pad, seed=job.seed, slots=job.rows)
    sampling = Sampling(job.max_response_tokens, temperature=job.temperature, vocabulary_size=len(tokenizer))
    examples = [prompt for prompt in prompts for _ in range(job.samples)]
    given = collate_prompts(examples, pad, row_ids=list(range(len(examples)))).to(job.device)
    rollout = backend.generate(given, sampling, iteration=0)
    ids, mask = rollout.response_ids.cpu(), rollout.response_mask.cpu()
    final = ids.gather(1, last_true(mask).unsqueeze(1)).squeeze(1)
    ended = torch.isin(final, torch.tensor(list(eos_ids))) & mask.any(1)
    texts = [
        tokenizer.decode(row[kept].tolist(), skip_special_tokens=True).strip()
        for row, kept in zip(ids, mask, strict=True)
    ]
    measured = measure_gold(Responses(rollout, examples, texts, ended))
    shown = [
        {
            "prompt": example.messages[-1]["content"] if example.messages else example.text,
            "response": text,
            "ended": end,
        }
        for example, text, end in zip(examples, texts, ended.tolist(), strict=True)
    ]
    return {
        **generation_statistics(texts, ids, mask, ended),
        "prompts": len(prompts),
        **{name: float(values.mean()) for name, values in measured.items()},
        "answers": shown,
    }


# --------------------------------------------------------------------------------------------------------- shared


def _load(job: EvalJob, kind: str, specs: Sequence[str], tokenizer: Any) -> StageData:
    config = DataConfig(
        template=job.template,
        max_prompt_tokens=job.max_prompt_tokens,
        max_response_tokens=job.max_response_tokens,
        eval_fraction=0.0,
    )
    job.report_dir.mkdir(parents=True, exist_ok=True)
    data = load_stage_data(
        kind, list(specs), [], config=config, stage="eval", tokenizer=tokenizer, seed=job.seed,
        cache_dir=job.cache_dir, report_dir=job.report_dir, field="--prompts" if kind == "prompt" else "--data",
    )  # fmt: skip
    for line in data.summary:
        logger.info(line)
    return data


def _batches(lengths: Sequence[int], *, by: Sequence[str] | None = None) -> Iterator[list[int]]:
    """Rows of like length together, as many as `BATCH_TOKENS` hold; those of one kind (`by`) apart from others."""
    order = sorted(range(len(lengths)), key=lambda row: ("" if by is None else by[row], lengths[row]))
    part: list[int] = []
    for row in order:
        other = part and by is not None and by[part[0]] != by[row]
        if part and (other or lengths[row] * (len(part) + 1) > BATCH_TOKENS):
            yield part
            part = []
        part.append(row)
    if part:
        yield part
