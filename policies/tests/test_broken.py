"""The conformance check finds every way to break the contract, and names it."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from time import monotonic
from typing import Any, ClassVar, Literal

import pytest

from policies.api import (
    ADMIT,
    Admission,
    AdmissionPolicy,
    BlockView,
    ClusterView,
    Defer,
    EngineView,
    InstanceView,
    PDPolicy,
    Placement,
    PolicyError,
    PrefixMatch,
    RequestView,
    ReusePolicy,
    Router,
    Tier,
)
from policies.eviction.lru import Lru
from policies.routing.least_loaded import LeastLoaded
from policies.testing import check

drawn: list[str] = []
asked = 0

# --------------------------------------------------------------------------- parameters, state


@dataclass(slots=True, eq=False)
class NoDefault(AdmissionPolicy):
    limit: int


class NoType(AdmissionPolicy):
    def __init__(self, limit=3) -> None:  # type: ignore[no-untyped-def]
        self.limit = limit


class NoPolicy:
    pass


@dataclass(slots=True, eq=False)
class FailsToStart(AdmissionPolicy):
    limit: int = 0

    def __post_init__(self) -> None:
        raise ValueError("limit is 0")


class ClassState(AdmissionPolicy):
    seen: ClassVar[set[str]] = set()

    def order(self, request: RequestView, now: float) -> float:
        self.seen.add(request.id)
        return 0.0


class ModuleState(AdmissionPolicy):
    def order(self, request: RequestView, now: float) -> float:
        drawn.append(request.id)
        return 0.0


class ModuleCounter(AdmissionPolicy):
    def order(self, request: RequestView, now: float) -> float:
        global asked  # noqa: PLW0603
        asked += 1
        return 0.0


def sharing() -> Callable[[], AdmissionPolicy]:
    common: list[str] = []

    class Sharing(AdmissionPolicy):
        def __init__(self) -> None:
            self.seen = common

    return Sharing


# --------------------------------------------------------------------------- clock, chance, views


class ReadsClock(AdmissionPolicy):
    def order(self, request: RequestView, now: float) -> float:
        return time.time()


class ReadsImportedClock(AdmissionPolicy):
    def order(self, request: RequestView, now: float) -> float:
        return monotonic()


class ReadsDate(AdmissionPolicy):
    def order(self, request: RequestView, now: float) -> float:
        return datetime.now().timestamp()


class DrawsGlobally(Router):
    def route(
        self, request: RequestView, instances: Sequence[InstanceView], now: float
    ) -> InstanceView:
        return random.choice(instances)


@dataclass(slots=True, eq=False)
class DrawsUnseeded(Router):
    _random: random.Random = field(init=False, repr=False, default_factory=random.Random)

    def route(
        self, request: RequestView, instances: Sequence[InstanceView], now: float
    ) -> InstanceView:
        return self._random.choice(instances)


class ReadsFuture(AdmissionPolicy):
    def order(self, request: RequestView, now: float) -> float:
        return float(request._true_output_tokens)  # type: ignore[attr-defined]


class Misspells(AdmissionPolicy):
    def order(self, request: RequestView, now: float) -> float:
        return float(request.prompt_token)  # type: ignore[attr-defined]


class Writes(AdmissionPolicy):
    def order(self, request: RequestView, now: float) -> float:
        request.priority = 1  # type: ignore[misc]
        return 0.0


class Crashes(AdmissionPolicy):
    def order(self, request: RequestView, now: float) -> float:
        return 1 / (request.priority - request.priority)


# --------------------------------------------------------------------------- admission


class SaysTrue(AdmissionPolicy):
    def admit(self, request: RequestView, engine: EngineView, now: float) -> Admission:
        return True  # type: ignore[return-value]


class OrdersByNaN(AdmissionPolicy):
    def order(self, request: RequestView, now: float) -> float:
        return float("nan")


class ChargesTwice(AdmissionPolicy):
    def __init__(self) -> None:
        self.asked = 0

    def admit(self, request: RequestView, engine: EngineView, now: float) -> Admission:
        self.asked += 1
        return ADMIT if self.asked % 3 else Defer(now + 1.0)


class ChargesSilently(AdmissionPolicy):
    def __init__(self) -> None:
        self.asked = 0

    def admit(self, request: RequestView, engine: EngineView, now: float) -> Admission:
        self.asked += 1
        return ADMIT if self.asked < 60 else Defer(now + 1.0)


class DefersIntoThePast(AdmissionPolicy):
    def admit(self, request: RequestView, engine: EngineView, now: float) -> Admission:
        return Defer(now)


class DefersForever(AdmissionPolicy):
    def admit(self, request: RequestView, engine: EngineView, now: float) -> Admission:
        return Defer()


class DefersOnAndOn(AdmissionPolicy):
    def admit(self, request: RequestView, engine: EngineView, now: float) -> Admission:
        return Defer(now + 0.01)


class PreemptsOddly(AdmissionPolicy):
    preempts: ClassVar[Literal["last", "order"]] = "first"  # type: ignore[assignment]


class NoHorizon(AdmissionPolicy):
    horizon_steps: ClassVar[int | None] = 0


# --------------------------------------------------------------------------- eviction


class DropsVictims(Lru):
    def victims(self, count: int, now: float) -> Sequence[BlockView]:
        named = list(super().victims(count, now))
        for block in named:
            del self._order[block]
        return named


class NamesRemoved(Lru):
    def remove(self, block: BlockView, now: float) -> None:
        pass


class NamesTwice(Lru):
    def victims(self, count: int, now: float) -> Sequence[BlockView]:
        return [block for block in super().victims(count, now) for _ in range(2)]


class CountsViews(Lru):
    def victims(self, count: int, now: float) -> Sequence[BlockView]:
        return list(self._order)[: max(count // 2, 1)]


class DependsOnCount(Lru):
    def victims(self, count: int, now: float) -> Sequence[BlockView]:
        return list(self._order) if count % 2 else list(self._order)[::-1]


class DependsOnTime(Lru):
    in_order = False

    def victims(self, count: int, now: float) -> Sequence[BlockView]:
        return sorted(self._order, key=lambda b: (b.hits + b.depth) / (now - b.used_s + 1))


class DependsOnSize(Lru):
    in_order = False

    def victims(self, count: int, now: float) -> Sequence[BlockView]:
        return sorted(self._order, key=lambda block: -block.blocks)


class BreaksItsPromise(Lru):
    def victims(self, count: int, now: float) -> Sequence[BlockView]:
        return list(reversed(self._order))


class NamesNone(Lru):
    def victims(self, count: int, now: float) -> Sequence[BlockView]:
        return None  # type: ignore[return-value]


# --------------------------------------------------------------------------- reuse


class UsesTooMuch(ReusePolicy):
    def use(self, request: RequestView, match: PrefixMatch, engine: EngineView, now: float) -> int:
        return request.prompt_tokens


class UsesHalves(ReusePolicy):
    def use(self, request: RequestView, match: PrefixMatch, engine: EngineView, now: float) -> int:
        return match.tokens / 2  # type: ignore[return-value]


class UsesUp(ReusePolicy):
    def __init__(self) -> None:
        self.left = 100_000

    def use(self, request: RequestView, match: PrefixMatch, engine: EngineView, now: float) -> int:
        self.left -= match.tokens
        return match.tokens if self.left > 0 else 0


class RetainsByName(ReusePolicy):
    def retain(self, request: RequestView, engine: EngineView, now: float) -> Mapping[Tier, int]:
        return {"hbm": 16}  # type: ignore[dict-item]


# --------------------------------------------------------------------------- placement


class RoutesById(Router):
    def route(
        self, request: RequestView, instances: Sequence[InstanceView], now: float
    ) -> InstanceView:
        return instances[0].id  # type: ignore[return-value]


class NeedsTwo(Router):
    def route(
        self, request: RequestView, instances: Sequence[InstanceView], now: float
    ) -> InstanceView:
        return instances[1]


class Clings(Router):
    first: InstanceView | None = None

    def route(
        self, request: RequestView, instances: Sequence[InstanceView], now: float
    ) -> InstanceView:
        if self.first is None:
            self.first = instances[0]
        return self.first


class OnlyTold(LeastLoaded):
    def route(
        self, request: RequestView, instances: Sequence[InstanceView], now: float
    ) -> InstanceView:
        return super().route(request, instances, now) if self._told else instances[0]


class PlacesOne(PDPolicy):
    def place(self, request: RequestView, cluster: ClusterView, now: float) -> Placement:
        return cluster.instances[0]  # type: ignore[return-value]


class PlacesElsewhere(PDPolicy):
    def place(self, request: RequestView, cluster: ClusterView, now: float) -> Placement:
        return Placement(cluster.instances[0], None)  # type: ignore[arg-type]


BROKEN: list[tuple[Callable[..., Any], str]] = [
    (NoDefault, r"NoDefault: parameter limit has no default$"),
    (NoType, r"NoType: parameter limit has no type$"),
    (NoPolicy, r"NoPolicy: NoPolicy derives from none of AdmissionPolicy, EvictionPolicy, "),
    (FailsToStart, r"factory .*FailsToStart failed: ValueError: limit is 0$"),
    (ClassState, r"ClassState: it keeps state outside the object: ClassState\.seen changed"),
    (ModuleState, r"ModuleState: it keeps state outside the object: .*test_broken\.drawn changed"),
    (ModuleCounter, r"ModuleCounter: it keeps state outside .*test_broken\.asked changed"),
    (sharing(), r"Sharing: two objects share one seen$"),
    (ReadsClock, r"ReadsClock\.order\(request r0, 0\): time\.time\(\) is out of bounds; use the"),
    (ReadsImportedClock, r"ReadsImportedClock\.order\(.*: time\.monotonic\(\) is out of bounds"),
    (ReadsDate, r"ReadsDate\.order\(.*: datetime\.now\(\) is out of bounds"),
    (DrawsGlobally, r"DrawsGlobally\.route\(.*: random\.choice\(\) is out .* field `seed: int`"),
    (DrawsUnseeded, r"DrawsUnseeded: two objects answered the same calls differently: answer \d"),
    (ReadsFuture, r"\.order\(.*: it read RequestView\._true_output_tokens, which is not in the "),
    (Misspells, r"it read RequestView\.prompt_token, .*; did you mean 'prompt_tokens'\?$"),
    (Writes, r"Writes\.order\(.*: it set RequestView\.priority; views are read-only$"),
    (Crashes, r"Crashes\.order\(request r0, 0\): raised ZeroDivisionError: division by zero$"),
    (SaysTrue, r"SaysTrue\.admit\(request r0, engine 0, 4\): answered True; Admit\(\), Defer\(\) "),
    (OrdersByNaN, r"OrdersByNaN\.order\(.*: answered nan; a number was expected$"),
    (ChargesTwice, r"ChargesTwice\.admit\(.*: answered Admit\(\), then Defer\(.*nothing changed$"),
    (ChargesSilently, r"\.admit\(.*: answered Admit\(\), then Defer\(.*although nothing changed$"),
    (DefersIntoThePast, r"\.admit\(request r0, engine 0, 4\): deferred until 4.0, which has pas"),
    (DefersForever, r"\.admit\(.*: deferred without a time on an idle engine, where nothing chan"),
    (DefersOnAndOn, r"\.admit\(.*: still deferred after it was asked 1000 times$"),
    (PreemptsOddly, r"PreemptsOddly: preempts is 'first'; 'last' or 'order' is allowed$"),
    (NoHorizon, r"NoHorizon: horizon_steps is 0; None or at least 1 is allowed$"),
    (DropsVictims, r"DropsVictims\.victims\(\d+, [\d.]+\): named only 0 blocks$"),
    (NamesRemoved, r"\.victims\(.*: named block \d+, which was removed or never added$"),
    (NamesTwice, r"NamesTwice\.victims\(.*: named block \d+ twice$"),
    (CountsViews, r"CountsViews\.victims\(.*: named only \d+ blocks$"),
    (DependsOnCount, r"\.victims\(.*; the order may not depend on how much or when is asked$"),
    (DependsOnTime, r"\.victims\(.*; the order may not depend on how much or when is asked$"),
    (DependsOnSize, r"DependsOnSize\.victims\(.*: named \[.*\] after evicting; \[.*\] was next$"),
    (BreaksItsPromise, r"BreaksItsPromise\.victims\(.*, but in_order promises the order of add: "),
    (NamesNone, r"NamesNone\.victims\(.*: answered None; a sequence of blocks was expected$"),
    (UsesTooMuch, r"UsesTooMuch\.use\(request r0, match of \d+ tokens, engine 0, 0\): answered "),
    (UsesHalves, r"UsesHalves\.use\(.*: answered [\d.]+; a whole number to \d+ was expected$"),
    (UsesUp, r"UsesUp\.use\(.*: answered \d+, then 0$"),
    (RetainsByName, r"RetainsByName\.retain\(.*: answered {'hbm': 16}; None or tokens "),
    (RoutesById, r"RoutesById\.route\(.*: answered \d; one of the instances was expected$"),
    (NeedsTwo, r"NeedsTwo\.route\(request r\d+, \[instance \d\], .*: raised IndexError: "),
    (Clings, r"Clings\.route\(.*: answered instance \d; one of the instances was expected$"),
    (OnlyTold, r"OnlyTold: calling `changed` or not made a difference: answer \d+ was "),
    (PlacesOne, r"PlacesOne\.place\(request r0, cluster of \d, 0\): answered .*; a Placement was"),
    (PlacesElsewhere, r"PlacesElsewhere\.place\(.*: answered None for decode; one of the cluster"),
]


@pytest.mark.parametrize(("policy", "message"), BROKEN, ids=lambda p: getattr(p, "__name__", ""))
def test_a_broken_rule_is_named_in_one_line(policy: Callable[..., Any], message: str) -> None:
    with pytest.raises(PolicyError, match=message) as caught:
        check(policy)
    assert "\n" not in str(caught.value)


def test_the_clock_works_again_after_a_check() -> None:
    before = (time.time, random.random, datetime, monotonic)
    with pytest.raises(PolicyError):
        check(ReadsClock)
    assert (time.time, random.random, datetime, monotonic) == before
