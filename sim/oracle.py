"""The future of a replayed trace, for policies that declare ``needs_oracle``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from policies.api import BlockView

if TYPE_CHECKING:
    from traces.schema import Chains, Trace


class TraceOracle:
    """Knows when each block of the trace is contained in the next request.

    "Next" is by the trace's order of arrival after the request that used the block last, over
    all engines: with one engine and no overtaking this is exact.
    """

    def __init__(self, trace: Trace, chains: Chains | None) -> None:
        count = len(trace)
        if chains is None:
            self._offset = np.zeros(count + 1, dtype=np.int64)
            self._next_s: NDArray[np.float64] = np.empty(0)
            return
        lengths = chains.count
        first = np.repeat(chains.start - np.cumsum(lengths) + lengths, lengths)
        ids = first + np.arange(int(lengths.sum()))
        sizes = np.asarray(chains.lengths)
        self._offset = np.concatenate([[0], np.cumsum(sizes)])
        arrival_s = np.repeat(trace.requests["arrival_s"].to_numpy(), sizes)
        order = np.argsort(ids, kind="stable")
        same = ids[order][1:] == ids[order][:-1]
        self._next_s = np.full(len(ids), np.inf)
        self._next_s[order[:-1][same]] = arrival_s[order[1:][same]]

    def of(self, row: int) -> NDArray[np.float64]:
        """Per block of a request's chain: when the next request with that block arrives."""
        return self._next_s[self._offset[row] : self._offset[row + 1]]

    def next_use_s(self, block: BlockView) -> float:
        return float(block.next_use_s)  # type: ignore[attr-defined]
