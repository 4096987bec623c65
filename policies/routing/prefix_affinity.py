"""Follow the cache, unless that leaves the load too uneven."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from policies.api import InstanceView, RequestView, Router
from policies.registry import register


@register("routing/prefix_affinity")
@dataclass(slots=True, eq=False)
class PrefixAffinity(Router):
    """Send a request where most of its prompt is cached; balance when loads differ too much.

    Loads are unbalanced when the largest exceeds the smallest by more than ``balance_abs`` and
    by more than a factor of ``balance_rel``; then the least loaded instance gets the request.
    Ties (nothing cached anywhere, for example) go to the least loaded, then to the lowest id.

    Source: the two thresholds of SGLang's ``cache_aware`` router
    (``sgl-model-gateway/src/policies/cache_aware.rs``); unlike it, this one asks the instances
    what they have cached and does not keep a tree of its own.
    """

    balance_abs: int = 32
    """Requests by which the largest load may exceed the smallest."""

    balance_rel: float = 1.5
    """Factor by which the largest load may exceed the smallest."""

    def __post_init__(self) -> None:
        if self.balance_abs < 0:
            raise ValueError(f"balance_abs is {self.balance_abs}; at least 0 is allowed")
        if not self.balance_rel >= 0:
            raise ValueError(f"balance_rel is {self.balance_rel}; at least 0 is allowed")

    def route(
        self, request: RequestView, instances: Sequence[InstanceView], now: float
    ) -> InstanceView:
        loads = [i.waiting + i.running for i in instances]
        low, high = min(loads), max(loads)
        if high - low > self.balance_abs and high > self.balance_rel * low:
            ranks = [(load, i.id) for load, i in zip(loads, instances, strict=True)]
            return instances[ranks.index(min(ranks))]
        best = instances[0]
        best_rank = (-best.matched_tokens(request), loads[0], best.id)
        for position in range(1, len(instances)):
            instance = instances[position]
            rank = (-instance.matched_tokens(request), loads[position], instance.id)
            if rank < best_rank:
                best, best_rank = instance, rank
        return best
