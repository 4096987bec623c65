"""The instance with the fewest requests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush

from policies.api import InstanceView, RequestView, Router
from policies.registry import register


@register("routing/least_loaded")
@dataclass(slots=True, eq=False)
class LeastLoaded(Router):
    """Send a request where the fewest are waiting and running; ties go to the lowest id.

    Until it is told of a first change it looks at everyone. From then on it keeps a heap of
    (load, id) and trusts ``changed`` for as long as the list of instances stays the same; an entry
    that does not agree with ``_load`` is out of date.
    """

    _told: bool = field(init=False, repr=False, default=False)
    _seen: Sequence[InstanceView] = field(init=False, repr=False, default=())
    _by_id: dict[int, InstanceView] = field(init=False, repr=False, default_factory=dict)
    _load: dict[int, int] = field(init=False, repr=False, default_factory=dict)
    _heap: list[tuple[int, int]] = field(init=False, repr=False, default_factory=list)

    def changed(self, instance: InstanceView) -> None:
        self._told = True
        ident = instance.id
        if self._by_id.get(ident) is not instance:
            return
        load = instance.waiting + instance.running
        if self._load[ident] == load:
            return
        self._load[ident] = load
        heap = self._heap
        heappush(heap, (load, ident))
        if len(heap) > 4 * len(self._seen) + 16:
            self._rebuild()

    def route(
        self, request: RequestView, instances: Sequence[InstanceView], now: float
    ) -> InstanceView:
        if not self._told:
            return min(instances, key=lambda i: (i.waiting + i.running, i.id))
        # Comparing lists of the same objects takes 5 ns per instance, asking for loads 100 ns.
        if self._seen is not instances and self._seen != instances:
            self._seen = instances[:]
            self._by_id = {i.id: i for i in instances}
            self._load = {i.id: i.waiting + i.running for i in instances}
            self._rebuild()
        heap = self._heap
        load = self._load
        while load[heap[0][1]] != heap[0][0]:
            heappop(heap)
        return self._by_id[heap[0][1]]

    def _rebuild(self) -> None:
        self._heap = [(load, ident) for ident, load in self._load.items()]
        heapify(self._heap)
