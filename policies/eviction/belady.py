"""The optimum that needs the future: a bound for every other eviction policy."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from policies.api import BlockView, Oracle, PolicyError
from policies.eviction.scored import ScoredEviction
from policies.registry import register


@register("eviction/belady")
@dataclass(slots=True, eq=False)
class Belady(ScoredEviction):
    """Evict the block that is needed again last. Simulator only: it reads the future.

    Source: L. A. Belady, "A study of replacement algorithms for a virtual-storage computer",
    IBM Systems Journal 5(2), 1966
    """

    needs_oracle: ClassVar[bool] = True
    single_blocks: ClassVar[bool] = True

    _oracle: Oracle | None = field(init=False, repr=False, default=None)

    def attach_oracle(self, oracle: Oracle) -> None:
        self._oracle = oracle

    def score(self, block: BlockView, now: float) -> float:
        if self._oracle is None:
            raise PolicyError("eviction/belady.add: no oracle was attached before the run")
        return -self._oracle.next_use_s(block)
