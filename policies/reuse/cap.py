"""Use only the beginning of a cached prefix, for example the system prompt."""

from __future__ import annotations

from dataclasses import dataclass

from policies.api import EngineView, PrefixMatch, RequestView, ReusePolicy
from policies.registry import register


@register("reuse/cap")
@dataclass(slots=True, eq=False)
class Cap(ReusePolicy):
    """Use at most ``max_tokens`` tokens of a cached prefix; keep all of every prompt."""

    max_tokens: int = 4096
    """The most tokens of a match that are used."""

    def __post_init__(self) -> None:
        if self.max_tokens < 0:
            raise ValueError(f"max_tokens is {self.max_tokens}; at least 0 is allowed")

    def use(self, request: RequestView, match: PrefixMatch, engine: EngineView, now: float) -> int:
        return min(match.tokens, self.max_tokens)
