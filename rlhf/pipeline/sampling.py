"""A data set of models' own responses: N to each prompt, scored by any rewards (best-of-N, RAFT, pairs, rankings)."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from rlhf.checkpoint.atomic import replaced_file
from rlhf.checkpoint.fingerprint import model_fingerprint
from rlhf.config import ConfigError, DataConfig, ModelConfig
from rlhf.data.collate import collate_prompts
from rlhf.data.rendered import asked
from rlhf.data.stage_data import StageData, load_stage_data
from rlhf.data.templates import Template, load_template
from rlhf.distributed.collectives import any_rank, raise_on_all
from rlhf.distributed.log import logger
from rlhf.distributed.place import is_main, rank, world_size
from rlhf.distributed.world import init_world
from rlhf.generation.backend import Backend, make_backend
from rlhf.generation.diverse_beams import DiverseBeams
from rlhf.generation.token_sampling import Sampling
from rlhf.models.directories import check_causal_directory, check_scalar_directory
from rlhf.models.inner_model import eos_token_ids
from rlhf.models.loading import load_causal_lm, load_tokenizer
from rlhf.models.scalar import ScalarModel
from rlhf.numerics.statistics import last_true
from rlhf.rewards.reward import Reward, RewardError, RewardSources
from rlhf.rewards.table import RewardSpec, build_reward, check_rewards, needs_reward_model, reward_fingerprints
from rlhf.types import Responses, Rollout, TokenizedPrompt

Form = Literal["best", "pairs", "all"]
"""What is written of the responses to a prompt: the best one, the best and the worst, or all with their scores."""
SCORED_ROWS = 32
"""Responses that a reward is asked about at a time."""


@dataclass(frozen=True)
class SamplingJob:
    """What is sampled, with what, and where it goes.

    Every one of `models` gives `samples` responses to each prompt. `diversity`: the penalty of a diverse beam search
    that takes the place of sampling (`DiverseBeams`). `rows`: responses that are sampled side by side on a device.
    """

    models: Sequence[str]
    prompts: Sequence[str]
    output: Path
    rewards: Sequence[str]
    reward_model: str | None = None
    samples: int = 4
    form: Form = "best"
    temperature: float = 1.0
    diversity: float | None = None
    rows: int = 64
    seed: int = 1
    precision: Literal["fp32", "bf16"] = "fp32"
    template: str = "kullm"
    max_prompt_tokens: int = 256
    max_response_tokens: int = 256
    cache_dir: Path = Path("runs/.cache")

    def __post_init__(self) -> None:
        if not self.models:
            raise ConfigError("models is empty: name at least one directory of a model that answers")
        if repeated := [path for path in self.models if self.models.count(path) > 1]:
            raise ConfigError(f"models names {repeated[0]} twice: raise samples for more responses of one model")
        alone = 1 if self.form == "best" or len(self.models) > 1 else 2
        for name, least in (("samples", alone), ("rows", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least {least} with form={self.form}")
        if self.form not in get_args(Form):
            raise ConfigError(f"form={self.form!r} is not one of {', '.join(get_args(Form))}")
        if not 0 < self.temperature < math.inf:
            raise ConfigError(f"temperature={self.temperature} must be above 0")
        if self.diversity is not None:
            if not 0 < self.diversity < math.inf:
                raise ConfigError(f"diversity={self.diversity} must be above 0 (RRHF: 1.0); leave it out to sample")
            if self.samples < 2 or self.temperature != 1:
                raise ConfigError(
                    f"diversity={self.diversity} with samples={self.samples}, temperature={self.temperature}: a "
                    "diverse beam search needs 2 samples at least and has no temperature; leave temperature out"
                )
        if self.output.suffix != ".jsonl":
            raise ConfigError(f"output={self.output}: give a name that ends in .jsonl, which is what is written")

    def specs(self) -> list[RewardSpec]:
        """The rewards, parsed. ConfigError for one that a run over whole rollouts would need."""
        specs = [RewardSpec.parse(text) for text in self.rewards]
        if not specs:
            raise ConfigError("rewards is empty: name at least one, such as reward_model")
        if wrong := [spec.name for spec in specs if spec.normalize]:
            raise ConfigError(
                f"rewards: normalize of {wrong[0]} goes over the rollouts of a training; leave it out here"
            )
        return specs

    @property
    def parts(self) -> Path:
        """Where finished batches lie until all are."""
        return self.output.with_name(f"{self.output.name}.parts")


def sample_dataset(job: SamplingJob) -> dict[str, int | float]:
    """Sample, score and write `job.output`; counts of what was done. Batches of an interrupted run are not done again.

    A collective: each rank takes every world_size-th batch; rank 0 writes the file in the order of the prompts. The
    same job gives the same file, on however many ranks. ConfigError, DataError and RewardError say what is wrong.
    """
    specs = job.specs()
    device = init_world()
    for path in job.models:
        check_causal_directory(path)
    tokenizers = [load_tokenizer(path) for path in job.models]
    data = [_prompts(job, tokenizer) for tokenizer in tokenizers]
    check_rewards(specs, data[0].train)
    _claim_parts(job, specs, [each.fingerprint for each in data])
    per_batch = max(1, job.rows // job.samples)
    starts = range(0, len(data[0].train), per_batch)
    for model, (tokenizer, prompts) in enumerate(zip(tokenizers, data, strict=True)):
        mine = range(rank(), len(starts), world_size())
        todo = [index for index in mine if not _part(job, model, index).is_file()]
        if not todo:
            continue
        draw = _drawer(job, model, specs, tokenizer, device)
        for done, index in enumerate(todo, start=1):
            rows = draw(prompts.train[starts[index] : starts[index] + per_batch], index)
            with replaced_file(_part(job, model, index)) as part:
                part.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
            logger.info("%s: sampled %d of %d batches of this rank", job.models[model], done, len(todo))
        del draw  # and with it the model, before the next one is loaded
    any_rank(False, device)  # all parts are there
    report = _merge(job, len(starts))
    any_rank(False, device)  # all have read them
    if is_main():
        shutil.rmtree(job.parts)
    return report


def _prompts(job: SamplingJob, tokenizer: Any) -> StageData:
    return load_stage_data(
        "prompt",
        list(job.prompts),
        [],
        config=DataConfig(
            template=job.template,
            max_prompt_tokens=job.max_prompt_tokens,
            max_response_tokens=job.max_response_tokens,
            eval_fraction=0.0,
        ),
        stage="sample",
        tokenizer=tokenizer,
        seed=job.seed,
        cache_dir=job.cache_dir,
        report_dir=_made(job.parts),
        field="prompts",
    )


def _made(directory: Path) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def _claim_parts(job: SamplingJob, specs: Sequence[RewardSpec], prompts: Sequence[str]) -> None:
    """Note what the parts belong to. ConfigError where they are of another job."""
    settings = {name: value for name, value in asdict(job).items() if name not in ("output", "cache_dir", "form")}
    fingerprints = [None if path is None else model_fingerprint(path) for path in (*job.models, job.reward_model)]
    identity = json.dumps([settings, fingerprints, reward_fingerprints(specs), prompts], sort_keys=True, default=list)
    file, error = job.parts / "job.json", None
    if is_main():
        if file.is_file() and file.read_text(encoding="utf-8") != identity:
            error = ConfigError(
                f"{job.parts} holds batches of another job (another model, prompts, rewards or settings): remove it, "
                "or choose another --output"
            )
        elif not file.is_file():
            file.write_text(identity, encoding="utf-8")
    raise_on_all(error)


def _part(job: SamplingJob, model: int, index: int) -> Path:
    return job.parts / f"{model}-{index:08d}.jsonl"


def _drawer(
    job: SamplingJob, number: int, specs: Sequence[RewardSpec], tokenizer: Any, device: torch.device
) -> Callable[[Sequence[TokenizedPrompt], int], list[dict[str, Any]]]:
    """What samples with the model of that `number` and scores the responses to a batch of prompts, with the random
    numbers of the batch's number."""
    dtype = torch.bfloat16 if job.precision == "bf16" else torch.float32
    model = load_causal_lm(job.models[number], dtype=dtype).to(device).eval().requires_grad_(False)
    eos_ids = eos_token_ids(model, tokenizer)
    reward = _reward(job, specs, tokenizer, eos_ids, device, dtype)
    pad, template = tokenizer.pad_token_id, load_template(job.template, tokenizer)
    backend: Backend | DiverseBeams
    if job.diversity is None:
        backend = make_backend("own", model, eos_ids=eos_ids, pad_token_id=pad, seed=job.seed, slots=job.rows)
    else:
        backend = DiverseBeams(model, eos_ids=eos_ids, pad_token_id=pad, groups=job.samples, penalty=job.diversity)
    sampling = Sampling(job.max_response_tokens, temperature=job.temperature, vocabulary_size=len(tokenizer))

    def draw(batch: Sequence[TokenizedPrompt], index: int) -> list[dict[str, Any]]:
        examples = [prompt for prompt in batch for _ in range(job.samples)]
        first = number * max(job.rows, job.samples)  # models that are alike draw with other random numbers
        given = collate_prompts(examples, pad, row_ids=list(range(first, first + len(examples)))).to(device)
        rollout = backend.generate(given, sampling, iteration=index)
        texts, ended = _texts(rollout, tokenizer), _ended(rollout, eos_ids)
        scores: list[float] = []
        for start in range(0, len(examples), SCORED_ROWS):
            rows = slice(start, start + SCORED_ROWS)
            part = Responses(rollout.rows(rows).trimmed()[0], examples[rows], texts[rows], ended[rows])
            scores += _scores(reward, part)
        return [
            {
                "id": prompt.id,
                **_written_prompt(prompt, template),
                "responses": texts[row : row + job.samples],
                "scores": scores[row : row + job.samples],
                "ended": ended[row : row + job.samples].tolist(),
            }
            for prompt, row in zip(batch, range(0, len(examples), job.samples), strict=True)
        ]

    return draw


def _written_prompt(prompt: TokenizedPrompt, template: Template) -> dict[str, Any]:
    """The prompt as training is to read it again: its turns, or the text that the actor read where the turns would be
    rendered as another one (an instruction with an input)."""
    turns = list(map(dict, prompt.messages))
    if turns and template.render_messages(turns).endswith(prompt.text):  # its end where it is too long
        return {"prompt": asked(prompt), "messages": turns}
    return {"prompt": prompt.text, "messages": []}


def _reward(
    job: SamplingJob, specs: Sequence[RewardSpec], tokenizer: Any, eos_ids: Sequence[int], device: torch.device,
    dtype: torch.dtype,
) -> Reward:  # fmt: skip
    engine, reward_tokenizer = None, None
    if needs_reward_model(specs):
        if job.reward_model is None:
            raise ConfigError("the reward reward_model needs --reward_model: a directory that step 2 saved")
        check_scalar_directory(job.reward_model)
        reward_tokenizer = load_tokenizer(job.reward_model)
        engine = ScalarModel.from_pretrained(job.reward_model, ModelConfig(), dtype=dtype)
        engine = engine.to(device).eval().requires_grad_(False)
    chat = job.template == "chat"
    return build_reward(specs, RewardSources(tokenizer, tuple(eos_ids), engine, reward_tokenizer, chat))


def _scores(reward: Reward, responses: Responses) -> list[float]:
    """What a response is worth: its score and the rewards of its tokens. RewardError where that is not finite."""
    found = reward.score(responses)
    scores = found.scores if found.per_token is None else found.scores + found.per_token.sum(1)
    for row, score in enumerate(scores.tolist()):
        if not math.isfinite(score):
            raise RewardError(f"the reward gave {score} for a response to prompt {responses.prompts[row].id!r}")
    return list(scores.tolist())


def _texts(rollout: Rollout, tokenizer: Any) -> list[str]:
    rows = [ids[mask].tolist() for ids, mask in zip(rollout.response_ids, rollout.response_mask, strict=True)]
    return [text.strip() for text in tokenizer.batch_decode(rows, skip_special_tokens=True)]


def _ended(rollout: Rollout, eos_ids: Sequence[int]) -> torch.Tensor:
    final = rollout.response_ids.gather(1, last_true(rollout.response_mask).unsqueeze(1)).squeeze(1)
    return (torch.isin(final, torch.tensor(list(eos_ids), device=final.device)) & rollout.response_mask.any(1)).cpu()


def _merge(job: SamplingJob, batches: int) -> dict[str, int | float]:
    """Write the data set from its parts, on rank 0; what stands in it."""
    by_model = [
        [
            json.loads(line)
            for index in range(batches)
            for line in _part(job, model, index).read_text(encoding="utf-8").split("\n")  # a text may hold other ends
            if line
        ]
        for model in range(len(job.models))
    ]
    rows = [_together(of_prompt) for of_prompt in zip(*by_model, strict=True)]
    written = [form for row in rows if (form := formed(row, job.form)) is not None]
    if is_main():
        _made(job.output.parent)
        with replaced_file(job.output) as part:
            part.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in written), encoding="utf-8")
    scores = torch.tensor([row["scores"] for row in rows])
    return {
        "prompts": len(rows),
        "written": len(written),
        "mean_score": float(scores.mean()),
        "mean_best_score": float(scores.amax(1).mean()),
        "eos_rate": float(torch.tensor([row["ended"] for row in rows]).float().mean()),
    }


def _together(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The responses of several models to one prompt as one row, in their order."""
    lists = {name: [entry for row in rows for entry in row[name]] for name in ("responses", "scores", "ended")}
    return {**rows[0], **lists}


def formed(row: Mapping[str, Any], form: Form) -> dict[str, Any] | None:
    """What is written of the responses to a prompt: a row that SFT (`best`), DPO (`pairs`) or RRHF and the reward model
    (`all`) read without a mapping.

    A response that was cut off is left out, since training would teach its end, and so is one that was there before.
    None where too few are left, or where the two of a pair score alike.
    """
    found: dict[str, float] = {}
    for text, score, ended in zip(row["responses"], row["scores"], row["ended"], strict=True):
        if ended:
            found.setdefault(text, score)
    if len(found) < (1 if form == "best" else 2):
        return None
    best, worst = (extreme(found, key=found.__getitem__) for extreme in (max, min))
    turns = row["messages"]
    if form == "best":
        said = {"role": "assistant", "content": best}
        asked_for = {"messages": [*turns, said]} if turns else {"prompt": row["prompt"], "response": best}
        return {"id": row["id"], **asked_for, "score": found[best]}
    prompt = turns if len(turns) > 1 else row["prompt"]
    if form == "all":
        return {"id": row["id"], "prompt": prompt, "responses": [*found], "scores": [*found.values()]}
    if found[best] == found[worst]:
        return None
    sides: dict[str, Any] = {"chosen": best, "rejected": worst}
    if len(turns) > 1:
        sides = {name: [{"role": "assistant", "content": text}] for name, text in sides.items()}
    return {"id": row["id"], "prompt": prompt, **sides, "score_chosen": found[best], "score_rejected": found[worst]}
