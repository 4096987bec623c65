"""The front before two servers that behave like vLLM's, as far as the front can see."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from policies.api import (
    ClusterView,
    InstanceView,
    PDPolicy,
    Placement,
    PolicyError,
    RequestView,
    Router,
)
from policies.pd.colocated import Colocated
from policies.registry import UnknownPolicy, build, policy_set
from validate.front.front import Front, check_engines, front, policy_spec

aiohttp = pytest.importorskip("aiohttp", reason="aiohttp comes with vLLM")
web: Any = pytest.importorskip("aiohttp.web")

from validate.front import engine_client  # noqa: E402
from validate.front.kv_events import KvEvents  # noqa: E402
from validate.front.proxy import Proxy  # noqa: E402
from validate.tests.server import free_port  # noqa: E402

BLOCK = 32
TIMEOUT_S = 20.0


class Engine:
    """Stands for a vLLM server; what it answers is set from outside."""

    def __init__(self) -> None:
        self.running = self.waiting = 0
        self.gate = asyncio.Event()
        """Streams wait for it after their first chunk."""
        self.gate.set()
        self.awake = asyncio.Event()
        """Metrics wait for it."""
        self.awake.set()
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[Any] = []
        self.tokenized = 0
        self.cancelled = 0
        self.url = ""
        self._runner: Any = None

    async def start(self, port: int = 0) -> None:
        app = web.Application()
        app.add_routes([
            web.get("/metrics", self._metrics),
            web.get("/v1/models", self._models),
            web.post("/tokenize", self._tokenize),
            web.post("/v1/completions", self._complete),
            web.post("/v1/chat/completions", self._complete),
        ])  # fmt: skip
        self._runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", port).start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"

    async def stop(self) -> None:
        await self._runner.cleanup()

    async def _metrics(self, _: Any) -> Any:
        await self.awake.wait()
        labels = '{engine="0",model_name="tiny"}'
        return web.Response(
            text=f"# HELP vllm:num_requests_running n\nvllm:num_requests_running{labels} "
            f"{float(self.running)}\nvllm:num_requests_waiting{labels} {float(self.waiting)}\n"
            f'vllm:num_requests_waiting_by_reason{{engine="0",reason="capacity"}} 99.0\n'
            f"vllm:kv_cache_usage_perc{labels} 0.25\n"
        )

    async def _models(self, _: Any) -> Any:
        return web.json_response({"data": [{"id": "tiny", "max_model_len": 512}]})

    async def _tokenize(self, request: Any) -> Any:
        self.tokenized += 1
        body = await request.json()
        text = body["prompt"] if "prompt" in body else body["messages"][0]["content"]
        return web.json_response({"tokens": [int(word) for word in text.split()]})

    async def _complete(self, request: Any) -> Any:
        body = await request.json()
        self.bodies.append(body)
        self.headers.append(request.headers)
        if "status" in body:
            return web.json_response(
                {"error": "so"}, status=body["status"], headers={"x-should-retry": "false"}
            )
        if not body.get("stream"):
            return web.json_response({"choices": [{"text": "whole"}]})
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        try:
            await response.write(b"data: first\n\n")
            await self.gate.wait()
            if body.get("breaks"):
                request.transport.abort()
            await response.write(b"data: [DONE]\n\n")
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        return response


class Rig:
    """Two engines, a front before them, and a client."""

    def __init__(self, engines: list[Engine], proxy: Proxy, url: str, session: Any) -> None:
        self.engines = engines
        self.proxy = proxy
        self.front = proxy.front
        self.url = url
        self.session = session
        self.lines: list[str] = []

    async def ask(self, path: str = "completions", **body: Any) -> Any:
        """The status, the engine that answered, and the body of the answer."""
        async with self.session.post(f"{self.url}/v1/{path}", json=body) as answer:
            read = await answer.read()
            return answer.status, answer.headers.get("X-Servelab-Engine"), read

    async def until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            await asyncio.sleep(0.01)


@asynccontextmanager
async def rig(pd: PDPolicy, *, signal_s: float = 0.05, polls: bool = True) -> AsyncIterator[Rig]:
    async with AsyncExitStack() as stack:
        engines = [Engine(), Engine()]
        for engine in engines:
            await engine.start()
            stack.push_async_callback(engine.stop)
        lines: list[str] = []
        clock = asyncio.get_running_loop().time
        cluster = Front([e.url for e in engines], pd, clock, warn=lines.append, note=lines.append)
        proxy = Proxy(cluster, signal_s=signal_s if polls else 3600.0)
        url = await stack.enter_async_context(proxy.serving("127.0.0.1", 0))
        session = await stack.enter_async_context(aiohttp.ClientSession())
        made = Rig(engines, proxy, url, session)
        made.lines = lines
        yield made


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def limited() -> None:
        await asyncio.wait_for(test(), TIMEOUT_S)

    asyncio.run(limited())


def policy(routing: Any) -> PDPolicy:
    made: PDPolicy = build(policy_set(routing=routing).pd, 0, "pd")
    return made


# --------------------------------------------------------------------------- placing


def test_round_robin_takes_turns_and_bodies_pass_unchanged() -> None:
    async def test() -> None:
        async with rig(policy("round_robin")) as r:
            answers = [await r.ask(prompt=[1, 2], odd={"a": i}) for i in range(4)]
            assert [engine for _, engine, _ in answers] == ["0", "1", "0", "1"]
            assert json.loads(answers[0][2]) == {"choices": [{"text": "whole"}]}
            assert [body["odd"]["a"] for body in r.engines[0].bodies] == [0, 2]

    run(test)


def test_least_loaded_counts_what_it_has_just_sent() -> None:
    async def test() -> None:
        async with rig(policy("least_loaded"), polls=False) as r:
            for engine in r.engines:
                engine.gate.clear()
            open_streams = [asyncio.create_task(r.ask(prompt=[1], stream=True)) for _ in range(6)]
            await r.until(lambda: sum(len(e.bodies) for e in r.engines) == 6)
            assert [len(e.bodies) for e in r.engines] == [3, 3]
            assert [i.inflight_tokens for i in r.front.engines] == [3, 3]
            for engine in r.engines:
                engine.gate.set()
            await asyncio.gather(*open_streams)
            assert [(i.waiting, i.inflight_tokens) for i in r.front.engines] == [(0, 0)] * 2

    run(test)


def test_least_loaded_follows_the_polled_queues() -> None:
    async def test() -> None:
        async with rig(policy("least_loaded")) as r:
            r.engines[0].running, r.engines[0].waiting = 4, 3
            await r.until(lambda: r.front.engines[0].waiting == 3)
            view = r.front.engines[0]
            assert (view.running, view.kv_usage, view.model) == (4, 0.25, "tiny")
            assert {(await r.ask(prompt=[1]))[1] for _ in range(5)} == {"1"}

    run(test)


def test_prefix_affinity_follows_the_index_and_tokenises_once() -> None:
    async def test() -> None:
        async with rig(policy("prefix_affinity")) as r:
            tokens = list(range(100, 100 + 3 * BLOCK))
            r.front.engines[1].index.apply({
                "type": "BlockStored", "block_hashes": [b"a", b"b", b"c"],
                "parent_block_hash": None, "token_ids": tokens, "block_size": BLOCK,
            })  # fmt: skip
            text = " ".join(map(str, tokens))
            chat = [{"role": "user", "content": text}]
            assert (await r.ask(prompt=tokens))[1] == "1"
            assert (await r.ask(prompt=text))[1] == "1"
            assert (await r.ask(prompt=text))[1] == "1"
            assert (await r.ask("chat/completions", messages=chat))[1] == "1"
            assert (await r.ask(prompt=tokens[1:]))[1] == "0"
            assert (await r.ask(prompt=tokens, cache_salt="x"))[1] == "0"
            assert [e.tokenized for e in r.engines] == [2, 0]
            assert len([line for line in r.lines if "nobody follows" in line]) == 1

    run(test)


class Spy(Router):
    """Remembers what it saw."""

    def __init__(self) -> None:
        self.seen: list[tuple[RequestView, list[InstanceView], float]] = []
        self.told = 0
        self.ages: list[float] = []

    def route(self, request: RequestView, instances: Any, now: float) -> InstanceView:
        self.seen.append((request, list(instances), now))
        self.ages = [instance.signal_age_s for instance in instances]
        return instances[0]  # type: ignore[no-any-return]

    def changed(self, instance: InstanceView) -> None:
        self.told += 1


def test_a_policy_sees_the_request_and_the_true_age() -> None:
    spy = Spy()

    async def test() -> None:
        async with rig(Colocated(spy), polls=False) as r:
            await asyncio.sleep(0.2)
            facts = {"slo_class": "chat", "slo_ttft_s": 0.5, "session": "s", "kind": "k",
                     "client_max_tokens": 77}  # fmt: skip
            await r.ask(prompt=[5] * 40, max_tokens=9, user="u", priority=3, model="tiny",
                        vllm_xargs=facts)  # fmt: skip
            request, _, now = spy.seen[-1]
            assert request.arrival_s <= now <= request.arrival_s + 1
            assert (request.prompt_tokens, request.max_tokens, request.priority) == (40, 77, 3)
            assert (request.slo.name, request.slo.ttft_s) == ("chat", 0.5)
            assert (request.session, request.tenant) == ("s", "u")
            assert (request.model, request.kind) == ("tiny", "k")
            assert all(0.2 <= age < 5 for age in spy.ages)
            assert spy.told == 2 + 2, "both came up, one request began and ended"
            await r.ask("chat/completions", messages=[{"role": "user", "content": "1 2"}])
            assert spy.seen[-1][0].max_tokens == 510, "what the context leaves"

    run(test)


def test_ages_stay_near_the_interval_while_polls_succeed() -> None:
    spy = Spy()

    async def test() -> None:
        async with rig(Colocated(spy), signal_s=0.1) as r:
            ages = []
            for _ in range(10):
                await asyncio.sleep(0.03)
                await r.ask(prompt=[1])
                ages += spy.ages
            assert 0 < min(ages) < 0.1
            assert max(ages) < 1

    run(test)


# --------------------------------------------------------------------------- passing on


def test_streams_are_passed_on_while_they_come() -> None:
    async def test() -> None:
        async with rig(policy("round_robin")) as r:
            r.engines[0].gate.clear()
            body = {"prompt": [1], "stream": True}
            headers = {"Authorization": "Bearer key"}
            url = f"{r.url}/v1/completions?x=1"
            async with r.session.post(url, json=body, headers=headers) as answer:
                assert answer.headers["Content-Type"] == "text/event-stream"
                assert await answer.content.readline() == b"data: first\n"
                r.engines[0].gate.set()
                assert (await answer.content.read()).endswith(b"data: [DONE]\n\n")
            assert r.engines[0].headers[0]["Authorization"] == "Bearer key"

    run(test)


def test_a_client_that_goes_away_ends_the_engines_request() -> None:
    async def test() -> None:
        async with rig(policy("round_robin")) as r:
            r.engines[0].gate.clear()
            body = {"prompt": [1], "stream": True}
            answer = await r.session.post(f"{r.url}/v1/completions", json=body)
            await answer.content.readline()
            assert r.front.engines[0].inflight == 1
            answer.close()
            await r.until(lambda: r.engines[0].cancelled == 1)
            await r.until(lambda: r.front.engines[0].inflight == 0)

    run(test)


@pytest.mark.parametrize("status", [400, 429, 500])
def test_errors_of_an_engine_pass(status: int) -> None:
    async def test() -> None:
        async with rig(policy("round_robin")) as r:
            url, body = f"{r.url}/v1/completions", {"prompt": [1], "status": status}
            async with r.session.post(url, json=body) as answer:
                assert answer.status == status
                assert await answer.json() == {"error": "so"}
                assert answer.headers["x-should-retry"] == "false"

    run(test)


def test_a_broken_stream_does_not_look_complete() -> None:
    async def test() -> None:
        async with rig(policy("round_robin")) as r:
            with pytest.raises(aiohttp.ClientPayloadError):
                await r.ask(prompt=[1], stream=True, breaks=True)
            assert any("broke off" in line for line in r.lines)
            assert r.front.engines[0].inflight == 0

    run(test)


@pytest.mark.parametrize("body", [b"", b"{", b"[1]"])
def test_what_is_no_json_object_is_refused(body: bytes) -> None:
    async def test() -> None:
        async with rig(policy("round_robin")) as r:
            async with r.session.post(f"{r.url}/v1/completions", data=body) as answer:
                assert answer.status == 400
                assert "JSON" in (await answer.json())["error"]["message"]
            async with r.session.get(f"{r.url}/v1/nothing") as answer:
                assert answer.status == 404
                assert "/v1/nothing" in (await answer.json())["error"]["message"]

    run(test)


def test_a_malformed_prompt_is_the_engines_business() -> None:
    async def test() -> None:
        async with rig(policy("round_robin")) as r:
            for prompt in ({"a": 1}, [], [1, "a"], "no number"):
                status, _, _ = await r.ask(prompt=prompt)
                assert status == 200, "the fake takes anything"
            assert sum(len(e.bodies) for e in r.engines) == 4

    run(test)


@pytest.mark.parametrize("wrong", [-1, 2**63])
def test_impossible_token_ids_reach_no_engine(wrong: int) -> None:
    async def test() -> None:
        async with rig(policy("prefix_affinity")) as r:
            r.front.engines[1].index.block_tokens = BLOCK
            status, _, body = await r.ask(prompt=[wrong] * BLOCK)
            assert status == 400
            assert f"token id {wrong}" in json.loads(body)["error"]["message"]
            assert not any(e.bodies for e in r.engines)

    run(test)


# --------------------------------------------------------------------------- failing


def test_a_dead_engine_is_left_out_and_comes_back() -> None:
    async def test() -> None:
        async with rig(policy("least_loaded")) as r:
            first = r.engines[0]
            port = int(first.url.rpartition(":")[2])
            await first.stop()
            await r.until(lambda: len(r.front.up) == 1)
            await asyncio.sleep(0.2)
            down = [line for line in r.lines if "is down" in line]
            assert len(down) == 1, "said once"
            assert first.url in down[0]
            assert {(await r.ask(prompt=[1]))[1] for _ in range(4)} == {"1"}
            await first.start(port)
            await r.until(lambda: len(r.front.up) == 2)
            assert {(await r.ask(prompt=[1]))[1] for _ in range(4)} == {"0"}

    run(test)


def test_a_slow_engine_keeps_its_index_and_a_dead_one_does_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def test() -> None:
        async with rig(policy("round_robin")) as r:
            slow = r.front.engines[0]
            r.proxy.events[0] = KvEvents(slow.index, "tcp://127.0.0.1:1", r.lines.append)
            slow.index.apply({
                "type": "BlockStored", "block_hashes": [b"a"], "parent_block_hash": None,
                "token_ids": list(range(BLOCK)), "block_size": BLOCK,
            })  # fmt: skip
            r.engines[0].awake.clear()
            await r.until(lambda: not slow.up)
            assert len(slow.index) == 1
            r.engines[0].awake.set()
            await r.until(lambda: slow.up)
            assert len(slow.index) == 1
            await r.engines[0].stop()
            await r.until(lambda: not len(slow.index))
            assert not slow.up

    monkeypatch.setattr(engine_client, "ANSWER_S", 0.2)
    run(test)


def test_a_refused_connection_places_the_request_again() -> None:
    async def test() -> None:
        async with rig(policy("round_robin"), polls=False) as r:
            await r.engines[0].stop()
            status, engine, _ = await r.ask(prompt=[1])
            assert (status, engine) == (200, "1")
            assert [i.inflight for i in r.front.engines] == [0, 0]

    run(test)


def test_no_engine_left_is_said() -> None:
    async def test() -> None:
        async with rig(policy("round_robin"), polls=False) as r:
            for engine in r.engines:
                await engine.stop()
            status, _, body = await r.ask(prompt=[1])
            assert status == 503
            message = json.loads(body)["error"]["message"]
            assert all(e.url in message for e in r.engines)
            async with r.session.get(f"{r.url}/health") as answer:
                assert answer.status == 503

    run(test)


class Foreign(PDPolicy):
    """Answers what it is told."""

    answer: Any = None

    def place(self, request: RequestView, cluster: ClusterView, now: float) -> Placement:
        if self.answer == "split":
            return Placement(*cluster.instances)
        if self.answer == "raise":
            raise KeyError("oops")
        return self.answer  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (None, "answered None"),
        (7, "answered 7"),
        ("split", "over instances 0 and 1; this deployment is colocated"),
        ("raise", "failed: KeyError: 'oops'"),
    ],
)
def test_a_policy_that_breaks_its_contract_is_named(answer: Any, says: str) -> None:
    async def test() -> None:
        pd = Foreign()
        pd.answer = answer
        async with rig(pd) as r:
            status, _, body = await r.ask(prompt=[1])
            error = json.loads(body)["error"]
            assert status == 500
            assert "Foreign.place(http-1)" in error["message"]
            assert says in error["message"]
            assert error["message"] in r.lines

    run(test)


# --------------------------------------------------------------------------- own pages, arguments


def test_own_pages() -> None:
    async def test() -> None:
        async with rig(policy("round_robin")) as r:
            for _ in range(3):
                await r.ask(prompt=[1])
            async with r.session.get(f"{r.url}/metrics") as answer:
                text = await answer.text()
            name = "servelab_front_requests_total"
            assert f'{name}{{engine="0",url="{r.engines[0].url}"}} 2\n' in text
            assert f'{name}{{engine="1",url="{r.engines[1].url}"}} 1\n' in text
            assert "servelab_front_placing_seconds_count 3" in text
            assert 'servelab_front_signal_age_seconds{engine="0"' in text
            async with r.session.get(f"{r.url}/v1/models") as answer:
                assert [m["id"] for m in (await answer.json())["data"]] == ["tiny"]
            async with r.session.get(f"{r.url}/health") as answer:
                assert answer.status == 200
            assert "engine 0: 2, engine 1: 1" in r.proxy.summary()

    run(test)


def test_a_port_in_use_is_one_line() -> None:
    async def test() -> None:
        async with rig(policy("round_robin")) as r:
            port = int(r.url.rpartition(":")[2])
            again = Proxy(r.front, signal_s=1)
            with pytest.raises(ValueError, match=f"cannot listen on 127.0.0.1:{port}: .*in use"):
                async with again.serving("127.0.0.1", port):
                    pass

    run(test)


def test_options_of_policies() -> None:
    spec = policy_spec("prefix_affinity", ["balance_abs=4", "balance_rel=2.5"])
    assert spec == {"name": "prefix_affinity", "balance_abs": 4, "balance_rel": 2.5}
    with pytest.raises(ValueError, match="'balance' is not of the form key=value"):
        policy_spec("prefix_affinity", ["balance"])


@pytest.mark.parametrize(
    ("urls", "says"),
    [
        ([], "no engine"),
        (["127.0.0.1:8001"], "no base URL"),
        (["http://a:1/x"], "no base URL"),
        (["http://a:1", "http://a:1/v1"], "named twice"),
    ],
)
def test_engines_are_checked(urls: list[str], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        check_engines(urls)


def test_arguments_are_checked(tmp_path: Path) -> None:
    one = ["http://127.0.0.1:1"]
    with pytest.raises(UnknownPolicy, match="least_loaded"):
        front(one, routing="least_loadet")
    with pytest.raises(ValueError, match="balance_abs"):
        front(one, routing={"name": "prefix_affinity", "balance_ab": 3})
    with pytest.raises(ValueError, match="more than 0"):
        front(one, signal_s=0)
    with pytest.raises(ValueError, match="2 KV events endpoints for 1 engines"):
        front(one, kv_events=["tcp://a:1", "tcp://a:2"])
    with pytest.raises(ValueError, match="'a:1' is not of the form"):
        front(one, kv_events=["a:1"])
    broken = tmp_path / "broken_router_for_test.py"
    broken.write_text("1 / 0")
    with pytest.raises(PolicyError, match="ZeroDivisionError"):
        front(one, policy_modules=[str(broken)])


def test_the_process_says_what_is_wrong_and_ends_when_told() -> None:
    port, other = free_port(), free_port()
    code = (
        f"from validate.front.front import front\n"
        f"front(['http://127.0.0.1:{other}'], routing='least_loaded', port={port})"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        assert process.stderr is not None
        try:
            lines = [process.stderr.readline(), process.stderr.readline()]
            process.send_signal(signal.SIGTERM)
            lines += process.stderr.readlines()
            assert process.wait(TIMEOUT_S) == 0
        finally:
            process.kill()
    assert f"warning: engine 0 at http://127.0.0.1:{other} is down" in lines[0]
    assert f"http://127.0.0.1:{port}, routing/least_loaded in pd/colocated" in lines[1]
    assert "requests sent: engine 0: 0" in lines[-1]
    assert len(lines) == 3
