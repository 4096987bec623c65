"""A policy that breaks its contract is named, with the call, whatever it answered."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import nan
from typing import Any

import pytest

from policies.api import (
    AdmissionPolicy,
    BlockView,
    ClusterView,
    Defer,
    EvictionPolicy,
    InstanceView,
    PDPolicy,
    Placement,
    PolicyError,
    PrefixMatch,
    RequestView,
    ReusePolicy,
    Tier,
)
from policies.fakes import FakeBlock, FakeInstance
from policies.registry import policy_set
from sim.tests.bench import MODES, Job, Mode, serve

pytestmark = pytest.mark.parametrize("mode", MODES)


@dataclass(slots=True, eq=False)
class BadAdmission(AdmissionPolicy):
    verdict: Any = None
    key: Any = 0.0

    def order(self, request: RequestView, now: float) -> float:
        return self.key  # type: ignore[no-any-return]

    def admit(self, request: RequestView, engine: object, now: float) -> Any:
        return self.verdict


@pytest.mark.parametrize("key", ["first", None, nan, (1, 2)])
def test_a_key_that_is_no_number(mode: Mode, key: object) -> None:
    policies = policy_set(admission=lambda: BadAdmission(key=key))
    with pytest.raises(PolicyError, match=r"BadAdmission\.order\(0\) answered .*number"):
        serve(Job(0, 4, 1), mode=mode, policies=policies)


@pytest.mark.parametrize("verdict", [None, True, "admit", Defer])
def test_a_verdict_that_is_no_admission(mode: Mode, verdict: object) -> None:
    policies = policy_set(admission=lambda: BadAdmission(verdict=verdict))
    with pytest.raises(PolicyError, match=r"BadAdmission\.admit\(0\) answered .*Admit, Defer or"):
        serve(Job(0, 4, 1), mode=mode, policies=policies)


@pytest.mark.parametrize("until_s", [0.0, -1.0, 50e-12])
def test_a_deferral_into_the_past(mode: Mode, until_s: float) -> None:
    policies = policy_set(admission=lambda: BadAdmission(verdict=Defer(until_s)))
    with pytest.raises(PolicyError, match=r"BadAdmission\.admit\(0.*has passed"):
        serve(Job(50, 4, 1), mode=mode, policies=policies)


@dataclass(slots=True, eq=False)
class BadReuse(ReusePolicy):
    used: Any = 0
    kept: Any = None

    def use(self, request: RequestView, match: PrefixMatch, engine: object, now: float) -> int:
        return self.used  # type: ignore[no-any-return]

    def retain(self, request: RequestView, engine: object, now: float) -> Any:
        return self.kept


@pytest.mark.parametrize("used", [-1, 5, 4.0, None, "all"])
def test_a_use_of_more_than_there_is_or_of_no_whole_number(mode: Mode, used: object) -> None:
    policies = policy_set(reuse=lambda: BadReuse(used=used))
    jobs = (Job(0, 8, 1, chain=((70, 2),)), Job(500, 8, 1, chain=((70, 2),)))
    with pytest.raises(PolicyError, match=r"BadReuse\.use\(1\) answered .* from 0 to 4 "):
        serve(*jobs, mode=mode, policies=policies)


@pytest.mark.parametrize("kept", [{Tier.HBM: -1}, {Tier.HBM: 2.5}, {Tier.HBM: None}, 16])
def test_a_retention_that_is_no_number_of_tokens(mode: Mode, kept: object) -> None:
    policies = policy_set(reuse=lambda: BadReuse(kept=kept))
    with pytest.raises(PolicyError, match=r"BadReuse\.retain\(0\) answered "):
        serve(Job(0, 8, 1, chain=((70, 2),)), mode=mode, policies=policies)


@dataclass(slots=True, eq=False)
class BadEviction(EvictionPolicy):
    """Knows every block it was ever given, oldest first, and answers with a function of them."""

    answer: Callable[[list[BlockView]], Any] = list
    given: list[BlockView] = field(default_factory=list)

    def add(self, block: BlockView, now: float) -> None:
        self.given.append(block)

    def remove(self, block: BlockView, now: float) -> None:
        pass

    def victims(self, count: int, now: float) -> Sequence[BlockView]:
        return self.answer(self.given)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "answer",
    [
        lambda given: [],
        lambda given: ["block"],
        lambda given: [FakeBlock(hash=70), *given],
        lambda given: None,
    ],
    ids=["too few", "a string", "a made-up block", "nothing"],
)
def test_victims_that_are_missing_or_made_up(
    mode: Mode, answer: Callable[[list[BlockView]], Any]
) -> None:
    policies = policy_set(eviction=lambda: BadEviction(answer))
    jobs = (Job(0, 8, 1, chain=((70, 2),)), Job(500, 12, 1, chain=((80, 3),)))
    with pytest.raises(PolicyError, match=r"BadEviction\.victims"):
        serve(*jobs, mode=mode, policies=policies, blocks=4)


def test_a_victim_in_use(mode: Mode) -> None:
    # The second request holds the first one's blocks when it needs more of them.
    policies = policy_set(eviction=BadEviction)
    jobs = (
        Job(0, 8, 1, chain=((70, 2),)),
        Job(500, 4, 1, chain=((80, 1),)),
        Job(1000, 13, 3, chain=((70, 3),)),
    )
    with pytest.raises(PolicyError, match=r"BadEviction\.victims"):
        serve(*jobs, mode=mode, policies=policies, blocks=4)


@dataclass(slots=True, eq=False)
class BadPlacement(PDPolicy):
    answer: Callable[[Sequence[InstanceView]], Any]

    def place(self, request: RequestView, cluster: ClusterView, now: float) -> Placement:
        return self.answer(cluster.instances)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "answer",
    [
        lambda instances: None,
        lambda instances: instances[0],
        lambda instances: Placement(None, None),  # type: ignore[arg-type]
        lambda instances: Placement(FakeInstance(), FakeInstance()),
    ],
    ids=["nothing", "an instance", "a placement of nothing", "a made-up instance"],
)
def test_a_placement_on_nothing(
    mode: Mode, answer: Callable[[Sequence[InstanceView]], Any]
) -> None:
    policies = policy_set(pd=lambda: BadPlacement(answer))
    with pytest.raises(PolicyError, match=r"BadPlacement\.place\(0\) answered .* Placement of"):
        serve(Job(0, 4, 1), mode=mode, policies=policies)


def test_a_placement_on_two_instances_of_a_colocated_deployment(mode: Mode) -> None:
    policies = policy_set(pd=lambda: BadPlacement(lambda i: Placement(i[0], i[1])))
    with pytest.raises(PolicyError, match=r"BadPlacement\.place\(0\) split .* 0 and 1.*colocated"):
        serve(Job(0, 4, 1), mode=mode, policies=policies, engines=2)


@pytest.mark.parametrize(
    ("kind", "method"),
    [("admission", "admit"), ("eviction", "victims"), ("reuse", "use"), ("pd", "place")],
)
def test_a_factory_that_makes_something_else(mode: Mode, kind: str, method: str) -> None:
    def something() -> object:
        return object()

    policies = policy_set(**{kind: something})
    with pytest.raises(PolicyError, match=rf"<object .*> is not .* {kind} policy: no {method}\(\)"):
        serve(Job(0, 4, 1), mode=mode, policies=policies)
