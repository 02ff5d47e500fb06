"""Questions to any server of OpenAI's chat protocol, each answer kept on disk at once."""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from rlhf.config import ConfigError
from rlhf.distributed.log import logger
from rlhf.rewards.http import BACKOFF_SECONDS, CONNECT_SECONDS, LONGEST_BACKOFF_SECONDS, SHOWN, TRY_AGAIN

Message = dict[str, str]
KEY_VARIABLE = "OPENAI_API_KEY"


class JudgeError(RuntimeError):
    """A judge that cannot be asked: says what was asked of whom, and what came."""


class UnreadableError(ValueError):
    """An answer in which what was asked for is not found; the sentence says what is missing, to the judge itself."""


@dataclass(frozen=True)
class JudgeSettings:
    """Whom to ask, and how.

    `url`: up to `/v1`. `key_variable` names the environment variable with the key; empty asks without one. A request
    without an answer for `request_seconds`, a failed connection, and what may pass (429, 5xx) are tried again `retries`
    times, as late as `Retry-After` says or with growing pauses. An answer that cannot be read is asked for again
    `rereads` times, with what was missing. `cache`: the file that keeps every answer; it may be shared by runs.
    """

    url: str
    model: str
    cache: Path
    key_variable: str = KEY_VARIABLE
    temperature: float = 0.0
    max_tokens: int = 1024
    concurrency: int = 4
    request_seconds: float = 120.0
    retries: int = 5
    rereads: int = 2

    def __post_init__(self) -> None:
        if urlsplit(self.url).scheme not in ("http", "https") or not urlsplit(self.url).hostname:
            raise ConfigError(f"url={self.url!r} is no address such as https://api.openai.com/v1")
        for name, least in (("max_tokens", 1), ("concurrency", 1), ("retries", 0), ("rereads", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least {least}")
        if self.request_seconds <= 0 or self.temperature < 0:
            raise ConfigError(
                f"request_seconds={self.request_seconds:g} must be above 0, temperature={self.temperature:g} at least 0"
            )
        if self.key_variable and not os.environ.get(self.key_variable):
            raise ConfigError(
                f"the judge's key is missing: set the environment variable {self.key_variable}, name another one with "
                "--key_variable, or give --key_variable '' for a server that wants none"
            )


@dataclass
class Usage:
    """What the judge was asked: `calls` over the network, `cached` from disk, tokens of all of them, how many answers
    were unreadable at first, and how many to the last."""

    calls: int = 0
    cached: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    asked_again: int = 0
    unreadable: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def add(self, **counts: int) -> None:
        """Count more."""
        with self._lock:
            for name, count in counts.items():
                setattr(self, name, getattr(self, name) + count)

    def content(self) -> dict[str, int]:
        """The counts by name."""
        return {name: value for name, value in vars(self).items() if not name.startswith("_")}


@dataclass(frozen=True)
class Question:
    """What is asked, and what reads the answer: a value, or `UnreadableError`."""

    messages: Sequence[Message]
    read: Callable[[str], Any]


class AnswerCache:
    """Answers by a checksum of the whole request, in SQLite: what was paid for is never lost, nor paid for twice."""

    def __init__(self, path: Path) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._base = sqlite3.connect(path, check_same_thread=False, timeout=30.0)
            self._base.execute("PRAGMA journal_mode=WAL")
            self._base.execute("CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, request TEXT, answer TEXT)")
        except (OSError, sqlite3.Error) as error:
            raise ConfigError(f"the judge's cache {path} cannot be used: {error}") from error
        self._lock = threading.Lock()

    def get(self, key: str) -> dict[str, Any] | None:
        """The answer under `key`, None where there is none."""
        with self._lock:
            row = self._base.execute("SELECT answer FROM answers WHERE key = ?", (key,)).fetchone()
        found: dict[str, Any] | None = None if row is None else json.loads(row[0])
        return found

    def put(self, key: str, request: str, answer: dict[str, Any]) -> None:
        """Keep an answer for good."""
        with self._lock, self._base:
            row = (key, request, json.dumps(answer, ensure_ascii=False))
            self._base.execute("INSERT OR REPLACE INTO answers VALUES (?, ?, ?)", row)

    def close(self) -> None:
        """No more answers."""
        self._base.close()


class JudgeClient:
    """Asks the questions of `ask`, a bounded number at a time."""

    def __init__(self, settings: JudgeSettings) -> None:
        try:
            import urllib3
        except ImportError as error:
            raise ConfigError("a judge needs urllib3: pip install 'rlhf[eval]', or pip install urllib3") from error
        self.settings = settings
        self.usage = Usage()
        self._cache = AnswerCache(settings.cache)
        self._connections = urllib3.PoolManager(maxsize=settings.concurrency, block=True)

    def ask(self, questions: Iterable[Question]) -> list[Any]:
        """What was read of each answer, in order; None where it could not be read to the last.

        The first `JudgeError` ends it, once those that are on their way have been kept.
        """
        with ThreadPoolExecutor(self.settings.concurrency, thread_name_prefix="rlhf-judge") as threads:
            futures = [threads.submit(self._read, question) for question in questions]
            try:
                return [future.result() for future in futures]
            except BaseException:
                for future in futures:
                    future.cancel()
                raise

    def close(self) -> None:
        """No more questions."""
        self._cache.close()
        self._connections.clear()

    def _read(self, question: Question) -> Any:
        messages = list(question.messages)
        for again in range(self.settings.rereads + 1):
            text = self._answer(messages)
            try:
                return question.read(text)
            except UnreadableError as error:
                self.usage.add(asked_again=int(again == 0))
                messages += [{"role": "assistant", "content": text}, {"role": "user", "content": str(error)}]
        self.usage.add(unreadable=1)
        logger.warning("the judge's answer cannot be read after %d tries: %r", self.settings.rereads + 1, text[:SHOWN])
        return None

    def _answer(self, messages: Sequence[Message]) -> str:
        settings = self.settings
        body = json.dumps(
            {
                "model": settings.model,
                "messages": list(messages),
                "temperature": settings.temperature,
                "max_tokens": settings.max_tokens,
            }
        )
        key = hashlib.sha256(body.encode()).hexdigest()
        answer = self._cache.get(key)
        self.usage.add(cached=int(answer is not None), calls=int(answer is None))
        if answer is None:
            answer = self._asked(body)
            self._cache.put(key, body, answer)
        self.usage.add(prompt_tokens=answer["prompt_tokens"], completion_tokens=answer["completion_tokens"])
        return str(answer["text"])

    def _asked(self, body: str) -> dict[str, Any]:
        import urllib3

        settings = self.settings
        headers = {"Content-Type": "application/json"}
        if settings.key_variable:
            headers["Authorization"] = f"Bearer {os.environ[settings.key_variable]}"
        again = urllib3.Retry(
            total=settings.retries, allowed_methods=None, status_forcelist=TRY_AGAIN, backoff_factor=BACKOFF_SECONDS,
            backoff_jitter=BACKOFF_SECONDS, backoff_max=LONGEST_BACKOFF_SECONDS, raise_on_status=False,
        )  # fmt: skip
        limits = urllib3.Timeout(connect=min(CONNECT_SECONDS, settings.request_seconds), read=settings.request_seconds)
        url = f"{settings.url.rstrip('/')}/chat/completions"
        try:
            answer = self._connections.request("POST", url, body=body, headers=headers, timeout=limits, retries=again)
        except urllib3.exceptions.HTTPError as error:
            reason = getattr(error, "reason", None) or error
            raise JudgeError(f"judge {url}: no answer ({type(reason).__name__}: {reason})") from error
        text = answer.data.decode("utf-8", errors="replace")
        if answer.status != 200:
            raise JudgeError(f"judge {url}, model {settings.model}: it answered {answer.status}: {text[:SHOWN]!r}")
        try:
            content = json.loads(text)
            said, used = content["choices"][0]["message"]["content"], content.get("usage") or {}
            counts = {name: int(used.get(name) or 0) for name in ("prompt_tokens", "completion_tokens")}
        except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            raise JudgeError(f"judge {url}: it answered {text[:SHOWN]!r}, which is no chat completion") from error
        return {"text": said or "", **counts}
