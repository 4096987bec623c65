"""Rules of admission policies.

Answers have their type and cost nothing to hear again; no request waits for what cannot happen.
"""

from __future__ import annotations

import random
from math import inf, isnan
from typing import Any

from policies import api
from policies.api import PolicyError
from policies.contract.subject import SLOS, Answers, Subject, guarded
from policies.fakes import FakeEngine, FakeRequest
from policies.strict import unwrapped


def admission(subject: Subject, asks: int) -> Answers:
    """Queue requests, ask for each at the head ``asks`` times over, follow what it says."""
    dice = random.Random(1)
    policy, answers = subject.policy, []
    horizon = policy.horizon_steps
    if horizon is not None and (type(horizon) is not int or horizon < 1):
        raise PolicyError(
            f"{subject.name}: horizon_steps is {horizon!r}; None or at least 1 is allowed"
        )
    if policy.preempts not in ("last", "order"):
        raise PolicyError(
            f"{subject.name}: preempts is {policy.preempts!r}; 'last' or 'order' is allowed"
        )
    queue = []
    for index in range(40):
        request = guarded(
            FakeRequest(
                id=f"r{index}",
                arrival_s=index * 0.1,
                prompt_tokens=dice.choice((16, 500, 4000, 30_000)),
                priority=dice.randrange(4),
                slo=dice.choice(SLOS),
                tenant=dice.choice("ab"),
            )
        )
        args = (request, index * 0.1)
        orders = [subject.ask("order", *args) for _ in range(asks)]
        for order in orders:
            if not isinstance(order, int | float) or isnan(order):
                raise subject.broke("order", args, f"answered {order!r}; a number was expected")
            if order != orders[0]:
                raise subject.broke("order", args, f"answered {orders[0]!r}, then {order!r}")
        answers.append(orders[0])
        queue.append((orders[0], index, request))
    queue.sort(key=lambda entry: entry[:2])
    now = 4.0
    for position, (_, _, request) in enumerate(queue):
        engine = FakeEngine(
            waiting=len(queue) - position, running=dice.randrange(9), free=dice.randrange(1000)
        )
        now = _head(subject, request, engine, now=now, asks=asks, answers=answers)
        if position % 10 == 9:  # preempted: it comes back with nothing computed
            unwrapped(request).preemptions += 1
            now = _head(subject, request, engine, now=now, asks=asks, answers=answers)
    return answers


def _head(
    subject: Subject, request: Any, engine: FakeEngine, *, now: float, asks: int, answers: Answers
) -> float:
    """Ask until the head is admitted or rejected, and return when that was."""
    for _ in range(1000):
        args = (request, guarded(engine), now)
        heard = [subject.ask("admit", *args) for _ in range(asks)]
        answer = heard[0]
        if not isinstance(answer, api.Admit | api.Defer | api.Reject):
            raise subject.broke(
                "admit", args, f"answered {answer!r}; Admit(), Defer() or Reject() was expected"
            )
        for other in heard[1:]:
            if other != answer:
                raise subject.broke(
                    "admit", args, f"answered {answer!r}, then {other!r} although nothing changed"
                )
        answers.append((now, *answer))
        if not isinstance(answer, api.Defer):
            return now
        if not answer.until_s > now:
            raise subject.broke(
                "admit", args, f"deferred until {answer.until_s!r}, which has passed"
            )
        if answer.until_s < inf:
            now = answer.until_s
        elif engine.running == 0 and engine.free == engine.total:
            raise subject.broke(
                "admit", args, "deferred without a time on an idle engine, where nothing changes"
            )
        else:  # somebody finishes
            now += 0.5
            engine.running = max(engine.running - 1, 0)
            engine.free = engine.total if not engine.running else engine.free
    args = (request, guarded(engine), now)
    raise subject.broke("admit", args, "still deferred after it was asked 1000 times")
