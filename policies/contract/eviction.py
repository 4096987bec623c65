"""Rules of eviction policies.

Only blocks that were added and not removed are named, each once and all in the end, in an order
that does not depend on how much or when is asked.
"""

from __future__ import annotations

import random
from collections.abc import Hashable, Sequence
from math import inf
from typing import Any

from policies.contract.subject import SLOS, Answers, Subject, guarded, ids, show
from policies.fakes import FakeBlock, FakeOracle
from policies.strict import unwrapped


def eviction(subject: Subject, asks: int) -> Answers:
    """Release, hit and evict blocks at random; every time of asking must name the same order."""
    dice = random.Random(2)
    policy = subject.policy
    if policy.needs_oracle:
        table: dict[Hashable, float] = {
            i: dice.choice((inf, dice.random() * 300)) for i in range(60)
        }
        subject.ask("attach_oracle", FakeOracle(table))
    busy = [
        guarded(
            FakeBlock(
                hash=i,
                depth=i % 4,
                blocks=1 if policy.single_blocks else dice.randint(1, 5),
                slo=dice.choice(SLOS),
                stored_s=dice.random(),
            )
        )
        for i in range(60)
    ]
    stage = _Stage(subject, asks, busy)
    idle = stage.idle
    for _ in range(400):
        stage.now += dice.choice((0.0, 0.5))
        what = dice.random()
        if what < 0.5 and busy:
            block = busy.pop(dice.randrange(len(busy)))
            unwrapped(block).used_s = stage.now
            subject.ask("add", block, stage.now)
            idle[id(block)] = block
        elif what < 0.7 and idle:
            block = idle.pop(dice.choice(list(idle)))
            subject.ask("remove", block, stage.now)
            unwrapped(block).hits += 1
            busy.append(block)
        elif idle:
            stage.evict(dice.randint(1, stage.total()))
    while idle:
        stage.evict(stage.total())
    return stage.answers


class _Stage:
    """Which blocks the policy may name (``idle``) and which not (``busy``)."""

    def __init__(self, subject: Subject, asks: int, busy: list[Any]) -> None:
        self.subject = subject
        self.asks = asks
        self.busy = busy
        self.idle: dict[int, Any] = {}
        self.answers: Answers = []
        self.now = 1.0

    def total(self) -> int:
        return sum(block.blocks for block in self.idle.values())

    def evict(self, count: int) -> None:
        """Ask for everything and for ``count`` blocks, and evict those."""
        subject, total = self.subject, self.total()
        order = self.victims(total, self.now)
        if len(order) != len(self.idle):
            args = (total, self.now)
            raise subject.broke(
                "victims", args, f"named {len(order)} of {len(self.idle)} views that can be evicted"
            )
        if subject.policy.in_order and order != list(self.idle.values()):
            raise subject.broke(
                "victims",
                (total, self.now),
                f"named {ids(order)}, but in_order promises the order of add: "
                f"{ids(list(self.idle.values()))}",
            )
        self.answers.append(ids(order))
        for ask in range(self.asks):
            later = self.now + (0.0, 1.0, 20.0, 5000.0)[(len(self.answers) + ask) % 4]
            named = self.victims(count, later)
            if named != order[: len(named)]:
                raise subject.broke(
                    "victims",
                    (count, later),
                    f"named {ids(named)}, but asked for {total} at {self.now:g} it began with "
                    f"{ids(order[: len(named)])}; the order may not depend on how much or when "
                    f"is asked",
                )
        while count and order[0].blocks <= count:
            block = order.pop(0)
            count -= block.blocks
            subject.ask("remove", block, self.now)
            del self.idle[id(block)]
            unwrapped(block).hits = 0
            self.busy.append(block)
        if count:  # the deep end of this one goes
            unwrapped(order[0]).blocks -= count
        after = self.victims(self.total(), self.now)
        if after != order:
            raise subject.broke(
                "victims",
                (self.total(), self.now),
                f"named {ids(after)} after evicting; {ids(order)} was next",
            )

    def victims(self, count: int, now: float) -> list[Any]:
        """The policy's answer, each of which may be named, together enough."""
        args = (count, now)
        named = self.subject.ask("victims", *args)
        if not isinstance(named, Sequence) or isinstance(named, str):
            raise self.subject.broke(
                "victims", args, f"answered {named!r}; a sequence of blocks was expected"
            )
        seen: set[int] = set()
        for block in named:
            if id(block) not in self.idle:
                raise self.subject.broke(
                    "victims", args, f"named {show(block)}, which was removed or never added"
                )
            if id(block) in seen:
                raise self.subject.broke("victims", args, f"named {show(block)} twice")
            seen.add(id(block))
        found = sum(block.blocks for block in named)
        if found < count:
            raise self.subject.broke("victims", args, f"named only {found} blocks")
        return list(named)
