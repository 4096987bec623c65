"""Any instance."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from policies.api import InstanceView, RequestView, Router
from policies.registry import register


@register("routing/random")
@dataclass(slots=True, eq=False)
class Random(Router):
    """Send every request to an instance drawn uniformly at random."""

    seed: int = 0
    """Seed of the draws; by default a backend derives one from the run's."""

    _random: random.Random = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)

    def route(
        self, request: RequestView, instances: Sequence[InstanceView], now: float
    ) -> InstanceView:
        # Of all draws only random() is the same in every Python version.
        return instances[int(self._random.random() * len(instances))]
