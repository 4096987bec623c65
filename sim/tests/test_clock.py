"""The clock holds timers and SimPy's own events side by side."""

from __future__ import annotations

from collections.abc import Generator

from simpy.events import Event

from sim.clock import ARRIVAL, LATE, SIGNAL, Clock, Timer


def test_timers_and_processes_share_one_time_and_run_until_stops_between_them() -> None:
    clock = Clock()
    seen: list[tuple[str, float]] = []

    def process() -> Generator[Event, None, None]:
        yield clock.timeout(5)
        seen.append(("process", clock.now))

    clock.process(process())
    clock.arm(3, ARRIVAL, Timer(lambda timer: seen.append(("early", clock.now))))
    clock.arm(8, ARRIVAL, Timer(lambda timer: seen.append(("late", clock.now))))
    clock.run(until=6)
    assert seen == [("early", 3), ("process", 5)]
    clock.run_out()
    assert seen[2:] == [("late", 8)]


def test_arming_a_timer_again_replaces_its_time() -> None:
    clock = Clock()
    seen: list[int] = []
    timer = Timer(lambda timer: seen.append(int(clock.now)))
    clock.arm(9, ARRIVAL, timer)
    clock.arm(4, ARRIVAL, timer)
    clock.run_out()
    assert seen == [4]


def test_at_one_instant_signals_come_before_arrivals_and_those_before_engines_by_number() -> None:
    clock = Clock()
    seen: list[str] = []
    for priority, name in ((LATE + 1, "engine 1"), (LATE, "engine 0"), (ARRIVAL, "arrival")):
        clock.arm(1, priority, Timer(lambda timer: seen.append(timer.payload), name))
    clock.arm(1, SIGNAL, Timer(lambda timer: seen.append(timer.payload), "signal"))
    clock.run_out()
    assert seen == ["signal", "arrival", "engine 0", "engine 1"]
