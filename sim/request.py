"""A request while it lives in the simulator. Its public attributes are exactly a ``RequestView``.

Times inside the simulator are integer picoseconds (``_ps``); what policies see is in seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from policies.api import Slo

if TYPE_CHECKING:
    from numpy.typing import NDArray

PS_PER_S = 1_000_000_000_000
"""Picoseconds in a second."""

PRIVATE_BITS = 26
"""A request's own (never shared) blocks have ids from ``-(index + 1) << PRIVATE_BITS`` upwards."""

ENDLESS = 1 << PRIVATE_BITS

NO_SLO = Slo()

Run = tuple[int, int, int]
"""(index of the first block in the chain, id of that block, number of consecutive blocks)."""


class Request:
    """One live request; created when it arrives and dropped when it ends."""

    __slots__ = (
        "_true_output_tokens",
        "admitted_ps",
        "arrival_ps",
        "arrival_s",
        "blocks",
        "cached_tokens",
        "chain_blocks",
        "computed_tokens",
        "decoding",
        "due",
        "first_ps",
        "future_s",
        "held",
        "index",
        "kind",
        "longest_key",
        "max_tokens",
        "model",
        "name",
        "order",
        "output_tokens",
        "phase",
        "placeholders",
        "preemptions",
        "priority",
        "prompt_blocks",
        "prompt_tokens",
        "rank",
        "retain_blocks",
        "runs",
        "seat",
        "session",
        "slo",
        "stored",
        "tenant",
    )

    def __init__(
        self,
        index: int,
        arrival_ps: int,
        prompt_tokens: int,
        output_tokens: int,
        chain: Sequence[tuple[int, int]] = (),
        *,
        answer: Sequence[tuple[int, int]] = (),
        name: str | None = None,
        slo: Slo = NO_SLO,
        priority: int = 0,
        session: str = "",
        tenant: str = "",
        model: str = "",
        kind: str = "",
    ) -> None:
        self.index = index
        self.name = name
        self.arrival_ps = arrival_ps
        self.arrival_s = arrival_ps / PS_PER_S
        self.prompt_tokens = prompt_tokens
        self.max_tokens = 0
        """Set by the engine that takes the request: what its context length leaves."""
        self._true_output_tokens = output_tokens
        """How many tokens it will generate; no view shows it."""
        self.slo = slo
        self.priority = priority
        self.session = session
        self.tenant = tenant
        self.model = model
        self.kind = kind
        # Where its KV blocks stand in the world's block ids; the last run is its own.
        runs: list[Run] = []
        first = 0
        for start, count in chain:
            runs.append((first, start, count))
            first += count
        self.prompt_blocks = first
        """Full blocks of the prompt whose content the trace knows."""
        for start, count in answer:
            if runs and sum(runs[-1][1:]) == start:  # goes on: one run
                index, begin, before = runs[-1]
                runs[-1] = (index, begin, before + count)
            else:
                runs.append((first, start, count))
            first += count
        runs.append((first, (-(index + 1) << PRIVATE_BITS) + first, ENDLESS - first))
        self.runs = runs
        self.chain_blocks = first
        """Leading blocks of prompt and answer whose content is known; the others are its own."""
        self.future_s: NDArray | None = None  # type: ignore[type-arg]
        """Per block of the chain: arrival of the next request that contains it (oracle only)."""
        # What has happened to it.
        self.computed_tokens = 0
        """Tokens with KV; while decoding only brought up to date when the engine looks."""
        self.output_tokens = 0
        self.placeholders = 0
        """Tokens in flight: asynchronous scheduling only."""
        self.preemptions = 0
        self.cached_tokens = 0
        self.admitted_ps = -1
        self.first_ps = -1
        # The engine's bookkeeping.
        self.order = 0.0
        self.rank = 0
        self.seat = 0
        self.blocks = 0
        self.stored = 0
        self.retain_blocks = ENDLESS
        self.held: list = []  # type: ignore[type-arg]
        self.decoding = False
        self.due = 0
        self.phase = 0
        self.longest_key = 0

    @property
    def id(self) -> str:
        return self.name if self.name is not None else str(self.index)

    @property
    def block_hashes(self) -> list[int]:
        """Ids of the full blocks of the prompt that the trace knows."""
        idents = [i for _, start, count in self.runs[:-1] for i in range(start, start + count)]
        return idents[: self.prompt_blocks]

    def __repr__(self) -> str:
        return f"<Request {self.id}: {self.prompt_tokens} prompt tokens>"
