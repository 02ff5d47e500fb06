"""Scores that an HTTP endpoint gives: the client of the protocol in docs/reward_sources.md.

A POST of `{"prompts": [...], "responses": [...], ...}` is answered with `{"scores": [...]}`, a number for each
response or a list of one for each of its tokens. `rlhf serve-reward` is a server of it.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections import Counter, deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from rlhf.config import ConfigError
from rlhf.rewards.reward import RewardError, RewardSources, Score, reward_output

if TYPE_CHECKING:
    from rlhf.types import Responses, RewardOutput, TokenizedPrompt

PROTOCOL = 1
TRY_AGAIN = (408, 425, 429, 500, 502, 503, 504)
"""Answers after which the same request may succeed."""
BACKOFF_SECONDS = 0.5
"""Before the second retry, twice as long before each further one, and up to as much again at random."""
LONGEST_BACKOFF_SECONDS = 30.0
CONNECT_SECONDS = 10.0
SHOWN = 200
"""Characters of an answer in an error."""


class _Refused(Exception):
    """An answer that is no list of scores; the sentence that says so."""


_Key = tuple[str, str, tuple[int, ...], bool]
_Answer = list[Score] | str
"""The scores of a request, or why there are none."""


@dataclass(frozen=True)
class _Row:
    """A response to be scored; two with the same `key` may take each other's score."""

    prompt: TokenizedPrompt
    text: str
    ids: tuple[int, ...]
    ended: bool

    @property
    def key(self) -> _Key:
        return self.prompt.id, self.prompt.text, self.ids, self.ended


def _rows(responses: Responses) -> list[_Row]:
    rollout = responses.rollout
    ids = [tuple(row[mask].tolist()) for row, mask in zip(rollout.response_ids, rollout.response_mask, strict=True)]
    return [_Row(*row) for row in zip(responses.prompts, responses.texts, ids, responses.ended.tolist(), strict=True)]


class HttpReward:
    """Asks an endpoint for the scores of this rank's responses, `batch_size` in a request and `concurrency` requests at
    a time.

    A request that is not answered within `request_seconds`, whose connection fails, or that is answered with one of
    `TRY_AGAIN`, is sent again up to `retries` times, as late as `Retry-After` says or with growing, random pauses. What
    has no score `timeout_seconds` after it was handed over is an error that names the prompt. `token_variable` names
    the environment variable with a bearer token.
    """

    training_range = None

    def __init__(
        self,
        sources: RewardSources,
        *,
        url: str,
        batch_size: int = 32,
        concurrency: int = 4,
        timeout_seconds: float = 300.0,
        request_seconds: float = 60.0,
        retries: int = 5,
        token_variable: str | None = None,
    ) -> None:
        del sources
        _require_urllib3()
        if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).hostname:
            raise ConfigError(f"http: url={url!r} is no address such as http://127.0.0.1:8765")
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("concurrency", concurrency, 1),
            ("retries", retries, 0),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ConfigError(f"http: {name}={value!r} must be a whole number of at least {least}")
        for name, seconds in (("timeout_seconds", timeout_seconds), ("request_seconds", request_seconds)):
            if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 < seconds < math.inf:
                raise ConfigError(f"http: {name}={seconds!r} must be a number of seconds above 0")
        if token_variable is not None and not os.environ.get(token_variable):
            raise ConfigError(
                f"http: token_variable={token_variable}: there is no such environment variable, or it is empty"
            )
        self.url, self.batch_size, self.concurrency = url, batch_size, concurrency
        self.timeout_seconds, self.request_seconds, self.retries = timeout_seconds, request_seconds, retries
        self.token_variable = token_variable
        self.fingerprint = url
        self._waiting: list[_Row] = []
        self._sent: dict[_Key, deque[tuple[Future[_Answer], int, float]]] = {}

    def check(self, prompts: Sequence[TokenizedPrompt]) -> None:
        """ConfigError for an endpoint that does not answer a request without responses with no scores."""
        del prompts
        try:
            self._ask({"protocol": PROTOCOL, "prompts": [], "responses": []}, 0, retries=min(self.retries, 1))
        except _Refused as error:
            raise ConfigError(
                f"reward http {self.url}: {error}. It was asked for the scores of no responses; start it (`rlhf "
                "serve-reward` is such a server), or correct url"
            ) from error

    def prefetch(self, responses: Responses, *, more: bool) -> None:
        """Send the requests that are full, and where no `more` rows follow the last one too."""
        for row in _rows(responses):
            self._add(row)
        if not more:
            self._send()

    def score(self, responses: Responses) -> RewardOutput:
        """See `rlhf.rewards.reward.Reward`. RewardError, with the prompt's id, where no score came in time."""
        rows = _rows(responses)
        known = Counter(row.key for row in self._waiting)
        known.update({key: len(places) for key, places in self._sent.items()})
        for row in rows:
            known[row.key] -= 1
            if known[row.key] < 0:
                self._add(row)
        self._send()
        found = [_checked(self._answer(*self._sent[row.key].popleft()), row) for row in rows]
        self._sent = {key: places for key, places in self._sent.items() if places}
        by_token = any(isinstance(each, list) for each in found)
        if by_token and any(isinstance(each, float) for each in found):
            raise RewardError(f"reward http {self.url} gave numbers for some responses and lists for others")
        refused = {number: each for number, each in enumerate(found) if isinstance(each, str)}
        missing: Score = [] if by_token else math.nan
        output = reward_output([missing if isinstance(each, str) else each for each in found], responses)
        if refused:
            number, message = next(iter(refused.items()))
            raise RewardError(
                f"reward http {self.url}: no score for {len(refused)} of {len(rows)} responses, the first to prompt "
                f"{rows[number].prompt.id!r}: {message}",
                rows=list(refused),
                output=output,
            )
        return output

    @cached_property
    def _threads(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(self.concurrency, thread_name_prefix="rlhf-http-reward")

    @cached_property
    def _connections(self) -> Any:
        import urllib3

        return urllib3.PoolManager(maxsize=self.concurrency, block=True)

    def _add(self, row: _Row) -> None:
        self._waiting.append(row)
        if len(self._waiting) == self.batch_size:
            self._send()

    def _send(self) -> None:
        """Ask for the scores of the rows that wait."""
        if self._waiting:
            until = time.monotonic() + self.timeout_seconds
            future = self._threads.submit(self._scores_of, _request(self._waiting), until)
            for place, row in enumerate(self._waiting):
                self._sent.setdefault(row.key, deque()).append((future, place, until))
            self._waiting = []

    @property
    def _late(self) -> str:
        return (
            f"no answer within timeout_seconds={self.timeout_seconds:g}, the wait for {self.concurrency} requests at a "
            "time included"
        )

    def _answer(self, future: Future[_Answer], place: int, until: float) -> Score | str:
        """The score at `place` of a request, or why there is none."""
        done, _ = wait([future], timeout=max(0.0, until - time.monotonic()))
        if not done:
            return self._late
        found = future.result()
        return found if isinstance(found, str) else found[place]

    def _scores_of(self, request: dict[str, Any], until: float) -> _Answer:
        left = until - time.monotonic()
        if left <= 0:  # nobody waits for it any more
            return self._late
        try:
            return self._ask(request, len(request["responses"]), retries=self.retries, seconds=left)
        except _Refused as error:
            return str(error)

    def _ask(self, request: dict[str, Any], expected: int, *, retries: int, seconds: float = math.inf) -> list[Score]:
        """The scores of a request, a try of which takes no more than `seconds`. `_Refused` says why there are none."""
        import urllib3

        headers = {"Content-Type": "application/json"}
        if self.token_variable is not None:
            headers["Authorization"] = f"Bearer {os.environ[self.token_variable]}"
        again = urllib3.Retry(
            total=retries,
            allowed_methods=None,
            status_forcelist=TRY_AGAIN,
            backoff_factor=BACKOFF_SECONDS,
            backoff_jitter=BACKOFF_SECONDS,
            backoff_max=LONGEST_BACKOFF_SECONDS,
            raise_on_status=False,
        )
        longest = min(self.request_seconds, seconds)
        limits = urllib3.Timeout(connect=min(CONNECT_SECONDS, longest), read=longest)
        body = json.dumps(request).encode("ascii")  # also where a text holds half of a surrogate pair
        try:
            answer = self._connections.request(
                "POST", self.url, body=body, headers=headers, timeout=limits, retries=again
            )
        except urllib3.exceptions.HTTPError as error:
            reason = getattr(error, "reason", None) or error
            raise _Refused(f"no answer ({type(reason).__name__}: {reason})") from error
        text = answer.data.decode("utf-8", errors="replace")
        if answer.status != 200:
            raise _Refused(f"it answered {answer.status}: {text[:SHOWN]!r}")
        return _scores(text, expected)


def _request(rows: Sequence[_Row]) -> dict[str, Any]:
    from rlhf.data.rendered import asked

    prompts = [row.prompt for row in rows]
    columns = sorted({name for prompt in prompts for name in prompt.columns})
    return {
        "protocol": PROTOCOL,
        "prompts": [asked(prompt) for prompt in prompts],
        "responses": [row.text for row in rows],
        "response_ids": [row.ids for row in rows],
        "messages": [list(map(dict, prompt.messages)) for prompt in prompts],
        "rendered_prompts": [prompt.text for prompt in prompts],
        "ended": [row.ended for row in rows],
        "ids": [prompt.id for prompt in prompts],
        "columns": {name: [prompt.columns.get(name) for prompt in prompts] for name in columns},
    }


def _scores(text: str, expected: int) -> list[Score]:
    """The numbers of an answer, or lists of them; they need not be finite. `_Refused` for anything else."""
    try:
        scores = json.loads(text)["scores"]
    except (ValueError, TypeError, KeyError) as error:
        raise _Refused(f'it answered {text[:SHOWN]!r}, which is no {{"scores": [...]}}') from error
    if not isinstance(scores, list) or len(scores) != expected:
        count = f"{len(scores)} scores" if isinstance(scores, list) else repr(scores)[:SHOWN]
        raise _Refused(f"it gave {count} for {expected} responses")
    return [[_number(one) for one in each] if isinstance(each, list) else _number(each) for each in scores]


def _number(value: Any) -> float:
    if value is None:  # JSON has no nan
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _Refused(f"it gave {value!r:.80} as a score, and needed is a number")
    return float(value)


def _checked(found: Score | str, row: _Row) -> Score | str:
    """The score, or why it is none for this response."""
    if isinstance(found, str):
        return found
    numbers = found if isinstance(found, list) else [found]
    if strange := [one for one in numbers if not math.isfinite(one)]:
        return f"it gave {strange[0]}, and needed is a finite number"
    if isinstance(found, list) and len(found) != len(row.ids):
        return f"it gave {len(found)} numbers for the {len(row.ids)} tokens of the response, its end included"
    return found


def _require_urllib3() -> None:
    try:
        import urllib3  # noqa: F401
    except ImportError as error:
        raise ConfigError("the reward http needs urllib3: pip install 'rlhf[http]', or pip install urllib3") from error
