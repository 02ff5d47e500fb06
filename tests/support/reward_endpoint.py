"""A reward server over loopback: the real one, and one that misbehaves as it is told."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import uvicorn

from rlhf.distributed.place import free_port


@contextmanager
def served(app: Any) -> Iterator[str]:
    """The address of an ASGI application within the block."""
    port = free_port()
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="error", lifespan="off"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    until = time.monotonic() + 20
    while not server.started:
        assert thread.is_alive() and time.monotonic() < until
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = server.force_exit = True
        thread.join(10)


class Endpoint:
    """Answers each request with the next of `behaviours`, and as it should once they are used up: the score of a
    response is its length in characters. A behaviour is a status, a text in the place of JSON, the scores, or
    {"seconds": ...} before a right answer. `requests` has the bodies, `most_at_once` how many were open together."""

    def __init__(self, behaviours: Sequence[Any] = (), *, seconds: float = 0.0, retry_after: str | None = None) -> None:
        self.behaviours = list(behaviours)
        self.seconds = seconds
        self.retry_after = retry_after
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.times: list[float] = []
        self.open = self.most_at_once = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        import asyncio

        body, more = b"", True
        while more:
            message = await receive()
            body += message.get("body", b"")
            more = message.get("more_body", False)
        request = json.loads(body)
        self.requests.append(request)
        self.times.append(time.monotonic())
        self.headers.append({name.decode(): value.decode() for name, value in scope["headers"]})
        behaviour = self.behaviours.pop(0) if self.behaviours else {"seconds": self.seconds}
        self.open += 1
        self.most_at_once = max(self.most_at_once, self.open)
        status, text = 200, ""
        if isinstance(behaviour, int):
            status, text = behaviour, json.dumps({"error": f"as told: {behaviour}"})
        elif isinstance(behaviour, str):
            text = behaviour
        elif isinstance(behaviour, dict):
            await asyncio.sleep(behaviour["seconds"])
            text = json.dumps({"scores": [len(response) for response in request["responses"]]})
        else:
            text = json.dumps({"scores": behaviour})
        self.open -= 1
        headers = [(b"content-type", b"application/json")]
        if self.retry_after is not None and status != 200:
            headers.append((b"retry-after", self.retry_after.encode()))
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": text.encode()})
