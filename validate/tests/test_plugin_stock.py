"""The plug-in changes nothing where no policy, or vLLM's own ones, are configured."""

# ruff: noqa: E402 - vLLM is looked for before what needs it is imported

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

pytestmark = pytest.mark.vllm
pytest.importorskip("vllm", reason="needs vLLM: make validate builds an environment with it")

from policies.admission.fcfs import Fcfs
from policies.api import ADMIT, Admission, EngineView, RequestView
from policies.eviction.lru import Lru
from validate.decisions import Decision, first_difference
from validate.tests.plugin_bench import LIMITS, Bench, words
from validate.vllm_plugin.bare import BareEngine
from validate.vllm_plugin.queue import PolicyQueue
from validate.workloads import Entry, Workload, random_workload

DEFAULTS = {"admission": "fcfs", "eviction": "lru", "reuse": "always"}


def rows_of(workload: Workload, **options: Any) -> list[Decision]:
    return BareEngine(workload, **options).run()


@pytest.mark.parametrize("asynchronous", [False, True])
def test_decisions_are_those_of_stock_vllm_with_any_options(asynchronous: bool) -> None:
    priorities = 0
    for seed in range(10):
        stock = random_workload(seed, asynchronous=asynchronous)
        expected = rows_of(stock)
        assert first_difference(expected, rows_of(stock, plugged=True)) is None
        policies = DEFAULTS | ({"admission": "priority"} if stock.priority else {})
        found = rows_of(replace(stock, policies=policies, priority=False))
        assert first_difference(expected, found) is None
        priorities += stock.priority
    assert 0 < priorities < 10


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("priority", [False, True])
def test_decisions_are_those_of_stock_vllm_for_thousands_of_steps(
    asynchronous: bool, priority: bool
) -> None:
    entries = tuple(
        Entry(
            id=f"r{index:03}",
            at_step=8 * index,
            prompt=tuple(words(index % 7, 60) + words(100 + index, 5 * (index % 9))),
            output_tokens=40 + index % 130,
            priority=index % 3,
        )
        for index in range(250)
    )
    limits = replace(LIMITS, async_scheduling=asynchronous)
    stock = Workload(name="long", limits=limits, priority=priority, entries=entries)
    expected = rows_of(stock)
    policies = DEFAULTS | ({"admission": "priority"} if priority else {})
    found = rows_of(replace(stock, policies=policies, priority=False))
    assert first_difference(expected, found) is None
    assert len(expected) > 2000
    assert sum(len(row["evicted"]) for row in expected) > 1000
    assert sum(len(row["preempted"]) for row in expected) > 50


class Flat(Fcfs):
    """First come, first served, but through the queue of the plug-in."""

    def order(self, request: RequestView, now: float) -> float:
        return 0.0

    def admit(self, request: RequestView, engine: EngineView, now: float) -> Admission:
        return ADMIT


def crowd(bench: Bench) -> Bench:
    for index in range(60):
        prompt = words(index % 7, 60) + words(100 + index, 5 * (index % 9))
        bench.add(f"r{index}", prompt, 40 + index % 30)
        bench.step()
    bench.run()
    return bench


def test_the_queue_in_order_of_arrival_is_vllms_queue() -> None:
    ours = crowd(Bench(admission=Flat(), eviction=Lru()))
    assert isinstance(ours.scheduler.waiting, PolicyQueue)
    stock = crowd(Bench(stock=True))
    assert first_difference(stock.rows, ours.rows) is None
    assert sum(len(row["preempted"]) for row in stock.rows) > 10
    assert sum(len(row["evicted"]) for row in stock.rows) > 100


def test_without_policies_nothing_is_replaced() -> None:
    ours, stock = Bench().scheduler, Bench(stock=True).scheduler
    assert type(ours.waiting) is type(stock.waiting)
    pool, manager = ours.kv_cache_manager.block_pool, ours.kv_cache_manager
    assert type(pool.free_block_queue) is type(stock.kv_cache_manager.block_pool.free_block_queue)
    assert not {"touch", "get_new_blocks", "reset_prefix_cache"} & set(vars(pool))
    assert "get_computed_blocks" not in vars(manager)
    assert ours.policies == {"admission": None, "eviction": None, "reuse": None}
