"""Invariant I5: the fast engine and the reference engine agree on everything, to the bit."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import floor
from zlib import crc32

import pytest

from policies.api import (
    ADMIT,
    Admission,
    AdmissionPolicy,
    Admit,
    Defer,
    EngineView,
    Reject,
    RequestView,
)
from policies.registry import catalog, policy_set
from sim.backend import Deployment
from sim.engine import FastEngine
from sim.simulator import Simulator
from sim.stepwise import StepEngine
from sim.tests.twins import compare, play, random_case
from traces import generate

CHUNK = 50


@pytest.mark.parametrize("first", range(0, 1000, CHUNK))
def test_the_fast_engine_equals_the_reference_engine_on_random_cases(first: int) -> None:
    outcomes = [compare(seed) for seed in range(first, first + CHUNK)]
    # A chunk in which nothing goes wrong on the engines would prove little.
    rows = [row for outcome in outcomes for row in outcome["requests"].values()]
    rejected = [row for row in rows if len(row) == 3]
    hits = [row for row in rows if len(row) > 3 and row[5]]
    assert len(rejected) > 0
    assert len(hits) > 100
    assert sum(sum(outcome["preemptions"]) for outcome in outcomes) > 10
    assert sum(sum(outcome["evictions"]) for outcome in outcomes) > 1000


@dataclass(slots=True, eq=False)
class Picky(AdmissionPolicy):
    """Defers by memory, by company and by the clock, and rejects some, by the request's name."""

    salt: int
    answers: list[Admission]

    def order(self, request: RequestView, now: float) -> float:
        return float(self._draw(request, "order") % 5)

    def admit(self, request: RequestView, engine: EngineView, now: float) -> Admission:
        answer = self._answer(request, engine, now)
        self.answers.append(answer)
        return answer

    def _answer(self, request: RequestView, engine: EngineView, now: float) -> Admission:
        mood = self._draw(request, "mood") % 6
        if engine.running == 0:
            return ADMIT  # so that nobody waits for ever
        if mood == 0:
            return Reject("mood")
        if mood == 1 and engine.free_blocks() < engine.total_blocks() // 2:
            return Defer(reason="memory")
        if mood == 2 and engine.running > 3:
            return Defer(reason="company")
        if mood == 3 and floor(now / 0.01) % 2:
            return Defer((floor(now / 0.01) + 1) * 0.01 + 1e-9, "clock")
        return ADMIT

    def _draw(self, request: RequestView, what: str) -> int:
        return crc32(f"{self.salt}/{what}/{request.id}".encode())


class PickyEveryStep(Picky):
    horizon_steps = 1


class PickyEveryFiveSteps(Picky):
    horizon_steps = 5
    preempts = "order"


@pytest.mark.parametrize("policy", [Picky, PickyEveryStep, PickyEveryFiveSteps])
def test_they_agree_under_a_policy_that_defers_and_rejects(policy: type[Picky]) -> None:
    given: list[Admission] = []
    for seed in range(20_000, 20_060):
        outcomes = []
        for kind in (FastEngine, StepEngine):
            answers: list[Admission] = []
            spec = {"name": policy, "salt": seed, "answers": answers}
            outcomes.append(play(replace(random_case(seed), admission=spec), kind) | {"a": answers})
        assert outcomes[0] == outcomes[1], f"seed {seed}"
        given += answers
    assert {type(answer) for answer in given} == {Admit, Defer, Reject}
    assert {answer.reason for answer in given if isinstance(answer, Defer)} == {
        "memory", "company", "clock",
    }  # fmt: skip


PLAIN = {"admission": "fcfs", "eviction": "lru", "reuse": "always", "routing": "round_robin"}
EVERY = [PLAIN] + [
    PLAIN | {entry.kind: entry.name}
    for entry in catalog().values()
    if PLAIN.get(entry.kind, entry.name) != entry.name
]


@pytest.mark.parametrize("signal_age_s", [0.0, 0.3])
@pytest.mark.parametrize("names", EVERY, ids=lambda names: "-".join(names.values()))
def test_both_modes_give_the_same_result_under_every_policy(
    names: dict[str, str], signal_age_s: float
) -> None:
    trace = generate(
        "chat",
        sessions=12,
        session_rate_per_s=4.0,
        prompt_max=2500,
        system_max=1000,
        think_mean_s=1.0,
        token_s=0.0,
        classes=[{"name": "interactive", "ttft_s": 0.3}, {"name": "batch", "priority": 1}],
        seed=3,
    )
    deployment = Deployment.of("a100_80g", "llama3_8b", engines=2, num_gpu_blocks=250)
    fast, stepwise = (
        Simulator(deployment, mode=mode, signal_age_s=signal_age_s).serve(
            trace, policy_set(**names), seed=1
        )
        for mode in ("fast", "stepwise")
    )
    assert fast.requests.equals(stepwise.requests)
    assert fast.engines.equals(stepwise.engines)
    summary = stepwise.summary()
    # Inter-token latencies are sums of floats, and the runs of one mode are longer.
    itl = {key: pytest.approx(summary[key], rel=1e-12) for key in summary if "itl" in key}
    assert fast.summary() == summary | itl
