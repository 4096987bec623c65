"""Rules of routers and PD policies.

The answer is one of the instances, also of a single one, and the same whether the policy is told
of changes or not.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from policies import api
from policies.contract.subject import Answers, Subject, guarded, show
from policies.fakes import FakeCluster, FakeInstance, FakeRequest
from policies.strict import unwrapped


def routing(subject: Subject, asks: int) -> Answers:
    """Route among one or more instances whose loads change; tell of it if ``asks`` is 1."""

    def choose(request: Any, cluster: Any, now: float) -> list[Any]:
        args = (request, cluster.instances, now)
        answer = subject.ask("route", *args)
        if not any(answer is instance for instance in args[1]):
            raise subject.broke(
                "route", args, f"answered {show(answer)}; one of the instances was expected"
            )
        return [answer]

    return _place_many(subject, choose, told=asks == 1)


def pd(subject: Subject, asks: int) -> Answers:
    """Place in a cluster of one or more instances whose loads change; tell as ``routing``."""

    def choose(request: Any, cluster: Any, now: float) -> list[Any]:
        args = (request, cluster, now)
        answer = subject.ask("place", *args)
        if not isinstance(answer, api.Placement):
            raise subject.broke("place", args, f"answered {answer!r}; a Placement was expected")
        for phase, picked in zip(answer._fields, answer, strict=True):
            if not any(picked is instance for instance in cluster.instances):
                raise subject.broke(
                    "place",
                    args,
                    f"answered {show(picked)} for {phase}; one of the cluster was expected",
                )
        return list(answer)

    return _place_many(subject, choose, told=asks == 1)


def _place_many(
    subject: Subject, choose: Callable[[Any, Any, float], list[Any]], *, told: bool
) -> Answers:
    dice = random.Random(4)
    fakes = [FakeInstance(id=index, running=dice.randrange(5)) for index in range(6)]
    stage = FakeCluster(fakes)
    cluster = guarded(stage)
    everyone = list(cluster.instances)

    def change(view: Any, running: int) -> None:
        fake = unwrapped(view)
        fake.running, fake.kv_usage = running, min(running / 100, 1.0)
        if told:
            subject.ask("changed", view)

    for view in everyone:
        change(view, view.running)
    answers: Answers = []
    for index in range(300):
        request = FakeRequest(id=f"r{index}", prompt_tokens=dice.choice((16, 500, 4000)))
        for fake in fakes:
            cached = dice.choice((0, 0, 16, request.prompt_tokens // 32 * 16))
            fake.matched = {request.id: cached}
        if index % 40 == 39:  # one instance drains, or piles up what another got
            change(dice.choice(everyone), dice.choice((0, 90)))
        some = [fakes[i] for i in sorted(dice.sample(range(6), dice.randint(1, 6)))]
        stage.instances = fakes if index % 4 else some
        picked = choose(guarded(request), cluster, index * 0.25)
        answers.append(tuple(view.id for view in picked))
        change(picked[-1], picked[-1].running + 1)
        view = dice.choice(everyone)
        change(view, max(view.running - dice.randrange(3), 0))
    return answers
