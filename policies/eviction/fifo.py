"""First in, first out."""

from __future__ import annotations

from dataclasses import dataclass

from policies.api import BlockView
from policies.eviction.scored import ScoredEviction
from policies.registry import register


@register("eviction/fifo")
@dataclass(slots=True, eq=False)
class Fifo(ScoredEviction):
    """Evict the blocks that were stored longest ago, however often they were used since."""

    def score(self, block: BlockView, now: float) -> float:
        return block.stored_s
