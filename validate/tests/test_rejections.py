"""The middleware alone, around an application that stands for vLLM's server."""

from __future__ import annotations

import asyncio
import json
import warnings
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest

pytestmark = pytest.mark.vllm
pytest.importorskip("vllm", reason="needs vLLM: make validate builds an environment with it")

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # torch's own, where vLLM imports it
    from validate.vllm_plugin.rejections import Rejections

START = {"type": "http.response.start", "status": 200, "headers": [(b"x-mine", b"1")]}
DONE = b"data: [DONE]\n\n"
REJECTED = ("abort", "rejected: too long")
Choice = tuple[str | None, str | None]


def output(choice: Choice, tokens: int = 0) -> Any:
    finish, stop = choice
    made = SimpleNamespace(finish_reason=finish, stop_reason=stop, token_ids=[7] * tokens)
    return SimpleNamespace(outputs=[made])


class Engine:
    """Generates what it is told to; what came of each generator is kept."""

    def __init__(self, *outputs: Any) -> None:
        self.outputs = outputs
        self.closed = 0

    async def generate(self, prompt: str) -> AsyncIterator[Any]:
        assert prompt == "p"
        try:
            for each in self.outputs:
                await asyncio.sleep(0)
                yield each
        finally:
            self.closed += 1


def served(engine: Engine, *, streamed: bool, skips_empty: bool = False) -> list[Any]:
    """Everything that a client is sent, with a marker where the engine yields an output."""
    sent: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        client = scope["app"].state.engine_client
        if streamed:
            await send(START)

        async def body() -> None:  # as Starlette does: in a task of its own
            async for each in client.generate("p"):
                sent.append("output")
                if streamed and not (skips_empty and not each.outputs[0].token_ids):
                    part = f"data: {each.outputs[0].finish_reason}\n\n".encode()
                    await send({"type": "http.response.body", "body": part, "more_body": True})

        await asyncio.create_task(body())
        if streamed:
            await send({"type": "http.response.body", "body": DONE, "more_body": True})
        else:
            await send(START)
        await send({"type": "http.response.body", "body": b"" if streamed else b"{}"})

    async def send(message: Any) -> None:
        sent.append(message)

    async def run() -> None:
        middleware = Rejections(app)
        state = SimpleNamespace(engine_client=engine)
        scope = {"type": "http", "app": SimpleNamespace(state=state)}
        for _ in range(2):  # the second request must not be judged by the first
            sent.clear()
            await middleware(scope, None, send)  # type: ignore[arg-type]

    asyncio.run(run())
    return sent


def bodies(sent: list[Any]) -> bytes:
    return b"".join(message.get("body", b"") for message in sent if message != "output")


@pytest.mark.parametrize("streamed", [True, False])
@pytest.mark.parametrize("skips_empty", [True, False])
def test_a_rejection_becomes_an_error(streamed: bool, skips_empty: bool) -> None:
    engine = Engine(output(REJECTED))
    sent = served(engine, streamed=streamed, skips_empty=skips_empty)
    starts = [m for m in sent if m != "output" and m["type"] == "http.response.start"]
    assert [m["status"] for m in starts] == [429]
    headers = dict(starts[0]["headers"])
    assert headers[b"x-should-retry"] == b"false"
    assert int(headers[b"content-length"]) == len(bodies(sent))
    assert json.loads(bodies(sent)) == {
        "error": {
            "message": "too long",
            "type": "rejected_by_policy",
            "param": None,
            "code": 429,
        }
    }
    assert engine.closed == 2


@pytest.mark.parametrize("choice", [("stop", None), ("abort", None), ("stop", "rejected: no")])
@pytest.mark.parametrize("streamed", [True, False])
def test_anything_else_passes_unchanged(choice: Choice, streamed: bool) -> None:
    sent = served(Engine(output(choice)), streamed=streamed)
    starts = [m for m in sent if m != "output" and m["type"] == "http.response.start"]
    assert starts == [START]
    assert bodies(sent) == (f"data: {choice[0]}\n\n".encode() + DONE if streamed else b"{}")


def test_a_stream_is_not_buffered() -> None:
    sent = served(Engine(*[output((None, None), 1)] * 3), streamed=True)
    kinds = [m if m == "output" else m["type"].rpartition(".")[2] for m in sent]
    assert kinds[:7] == ["output", "start", "body", "output", "body", "output", "body"]


def test_one_accepted_choice_is_an_answer() -> None:
    engine = Engine(output(REJECTED), output((None, None), 1), output(("length", None), 1))
    sent = served(engine, streamed=True)
    assert next(m for m in sent if m != "output") == START
    assert bodies(sent) == b"data: abort\n\ndata: None\n\ndata: length\n\n" + DONE


def test_a_rejection_after_some_tokens_is_no_error() -> None:
    sent = served(Engine(output((None, None), 1), output(REJECTED)), streamed=True)
    assert bodies(sent) == b"data: None\n\ndata: abort\n\n" + DONE


def test_other_traffic_passes() -> None:
    seen: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope["type"])
        if scope["type"] == "http":
            await send(START)
            await send({"type": "http.response.body", "body": b"metrics"})

    async def run() -> list[Any]:
        sent: list[Any] = []

        async def send(message: Any) -> None:
            sent.append(message)

        middleware = Rejections(app)
        await middleware({"type": "lifespan"}, None, send)  # type: ignore[arg-type]
        await middleware({"type": "http"}, None, send)  # type: ignore[arg-type]
        return sent

    sent = asyncio.run(run())
    assert seen == ["lifespan", "http"]
    assert sent == [START, {"type": "http.response.body", "body": b"metrics"}]
