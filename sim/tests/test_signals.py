"""What routers see: exact state, or snapshots of a given age; and how random ones are seeded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest

from policies.api import InstanceView, PolicySet, RequestView, Router
from policies.pd.colocated import Colocated
from policies.registry import policy_set
from sim.engine import FastEngine
from sim.stepwise import StepEngine
from sim.tests.bench import MODES, Job, Mode, serve
from sim.tests.twins import Stage, random_case

Seen = tuple[int, int, int, int]
"""(time in ps, requests, prompt tokens in flight, age in ps) of an instance."""


@dataclass(slots=True, eq=False)
class Watcher(Router):
    """Sends everything to the first instance and writes down what it looks like."""

    seen: list[Seen] = field(default_factory=list)
    cached: list[int] = field(default_factory=list)
    usage: list[float] = field(default_factory=list)

    def route(
        self, request: RequestView, instances: Sequence[InstanceView], now: float
    ) -> InstanceView:
        view = instances[0]
        load = view.waiting + view.running
        self.seen.append((_ps(now), load, view.inflight_tokens, _ps(view.signal_age_s)))
        self.cached.append(view.matched_tokens(request))
        self.usage.append(view.kv_usage)
        return view


def _ps(seconds: float) -> int:
    return round(seconds * 1e12)


def watched() -> tuple[Watcher, PolicySet]:
    watcher = Watcher()
    return watcher, policy_set(pd=lambda: Colocated(watcher))


@pytest.mark.parametrize("mode", MODES)
def test_age_zero_is_the_state_at_this_instant(mode: Mode) -> None:
    # The first request runs from 0 to 104 + 3 * 110 = 434.
    watcher, policies = watched()
    serve(Job(0, 4, 4), Job(50, 8, 1), Job(433, 4, 1), Job(800, 4, 1), mode=mode, policies=policies)
    assert watcher.seen == [(0, 0, 0, 0), (50, 1, 4, 0), (433, 1, 4, 0), (800, 0, 0, 0)]


@pytest.mark.parametrize("mode", MODES)
def test_signals_are_collected_at_multiples_of_their_age(mode: Mode) -> None:
    watcher, policies = watched()
    serve(
        *(Job(at, 4, 50) for at in (0, 40, 99, 100, 150, 230)),
        mode=mode,
        policies=policies,
        signal_age_s=100e-12,
    )
    # At 100 the three of 0 to 99 are seen, also by the request of that very instant.
    assert watcher.seen == [
        (0, 0, 0, 0),
        (40, 0, 0, 40),
        (99, 0, 0, 99),
        (100, 3, 12, 0),
        (150, 3, 12, 50),
        (230, 5, 20, 30),
    ]


@pytest.mark.parametrize("mode", MODES)
def test_usage_and_cache_are_of_the_step_in_progress(mode: Mode) -> None:
    # A computes 4 blocks from 0 to 116 and 4 from 116 to 232: scheduled ones are cached.
    chain = ((70, 8),)
    watcher, policies = watched()
    serve(
        Job(0, 32, 1, chain=chain),
        Job(50, 32, 1, chain=chain),
        Job(150, 32, 1, chain=chain),
        mode=mode,
        policies=policies,
        blocks=16,
    )
    assert watcher.cached == [0, 16, 28]
    assert watcher.usage == [0.0, 0.25, 0.5]


@pytest.mark.parametrize("mode", MODES)
def test_an_old_signal_shows_the_cache_of_its_time(mode: Mode) -> None:
    chain = ((70, 8),)
    watcher, policies = watched()
    serve(
        Job(0, 32, 1, chain=chain),
        Job(150, 32, 1, chain=chain),
        Job(210, 32, 1, chain=chain),
        mode=mode,
        policies=policies,
        blocks=16,
        signal_age_s=100e-12,
    )
    # Blocks of the first 16 tokens at 100; all 8 at 200, of which the last one cannot be used.
    assert watcher.cached == [0, 16, 28]
    assert watcher.usage == [0.0, 0.25, 0.5]


@pytest.mark.parametrize("seed", range(0, 40))
def test_published_content_is_what_is_cached(seed: int) -> None:
    case = random_case(seed)
    stage = Stage(case, FastEngine)
    looks = 0

    def look() -> None:
        nonlocal looks
        for engine in stage.engines:
            assert isinstance(engine, FastEngine)
            published = engine.published()
            assert set(published) == set(engine.pool.cached())  # type: ignore[call-overload]
            looks += 1

    for engine in stage.engines:
        engine.publish()
    for row in case.requests[::3]:
        stage.at(row["arrival_ps"] + 10**10, look)
    stage.env.run_out()
    look()
    assert looks > case.engines


def test_some_of_those_cases_cache_and_evict_something() -> None:
    outcomes = [Stage(random_case(seed), StepEngine).play() for seed in range(40)]
    assert sum(bool(cached) for o in outcomes for cached in o["cached"]) > 20
    assert sum(sum(o["evictions"]) for o in outcomes) > 1000


# --------------------------------------------------------------------------- random routers


def routes(routing: object, seed: int) -> list[int]:
    jobs = [Job(10 * i, 4, 3) for i in range(60)]
    return serve(*jobs, engines=4, policies={"routing": routing}, seed=seed).column("engine")


@pytest.mark.parametrize("routing", ["random", "power_of_two"])
def test_random_routers_follow_the_seed_of_the_run(routing: str) -> None:
    assert routes(routing, 1) == routes(routing, 1)
    assert routes(routing, 1) != routes(routing, 2)


@pytest.mark.parametrize("routing", ["random", "power_of_two"])
def test_a_seed_that_is_set_is_kept(routing: str) -> None:
    spec = {"name": routing, "seed": 5}
    assert routes(spec, 1) == routes(spec, 2)


def test_each_engine_has_a_random_stream_of_its_own() -> None:
    seeds: list[int] = []

    def admission(seed: int) -> object:
        seeds.append(seed)
        return policy_set().admission()

    serve(Job(0, 4, 1), engines=3, policies={"admission": admission}, seed=7)
    serve(Job(0, 4, 1), engines=3, policies={"admission": admission}, seed=7)
    serve(Job(0, 4, 1), engines=3, policies={"admission": admission}, seed=8)
    assert len(set(seeds[:3])) == 3
    assert seeds[3:6] == seeds[:3]
    assert not set(seeds[6:]) & set(seeds[:3])


def test_a_router_that_keeps_an_index_decides_as_one_that_looks_at_everyone() -> None:
    class Looks(Router):
        def route(
            self, request: RequestView, instances: Sequence[InstanceView], now: float
        ) -> InstanceView:
            return min(instances, key=lambda i: (i.waiting + i.running, i.id))

    jobs = [Job(37 * i, 4 + i % 9, 1 + i % 23) for i in range(300)]
    for age_s in (0.0, 90e-12):

        def place(age_s: float, routing: object) -> list[int]:
            outcome = serve(
                *jobs, engines=3, policies={"routing": routing}, signal_age_s=age_s, max_num_seqs=2
            )
            return outcome.column("engine")

        indexed, looking = place(age_s, "least_loaded"), place(age_s, Looks)
        assert indexed == looking
        assert set(indexed) == {0, 1, 2}


def test_a_placement_policy_is_told_of_every_change() -> None:
    told: list[tuple[int, int]] = []

    class Told(Colocated):
        """With a router that does not care."""

        def changed(self, instance: InstanceView) -> None:
            told.append((instance.id, instance.waiting + instance.running))

    serve(Job(0, 4, 1), Job(0, 4, 1), policies={"pd": Told})
    assert told == [(0, 0), (0, 1), (0, 2), (0, 1), (0, 0)]
