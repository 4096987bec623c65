"""The front before two real engines: routing by what is cached against taking turns."""

from __future__ import annotations

import asyncio
import json
import random
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import pytest

pytestmark = [pytest.mark.vllm, pytest.mark.slow]
pytest.importorskip("vllm", reason="needs vLLM: make validate builds an environment with it")
aiohttp = pytest.importorskip("aiohttp", reason="aiohttp comes with vLLM")

from policies.registry import build, policy_set  # noqa: E402
from validate import tiny_model  # noqa: E402
from validate.front.front import Front  # noqa: E402
from validate.front.proxy import Proxy  # noqa: E402
from validate.tests.server import free_port, vllm_server  # noqa: E402

BLOCK = 32
GROUPS = 7
"""Odd, so that taking turns moves every group to the other engine in every round."""
ROUNDS = 3
PREFIX_BLOCKS = 8
OPTIONS = [
    *("--load-format", "dummy", "--enforce-eager", "--max-model-len", "1024"),
    *("--block-size", str(BLOCK), "--num-gpu-blocks-override", "512"),
    *("--served-model-name", "tiny"),
]


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[tuple[str, str]]]:
    """Base URL and KV events endpoints of two servers, one CPU core each."""
    folder = tmp_path_factory.mktemp("engines")
    model = tiny_model.write(folder / "model")
    with ExitStack() as stack, ThreadPoolExecutor() as pool:

        def start(core: int) -> tuple[str, str]:
            events, replay = (f"127.0.0.1:{free_port()}" for _ in range(2))
            config = {
                "enable_kv_cache_events": True,
                "publisher": "zmq",
                "endpoint": f"tcp://*:{events.partition(':')[2]}",
                "replay_endpoint": f"tcp://*:{replay.partition(':')[2]}",
            }
            given = [*OPTIONS, "--kv-events-config", json.dumps(config)]
            server = vllm_server(model, given, log=folder / f"{core}.log", core=core)
            return stack.enter_context(server), f"tcp://{events},tcp://{replay}"

        yield list(pool.map(start, range(2)))


async def hit_tokens(session: Any, engines: list[tuple[str, str]]) -> int:
    return sum([await counted(session, url, "prefix_cache_hits_total") for url, _ in engines])


async def counted(session: Any, url: str, name: str) -> int:
    """A counter of vLLM's."""
    async with session.get(f"{url}/metrics") as answer:
        found = re.findall(rf"^vllm:{name}\S* (\S+)", await answer.text(), re.M)
    return sum(round(float(value)) for value in found)


async def replay(engines: list[tuple[str, str]], routing: str, seed: int) -> tuple[int, list[int]]:
    """Every group's shared prefix once per round; cached tokens and requests per engine."""
    pd = build(policy_set(routing=routing).pd, 0, "pd")
    urls = [url for url, _ in engines]
    clock = asyncio.get_running_loop().time
    lines: list[str] = []
    front = Front(urls, pd, clock, warn=lines.append, note=lines.append)
    proxy = Proxy(front, kv_events=[events for _, events in engines], signal_s=0.1)
    draw = random.Random(seed)
    words = [
        [f"t{draw.randrange(900)}" for _ in range(PREFIX_BLOCKS * BLOCK)] for _ in range(GROUPS)
    ]
    async with aiohttp.ClientSession() as session, proxy.serving("127.0.0.1", 0) as url:
        before = await hit_tokens(session, engines)
        for number in range(ROUNDS):
            answers = []
            for group in range(GROUPS):
                body = {
                    "model": "tiny",
                    "prompt": " ".join([*words[group], f"t{number}"]),
                    "max_tokens": 48,
                    "ignore_eos": True,
                    "stream": True,
                }
                # Returns with the first token: requests overlap, their order is certain.
                answers.append(await session.post(f"{url}/v1/completions", json=body))
            for answer in answers:
                assert (await answer.read()).endswith(b"data: [DONE]\n\n")
            await asyncio.sleep(0.3)  # for the last KV events
        after = await hit_tokens(session, engines)
        print(proxy.summary())
    assert not [line for line in lines if "down" in line or "missing" in line]
    return after - before, [instance.requests for instance in front.engines]


def test_routing_by_prefix_finds_more_in_the_caches(engines: list[tuple[str, str]]) -> None:
    async def both() -> tuple[Any, Any]:
        return await replay(engines, "round_robin", 1), await replay(engines, "prefix_affinity", 2)

    (turns, turns_requests), (affine, affine_requests) = asyncio.run(asyncio.wait_for(both(), 60))
    prefix = PREFIX_BLOCKS * BLOCK
    assert turns == GROUPS * (ROUNDS - 2) * prefix, "each engine computes every prefix"
    assert affine == GROUPS * (ROUNDS - 1) * prefix, "one engine computes a prefix, once"
    assert turns_requests == [11, 10]
    assert min(affine_requests) >= ROUNDS, "new prefixes go where the load is lower"


def test_a_late_front_learns_what_is_cached_from_the_replay(
    engines: list[tuple[str, str]],
) -> None:
    async def late() -> list[int]:
        clock = asyncio.get_running_loop().time
        pd = build(policy_set().pd, 0, "pd")
        front = Front([u for u, _ in engines], pd, clock, warn=print, note=print)
        proxy = Proxy(front, kv_events=[events for _, events in engines], signal_s=0.1)
        body = {"model": "tiny", "prompt": [9] * 70, "max_tokens": 1}
        async with aiohttp.ClientSession() as session, proxy.serving("127.0.0.1", 0) as url:
            while not all(len(instance.index) for instance in front.engines):
                async with session.post(f"{url}/v1/completions", json=body) as answer:
                    assert answer.status == 200
                await asyncio.sleep(0.1)
            return [len(instance.index) for instance in front.engines]

    found = asyncio.run(asyncio.wait_for(late(), 30))
    assert min(found) >= PREFIX_BLOCKS, "also of prompts that came before"


def test_a_client_that_goes_away_stops_the_engine(engines: list[tuple[str, str]]) -> None:
    async def leave() -> int:
        clock = asyncio.get_running_loop().time
        engine = engines[0][0]
        pd = build(policy_set().pd, 0, "pd")
        front = Front([engine], pd, clock, warn=print, note=print)
        proxy = Proxy(front, signal_s=0.1)
        body = {"model": "tiny", "prompt": [9] * 5, "max_tokens": 1000, "ignore_eos": True}
        async with aiohttp.ClientSession() as session, proxy.serving("127.0.0.1", 0) as url:
            before = await counted(session, engine, "generation_tokens_total")
            answer = await session.post(f"{url}/v1/completions", json=body | {"stream": True})
            await answer.content.readline()
            answer.close()
            while front.engines[0].inflight:
                await asyncio.sleep(0.01)
            last, now = -1, await counted(session, engine, "generation_tokens_total")
            while now != last:
                await asyncio.sleep(0.5)
                last, now = now, await counted(session, engine, "generation_tokens_total")
            return now - before

    assert 1 <= asyncio.run(asyncio.wait_for(leave(), 60)) < 900
