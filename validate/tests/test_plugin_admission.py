"""Admission policies in vLLM's waiting queue: order, holding back, rejecting, preempting."""

# ruff: noqa: E402 - vLLM is looked for before what needs it is imported

from __future__ import annotations

import time
from collections.abc import Callable
from math import inf, nan
from typing import Any

import pytest

pytestmark = pytest.mark.vllm
pytest.importorskip("vllm", reason="needs vLLM: make validate builds an environment with it")

from vllm.v1.request import RequestStatus

from policies.admission.priority import Priority
from policies.admission.shortest_prompt import ShortestPrompt
from policies.admission.token_bucket import TokenBucket
from policies.api import (
    ADMIT,
    Admission,
    AdmissionPolicy,
    Defer,
    EngineView,
    PolicyError,
    Reject,
    RequestView,
)
from validate.tests.plugin_bench import Bench, words
from validate.vllm_plugin import scheduler as plugin


class Asked(AdmissionPolicy):
    """Answers with a function; writes down who was asked when, and what was seen."""

    def __init__(self, answer: Callable[[RequestView, EngineView, float], Any]) -> None:
        self.answer = answer
        self.asked: list[tuple[str, float]] = []

    def admit(self, request: RequestView, engine: EngineView, now: float) -> Admission:
        self.asked.append((request.id, round(now, 6)))
        return self.answer(request, engine, now)  # type: ignore[no-any-return]


def order_of(bench: Bench) -> list[str]:
    return [ident for row in bench.rows for ident in row["new"]]


def test_order_decides_who_is_next_and_ties_go_by_arrival() -> None:
    bench = Bench(admission=ShortestPrompt(), limits={"max_num_seqs": 1})
    for ident, length in (("z", 50), ("y", 20), ("x", 20), ("w", 90), ("v", 10)):
        bench.add(ident, words(len(bench.scheduler.requests), length))
    assert [r.request_id for r in bench.scheduler.waiting] == ["v", "y", "x", "z", "w"]
    bench.run()
    assert order_of(bench) == ["v", "y", "x", "z", "w"]


def test_the_view_of_a_request_has_its_facts() -> None:
    seen: list[RequestView] = []

    def look(request: RequestView, engine: EngineView, now: float) -> Admission:
        seen.append(request)
        assert (engine.id, engine.waiting, engine.running) == (0, 1, 0)
        assert (engine.block_tokens, engine.free_blocks(), engine.total_blocks()) == (16, 40, 40)
        return ADMIT

    bench = Bench(admission=Asked(look))
    bench.now_s = 3.0
    request = bench.add(
        "a", words(1, 40), 5, priority=4, client_max_tokens=99, session="s", tenant="t", kind="k",
        model="m", slo_class="chat", slo_ttft_s="0.5", slo_tpot_s="fast", slo_e2e_s=7,
    )  # fmt: skip
    bench.step()
    (view,) = seen
    assert (view.id, view.arrival_s, view.prompt_tokens, view.max_tokens) == ("a", 3.0, 40, 99)
    assert (view.output_tokens, view.preemptions, view.priority) == (1, 0, 4)
    assert (view.session, view.tenant, view.kind, view.model) == ("s", "t", "k", "m")
    slo = view.slo
    assert (slo.name, slo.ttft_s, slo.tpot_s, slo.e2e_s) == ("chat", 0.5, inf, 7.0)
    assert list(view.block_hashes) == request.block_hashes[:2]


def test_a_deferred_head_holds_the_queue_and_is_asked_again_in_time() -> None:
    def later(request: RequestView, engine: EngineView, now: float) -> Admission:
        return Defer(0.45) if request.id == "a" and now < 0.45 else ADMIT

    policy = Asked(later)
    bench = Bench(admission=policy)
    bench.add("a", words(1, 20))
    bench.add("b", words(2, 20))
    for _ in range(3):
        bench.step()
    assert len(bench.scheduler.waiting) == 2
    assert bench.scheduler.has_unfinished_requests()
    assert bench.scheduler.get_request_counts() == (0, 2)
    assert policy.asked == [("a", 0.0)]
    assert bench.scheduler.waiting.deferred_until_s() == 0.45
    bench.run()
    assert policy.asked == [("a", 0.0), ("a", 0.5), ("b", 0.5)]
    assert order_of(bench) == ["a", "b"]


def test_an_answer_stands_until_something_changes_or_the_horizon_is_over() -> None:
    def when_alone(request: RequestView, engine: EngineView, now: float) -> Admission:
        return ADMIT if engine.running == 0 else Defer()

    def ask(horizon: int | None) -> list[tuple[str, float]]:
        class Once(Asked):
            horizon_steps = horizon

        policy = Once(when_alone)
        bench = Bench(admission=policy)
        bench.add("a", words(1, 20), 10)
        bench.add("b", words(2, 20), 1)
        bench.run()
        return policy.asked

    assert ask(None) == [("a", 0.0), ("b", 0.0), ("b", 1.0)]
    every = [0.0, 0.3, 0.6, 0.9, 1.0]
    assert ask(3) == [("a", 0.0), *(("b", at) for at in every)]


def test_nobody_is_asked_without_a_free_seat_nor_outside_a_step() -> None:
    policy = Asked(lambda *_: ADMIT)
    bench = Bench(admission=policy, limits={"max_num_seqs": 1})
    bench.add("a", words(1, 20), 3)
    bench.add("b", words(2, 20), 1)
    assert bool(bench.scheduler.waiting)
    bench.run()
    assert policy.asked == [("a", 0.0), ("b", 0.3)]


@pytest.mark.parametrize("others", [0, 3])
def test_the_client_of_a_rejected_request_is_told_why(others: int) -> None:
    def refuse(request: RequestView, engine: EngineView, now: float) -> Admission:
        return Reject("too rude") if request.id.startswith("rude") else ADMIT

    bench = Bench(admission=Asked(refuse))
    bench.add("rude1", words(1, 20), 5, client=2)
    bench.add("rude2", words(2, 20), 5, client=1)
    for index in range(others):
        bench.add(f"r{index}", words(3 + index, 20), 5)
    bench.step()
    assert bench.ended == {
        "rude1": ("abort", "rejected: too rude", 2),
        "rude2": ("abort", "rejected: too rude", 1),
    }
    bench.run()
    assert len(bench.ended) == 2 + others
    assert bench.pool.get_num_free_blocks() == 40
    assert not bench.scheduler.requests


def test_orders_choose_who_is_preempted() -> None:
    def preempted(policy: AdmissionPolicy | None) -> list[str]:
        bench = Bench(admission=policy, limits={"max_num_batched_tokens": 320})
        bench.add("high", words(1, 150), 120, priority=0)
        bench.add("low", words(2, 100), 120, priority=9)
        bench.add("middle", words(3, 150), 120, priority=5)
        bench.run()
        return [ident for row in bench.rows for ident in row["preempted"]]

    class LongestLast(ShortestPrompt):
        preempts = "order"

        def order(self, request: RequestView, now: float) -> float:
            assert request.priority in (0, 5, 9)  # not what vLLM compares by
            return -request.prompt_tokens - 0.5

    assert preempted(None)[0] == "middle"
    assert preempted(Priority())[0] == "low"
    assert preempted(LongestLast())[0] == "low"


def test_a_preempted_request_is_ordered_anew() -> None:
    orders: list[tuple[str, int, int]] = []

    class Watching(AdmissionPolicy):
        def order(self, request: RequestView, now: float) -> float:
            orders.append((request.id, request.preemptions, request.computed_tokens))
            return 0.0

    bench = Bench(admission=Watching(), limits={"num_gpu_blocks": 40})
    bench.add("a", words(1, 300), 20)
    bench.add("b", words(2, 290), 30)
    bench.add("c", words(3, 30), 1)
    bench.run()
    assert orders[:3] == [("a", 0, 0), ("b", 0, 0), ("c", 0, 0)]
    assert orders[3:] == [("b", 1, 0)]
    assert order_of(bench)[-1] == "c"


def test_aborted_requests_leave_the_queue() -> None:
    bench = Bench(admission=ShortestPrompt(), limits={"max_num_seqs": 1})
    for index in range(5):
        bench.add(f"r{index}", words(index, 20 + index))
    bench.scheduler.finish_requests(["r1", "r3"], RequestStatus.FINISHED_ABORTED)
    bench.run()
    assert order_of(bench) == ["r0", "r2", "r4"]


def test_a_rate_limit_spreads_admissions() -> None:
    bench = Bench(admission=TokenBucket(rate_tokens_per_s=100.0, burst_tokens=50))
    for index in range(4):
        bench.add(f"r{index}", words(index, 50))
    bench.run()
    began = [row["began_s"] for row in bench.rows if row["new"]]
    assert began == pytest.approx([0.0, 0.6, 1.2, 1.8])  # 0.5 s each, seen at the next step


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (True, r"Asked\.admit\(a\) answered True; Admit, Defer or Reject was expected"),
        (None, r"Asked\.admit\(a\) answered None"),
        (Defer(-1.0), r"Asked\.admit\(a, now=0\.0\) deferred until -1\.0, which has passed"),
    ],
)
def test_a_wrong_answer_is_an_error_with_the_policys_name(answer: Any, message: str) -> None:
    bench = Bench(admission=Asked(lambda *_: answer))
    bench.add("a", words(1, 20))
    with pytest.raises(PolicyError, match=message):
        bench.step()


@pytest.mark.parametrize("order", [nan, "first", None])
def test_a_wrong_order_is_an_error_with_the_policys_name(order: Any) -> None:
    class Odd(AdmissionPolicy):
        def order(self, request: RequestView, now: float) -> float:
            return order  # type: ignore[no-any-return]

    bench = Bench(admission=Odd())
    with pytest.raises(PolicyError, match=r"Odd\.order\(a\) answered .*a number was expected"):
        bench.add("a", words(1, 20))


def test_an_engine_that_only_holds_requests_does_not_spin(monkeypatch: Any) -> None:
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    bench = Bench(admission=Asked(lambda *_: Defer(1e9)))
    bench.add("a", words(1, 20))
    bench.step()
    assert not slept  # the clock is the test's own
    bench.scheduler._live = True
    bench.step()
    assert slept == [plugin.HELD_POLL_S]
