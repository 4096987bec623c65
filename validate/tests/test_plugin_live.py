"""The plug-in in live engines with a tiny random model: in this process, and beside it."""

# ruff: noqa: E402 - vLLM is looked for before what needs it is imported

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    # Of vLLM and its libraries, when an engine starts and when one ends.
    pytest.mark.filterwarnings("ignore:.torch.distributed.reduce_op. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Exception ignored in. <function Context.__del__"),
]
pytest.importorskip("vllm", reason="needs vLLM: make validate builds an environment with it")

from vllm import LLM, SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.v1.engine.async_llm import AsyncLLM

from policies import registry
from validate import tiny_model
from validate.decisions import read
from validate.vllm_plugin.eviction import PolicyFreeQueue

POLICY = '''
"""Refuses prompts of tenant "rude", and lets nobody of tenant "patient" in before 1.5 s."""

from dataclasses import dataclass

from policies.api import ADMIT, AdmissionPolicy, Defer, Reject
from policies.registry import register


@register("admission/door_for_live_test")
@dataclass(eq=False)
class Door(AdmissionPolicy):
    def order(self, request, now):
        return request.prompt_tokens

    def admit(self, request, engine, now):
        if request.tenant == "rude":
            return Reject("not like this")
        if request.tenant == "patient" and now < request.arrival_s + 1.5:
            return Defer(request.arrival_s + 1.5)
        return ADMIT
'''


@pytest.fixture(scope="module")
def options(tmp_path_factory: Any) -> Iterator[dict[str, Any]]:
    folder: Path = tmp_path_factory.mktemp("plugin")
    module = folder / "door_for_live_test.py"
    module.write_text(POLICY, encoding="utf-8")
    model = tiny_model.write(folder / "model", layers=1, hidden=64)
    yield {
        "model": str(model),
        "load_format": "dummy",
        "enforce_eager": True,
        "max_model_len": 512,
        "max_num_batched_tokens": 512,
        "block_size": 32,
        "num_gpu_blocks_override": 40,
        "dtype": "bfloat16",
        "scheduler_cls": "validate.vllm_plugin.PolicyScheduler",
        "additional_config": {
            "servelab": {
                "admission": "door_for_live_test",
                "eviction": "lfu",
                "reuse": {"name": "cap", "max_tokens": 100},
                "policy_modules": [str(module)],
                "decisions": str(folder / "decisions.jsonl"),
            }
        },
    }
    registry._registered.pop("admission/door_for_live_test", None)


@pytest.fixture(scope="module")
def llm(options: dict[str, Any]) -> Iterator[LLM]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        engine = LLM(**options, disable_log_stats=False)
        yield engine
        engine.llm_engine.engine_core.shutdown()


def params(tenant: str = "", tokens: int = 2) -> SamplingParams:
    facts = {"tenant": tenant}
    return SamplingParams(max_tokens=tokens, ignore_eos=True, temperature=0, extra_args=facts)


def prompt(seed: int, count: int) -> dict[str, Any]:
    return {"prompt_token_ids": [3 + (37 * seed + 7 * place) % 1000 for place in range(count)]}


def generate(llm: LLM, prompts: list[Any], options: Any) -> list[Any]:
    return list(llm.generate(prompts, options, use_tqdm=False))


def test_rejections_reach_the_client_also_alone(llm: LLM) -> None:
    (alone,) = generate(llm, [prompt(1, 50)], params("rude"))
    first, second = generate(llm, [prompt(2, 50), prompt(3, 50)], [params("rude"), params()])
    for refused in (alone, first):
        answer = refused.outputs[0]
        assert (answer.finish_reason, answer.stop_reason) == ("abort", "rejected: not like this")
        assert not answer.token_ids
    assert second.outputs[0].finish_reason == "length"


def test_reuse_is_capped_and_a_reset_empties_the_cache(llm: LLM) -> None:
    def cached() -> int:
        return int(generate(llm, [prompt(5, 300)], params())[0].num_cached_tokens)

    core: Any = llm.llm_engine.engine_core
    queue = core.engine_core.scheduler.kv_cache_manager.block_pool.free_block_queue
    assert isinstance(queue, PolicyFreeQueue)
    assert [cached(), cached()] == [0, 96]
    assert queue.idle > 0
    assert llm.reset_prefix_cache()
    assert queue.idle == 0
    assert [cached(), cached()] == [0, 96]
    llm.sleep(level=1)  # weights go, and with them everything cached
    llm.wake_up()
    assert [cached(), cached()] == [0, 96]


def test_order_holds_in_a_live_engine(llm: LLM, options: dict[str, Any]) -> None:
    lengths = [90, 30, 60]
    generate(llm, [prompt(20 + n, n) for n in lengths], params())
    rows = read(Path(options["additional_config"]["servelab"]["decisions"]))
    new = [tokens for row in rows[-3:] for tokens in row["scheduled"].values() if tokens > 1]
    assert new[-3:] == sorted(lengths)


def test_another_process_holds_and_rejects_too(options: dict[str, Any]) -> None:
    async def serve(engine: AsyncLLM, ident: str, tenant: str) -> tuple[Any, float]:
        began_s = asyncio.get_running_loop().time()
        outputs = [o async for o in engine.generate(prompt(7, 40), params(tenant), ident)]
        return outputs[-1].outputs[0], asyncio.get_running_loop().time() - began_s

    async def run() -> None:
        engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**options))
        try:
            answer, _ = await serve(engine, "a", "")
            assert answer.finish_reason == "length"
            held = asyncio.create_task(serve(engine, "b", "patient"))
            await asyncio.sleep(0.2)
            refused, took_s = await serve(engine, "c", "rude")
            answer, held_s = await held
        finally:
            engine.shutdown()
        assert (refused.finish_reason, refused.stop_reason) == (
            "abort", "rejected: not like this",
        )  # fmt: skip
        assert answer.finish_reason == "length"
        assert 1.5 <= held_s < 6
        assert took_s < 6

    with contextlib.closing(asyncio.new_event_loop()) as loop:
        loop.run_until_complete(run())
