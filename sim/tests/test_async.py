"""Asynchronous scheduling as tables worked by hand: a step is planned while another executes.

Times as in ``test_schedule``: 100 ps + 1 ps per prompt token + 10 ps per decoding request. That
the engines agree in general is tested in ``test_twins``, that vLLM does in ``validate``.
"""

from __future__ import annotations

import pytest

from policies.registry import policy_set
from sim.backend import Deployment
from sim.simulator import Simulator
from sim.tests.bench import MODES, Job, Mode, serve
from traces import generate


@pytest.mark.parametrize("mode", MODES)
def test_who_arrives_in_one_step_runs_in_the_next_but_one(mode: Mode) -> None:
    # Planned at 0: A4 -> 104 and A -> 214. Planned at 104, with B: A, B4 -> 328. Then A alone.
    outcome = serve(Job(0, 4, 5), Job(50, 4, 1), mode=mode, async_scheduling=True)
    assert outcome.times == [(0, 104, 548), (104, 328, 328)]
    assert serve(Job(0, 4, 5), Job(50, 4, 1), mode=mode).times[1] == (104, 218, 218)


@pytest.mark.parametrize("mode", MODES)
def test_a_seat_is_free_one_step_after_the_last_token(mode: Mode) -> None:
    # A4, C4 -> 108; A, C -> 228, A's last token; C -> 338, planned at 108; C, B4 -> 452; C -> 562.
    jobs = Job(0, 4, 2), Job(0, 4, 5), Job(10, 4, 1)
    outcome = serve(*jobs, mode=mode, max_num_seqs=2, async_scheduling=True)
    assert outcome.times == [(0, 108, 228), (0, 108, 562), (228, 452, 452)]


@pytest.mark.parametrize("mode", MODES)
def test_an_empty_step_in_between_takes_no_time(mode: Mode) -> None:
    # A4 -> 104; A -> 214; nothing; B4 -> 318.
    jobs = Job(0, 4, 2), Job(10, 4, 1)
    outcome = serve(*jobs, mode=mode, max_num_seqs=1, async_scheduling=True)
    assert outcome.times == [(0, 104, 214), (214, 318, 318)]
    assert [step.start_ps for step in outcome.steps] == [0, 104, 214]


def test_events_per_request_are_few_and_do_not_grow_with_the_output() -> None:
    events = []
    for output in (50, 500):
        trace = generate(
            "independent", count=400, rate_per_s=2.0, seed=1,
            prompt_mean=200, output_mean=output, output_cv=0.1,
        )  # fmt: skip
        deployment = Deployment.of("h100", "llama3_8b", async_scheduling=True)
        result = Simulator(deployment).serve(trace, policy_set())
        events.append(result.meta["simpy_events"] / len(trace))
    assert events[1] <= 1.5 * events[0] <= 12
