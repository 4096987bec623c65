"""Keep the blocks whose users have the tightest latency targets."""

from __future__ import annotations

from dataclasses import dataclass

from policies.api import BlockView
from policies.eviction.scored import ScoredEviction
from policies.registry import register


@register("eviction/slo_aware")
@dataclass(slots=True, eq=False)
class SloAware(ScoredEviction):
    """LRU, but a block with a TTFT target of x seconds counts as ``grace_s / x`` s newer."""

    grace_s: float = 10.0
    """How much longer (in seconds) a block with a target of one second is kept; 0 is LRU."""

    floor_s: float = 0.05
    """Tighter targets count as this one (seconds)."""

    def __post_init__(self) -> None:
        if not self.grace_s >= 0:
            raise ValueError(f"grace_s is {self.grace_s}; at least 0 is allowed")
        if not self.floor_s > 0:
            raise ValueError(f"floor_s is {self.floor_s}; a number above 0 is allowed")

    def score(self, block: BlockView, now: float) -> float:
        return now + self.grace_s / max(block.slo.ttft_s, self.floor_s)
