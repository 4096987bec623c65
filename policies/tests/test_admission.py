"""Admission policies against tables worked out by hand, and the law of the token bucket."""

from __future__ import annotations

from math import ceil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.admission.fcfs import Fcfs
from policies.admission.priority import Priority
from policies.admission.shortest_prompt import ShortestPrompt
from policies.admission.token_bucket import TokenBucket
from policies.api import ADMIT, Admission, AdmissionPolicy, Defer
from policies.fakes import FakeEngine, FakeRequest

ENGINE = FakeEngine()


def queue(policy: AdmissionPolicy) -> list[str]:
    """Ids in the order in which a queue with this policy hands requests out."""
    requests = [
        FakeRequest(id="a", prompt_tokens=300, priority=1),
        FakeRequest(id="b", prompt_tokens=100, priority=1),
        FakeRequest(id="c", prompt_tokens=200, priority=0),
        FakeRequest(id="d", prompt_tokens=100, priority=-2),
    ]
    return [r.id for r in sorted(requests, key=lambda r: policy.order(r, 0.0))]


def test_orders_of_the_queue() -> None:
    assert queue(Fcfs()) == ["a", "b", "c", "d"]
    assert queue(Priority()) == ["d", "c", "a", "b"]
    assert queue(ShortestPrompt()) == ["b", "d", "c", "a"]


def test_priority_preempts_the_least_important_and_the_others_the_last() -> None:
    assert Priority().preempts == "order"
    assert Fcfs().preempts == ShortestPrompt().preempts == TokenBucket().preempts == "last"


def test_policies_without_a_limit_admit() -> None:
    for policy in (Fcfs(), Priority(), ShortestPrompt()):
        assert policy.admit(FakeRequest(), ENGINE, 0.0) is ADMIT


def ask(policy: TokenBucket, ident: str, tokens: int, now: float) -> Admission:
    return policy.admit(FakeRequest(id=ident, prompt_tokens=tokens), ENGINE, now)


def test_the_bucket_by_hand() -> None:
    policy = TokenBucket(rate_tokens_per_s=100, burst_tokens=200)
    assert ask(policy, "a", 150, 0.0) is ADMIT  # 50 left
    assert ask(policy, "b", 60, 0.0) == Defer(pytest.approx(0.1), "rate limit")  # type: ignore[arg-type]
    assert ask(policy, "b", 60, 0.05) == Defer(pytest.approx(0.1), "rate limit")  # type: ignore[arg-type]
    assert ask(policy, "c", 50, 0.0) is ADMIT  # 0 left
    assert ask(policy, "b", 60, 0.1) == Defer(pytest.approx(0.6), "rate limit")  # type: ignore[arg-type]
    assert ask(policy, "b", 60, 0.7) is ADMIT  # 10 left
    assert ask(policy, "d", 11, 0.7) == Defer(pytest.approx(0.71), "rate limit")  # type: ignore[arg-type]


def test_a_request_is_charged_once() -> None:
    policy = TokenBucket(rate_tokens_per_s=100, burst_tokens=200)
    for now in (0.0, 0.0, 0.5, 9.0):
        assert ask(policy, "a", 200, now) is ADMIT
    assert ask(policy, "b", 200, 2.0) is ADMIT


def test_a_prompt_larger_than_the_bucket_waits_for_a_full_one_and_leaves_a_debt() -> None:
    policy = TokenBucket(rate_tokens_per_s=100, burst_tokens=200)
    assert ask(policy, "a", 100, 0.0) is ADMIT
    assert ask(policy, "big", 1000, 0.5) == Defer(pytest.approx(1.0), "rate limit")  # type: ignore[arg-type]
    assert ask(policy, "big", 1000, 1.5) is ADMIT  # -800 left
    assert ask(policy, "b", 100, 1.5) == Defer(pytest.approx(10.5), "rate limit")  # type: ignore[arg-type]


def test_the_bucket_never_holds_more_than_the_burst() -> None:
    policy = TokenBucket(rate_tokens_per_s=100, burst_tokens=200)
    assert ask(policy, "a", 200, 1000.0) is ADMIT
    assert isinstance(ask(policy, "b", 1, 1000.0), Defer)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rate_tokens_per_s": 0.0}, r"rate_tokens_per_s is 0\.0; a finite number above 0"),
        ({"rate_tokens_per_s": float("nan")}, r"rate_tokens_per_s is nan; a finite number above 0"),
        ({"burst_tokens": 0}, "burst_tokens is 0; at least 1 is allowed"),
    ],
)
def test_impossible_limits_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TokenBucket(**options)  # type: ignore[arg-type]


@given(
    prompts=st.lists(st.tuples(st.integers(1, 5000), st.floats(0, 20)), min_size=1, max_size=30),
    rate=st.floats(1, 1e5),
    burst=st.integers(1, 4000),
    start=st.floats(0, 1e6),
)
def test_requests_run_when_the_bucket_said_and_no_interval_gets_more_than_its_share(
    prompts: list[tuple[int, float]], rate: float, burst: int, start: float
) -> None:
    policy = TokenBucket(rate_tokens_per_s=rate, burst_tokens=burst)
    now = start
    admitted: list[tuple[float, int]] = []
    for index, (tokens, gap) in enumerate(prompts):
        now += gap
        answer = ask(policy, str(index), tokens, now)
        if isinstance(answer, Defer):
            assert answer.until_s > now
            now = ceil(answer.until_s * 1e12) / 1e12  # a backend that counts picoseconds
            assert ask(policy, str(index), tokens, now) is ADMIT
        admitted.append((now, tokens))
    for first, (since, _) in enumerate(admitted):
        for last in range(first, len(admitted)):
            # What is admitted at the end may go into debt, so it does not count.
            paid = sum(tokens for _, tokens in admitted[first:last])
            share = burst + rate * (admitted[last][0] - since)
            assert paid + min(admitted[last][1], burst) <= share * (1 + 1e-9) + rate * 1e-9 * (
                1 + start
            )
