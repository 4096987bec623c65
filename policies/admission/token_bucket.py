"""A rate limit on prompt tokens, per engine."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import inf, nextafter

from policies.api import ADMIT, Admission, AdmissionPolicy, Defer, EngineView, RequestView
from policies.registry import register


@register("admission/token_bucket")
@dataclass(slots=True, eq=False)
class TokenBucket(AdmissionPolicy):
    """Admit at most ``rate_tokens_per_s`` prompt tokens per second, with bursts.

    The bucket starts full. A prompt larger than the bucket waits until it is full and leaves it
    in debt. A request is charged once, also when it is preempted and admitted again.

    Source: the generic cell rate algorithm, ITU-T I.371 (the bucket as the time it is full again)
    """

    rate_tokens_per_s: float = 10_000.0
    """Tokens that flow into the bucket per second."""

    burst_tokens: int = 20_000
    """Size of the bucket."""

    _full_s: float = field(init=False, repr=False, default=-inf)
    """When the bucket is full again if nothing else is admitted."""

    _granted: set[str] = field(init=False, repr=False, default_factory=set)

    def __post_init__(self) -> None:
        if not 0 < self.rate_tokens_per_s < inf:
            raise ValueError(
                f"rate_tokens_per_s is {self.rate_tokens_per_s}; a finite number above 0 is allowed"
            )
        if self.burst_tokens < 1:
            raise ValueError(f"burst_tokens is {self.burst_tokens}; at least 1 is allowed")

    def admit(self, request: RequestView, engine: EngineView, now: float) -> Admission:
        ident = request.id
        if ident in self._granted:
            return ADMIT
        tokens = request.prompt_tokens
        spare = self.burst_tokens - min(tokens, self.burst_tokens)
        ready_s = self._full_s - spare / self.rate_tokens_per_s
        if now < ready_s:
            # One float later, so that a backend whose clock has other units (the simulator's
            # picoseconds) cannot come back one rounding too early.
            return Defer(nextafter(ready_s, inf), "rate limit")
        self._granted.add(ident)
        self._full_s = max(self._full_s, now) + tokens / self.rate_tokens_per_s
        return ADMIT
