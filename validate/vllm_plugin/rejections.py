"""Rejections by a policy as HTTP 429: ``vllm serve --middleware <this module>.Rejections``.

Without it vLLM's server answers a rejected request with status 200. What is in the answer
depends (``entrypoints/openai``, vLLM 0.32): a choice with ``finish_reason='abort'`` and
``stop_reason='rejected: ...'``; for a streamed chat the same after an empty first message; for a
streamed completion nothing at all but ``[DONE]``, because chunks without text are skipped
(``completion/serving.py``). So the answer alone does not tell, and the middleware looks at what
the engine client's ``generate`` yields while it serves the request.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from contextlib import aclosing
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, TypeAlias

__all__ = ["REJECTED", "Rejections"]

Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]

REJECTED = "rejected: "
"""How the ``stop_reason`` of a rejected request begins; the policy's reason follows."""


@dataclass(slots=True)
class _Verdict:
    """What the engine has said so far about the prompts and choices of one HTTP request."""

    reason: str | None = None
    """Of the first rejection."""
    served: bool = False
    """Something other than a rejection came, or a part of the answer has been sent."""
    held: list[Message] = field(default_factory=list)
    """Parts of the answer that wait until it is clear whether they are sent."""


_current: ContextVar[_Verdict | None] = ContextVar("_current", default=None)


class Rejections:
    """ASGI middleware that turns an answer without any accepted choice into an error.

    The error is status 429 with a body as OpenAI's, so that the ``openai`` client raises
    ``RateLimitError``, and the header ``x-should-retry: false``: a policy refuses for good, and
    the client would otherwise ask two more times. Everything else passes unchanged; only the
    start of an answer is held back, until its first byte. Where some of several choices are
    rejected the answer passes too: OpenAI's format has no error per choice.
    """

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self._app = app
        self._client: Any = None

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        state = getattr(scope.get("app"), "state", None)
        self._watch(getattr(state, "engine_client", None))
        verdict = _Verdict()
        token = _current.set(verdict)

        async def judged(message: Message) -> None:
            held = verdict.held
            held.append(message)
            if message["type"] == "http.response.start":
                return
            last = not message.get("more_body", False)
            if verdict.reason is None or verdict.served:
                if message.get("body") or last or message["type"] != "http.response.body":
                    verdict.held = []
                    verdict.served = True
                    for waiting in held:
                        await send(waiting)
            elif last:
                await _refuse(send, verdict.reason)

        try:
            await self._app(scope, receive, judged)
        finally:
            _current.reset(token)

    def _watch(self, client: Any) -> None:
        """Listen to what this engine client generates, from now on."""
        if client is None or client is self._client:
            return
        self._client = client
        client.generate = _observed(client.generate)


def _observed(generate: Callable[..., Any]) -> Callable[..., AsyncIterator[Any]]:
    """``generate``, telling the HTTP request that it is called for of rejections."""

    async def observed(*args: Any, **options: Any) -> AsyncIterator[Any]:
        verdict = _current.get()
        # Closing at once is what aborts the request when its client has gone.
        async with aclosing(generate(*args, **options)) as outputs:
            async for output in outputs:
                if verdict is not None and not verdict.served:
                    _judge(verdict, output)
                yield output

    return observed


def _judge(verdict: _Verdict, output: Any) -> None:
    for choice in output.outputs:
        reason = choice.stop_reason
        if (
            choice.finish_reason == "abort"
            and isinstance(reason, str)
            and reason.startswith(REJECTED)
            and not choice.token_ids
        ):
            verdict.reason = verdict.reason or reason.removeprefix(REJECTED)
        else:
            verdict.served = True


async def _refuse(send: Send, reason: str) -> None:
    error = {"message": reason, "type": "rejected_by_policy", "param": None, "code": 429}
    body = json.dumps({"error": error}).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"x-should-retry", b"false"),
    ]
    await send({"type": "http.response.start", "status": 429, "headers": headers})
    await send({"type": "http.response.body", "body": body})
