"""The trace: one table of requests with units in the column names, and their block hash chains.

Readers and generators make one with ``Trace.build``; everything else only looks at it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from traces.chains import Chains
from traces.columns import COLUMNS, check_chains, check_rows, table
from traces.errors import TraceError, at_least, listed, positive

__all__ = ["COLUMNS", "Chains", "Trace", "TraceError"]


@dataclass(frozen=True, slots=True, eq=False)
class Trace:
    """Requests in the order of their arrival. Do not change ``requests`` in place."""

    name: str
    block_tokens: int
    """Tokens per block id of ``chains``; 0 when the trace has no block ids."""
    requests: pd.DataFrame
    """One row per request, sorted by ``arrival_s`` (ties: file order); columns: ``COLUMNS``."""
    chains: Chains
    """The block ids of each prompt, in the order of ``requests``."""
    synthetic: str = ""
    """What was made up, e.g. "arrivals, lengths"; reports print it. Empty: all was recorded."""
    notes: tuple[str, ...] = ()
    """What a reader decided, e.g. "timestamps read as ms"."""

    def __post_init__(self) -> None:
        if list(self.requests.columns) != list(COLUMNS):
            raise TraceError(
                f"a trace has the columns {listed(COLUMNS)}; got {listed(self.requests.columns)}: "
                f"make it with Trace.build"
            )
        if len(self.chains) != len(self.requests):
            raise TraceError(f"{len(self.chains)} chains for {len(self.requests)} requests")

    @classmethod
    def build(
        cls,
        name: str,
        columns: Mapping[str, Any],
        chains: Chains | None = None,
        *,
        block_tokens: int = 0,
        synthetic: str = "",
        notes: tuple[str, ...] = (),
        where: Callable[[int], str] | None = None,
    ) -> Trace:
        """A sorted, validated trace from columns in any order of arrival.

        ``arrival_s``, ``prompt_tokens`` and ``output_tokens`` are required; a missing ``id`` is the
        row number. Values are arrays, lists or Series; a scalar fills its column. ``where`` names a
        row in errors, e.g. by file and line. Raises ``TraceError``.
        """
        where = where or (lambda row: f"row {row}")
        if block_tokens < 0:
            raise TraceError(f"block_tokens must be 0 (no block ids) or more, not {block_tokens}")
        requests = table(columns, where)
        chains = Chains.empty(len(requests)) if chains is None else chains
        if len(chains) != len(requests):
            raise TraceError(f"{name}: {len(chains)} chains for {len(requests)} requests")
        arrival_s = requests["arrival_s"].to_numpy()
        order = np.arange(len(requests))
        if np.any(arrival_s[1:] < arrival_s[:-1]):
            order = np.argsort(arrival_s, kind="stable")
            requests = requests.iloc[order].reset_index(drop=True)
            chains = chains.take(order)

        def row(position: int) -> str:
            return where(int(order[position]))

        check_rows(requests, row)
        check_chains(requests["prompt_tokens"].to_numpy(), chains, block_tokens, row)
        return cls(name, block_tokens, requests, chains, synthetic, notes)

    def __len__(self) -> int:
        return len(self.requests)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Trace):
            return NotImplemented
        return (
            (self.name, self.block_tokens, self.synthetic, self.notes)
            == (other.name, other.block_tokens, other.synthetic, other.notes)
            and self.requests.equals(other.requests)
            and self.chains == other.chains
        )

    __hash__ = None  # type: ignore[assignment]

    @property
    def prompt_tokens(self) -> int:
        """Prompt tokens of all requests."""
        return int(self._values("prompt_tokens").sum())

    @property
    def output_tokens(self) -> int:
        """Output tokens of all requests."""
        return int(self._values("output_tokens").sum())

    @property
    def span_s(self) -> float:
        """Time from the first arrival to the last."""
        arrival_s = self._values("arrival_s")
        return float(arrival_s[-1] - arrival_s[0])

    @property
    def rate_per_s(self) -> float:
        """Mean arrival rate, 1 / (mean gap); 0 where all requests arrive at once."""
        return (len(self) - 1) / self.span_s if self.span_s > 0 else 0.0

    def head(self, count: int) -> Trace:
        """The first ``count`` requests to arrive (all of them if there are fewer)."""
        at_least("count", count, 1)
        return self._rows(np.arange(min(count, len(self))))

    def between(self, start_s: float, end_s: float) -> Trace:
        """Requests with ``start_s <= arrival_s < end_s``, on a clock that is 0 at ``start_s``.

        A session that began earlier goes on with its later turns, numbered from 0 again; the first
        of them has no recorded pause.
        """
        arrival_s = self._values("arrival_s")
        rows = np.flatnonzero((arrival_s >= start_s) & (arrival_s < end_s))
        if len(rows) == 0:
            raise TraceError(
                f"{self.name} has no request between {start_s} s and {end_s} s; its arrivals are "
                f"{arrival_s[0]} s to {arrival_s[-1]} s"
            )
        cut = self._rows(rows)
        session, turn = pd.factorize(cut.requests["session"])[0], cut._values("turn")
        first = np.full(session.max() + 1, np.iinfo(np.int64).max)
        np.minimum.at(first, session, turn)
        turn = turn - first[session]
        think_s = np.where(turn == 0, 0.0, cut._values("think_s"))
        arrival_s = cut._values("arrival_s") - start_s
        return cut._with(arrival_s=arrival_s, turn=turn, think_s=think_s)

    def scaled(self, rate: float) -> Trace:
        """The same requests arriving ``rate`` times as fast.

        ``think_s`` stays: it is how long a person (or a tool) takes, which more load does not
        change. Only arrivals, the part that says how many people there are, are compressed.
        """
        positive("rate", rate)
        note = (f"arrivals {rate:g} times as fast as recorded",) if rate != 1 else ()
        scaled = self._with(arrival_s=self._values("arrival_s") / rate)
        return replace(scaled, notes=self.notes + note)

    def dequantised(self, tick_s: float, seed: int = 0) -> Trace:
        """Arrivals recorded on ticks, spread uniformly over the tick that follows.

        Requests of a tick keep their order. Raises where an arrival is not on a tick (within 1 %).
        """
        positive("tick_s", tick_s)
        arrival_s = self._values("arrival_s")
        tick = np.rint((arrival_s - arrival_s[0]) / tick_s)
        base_s = arrival_s[0] + tick * tick_s
        off = np.flatnonzero(np.abs(base_s - arrival_s) > 0.01 * tick_s)
        if len(off):
            raise TraceError(
                f"{self.name} is not quantised to {tick_s} s: row {off[0]} arrives at "
                f"{arrival_s[off[0]]} s, and arrivals must be whole ticks after the first one "
                f"({arrival_s[0]} s)"
            )
        jitter_s = np.random.default_rng(seed).uniform(0.0, tick_s, len(self))
        jitter_s = jitter_s[np.lexsort((jitter_s, tick))]
        spread_s = np.maximum.accumulate(base_s + jitter_s)
        made_up = f"arrivals within {tick_s:g} s ticks"
        synthetic = f"{self.synthetic}, {made_up}" if self.synthetic else made_up
        return replace(self._with(arrival_s=spread_s), synthetic=synthetic)

    def recoded(self, block_tokens: int, *, full_blocks_only: bool = True) -> Chains:
        """The chains in another block size, which must divide the trace's or be a multiple of it.

        A smaller block gets ids of its own; a larger one the id of its last part, and an incomplete
        last group is dropped. Both are exact for chained ids. Chains cover only full blocks of the
        prompt (what engines share), or with ``full_blocks_only=False`` also the partial last one.
        A trace without block ids gives empty chains.
        """
        size = self.block_tokens
        if block_tokens < 1 or (size and size % block_tokens and block_tokens % size):
            fits = [d for d in range(1, size + 1) if size % d == 0]
            raise TraceError(
                f"block_tokens={block_tokens} does not fit {self.name}, whose blocks have {size} "
                f"tokens; it must be one of {listed(fits)} or a multiple of {size}"
                if size
                else f"block_tokens must be at least 1, not {block_tokens}"
            )
        if size == 0:
            return self.chains
        if block_tokens <= size:
            chains = self.chains.refined(size // block_tokens)
        else:
            chains = self.chains.coarsened(block_tokens // size)
        prompt_tokens = self._values("prompt_tokens")
        partial = 0 if full_blocks_only else block_tokens - 1
        return chains.truncated((prompt_tokens + partial) // block_tokens)

    def _values(self, column: str) -> NDArray[Any]:
        return self.requests[column].to_numpy()

    def _with(self, **columns: NDArray[Any]) -> Trace:
        return replace(self, requests=self.requests.assign(**columns))

    def _rows(self, rows: NDArray[np.int64]) -> Trace:
        return replace(
            self,
            requests=self.requests.iloc[rows].reset_index(drop=True),
            chains=self.chains.take(rows),
        )
