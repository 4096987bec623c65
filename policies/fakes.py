"""Views made by hand, for tests of policies without a backend."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field

from policies.api import InstanceView, RequestView, Slo, Tier

__all__ = ["FakeBlock", "FakeCluster", "FakeEngine", "FakeInstance", "FakeOracle", "FakeRequest"]


@dataclass(slots=True, eq=False, kw_only=True)
class FakeRequest:
    """A ``RequestView``."""

    id: str = "r"
    arrival_s: float = 0.0
    prompt_tokens: int = 100
    max_tokens: int = 1000
    computed_tokens: int = 0
    output_tokens: int = 0
    preemptions: int = 0
    priority: int = 0
    slo: Slo = field(default_factory=Slo)
    session: str = ""
    tenant: str = ""
    model: str = ""
    kind: str = ""
    block_hashes: Sequence[Hashable] = ()


@dataclass(slots=True, eq=False, kw_only=True)
class FakeBlock:
    """A ``BlockView``."""

    hash: Hashable = 0
    depth: int = 0
    blocks: int = 1
    hits: int = 0
    stored_s: float = 0.0
    used_s: float = 0.0
    slo: Slo = field(default_factory=Slo)
    recompute_s: float = 0.001


@dataclass(slots=True, eq=False, kw_only=True)
class FakeEngine:
    """An ``EngineView`` with one tier, where every prompt token takes 0.1 ms."""

    id: int = 0
    waiting: int = 0
    running: int = 0
    block_tokens: int = 16
    free: int = 1000
    total: int = 1000

    def free_blocks(self, tier: Tier = Tier.HBM) -> int:
        return self.free

    def total_blocks(self, tier: Tier = Tier.HBM) -> int:
        return self.total

    def prefill_s(self, tokens: int, context: int = 0) -> float:
        return tokens * 1e-4


@dataclass(slots=True, eq=False, kw_only=True)
class FakeInstance:
    """An ``InstanceView``; ``matched`` is what it has cached of each request, by id."""

    id: int = 0
    role: str = "both"
    model: str = ""
    chip: str = ""
    waiting: int = 0
    running: int = 0
    kv_usage: float = 0.0
    inflight_tokens: int = 0
    signal_age_s: float = 0.0
    matched: Mapping[str, int] = field(default_factory=dict)

    def matched_tokens(self, request: RequestView) -> int:
        return self.matched.get(request.id, 0)


@dataclass(slots=True, eq=False)
class FakeCluster:
    """A ``ClusterView``."""

    instances: Sequence[InstanceView]


@dataclass(slots=True, eq=False)
class FakeOracle:
    """An ``Oracle`` that looks block hashes up in a table."""

    uses_s: Mapping[Hashable, float]

    def next_use_s(self, block: object) -> float:
        return self.uses_s.get(getattr(block, "hash", None), float("inf"))
