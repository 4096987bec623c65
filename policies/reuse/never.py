"""No prefix cache: the baseline of every reuse policy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from policies.api import EngineView, PrefixMatch, RequestView, ReusePolicy, Tier
from policies.registry import register


@register("reuse/never")
@dataclass(slots=True, eq=False)
class Never(ReusePolicy):
    """Use nothing of a cached prefix and keep nothing of a prompt."""

    def use(self, request: RequestView, match: PrefixMatch, engine: EngineView, now: float) -> int:
        return 0

    def retain(self, request: RequestView, engine: EngineView, now: float) -> Mapping[Tier, int]:
        return {Tier.HBM: 0}
