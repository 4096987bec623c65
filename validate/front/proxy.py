"""The front's HTTP side: takes requests in, sends them on, and polls the engines.

This module needs aiohttp, which comes with vLLM.
"""

from __future__ import annotations

import asyncio
import errno
import json
from collections import deque
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from statistics import median
from typing import Any

from aiohttp import ClientConnectorError, ClientError, web

from policies.api import PolicyError
from validate.front.engine_client import UNREACHABLE, EngineClient
from validate.front.front import Front, NoEngineError
from validate.front.http_requests import request_of
from validate.front.kv_events import KvEvents
from validate.front.signals import Instance, exposition

__all__ = ["Proxy"]

PLACED = 10_000
"""Latest requests whose placing times are remembered."""

HOP = frozenset({
    "connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "te", "trailer",
    "transfer-encoding", "upgrade", "host", "content-length",
})  # fmt: skip
"""Headers that belong to one connection and are not passed on to an engine."""


class Proxy:
    """Serves completions, chats, ``/v1/models``, ``/health`` and its own ``/metrics``.

    Bodies pass both ways as they are and unbuffered, with their status; the header
    ``X-Servelab-Engine`` says who answered. When a client goes away, the engine's connection is
    closed too, upon which vLLM aborts the request. A request whose engine refuses the connection
    is placed again among the others.

    Args:
        front: places the requests.
        kv_events: endpoints, one per engine or none, as ``front.front``.
        signal_s: seconds between two polls of an engine.

    Raises:
        ValueError: a KV events endpoint is malformed.
    """

    def __init__(self, front: Front, *, kv_events: Sequence[str] = (), signal_s: float) -> None:
        self.front = front
        self.signal_s = signal_s
        self.events: dict[int, KvEvents] = {}
        """By engine id."""
        for instance, endpoints in zip(front.engines, kv_events, strict=bool(kv_events)):
            if endpoints:
                instance.followed = True
                self.events[instance.id] = KvEvents(
                    instance.index, endpoints, self._sayer(instance)
                )
        self.placing_s: deque[float] = deque(maxlen=PLACED)
        """Of the latest requests: from their last byte to their sending, tokenising included."""
        self._context_tokens: dict[int, int] = {}
        self._client: EngineClient
        self._count = 0

    @asynccontextmanager
    async def serving(self, host: str, port: int) -> AsyncIterator[str]:
        """Listen while the context is open; yields the base URL. Port 0: any free one.

        Raises:
            ValueError: the port is in use, or not ours to use.
        """
        app = web.Application(client_max_size=0, middlewares=[web.middleware(_plain_errors)])
        app.add_routes([
            web.post("/v1/completions", self._generate),
            web.post("/v1/chat/completions", self._generate),
            web.get("/v1/models", self._models),
            web.get("/health", self._health),
            web.get("/metrics", self._metrics),
        ])  # fmt: skip
        runner = web.AppRunner(app, handler_cancellation=True, access_log=None)
        tasks: list[asyncio.Task[None]] = []
        async with EngineClient() as self._client:
            await runner.setup()
            try:
                site = web.TCPSite(runner, host, port)
                try:
                    await site.start()
                except OSError as error:
                    raise ValueError(
                        f"cannot listen on {host}:{port}: {error.strerror or error}; "
                        f"choose another port"
                    ) from None
                tasks += [asyncio.create_task(self._follow(i)) for i in self.front.engines]
                await asyncio.gather(*map(self._poll, self.front.engines))
                tasks += [asyncio.create_task(self._watch(i)) for i in self.front.engines]
                bound = runner.addresses[0][1]
                yield f"http://{host}:{bound}"
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                await runner.cleanup()

    def summary(self) -> str:
        """One line: who got how many requests, and what placing cost."""
        counts = ", ".join(f"engine {i.id}: {i.requests}" for i in self.front.engines)
        added = f"{median(self.placing_s) * 1e3:.2f} ms" if self.placing_s else "none"
        return f"requests sent: {counts}; median time from request to sending: {added}"

    # ------------------------------------------------------------------ requests

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        raw = await request.read()
        began_s = self.front.clock()
        try:
            body = json.loads(raw)
        except ValueError as error:
            return _error(400, f"the request's body is no JSON: {error}", "invalid_request_error")
        if not isinstance(body, dict):
            return _error(400, "the request's body is no JSON object", "invalid_request_error")
        self._count += 1
        prompts = await self._prompts(body)
        try:
            view = request_of(
                body,
                request.headers,
                prompts,
                ident=request.headers.get("X-Request-Id") or f"http-{self._count}",
                now=began_s,
                context_tokens=max(self._context_tokens.values(), default=0),
                block_tokens=next(filter(None, (i.index.block_tokens for i in self.front.up)), 0),
            )
        except ValueError as error:
            return _error(400, str(error), "invalid_request_error")
        while True:
            try:
                instance = self.front.place(view)
            except NoEngineError as error:
                return _error(503, str(error), "service_unavailable")
            except PolicyError as error:
                self.front.warn(str(error))
                return _error(500, str(error), "policy_error", retry=False)
            self.front.sent(instance, view)
            self.placing_s.append(self.front.clock() - began_s)
            try:
                async with self._client.send(
                    instance.url + request.path_qs, raw, _passed(request.headers)
                ) as answer:
                    return await self._relay(request, answer, instance)
            except ClientConnectorError as error:
                self._lost(instance, error)
            except ClientError as error:
                message = f"engine {instance.id} at {instance.url} broke off: {_line(error)}"
                return _error(502, message, "bad_gateway")
            finally:
                self.front.ended(instance, view)

    async def _relay(
        self, request: web.Request, answer: Any, instance: Instance
    ) -> web.StreamResponse:
        """Pass an engine's answer on while it comes."""
        headers = _passed(answer.headers)
        if "Content-Length" in answer.headers:
            headers["Content-Length"] = answer.headers["Content-Length"]
        headers["X-Servelab-Engine"] = str(instance.id)
        response = web.StreamResponse(status=answer.status, headers=headers)
        try:
            await response.prepare(request)
            async for chunk in answer.content.iter_any():
                await response.write(chunk)
            await response.write_eof()
        except ConnectionResetError:
            pass  # the client has gone: leaving closes the engine's connection
        except ClientError as error:
            self.front.warn(f"engine {instance.id} broke off an answer: {_line(error)}")
            if request.transport is not None:
                request.transport.abort()  # so that the client does not take it for complete
        return response

    async def _prompts(self, body: Mapping[str, Any]) -> list[list[int]]:
        """Token ids of every prompt; none where no engine can tell (the one asked will say why)."""
        for instance in list(self.front.up):
            try:
                return await self._client.prompts(instance.url, body)
            except ClientConnectorError as error:
                self._lost(instance, error)
            except UNREACHABLE:
                return []
        return []

    # ------------------------------------------------------------------ the front's own pages

    async def _models(self, _: web.Request) -> web.Response:
        """The models of all engines that are up, each once."""
        models: dict[str, Any] = {}
        for instance in list(self.front.up):
            with suppress(*UNREACHABLE):
                for model in await self._client.models(instance.url):
                    models.setdefault(model["id"], model)
        if not models:
            return _error(503, "no engine is up", "service_unavailable")
        return web.json_response({"object": "list", "data": list(models.values())})

    async def _health(self, _: web.Request) -> web.Response:
        engines = [{"url": i.url, "up": i.up} for i in self.front.engines]
        return web.json_response({"engines": engines}, status=200 if self.front.up else 503)

    async def _metrics(self, _: web.Request) -> web.Response:
        return web.Response(text=exposition(self.front.engines, self.placing_s))

    # ------------------------------------------------------------------ signals

    async def _watch(self, instance: Instance) -> None:
        """Poll an engine for as long as the front runs."""
        clock = self.front.clock
        due_s = clock()
        while True:
            due_s = max(due_s + self.signal_s, clock())
            await asyncio.sleep(due_s - clock())
            await self._poll(instance)

    async def _poll(self, instance: Instance) -> None:
        asked_s = self.front.clock()
        try:
            if not instance.up:
                model = (await self._client.models(instance.url))[0]
                instance.model = model["id"]
                self._context_tokens[instance.id] = model.get("max_model_len") or 0
            sample = await self._client.sample(instance.url)
        except (*UNREACHABLE, IndexError) as error:
            self._lost(instance, error)
        else:
            self.front.polled(instance, sample, asked_s)

    def _lost(self, instance: Instance, why: BaseException) -> None:
        self.front.lost(instance, _line(why))
        # An engine that is only slow keeps its cache. One that ended refuses connections, and
        # should no poll see that, then its successor's sequence numbers begin again.
        if instance.id in self.events and getattr(why, "errno", None) == errno.ECONNREFUSED:
            self.events[instance.id].restart()

    async def _follow(self, instance: Instance) -> None:
        """Take in an engine's KV events for as long as the front runs."""
        events = self.events.get(instance.id)
        if events is None:
            return
        try:
            await events.follow()
        except Exception as error:
            instance.index.clear()
            self._sayer(instance)(f"KV events can no longer be followed: {_line(error)}")

    def _sayer(self, instance: Instance) -> Any:
        return lambda text: self.front.warn(f"engine {instance.id} at {instance.url}: {text}")


async def _plain_errors(request: web.Request, handler: Any) -> web.StreamResponse:
    """Unknown paths and methods answered in OpenAI's format."""
    try:
        answer: web.StreamResponse = await handler(request)
    except web.HTTPException as error:
        return _error(error.status, f"{request.method} {request.path}: {error.reason}", "not_found")
    return answer


def _error(status: int, message: str, kind: str, *, retry: bool = True) -> web.Response:
    error = {"message": message, "type": kind, "param": None, "code": status}
    headers = {} if retry else {"x-should-retry": "false"}
    return web.json_response({"error": error}, status=status, headers=headers)


def _passed(headers: Mapping[str, str]) -> dict[str, str]:
    return {key: value for key, value in headers.items() if key.lower() not in HOP}


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
