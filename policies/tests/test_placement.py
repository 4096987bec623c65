"""Routers and PD policies against tables worked out by hand, and against brute force."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.api import Placement, Router
from policies.fakes import FakeCluster, FakeInstance, FakeRequest
from policies.pd.colocated import Colocated
from policies.routing.least_loaded import LeastLoaded
from policies.routing.power_of_two import PowerOfTwo
from policies.routing.prefix_affinity import PrefixAffinity
from policies.routing.random import Random
from policies.routing.round_robin import RoundRobin

REQUEST = FakeRequest(id="r")


def instances(*loads: int, matched: tuple[int, ...] = ()) -> list[FakeInstance]:
    """Instances with these loads (half waiting, half running) and cached tokens of ``REQUEST``."""
    cached = matched or (0,) * len(loads)
    return [
        FakeInstance(id=i, waiting=n // 2, running=n - n // 2, matched={"r": tokens})
        for i, (n, tokens) in enumerate(zip(loads, cached, strict=True))
    ]


def routes(router: Router, some: list[FakeInstance], count: int) -> list[int]:
    return [router.route(REQUEST, some, 0.0).id for _ in range(count)]


def test_round_robin_by_hand() -> None:
    router = RoundRobin()
    assert routes(router, instances(9, 0, 0), 5) == [0, 1, 2, 0, 1]
    assert routes(router, instances(0, 0), 3) == [0, 1, 0]


def test_random_is_uniform_and_repeats_with_its_seed() -> None:
    some = instances(0, 5, 9)
    drawn = routes(Random(seed=1), some, 3000)
    assert drawn == routes(Random(seed=1), some, 3000)
    assert drawn != routes(Random(seed=2), some, 3000)
    # Standard deviation of each count is 26.
    assert all(abs(n - 1000) < 130 for n in Counter(drawn).values())


def test_power_of_two_takes_the_better_of_two() -> None:
    # With 3 instances the least loaded one is among two of them in 2 of 3 draws, and the most
    # loaded one never wins.
    drawn = Counter(routes(PowerOfTwo(seed=1), instances(4, 7, 2), 3000))
    assert drawn[1] == 0
    assert abs(drawn[2] - 2000) < 130
    assert routes(PowerOfTwo(), instances(3, 3), 20) == [0] * 20
    assert routes(PowerOfTwo(), instances(3), 3) == [0] * 3


def test_least_loaded_by_hand() -> None:
    some = instances(3, 1, 2, 1)
    router = LeastLoaded()
    for told in (False, True):
        assert routes(router, some, 2) == [1, 1]
        some[1].waiting += 1
        if told:
            router.changed(some[1])
        assert routes(router, some, 1) == [3]
        some[1].waiting -= 1
        router.changed(some[1])


@given(
    st.booleans(),
    st.lists(
        st.one_of(
            st.tuples(st.just("load"), st.integers(0, 7), st.integers(0, 5)),
            st.tuples(st.just("route"), st.integers(1, 255), st.just(0)),
            st.tuples(st.just("all"), st.booleans(), st.just(0)),
        ),
        max_size=150,
    ),
)
def test_least_loaded_is_the_minimum_whatever_is_asked(
    told: bool, calls: list[tuple[str, int, int]]
) -> None:
    every = instances(*(3,) * 8)
    router = LeastLoaded()
    for call, value, load in calls:
        if call == "load":
            every[value].running = load
            if told:
                router.changed(every[value])
            continue
        some = [x for i, x in enumerate(every) if value >> i & 1] if call == "route" else every
        given_as = tuple(some) if call == "all" and value else some
        best = min(some, key=lambda x: (x.waiting + x.running, x.id))
        assert router.route(REQUEST, given_as, 0.0) is best


def test_least_loaded_notices_that_the_list_itself_was_changed() -> None:
    some = instances(3, 1, 2)
    router = LeastLoaded()
    router.changed(some[0])
    assert router.route(REQUEST, some, 0.0).id == 1
    some[1] = FakeInstance(id=7, running=9)
    assert router.route(REQUEST, some, 0.0).id == 2


def test_least_loaded_keeps_its_heap_small() -> None:
    some = instances(*(0,) * 10)
    router = LeastLoaded()
    router.changed(some[0])
    router.route(REQUEST, some, 0.0)
    for i in range(10_000):
        some[i % 10].running = i % 7
        router.changed(some[i % 10])
    assert len(router._heap) <= 4 * 10 + 17


@pytest.mark.parametrize(
    ("loads", "matched", "expected"),
    [
        ((5, 9, 0), (16, 64, 32), 1),  # the longest match
        ((5, 9, 7), (64, 64, 0), 0),  # a tie: the fewer requests
        ((5, 5, 7), (64, 64, 0), 0),  # and the lower id
        ((5, 3, 3), (0, 0, 0), 1),  # nothing cached anywhere
        ((1, 33, 5), (0, 64, 0), 1),  # 33 - 1 is not above 32
        ((1, 34, 1), (0, 64, 0), 0),  # it is now, and 34 > 1.5: the least loaded, lowest id
        ((80, 115, 90), (0, 64, 0), 1),  # 35 apart, but not by more than half
        ((70, 115, 69), (0, 64, 0), 2),  # by more than half
    ],
)
def test_prefix_affinity_by_hand(
    loads: tuple[int, ...], matched: tuple[int, ...], expected: int
) -> None:
    assert routes(PrefixAffinity(), instances(*loads, matched=matched), 1) == [expected]


def test_prefix_affinity_follows_its_thresholds() -> None:
    some = instances(0, 3, matched=(0, 64))
    assert routes(PrefixAffinity(balance_abs=3), some, 1) == [1]
    assert routes(PrefixAffinity(balance_abs=2), some, 1) == [0]
    some = instances(2, 5, matched=(0, 64))
    assert routes(PrefixAffinity(balance_abs=0, balance_rel=2.5), some, 1) == [1]
    assert routes(PrefixAffinity(balance_abs=0, balance_rel=2.4), some, 1) == [0]


def test_prefix_affinity_refuses_impossible_thresholds() -> None:
    with pytest.raises(ValueError, match="balance_abs is -1; at least 0 is allowed"):
        PrefixAffinity(balance_abs=-1)
    with pytest.raises(ValueError, match="balance_rel is nan; at least 0 is allowed"):
        PrefixAffinity(balance_rel=float("nan"))


def test_colocated_puts_both_phases_where_the_router_says_and_passes_changes_on() -> None:
    some = instances(3, 1)
    policy = Colocated(router=LeastLoaded())
    for instance in some:
        policy.changed(instance)
    assert policy.place(REQUEST, FakeCluster(some), 0.0) == Placement(some[1], some[1])
    some[1].running = 9
    assert policy.place(REQUEST, FakeCluster(some), 0.0).prefill is some[1]  # not told yet
    policy.changed(some[1])
    assert policy.place(REQUEST, FakeCluster(some), 0.0) == Placement(some[0], some[0])
