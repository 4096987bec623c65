"""Closed-loop sessions: a turn waits for its predecessor's answer and for its user to think."""

from __future__ import annotations

import numpy as np
import pytest

from policies.registry import policy_set
from sim.backend import Deployment
from sim.simulator import Simulator
from sim.tests.bench import MODES, PS_PER_S, Job, Mode, serve
from traces import generate


@pytest.mark.parametrize("mode", MODES)
def test_a_turn_comes_a_think_time_after_its_predecessor_is_answered(mode: Mode) -> None:
    # The first turn ends at 104 + 2 * 110 = 324.
    outcome = serve(
        Job(0, 4, 3, session="s"), Job(10, 4, 1, session="s", turn=1, think_ps=50), mode=mode
    )
    assert outcome.arrivals == [0, 374]
    assert outcome.times == [(0, 104, 324), (374, 478, 478)]


@pytest.mark.parametrize("mode", MODES)
def test_a_turn_does_not_come_before_its_recorded_time(mode: Mode) -> None:
    outcome = serve(
        Job(0, 4, 3, session="s"), Job(900, 4, 1, session="s", turn=1, think_ps=50), mode=mode
    )
    assert outcome.arrivals == [0, 900]


@pytest.mark.parametrize("mode", MODES)
def test_without_a_pause_the_client_still_has_to_see_the_answer(mode: Mode) -> None:
    # One tick later, so the turn misses the step that begins when its predecessor ends (324).
    outcome = serve(
        Job(0, 4, 3, session="s"),
        Job(1, 4, 1, session="s", turn=1),
        Job(300, 4, 2),
        mode=mode,
    )
    assert outcome.arrivals == [0, 325, 300]
    # 324: the third request, 104 -> 428. Then the turn joins it: 100 + 4 + 10 -> 542.
    assert outcome.times[1:] == [(428, 542, 542), (324, 428, 542)]


@pytest.mark.parametrize("mode", MODES)
def test_a_rejected_turn_still_releases_its_successor(mode: Mode) -> None:
    outcome = serve(
        Job(5, 4000, 3, session="s"),
        Job(10, 4, 1, session="s", turn=1, think_ps=50),
        Job(10, 4000, 1, session="s", turn=2),
        Job(10, 4, 1, session="s", turn=3, think_ps=7),
        mode=mode,
    )
    assert outcome.column("state") == ["rejected", "finished", "rejected", "finished"]
    # 5 + 50 = 55; done at 159; one tick to see it; rejected at once; 7 to think.
    assert outcome.arrivals == [5, 55, 160, 167]


def test_sessions_do_not_wait_for_each_other() -> None:
    outcome = serve(
        Job(0, 4, 9, session="a"),
        Job(0, 4, 1, session="b"),
        Job(1, 4, 1, session="b", turn=1),
        Job(2, 4, 1, session="a", turn=1),
    )
    finish = [finish for _, _, finish in outcome.times]
    assert outcome.arrivals[2] == finish[1] + 1 < finish[0]
    assert outcome.arrivals[3] == finish[0] + 1


@pytest.mark.parametrize(
    ("token_s", "waiting"),
    [
        (0.0, True),  # recorded as if answers took no time: every turn waits for the real one
        (0.5, False),  # recorded at half a second per token: none does
    ],
)
def test_every_turn_of_a_long_trace_comes_exactly_when_it_may(
    token_s: float, waiting: bool
) -> None:
    trace = generate(
        "chat", sessions=60, session_rate_per_s=5.0, think_mean_s=2.0, token_s=token_s, seed=2
    )
    deployment = Deployment.of("a100_80g", "llama3_8b")
    requests = Simulator(deployment).serve(trace, policy_set()).requests
    requests["think_s"] = trace.requests["think_s"]
    turns_after_the_first = 0
    for _, turns in requests.groupby("session"):
        arrival = _ps(turns["arrival_s"])
        ready = _ps(turns["finish_s"])[:-1] + np.maximum(_ps(turns["think_s"])[1:], 1)
        recorded = _ps(turns["recorded_s"])
        assert arrival[0] == recorded[0]
        np.testing.assert_array_equal(arrival[1:], np.maximum(recorded[1:], ready))
        assert np.all((ready > recorded[1:]) == waiting)
        turns_after_the_first += len(ready)
    assert turns_after_the_first > 100


def _ps(seconds: object) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    return np.rint(np.asarray(seconds, dtype=np.float64) * PS_PER_S).astype(np.int64)
