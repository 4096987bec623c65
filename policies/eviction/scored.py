"""A base for policies that give every block a number when it is released.

The order is a sorted front, which ``victims`` has asked for before, and a heap of the rest.
"""

from __future__ import annotations

from abc import abstractmethod
from bisect import insort
from collections.abc import Sequence
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from math import isnan

from policies.api import BlockView, EvictionPolicy, PolicyError

Entry = tuple[float, int, BlockView]
"""Score, serial number, block. Serial numbers differ, so blocks are never compared."""


@dataclass(slots=True, eq=False)
class ScoredEviction(EvictionPolicy):
    """Evict the block with the smallest ``score`` first; ties go by order of release.

    Invariants: a block is known if and only if ``_serial`` has it; an entry whose number is not
    the block's is dead; no entry of ``_heap`` comes before one of ``_front``.
    """

    _serial: dict[BlockView, int] = field(init=False, repr=False, default_factory=dict)
    _front: list[Entry] = field(init=False, repr=False, default_factory=list)
    _heap: list[Entry] = field(init=False, repr=False, default_factory=list)
    _added: int = field(init=False, repr=False, default=0)

    @abstractmethod
    def score(self, block: BlockView, now: float) -> float:
        """The block's place in the order, asked once: when it is released at ``now``."""

    def add(self, block: BlockView, now: float) -> None:
        score = self.score(block, now)
        if isnan(score):
            name = getattr(self, "policy_name", type(self).__name__)
            raise PolicyError(f"{name}.score answered nan for {block!r}; a number was expected")
        self._added += 1
        self._serial[block] = self._added
        entry = (score, self._added, block)
        front = self._front
        if front and entry < front[-1]:
            insort(front, entry)
        else:
            heappush(self._heap, entry)

    def remove(self, block: BlockView, now: float) -> None:
        serial = self._serial
        del serial[block]
        # Dead entries are dropped when they are the majority, so a removal costs O(1) on average.
        if len(self._heap) > 2 * len(serial) + 64:
            self._heap = [e for e in self._heap if serial.get(e[2]) == e[1]]
            heapify(self._heap)
        if len(self._front) > 2 * len(serial) + 64:
            self._front = [e for e in self._front if serial.get(e[2]) == e[1]]

    def victims(self, count: int, now: float) -> Sequence[BlockView]:
        serial, front, heap = self._serial, self._front, self._heap
        chosen: list[BlockView] = []
        dead = 0
        for _, number, block in front:
            if count <= 0:
                break
            if serial.get(block) == number:
                chosen.append(block)
                count -= block.blocks
            elif not chosen:
                dead += 1
        if dead:
            del front[:dead]
        while count > 0 and heap:
            entry = heappop(heap)
            block = entry[2]
            if serial.get(block) == entry[1]:
                front.append(entry)
                chosen.append(block)
                count -= block.blocks
        return chosen
