"""Invariant I6: policies get by with what the views show, and the future changes nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from policies.api import (
    Admission,
    AdmissionPolicy,
    BlockView,
    ClusterView,
    EngineView,
    EvictionPolicy,
    InstanceView,
    PDPolicy,
    Placement,
    PolicyError,
    PolicySet,
    PrefixMatch,
    RequestView,
    ReusePolicy,
)
from policies.registry import catalog, lookup, policy_set
from policies.strict import strict, unwrapped
from sim.backend import Deployment
from sim.engine import FastEngine
from sim.simulator import Simulator
from sim.tests.bench import MODES, Job, Mode, serve
from sim.tests.twins import play, random_case
from traces import generate


class StrictAdmission(AdmissionPolicy):
    def __init__(self, policy: AdmissionPolicy) -> None:
        self.policy = policy

    def order(self, request: RequestView, now: float) -> float:
        return self.policy.order(strict(request, RequestView), now)

    def admit(self, request: RequestView, engine: EngineView, now: float) -> Admission:
        return self.policy.admit(strict(request, RequestView), strict(engine, EngineView), now)


class StrictReuse(ReusePolicy):
    def __init__(self, policy: ReusePolicy) -> None:
        self.policy = policy

    def use(self, request: RequestView, match: PrefixMatch, engine: EngineView, now: float) -> int:
        guarded = strict(request, RequestView), match, strict(engine, EngineView)
        return self.policy.use(*guarded, now)

    def retain(self, request: RequestView, engine: EngineView, now: float) -> Any:
        return self.policy.retain(strict(request, RequestView), strict(engine, EngineView), now)


class StrictEviction(EvictionPolicy):
    def __init__(self, policy: EvictionPolicy) -> None:
        self.policy = policy
        self.guards: dict[int, BlockView] = {}

    def add(self, block: BlockView, now: float) -> None:
        guard = self.guards[id(block)] = strict(block, BlockView)
        self.policy.add(guard, now)

    def remove(self, block: BlockView, now: float) -> None:
        self.policy.remove(self.guards.pop(id(block)), now)

    def victims(self, count: int, now: float) -> Sequence[BlockView]:
        return [unwrapped(block) for block in self.policy.victims(count, now)]


class StrictPlacement(PDPolicy):
    def __init__(self, policy: PDPolicy) -> None:
        self.policy = policy
        self.guards: dict[int, InstanceView] = {}

    def place(self, request: RequestView, cluster: ClusterView, now: float) -> Placement:
        answer = self.policy.place(strict(request, RequestView), strict(cluster, ClusterView), now)
        return Placement(unwrapped(answer.prefill), unwrapped(answer.decode))


def behind_strict_views(policies: PolicySet) -> PolicySet:
    return PolicySet(
        admission=lambda: StrictAdmission(policies.admission()),
        eviction=lambda: StrictEviction(policies.eviction()),
        reuse=lambda: StrictReuse(policies.reuse()),
        pd=lambda: StrictPlacement(policies.pd()),
    )


PLAIN = {"admission": "fcfs", "eviction": "lru", "reuse": "always", "routing": "round_robin"}
EVERY = [PLAIN] + [
    PLAIN | {entry.kind: entry.name}
    for entry in catalog().values()
    if PLAIN.get(entry.kind, entry.name) != entry.name and not entry.needs_oracle
]


@pytest.mark.parametrize("names", EVERY, ids=lambda names: "-".join(names.values()))
@pytest.mark.parametrize("mode", MODES)
def test_every_policy_serves_a_trace_with_nothing_but_the_views(
    mode: Mode, names: dict[str, str]
) -> None:
    trace = generate(
        "chat", sessions=12, session_rate_per_s=8.0, prompt_max=2500, system_max=1000, seed=3
    )
    deployment = Deployment.of("a100_80g", "llama3_8b", engines=2, num_gpu_blocks=250)
    simulator = Simulator(deployment, mode=mode)
    routing: Any = names["routing"]
    if any(parameter.name == "seed" for parameter in lookup(f"routing/{routing}").parameters):
        routing = {"name": routing, "seed": 3}
    policies = policy_set(**names | {"routing": routing})
    open_views = simulator.serve(trace, policies)
    strict_views = simulator.serve(trace, behind_strict_views(policies))
    assert strict_views.requests.equals(open_views.requests)
    assert open_views.engines["evictions"].sum() > 0 or names["reuse"] == "never"


class Peeking(AdmissionPolicy):
    def order(self, request: RequestView, now: float) -> float:
        return float(request._true_output_tokens)  # type: ignore[attr-defined]


def test_a_policy_that_looks_at_the_true_output_length_fails_behind_strict_views() -> None:
    peeking = policy_set(admission=Peeking)
    assert serve(Job(0, 4, 3), policies=peeking).column("state") == ["finished"]
    with pytest.raises(PolicyError, match=r"RequestView\._true_output_tokens, which is not in"):
        serve(Job(0, 4, 3), policies=behind_strict_views(peeking))


@pytest.mark.parametrize("first", range(7000, 7040, 10))
def test_what_happens_before_a_request_ends_does_not_depend_on_when_it_will(first: int) -> None:
    compared = 0
    for seed in range(first, first + 10):
        case = random_case(seed)
        rows = play(case, FastEngine)["requests"]
        finished = {index: row for index, row in rows.items() if len(row) > 3}
        index = min(finished, key=lambda index: finished[index][3])
        end = finished[index][3]
        longer = [
            request | {"output_tokens": request["output_tokens"] + 7 * (request["index"] == index)}
            for request in case.requests
        ]
        again = play(replace(case, requests=longer), FastEngine)["requests"]
        for other, (engine, admitted, first_token, *_) in finished.items():
            if first_token < end:
                assert again[other][:3] == (engine, admitted, first_token)
                compared += 1
    assert compared > 20
