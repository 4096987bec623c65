"""Every instance in turn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from policies.api import InstanceView, RequestView, Router
from policies.registry import register


@register("routing/round_robin")
@dataclass(slots=True, eq=False)
class RoundRobin(Router):
    """Send request after request to the next instance of the list, whatever its load."""

    _next: int = field(init=False, repr=False, default=0)

    def route(
        self, request: RequestView, instances: Sequence[InstanceView], now: float
    ) -> InstanceView:
        position = self._next
        if position >= len(instances):
            position = 0
        self._next = position + 1
        return instances[position]
