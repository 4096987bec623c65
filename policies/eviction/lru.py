"""Least recently used, exactly as vLLM evicts."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

from policies.api import BlockView, EvictionPolicy
from policies.registry import register


@register("eviction/lru")
@dataclass(slots=True, eq=False)
class Lru(EvictionPolicy):
    """Evict the blocks that were released longest ago.

    Source: vLLM ``v1/core/block_pool.py`` and its ``FreeKVCacheBlockQueue``
    """

    in_order = True

    # An OrderedDict and not a dict: finding the first key of a dict skips over the holes that
    # evictions leave in front (0.1 against 3 us per eviction with 10,000 views).
    _order: OrderedDict[BlockView, None] = field(
        init=False, repr=False, default_factory=OrderedDict
    )

    def add(self, block: BlockView, now: float) -> None:
        self._order[block] = None

    def remove(self, block: BlockView, now: float) -> None:
        del self._order[block]

    def victims(self, count: int, now: float) -> Sequence[BlockView]:
        chosen: list[BlockView] = []
        for block in self._order:
            if count <= 0:
                break
            chosen.append(block)
            count -= block.blocks
        return chosen
