"""How engines ask admission policies: when, how often, and what a deferral does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from policies.api import (
    ADMIT,
    Admission,
    AdmissionPolicy,
    Defer,
    EngineView,
    PolicyError,
    PolicySet,
    Reject,
    RequestView,
)
from policies.registry import policy_set
from sim.tests.bench import MODES, PS_PER_S, Job, Mode, serve

pytestmark = pytest.mark.parametrize("mode", MODES)

Answer = Callable[[RequestView, EngineView, float], Admission]


@dataclass(slots=True, eq=False)
class Scripted(AdmissionPolicy):
    """Answers with a function and remembers when it was asked for whom."""

    answer: Answer = lambda request, engine, now: ADMIT
    asked: list[tuple[int, str]] = field(default_factory=list)

    def admit(self, request: RequestView, engine: EngineView, now: float) -> Admission:
        self.asked.append((round(now * PS_PER_S), request.id))
        return self.answer(request, engine, now)


def with_policy(policy: AdmissionPolicy) -> PolicySet:
    return policy_set(admission=lambda: policy)


def test_a_deferral_wakes_an_idle_engine_exactly_at_its_end(mode: Mode) -> None:
    policy = Scripted(lambda request, engine, now: ADMIT if now >= 0.25 else Defer(0.25))
    outcome = serve(Job(0, 4, 1), mode=mode, policies=with_policy(policy))
    assert outcome.times[0][0] == PS_PER_S // 4
    assert policy.asked == [(0, "0"), (PS_PER_S // 4, "0")]


def test_a_deferral_that_ends_in_mid_run_is_asked_about_at_the_next_step(mode: Mode) -> None:
    # A decodes in steps of 110 ps from 104 on; B is deferred until 300 and admitted at 324.
    policy = Scripted(
        lambda request, engine, now: (
            ADMIT if request.id == "0" or now >= 300e-12 else Defer(300e-12)
        )
    )
    outcome = serve(Job(0, 4, 5), Job(50, 4, 1), mode=mode, policies=with_policy(policy))
    assert outcome.times == [(0, 104, 548), (324, 438, 438)]
    assert policy.asked == [(0, "0"), (104, "1"), (324, "1")]


def test_a_deferred_head_is_asked_again_when_a_request_arrives_or_finishes(mode: Mode) -> None:
    # C's arrival at 150 changes the engine: B is asked at 214; A's end changes it again, at 544.
    policy = Scripted(
        lambda request, engine, now: (
            ADMIT if request.id == "0" or engine.running == 0 else Defer(reason="alone")
        )
    )
    outcome = serve(
        Job(0, 4, 5), Job(50, 4, 1), Job(150, 4, 1), mode=mode, policies=with_policy(policy)
    )
    assert [admitted for admitted, _, _ in outcome.times] == [0, 544, 648]
    assert [when for when, name in policy.asked if name == "1"] == [104, 214, 544]


def test_a_policy_with_a_horizon_is_asked_again_after_so_many_steps(mode: Mode) -> None:
    class EverySecondStep(Scripted):
        horizon_steps = 2

    policy = EverySecondStep(
        lambda request, engine, now: ADMIT if request.id == "0" or engine.running == 0 else Defer()
    )
    serve(Job(0, 4, 7), Job(50, 4, 1), mode=mode, policies=with_policy(policy))
    # A: 104, then six steps of 110 ps.
    assert [when for when, name in policy.asked if name == "1"] == [104, 324, 544, 764]


def test_the_bucket_admits_when_enough_has_flowed_in(mode: Mode) -> None:
    # 100 tokens at once leave it empty; 50 have flowed in after half a second.
    outcome = serve(
        Job(0, 100, 1),
        Job(PS_PER_S // 10, 50, 1),
        mode=mode,
        blocks=200,
        policies={
            "admission": {"name": "token_bucket", "rate_tokens_per_s": 100.0, "burst_tokens": 100}
        },
    )
    admitted_ps = outcome.times[1][0]
    assert 0 <= admitted_ps - PS_PER_S // 2 <= 1  # the policy rounds up to the next float


def test_a_rejected_head_makes_room_for_the_next(mode: Mode) -> None:
    policy = Scripted(
        lambda request, engine, now: Reject("no zeros") if request.id == "0" else ADMIT
    )
    outcome = serve(Job(0, 4, 1), Job(0, 4, 1), mode=mode, policies=with_policy(policy))
    assert outcome.column("state") == ["rejected", "finished"]
    assert outcome.column("reason") == ["no zeros", ""]
    assert outcome.times[1] == (0, 104, 104)


def test_a_deferral_that_nothing_can_end_is_an_error_with_the_policys_name(mode: Mode) -> None:
    policy = Scripted(lambda request, engine, now: Defer(reason="not today"))
    with pytest.raises(PolicyError, match=r"Scripted\.admit .* request 0 .*not today"):
        serve(Job(0, 4, 1), mode=mode, policies=with_policy(policy))
