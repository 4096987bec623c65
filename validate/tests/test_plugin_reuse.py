"""Reuse policies in vLLM's prefix cache: what is used of a hit, and what is kept of a prompt."""

# ruff: noqa: E402 - vLLM is looked for before what needs it is imported

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

pytestmark = pytest.mark.vllm
pytest.importorskip("vllm", reason="needs vLLM: make validate builds an environment with it")

from policies.api import EngineView, PolicyError, PrefixMatch, RequestView, ReusePolicy, Tier
from policies.eviction.lru import Lru
from policies.reuse.cap import Cap
from policies.reuse.never import Never
from validate.decisions import first_difference
from validate.tests.plugin_bench import Bench, words


class Keep(ReusePolicy):
    """Keeps the first ``tokens`` of every prompt of kind "once"; writes down what it was shown."""

    def __init__(self, tokens: Any) -> None:
        self.tokens = tokens
        self.asked: list[tuple[str, str, int, int, int]] = []

    def use(self, request: RequestView, match: PrefixMatch, engine: EngineView, now: float) -> int:
        assert match.runs == ((Tier.HBM, match.tokens),)
        self._note("use", request, engine)
        return match.tokens

    def retain(
        self, request: RequestView, engine: EngineView, now: float
    ) -> Mapping[Tier, int] | None:
        self._note("retain", request, engine)
        return {Tier.HBM: self.tokens} if request.kind == "once" else None

    def _note(self, call: str, request: RequestView, engine: EngineView) -> None:
        free = engine.free_blocks()
        self.asked.append((call, request.id, engine.waiting, engine.running, free))


def test_a_cap_limits_what_is_used() -> None:
    bench = Bench(reuse=Cap(max_tokens=50))
    assert bench.serve("a", words(1, 150)) == 0
    assert bench.serve("b", words(1, 150)) == 48
    assert bench.serve("c", words(1, 40)) == 32


def test_never_uses_nothing_but_stores() -> None:
    bench = Bench(reuse=Never(), eviction=Lru())
    bench.serve("a", words(1, 150))
    assert bench.serve("b", words(1, 150)) == 0


def test_what_is_not_kept_is_not_cached_also_of_the_answer() -> None:
    policy = Keep(40)
    bench = Bench(reuse=policy, eviction=Lru())
    prompt = words(1, 100)
    request = bench.add("a", prompt, 60, kind="once")
    bench.run()
    assert len(bench.pool.cached_block_hash_to_block) == 2
    longer = prompt + list(request.output_token_ids)
    assert bench.serve("b", longer) == 32
    assert bench.serve("c", longer) == len(longer) // 16 * 16 - (16 if len(longer) % 16 == 0 else 0)
    # Asked about hits before the blocks are taken, and about keeping only at admission.
    assert policy.asked[:3] == [
        ("retain", "a", 1, 0, 40), ("use", "b", 1, 0, 40), ("retain", "b", 1, 0, 40),
    ]  # fmt: skip


def test_keeping_is_asked_once_and_holds_after_a_preemption() -> None:
    policy = Keep(0)
    bench = Bench(reuse=policy, eviction=Lru(), limits={"num_gpu_blocks": 40})
    bench.add("a", words(1, 300), 20)
    bench.add("b", words(2, 290), 30, kind="once")
    bench.run()
    assert any("b" in row["preempted"] for row in bench.rows)
    assert [asked[:2] for asked in policy.asked if asked[0] == "retain"] == [
        ("retain", "a"), ("retain", "b"),
    ]  # fmt: skip
    assert bench.serve("again", words(2, 290)) == 0


def test_a_blocked_head_is_looked_up_again_and_again_without_effect() -> None:
    policy = Keep(0)
    limits = {"num_gpu_blocks": 30}
    bench, stock = (
        Bench(reuse=policy, eviction=Lru(), limits=limits),
        Bench(stock=True, limits=limits),
    )
    for each in (bench, stock):
        each.serve("first", words(1, 60))
        each.add("big", words(2, 300), 15)
        each.step()
        each.step()
        each.add("next", words(1, 200) + words(3, 110), 3)
        each.run()
    assert first_difference(stock.rows, bench.rows) is None
    uses = [asked for asked in policy.asked if asked[:2] == ("use", "next")]
    assert len(uses) > 5
    assert [asked[1] for asked in policy.asked if asked[0] == "retain"] == ["first", "big", "next"]


@pytest.mark.parametrize("answer", [-1, 33, 1.5, None])
def test_a_wrong_use_is_an_error_with_the_policys_name(answer: Any) -> None:
    class Odd(ReusePolicy):
        def use(self, request: Any, match: Any, engine: Any, now: float) -> int:
            return answer  # type: ignore[no-any-return]

    bench = Bench(reuse=Odd())
    bench.serve("a", words(1, 40))
    with pytest.raises(PolicyError, match=r"Odd\.use\(b\) answered .* from 0 to 32 was expected"):
        bench.serve("b", words(1, 40))


@pytest.mark.parametrize("answer", [-1, 1.5, "all"])
def test_a_wrong_retain_is_an_error_with_the_policys_name(answer: Any) -> None:
    bench = Bench(reuse=Keep(answer))
    with pytest.raises(PolicyError, match=r"Keep\.retain\(a\) answered .*whole number of tokens"):
        bench.serve("a", words(1, 40), kind="once")
