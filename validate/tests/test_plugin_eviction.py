"""Eviction policies in vLLM's block pool: what they see, and what is done with their answers."""

# ruff: noqa: E402 - vLLM is looked for before what needs it is imported

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

pytestmark = pytest.mark.vllm
pytest.importorskip("vllm", reason="needs vLLM: make validate builds an environment with it")

from policies.api import BlockView, EvictionPolicy, PolicyError
from policies.eviction.lfu import Lfu
from policies.eviction.lru import Lru
from policies.eviction.slo_aware import SloAware
from sim.latency import AffineStepModel
from validate.decisions import first_difference
from validate.tests.plugin_bench import Bench, words

MS = 10**9


class Watched(Lru):
    """Least recently used; remembers every view it was shown."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def add(self, block: BlockView, now: float) -> None:
        self.seen.append(
            (now, block, block.depth, block.hits, block.stored_s, block.used_s, block.slo.name)
        )
        super().add(block, now)


def test_a_block_shows_what_the_simulators_block_shows() -> None:
    policy = Watched()
    bench = Bench(eviction=policy, steps=AffineStepModel(MS, MS, 0, 0, MS))
    bench.now_s = 5.0
    request = bench.add("a", words(1, 40), 1, slo_class="batch", slo_ttft_s=9.0)
    bench.run()
    assert [seen[2:] for seen in policy.seen] == [
        (1, 0, 5.0, pytest.approx(5.1), "batch"), (0, 0, 5.0, pytest.approx(5.1), "batch"),
    ]  # fmt: skip
    view = policy.seen[0][1]
    assert view.hash == request.block_hashes[1]
    assert view.blocks == 1
    assert view.recompute_s == pytest.approx(1e-3 * (1 + 16 + 2 * 16 * 16 + 16 * 16))
    policy.seen.clear()
    bench.add("b", words(1, 33), 1, slo_class="chat", slo_ttft_s=1.0)
    bench.add("c", words(1, 33), 1, slo_class="slow", slo_ttft_s=20.0)
    bench.run()
    assert [(seen[1] is view, seen[3], seen[4], seen[6]) for seen in policy.seen[:2]] == [
        (True, 2, 5.0, "chat"), (False, 2, 5.0, "chat"),
    ]  # fmt: skip


def test_stored_s_is_the_first_admission_also_of_later_blocks() -> None:
    policy = Watched()
    bench = Bench(eviction=policy)
    bench.now_s = 2.0
    bench.add("a", words(1, 10), 20)
    bench.run()
    assert [seen[4] for seen in policy.seen] == [2.0]
    assert policy.seen[0][5] > 3.5


def test_a_block_stored_again_is_a_new_view() -> None:
    policy = Watched()
    bench = Bench(eviction=policy)
    bench.serve("a", words(1, 40))
    first = {id(seen[1]): seen[1] for seen in policy.seen}
    for index in range(10):
        bench.serve(f"fill{index}", words(2 + index, 300))
    policy.seen.clear()
    bench.serve("b", words(1, 40))
    again = [seen[1] for seen in policy.seen]
    assert len(again) == 2
    assert not any(id(view) in first for view in again)
    assert [view.hash for view in again] == [view.hash for view in first.values()]


def scan(policy: EvictionPolicy) -> tuple[int, int]:
    """A hot prefix and a batch one among prompts that are read once; hits of both."""
    bench = Bench(eviction=policy)
    batch = 0
    hot = bench.serve("hot", words(0, 97), slo_class="chat", slo_ttft_s=0.5)
    for index in range(30):
        hot += bench.serve(f"hot{index}", words(0, 97), slo_class="chat", slo_ttft_s=0.5)
        for part in range(4):
            bench.serve(f"s{index}-{part}", words(10 + 9 * index + part, 200), slo_class="batch",
                        slo_ttft_s=60.0)  # fmt: skip
        batch += bench.serve(f"b{index}", words(1, 97), slo_class="batch", slo_ttft_s=60.0)
    return hot, batch


def test_policies_change_what_stays() -> None:
    lru, lfu, slo = scan(Lru()), scan(Lfu()), scan(SloAware())
    assert lru == (96, 0)
    assert lfu == (30 * 96, 0)
    assert slo == (30 * 96, 0)


def test_a_reset_makes_every_block_blank_and_the_policy_forget() -> None:
    ours, stock = Bench(eviction=Watched()), Bench(stock=True)
    for bench in (ours, stock):
        for index in range(9):
            bench.serve(f"r{index}", words(index, 100))
        assert bench.scheduler.reset_prefix_cache()
        assert bench.serve("again", words(8, 100)) == 0
        bench.serve("fill", words(20, 300), 19)
    assert first_difference(stock.rows, ours.rows) is None
    queue = ours.pool.free_block_queue
    assert queue.idle == len(queue.policy._order)


def test_a_reset_with_running_requests_preempts_them_and_goes_on() -> None:
    ours, stock = Bench(eviction=Lru()), Bench(stock=True)
    for bench in (ours, stock):
        for index in range(3):
            bench.add(f"r{index}", words(index, 50), 30)
        for _ in range(9):
            bench.step()
        assert not bench.scheduler.reset_prefix_cache()
        assert bench.scheduler.reset_prefix_cache(reset_running_requests=True)
        assert ours.pool.free_block_queue.idle == 0 or bench is stock
        bench.run()
        assert len(bench.ended) == 3
    assert first_difference(stock.rows, ours.rows) is None


class Wrong(Lru):
    """Names what it should not."""

    in_order = False

    def __init__(self, answer: Any) -> None:
        super().__init__()
        self.answer = answer
        self.removed: list[BlockView] = []

    def remove(self, block: BlockView, now: float) -> None:
        self.removed.append(block)
        super().remove(block, now)

    def victims(self, count: int, now: float) -> Sequence[BlockView]:
        return self.answer(self) if self.removed else super().victims(count, now)


@pytest.mark.parametrize(
    "answer",
    [lambda _: None, lambda _: [], lambda _: [object()], lambda policy: [policy.removed[0]]],
    ids=["none", "empty", "rubbish", "evicted"],
)
def test_a_victim_that_is_not_evictable_is_an_error_with_the_policys_name(answer: Any) -> None:
    bench = Bench(eviction=Wrong(answer))
    for index in range(20):
        bench.add(f"r{index}", words(index, 200))
    with pytest.raises(PolicyError, match=r"eviction/lru\.victims\(1, now=.*nobody uses"):
        bench.run()


def test_batches_take_what_single_victims_take() -> None:
    class OneByOne(Lru):
        in_order = False

    rows = []
    for policy in (Lru(), OneByOne()):
        bench = Bench(eviction=policy)
        for index in range(30):
            bench.serve(f"r{index}", words(index % 9, 130 + 17 * (index % 11)), 20)
        rows.append([(row["blocks"], row["evicted"]) for row in bench.rows])
    assert rows[0] == rows[1]
    assert sum(len(evicted) for _, evicted in rows[0]) > 100
