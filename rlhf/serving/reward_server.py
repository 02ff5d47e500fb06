"""A reward behind HTTP: the server of the protocol that `rlhf.rewards.http` speaks."""

from __future__ import annotations

import hmac
import json
import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rlhf.config import ConfigError, ModelConfig
from rlhf.data.spec import DataError
from rlhf.data.templates import Template, load_template
from rlhf.data.tokenize import TextEncoder
from rlhf.models.directories import is_scalar_directory
from rlhf.models.loading import load_tokenizer
from rlhf.models.scalar import ScalarModel
from rlhf.rewards.reward import Reward, RewardError, RewardSources
from rlhf.rewards.table import REWARDS, RewardSpec, build_reward, check_rewards
from rlhf.types import Responses, Rollout, TokenizedPrompt

MOST_ROWS = 4096
"""Responses of one request."""
MOST_COMPUTED = 16
"""Responses that a model reads at a time."""


class RequestError(ValueError):
    """A request that cannot be scored: says what it lacks."""


@dataclass(frozen=True)
class ServedReward:
    """A reward that scores texts, and what it takes to make token ids of them (None: it reads text alone).

    `reencodes`: it is a model with a vocabulary of its own, which has no use for the ids of a request.
    """

    name: str
    reward: Reward
    encoder: TextEncoder | None = None
    template: Template | None = None
    reencodes: bool = False

    @classmethod
    def load(cls, given: str, *, tokenizer: str | None = None, template: str | None = None) -> ServedReward:
        """From a reward model's directory, or any entry that `rewards` may have. ConfigError says what is missing.

        `tokenizer` is a directory, for rules that count tokens; `template` renders the prompts of requests that have
        no `rendered_prompts`.
        """
        if Path(given).is_dir() and is_scalar_directory(given):
            read = load_tokenizer(given)
            dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
            model = ScalarModel.from_pretrained(given, ModelConfig(), dtype=dtype)
            model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval().requires_grad_(False)
            spec = RewardSpec("reward_model", 1.0, {})
            sources = RewardSources(read, (int(read.eos_token_id),), engine=model, reward_tokenizer=read)
        elif Path(given).is_dir():
            entry = json.dumps({"name": "classifier", "model": given})
            return cls.load(entry, tokenizer=tokenizer, template=template)
        else:
            spec = RewardSpec.parse(given)
            if spec.normalize or spec.fallback is not None:
                raise ConfigError("serve-reward: normalize and fallback belong to the run that asks, not to the server")
            if spec.name == "reward_model":
                raise ConfigError("serve-reward: name the reward model's directory in the place of reward_model")
            if spec.name != "function":  # whose columns come with the requests
                check_rewards([spec], [])
            read = None if tokenizer is None else load_tokenizer(tokenizer)
            sources = RewardSources(read, () if read is None else (int(read.eos_token_id),))
        if getattr(REWARDS[spec.name].build, "counts_tokens", False) and read is None:
            raise ConfigError(f"serve-reward: {spec.name} counts tokens: name the actor's directory with --tokenizer")
        reward = build_reward([spec], sources)
        encoder = None if read is None else TextEncoder(read, prompt_has_special_tokens=template == "chat")
        rendered = None if template is None else load_template(template, read)
        return cls(spec.label, reward, encoder, rendered, reencodes=spec.name == "reward_model")

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return next(
            (p.device for p in getattr(self.reward, "engine", torch.nn.Module()).parameters()), torch.device("cpu")
        )

    def scores(self, request: dict[str, Any]) -> list[float | None] | list[list[float | None]]:
        """A score for each response, or a list of those of its tokens; None for one that is not finite, which JSON
        cannot say. RequestError and RewardError say why there are none."""
        prompts, texts = self._prompts(request), _strings(request, "responses", None)
        if len(prompts) != len(texts):
            raise RequestError(f"{len(prompts)} prompts and {len(texts)} responses: a prompt for each is needed")
        ended = request.get("ended") or [True] * len(texts)
        if not isinstance(ended, list) or len(ended) != len(texts) or not all(isinstance(end, bool) for end in ended):
            raise RequestError(f"ended must be a list of {len(texts)} truth values, one for each response")
        ids = _ids(request, len(texts))
        scores: list[float | None] = []
        by_token: list[list[float | None]] = []
        for start in range(0, len(texts), MOST_COMPUTED):
            rows = slice(start, start + MOST_COMPUTED)
            rollout = self._rollout(prompts[rows], texts[rows], ended[rows], None if ids is None else ids[rows])
            responses = Responses(rollout, prompts[rows], texts[rows], torch.tensor(ended[rows], dtype=torch.bool))
            found = self.reward.score(responses)
            if found.per_token is None:
                scores += map(_json_number, found.scores.tolist())
            else:
                for numbers, mask in zip(found.per_token, rollout.response_mask, strict=True):
                    by_token.append([_json_number(number) for number in numbers[mask].tolist()])
        if scores and by_token:
            raise RewardError(f"reward {self.name} gave numbers for some responses and lists for others")
        return by_token or scores

    def _prompts(self, request: dict[str, Any]) -> list[TokenizedPrompt]:
        asked = _strings(request, "prompts", None)
        count = len(asked)
        if count > MOST_ROWS:
            raise RequestError(f"{count} prompts: a request may have {MOST_ROWS}")
        messages = request.get("messages") or [[]] * count
        columns = request.get("columns") or {}
        if not isinstance(columns, dict) or not all(
            isinstance(each, list) and len(each) == count for each in columns.values()
        ):
            raise RequestError(f"columns must be lists of {count} values by name, one for each prompt")
        if not isinstance(messages, list) or len(messages) != count:
            raise RequestError(f"messages must be a list of {count} lists of turns, one for each prompt")
        for each in messages:
            if not isinstance(each, list) or not all(map(_is_turn, each)):
                raise RequestError('messages must be lists of turns such as {"role": "user", "content": "..."}')
        turns = [each or [{"role": "user", "content": text}] for each, text in zip(messages, asked, strict=True)]
        ids = _strings(request, "ids", count) or [f"row {row}" for row in range(count)]
        rendered = _strings(request, "rendered_prompts", count)
        if rendered is None:
            rendered = [self._render(each) for each in turns]
        self._check_markup(rendered)
        encoded = [each.ids for each in self.encoder.prompts(rendered)] if self.encoder else [()] * count
        return [
            TokenizedPrompt(
                ids[row],
                encoded[row],
                rendered[row],
                "",
                tuple(turns[row]),
                {name: each[row] for name, each in columns.items()},
            )
            for row in range(count)
        ]

    def _check_markup(self, rendered: Sequence[str]) -> None:
        """RequestError for prompts whose special tokens this server would read as plain text."""
        if self.encoder is None or self.encoder.prompt_has_special_tokens:
            return
        tokenizer = self.encoder.tokenizer
        common = {tokenizer.eos_token, tokenizer.bos_token, tokenizer.pad_token, tokenizer.unk_token}
        for text in rendered:
            for token in set(tokenizer.all_special_tokens) - common:
                if token in text:
                    raise RequestError(
                        f"the rendered prompts hold the special token {token!r}: start the server with --template chat"
                    )

    def _render(self, turns: Sequence[dict[str, str]]) -> str:
        if self.template is not None:
            try:
                return self.template.render_messages(turns)
            except DataError as error:
                raise RequestError(f"messages cannot be rendered: {error}") from error
        if self.encoder is not None:
            raise RequestError("rendered_prompts are missing, and the server has no --template to render prompts with")
        return turns[-1]["content"]

    def _rollout(
        self,
        prompts: Sequence[TokenizedPrompt],
        texts: Sequence[str],
        ended: Sequence[bool],
        ids: Sequence[Sequence[int]] | None,
    ) -> Rollout:
        """The rows as token ids: those that the request tells (`ids`), or what a tokenizer makes of the texts."""
        responses: list[Sequence[int]] = [()] * len(texts)
        if ids is not None and not self.reencodes:
            responses = list(ids)
        elif self.encoder is not None:
            responses = [
                self.encoder.responses([text], append_eos=bool(end))[0].ids
                for text, end in zip(texts, ended, strict=True)
            ]
        prompt_ids, prompt_mask = _padded([prompt.input_ids for prompt in prompts], left=True)
        response_ids, response_mask = _padded(responses, left=False)
        logprobs = torch.zeros(response_ids.shape)
        return Rollout(prompt_ids, prompt_mask, response_ids, response_mask, logprobs).to(self.device)


def _ids(request: dict[str, Any], count: int) -> list[list[int]] | None:
    """The token ids of the responses, None where the request has none. RequestError for anything else."""
    found = request.get("response_ids")
    if found is None:
        return None
    if not isinstance(found, list) or len(found) != count or not all(isinstance(each, list) for each in found):
        raise RequestError(f"response_ids must be a list of {count} lists of token ids, one for each response")
    if not all(type(one) is int and 0 <= one < 2**31 for each in found for one in each):
        raise RequestError("response_ids must be lists of token ids, whole numbers of at least 0")
    return found


def _json_number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def create_app(served: ServedReward, *, token: str | None = None) -> Any:
    """The FastAPI application: `POST /` scores, `GET /health` says what is served. ConfigError without FastAPI.

    With a `token` requests need it as `Authorization: Bearer`. One request is scored at a time.
    """
    try:
        from fastapi import FastAPI, Request
        from fastapi.responses import JSONResponse
        from starlette.concurrency import run_in_threadpool
    except ImportError as error:
        raise ConfigError("serve-reward needs FastAPI and uvicorn: pip install 'rlhf[serve]'") from error

    app = FastAPI(title=f"reward {served.name}", openapi_url=None)
    turn = threading.Lock()

    def scored(request: dict[str, Any]) -> list[float | None] | list[list[float | None]]:
        with turn:
            return served.scores(request)

    @app.get("/health")
    def health() -> dict[str, str]:
        return {"status": "ok", "reward": served.name}

    async def score(request: Request) -> JSONResponse:
        given = request.headers.get("authorization", "")
        if token is not None and not hmac.compare_digest(given.encode(), f"Bearer {token}".encode()):
            return JSONResponse({"error": "Authorization: Bearer with the server's token is needed"}, 401)
        try:
            content = await request.json()
        except ValueError as error:
            return JSONResponse({"error": f"no JSON: {error}"}, 400)
        if not isinstance(content, dict):
            return JSONResponse({"error": "needed is an object with prompts and responses"}, 422)
        try:
            return JSONResponse({"scores": await run_in_threadpool(scored, content)})
        except (RequestError, RewardError, ConfigError) as error:
            return JSONResponse({"error": str(error)}, 422)

    score.__annotations__["request"] = Request  # FastAPI reads it, and finds no name of this function by text
    app.post("/")(score)
    return app


def _is_turn(turn: Any) -> bool:
    return isinstance(turn, dict) and all(isinstance(turn.get(key), str) for key in ("role", "content"))


def _strings(request: dict[str, Any], name: str, count: int | None) -> Any:
    """The list of texts `name` of a request; None where an optional one (`count`) is not there."""
    found = request.get(name)
    if found is None and count is not None:
        return None
    if not isinstance(found, list) or not all(isinstance(each, str) for each in found):
        raise RequestError(f"{name} must be a list of texts")
    if count is not None and len(found) != count:
        raise RequestError(f"{len(found)} {name} for {count} prompts: one for each is needed")
    return found


def _padded(rows: Sequence[Sequence[int]], *, left: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask [B, L], L at least 1."""
    longest = max([1, *map(len, rows)])
    ids, mask = torch.zeros(len(rows), longest, dtype=torch.long), torch.zeros(len(rows), longest, dtype=torch.bool)
    for index, row in enumerate(rows):
        places = slice(longest - len(row), longest) if left else slice(0, len(row))
        ids[index, places] = torch.tensor(row, dtype=torch.long)
        mask[index, places] = True
    return ids, mask
