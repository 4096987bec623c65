"""The better one of two random instances."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from policies.api import InstanceView, RequestView, Router
from policies.registry import register


@register("routing/power_of_two")
@dataclass(slots=True, eq=False)
class PowerOfTwo(Router):
    """Draw two different instances and take the one with fewer requests; ties: the lower id.

    Source: M. Mitzenmacher, "The power of two choices in randomized load balancing",
    IEEE TPDS 12(10), 2001
    """

    seed: int = 0
    """Seed of the draws; by default a backend derives one from the run's."""

    _random: random.Random = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)

    def route(
        self, request: RequestView, instances: Sequence[InstanceView], now: float
    ) -> InstanceView:
        count = len(instances)
        if count == 1:
            return instances[0]
        # Of all draws only random() is the same in every Python version.
        first = int(self._random.random() * count)
        second = int(self._random.random() * (count - 1))
        if second >= first:
            second += 1
        a, b = instances[first], instances[second]
        load_a, load_b = a.waiting + a.running, b.waiting + b.running
        if load_a != load_b:
            return a if load_a < load_b else b
        return a if a.id < b.id else b
