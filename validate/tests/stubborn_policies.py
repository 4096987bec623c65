"""Policies that use every answer a policy can give, for comparing both sides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from policies.api import (
    ADMIT,
    Admission,
    AdmissionPolicy,
    BlockView,
    Defer,
    EngineView,
    EvictionPolicy,
    PrefixMatch,
    Reject,
    RequestView,
    ReusePolicy,
    Tier,
)
from policies.registry import register


@register("admission/stubborn")
@dataclass(slots=True, eq=False)
class Stubborn(AdmissionPolicy):
    """Order by the rest of a division, hold while it is full, reject where many wait."""

    horizon_steps: ClassVar[int | None] = 3
    preempts: ClassVar[Literal["last", "order"]] = "order"

    def order(self, request: RequestView, now: float) -> float:
        return request.prompt_tokens % 7 + request.preemptions

    def admit(self, request: RequestView, engine: EngineView, now: float) -> Admission:
        if request.preemptions == 0 and engine.waiting > 6:
            return Reject(f"{engine.waiting} are waiting")
        if engine.running > 1 and engine.free_blocks() * 3 < engine.total_blocks():
            return Defer(reason="nearly full")
        if engine.running and request.prompt_tokens % 5 == 0 and now - request.arrival_s < 0.31:
            return Defer(request.arrival_s + 0.31)
        return ADMIT


@register("eviction/shallow_first")
@dataclass(slots=True, eq=False)
class ShallowFirst(EvictionPolicy):
    """Evict the beginnings of chains first, which vLLM never does; the cheapest of them."""

    single_blocks: ClassVar[bool] = True

    _blocks: dict[BlockView, int] = field(init=False, repr=False, default_factory=dict)
    _added: int = field(init=False, repr=False, default=0)

    def add(self, block: BlockView, now: float) -> None:
        self._added += 1
        self._blocks[block] = self._added

    def remove(self, block: BlockView, now: float) -> None:
        del self._blocks[block]

    def victims(self, count: int, now: float) -> Sequence[BlockView]:
        def key(block: BlockView) -> tuple[float, ...]:
            times = block.recompute_s, block.used_s, block.stored_s
            return block.depth, block.hits, block.slo.ttft_s, *times, self._blocks[block]

        return sorted(self._blocks, key=key)[:count]


@register("reuse/half")
@dataclass(slots=True, eq=False)
class Half(ReusePolicy):
    """Use half of a match where somebody waits, keep three quarters of a prompt."""

    def use(self, request: RequestView, match: PrefixMatch, engine: EngineView, now: float) -> int:
        return match.tokens // 2 if engine.waiting > 1 else match.tokens

    def retain(
        self, request: RequestView, engine: EngineView, now: float
    ) -> Mapping[Tier, int] | None:
        if request.kind == "chat":
            return None
        return {Tier.HBM: request.prompt_tokens * 3 // 4}
