"""Least frequently used."""

from __future__ import annotations

from dataclasses import dataclass

from policies.api import BlockView
from policies.eviction.scored import ScoredEviction
from policies.registry import register


@register("eviction/lfu")
@dataclass(slots=True, eq=False)
class Lfu(ScoredEviction):
    """Evict the blocks with the fewest hits, among those the ones released longest ago."""

    def score(self, block: BlockView, now: float) -> float:
        return block.hits
