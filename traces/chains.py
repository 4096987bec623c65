"""Block hash chains of requests, stored as runs of consecutive ids.

A chain lists the ids of a prompt's KV blocks, first block first. Ids are *chained*: an id stands
for a block and all blocks before it, so it has one predecessor and equal ids mean equal prefixes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
from numpy.typing import ArrayLike, NDArray

from traces.errors import TraceError

__all__ = ["MAX_ID", "Chains", "Ints", "ranges"]

Ints = NDArray[np.int64]
MAX_ID = 2**63 - 2
"""The largest block id; what follows it must still fit 64 bits."""


@dataclass(frozen=True, slots=True, eq=False)
class Chains:
    """The chain of request i is ``start[k] .. start[k] + count[k] - 1`` for each k of its runs.

    Its runs are ``offset[i] <= k < offset[i + 1]``. Runs that continue each other are merged on
    construction, so equal chains have equal arrays. The arrays are read-only.
    """

    offset: Ints
    start: Ints
    count: Ints

    def __post_init__(self) -> None:
        offset, start, count = (
            np.array(a, dtype=np.int64).reshape(-1) for a in (self.offset, self.start, self.count)
        )
        if (
            len(offset) < 1
            or offset[0] != 0
            or offset[-1] != len(start)
            or np.any(np.diff(offset) < 0)
        ):
            raise TraceError(
                f"chain offsets must rise from 0 to the number of runs ({len(start)}), "
                f"got {offset[:3].tolist()} .. {offset[-1:].tolist()}"
            )
        if len(start) != len(count):
            raise TraceError(f"{len(start)} run starts but {len(count)} run counts")
        bad = np.flatnonzero((start < 0) | (count < 1) | (start > MAX_ID + 1 - count))
        if len(bad):
            k = int(bad[0])
            raise TraceError(
                f"run {k} of the chains starts at id {start[k]} and has {count[k]} ids; "
                f"ids are 0 to 2^63 - 2 and a run has at least one"
            )
        owner = np.repeat(np.arange(len(offset) - 1), np.diff(offset))
        joins = np.zeros(len(start), dtype=bool)
        joins[1:] = (owner[1:] == owner[:-1]) & (start[1:] == start[:-1] + count[:-1])
        if joins.any():
            heads = np.flatnonzero(~joins)
            offset = _offsets(np.bincount(owner[heads], minlength=len(offset) - 1))
            start, count = start[heads], np.add.reduceat(count, heads)
        for name, array in (("offset", offset), ("start", start), ("count", count)):
            array.flags.writeable = False
            object.__setattr__(self, name, array)

    @classmethod
    def empty(cls, requests: int) -> Chains:
        """Chains of requests without block ids."""
        none = np.zeros(0, dtype=np.int64)
        return cls(np.zeros(requests + 1, dtype=np.int64), none, none)

    @classmethod
    def from_lists(cls, chains: Sequence[Sequence[int]]) -> Chains:
        """Chains from one list of ids per request."""
        lengths = np.fromiter(map(len, chains), np.int64, len(chains))
        try:
            ids = np.fromiter(chain.from_iterable(chains), np.int64, int(lengths.sum()))
        except OverflowError:
            worst = max(chain.from_iterable(chains), key=abs)
            raise TraceError(f"block id {worst} is out of range; ids are 0 to 2^63 - 2") from None
        head = np.ones(len(ids), dtype=bool)
        head[1:] = ids[1:] != ids[:-1] + 1
        ends = np.cumsum(lengths)
        head[(ends - lengths)[lengths > 0]] = True
        at = np.flatnonzero(head)
        owner = np.searchsorted(ends, at, side="right")
        return cls(
            _offsets(np.bincount(owner, minlength=len(chains))),
            ids[at],
            np.diff(at, append=len(ids)),
        )

    def __len__(self) -> int:
        return len(self.offset) - 1

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Chains):
            return NotImplemented
        return (
            np.array_equal(self.offset, other.offset)
            and np.array_equal(self.start, other.start)
            and np.array_equal(self.count, other.count)
        )

    __hash__ = None  # type: ignore[assignment]

    def runs(self, request: int) -> list[tuple[int, int]]:
        """(first id, how many ids) of each run of one chain."""
        k = slice(int(self.offset[request]), int(self.offset[request + 1]))
        return list(zip(self.start[k].tolist(), self.count[k].tolist(), strict=True))

    def blocks(self, request: int) -> Ints:
        """The ids of one chain."""
        k = slice(int(self.offset[request]), int(self.offset[request + 1]))
        return ranges(self.start[k], self.count[k])

    @property
    def lengths(self) -> Ints:
        """Blocks per request."""
        total = _offsets(self.count)
        return total[self.offset[1:]] - total[self.offset[:-1]]

    @property
    def owner(self) -> Ints:
        """The request of each run."""
        return np.repeat(np.arange(len(self)), np.diff(self.offset))

    @property
    def before(self) -> Ints:
        """Blocks of its chain in front of each run."""
        total = _offsets(self.count)
        return total[:-1] - total[self.offset[:-1]][self.owner]

    def take(self, requests: ArrayLike) -> Chains:
        """The chains of the given request indices, in that order."""
        index = np.asarray(requests, dtype=np.int64)
        runs = np.diff(self.offset)[index]
        k = ranges(self.offset[:-1][index], runs)
        return Chains(_offsets(runs), self.start[k], self.count[k])

    def truncated(self, blocks: ArrayLike) -> Chains:
        """At most ``blocks[i]`` leading blocks of chain i."""
        owner = self.owner
        limit = np.broadcast_to(np.asarray(blocks, dtype=np.int64), (len(self),))
        keep = np.clip(limit[owner] - self.before, 0, self.count)
        some = keep > 0
        offset = _offsets(np.bincount(owner[some], minlength=len(self)))
        return Chains(offset, self.start[some], keep[some])

    def refined(self, factor: int) -> Chains:
        """Chains of blocks ``factor`` times smaller: i becomes ``i * factor + 0 .. factor - 1``."""
        if len(self.start) and int((self.start + self.count).max()) > (MAX_ID + 1) // factor:
            raise TraceError(
                f"block ids up to {int((self.start + self.count).max()) - 1} are too large to be "
                f"split into {factor} each; ids are 0 to 2^63 - 2"
            )
        return Chains(self.offset, self.start * factor, self.count * factor)

    def coarsened(self, factor: int) -> Chains:
        """Chains of blocks ``factor`` times larger: the last id of each full group names it."""
        if factor == 1:
            return self
        before = self.before
        groups = (before + self.count) // factor - before // factor
        first = self.start + (before // factor + 1) * factor - 1 - before
        ids = np.repeat(first, groups) + factor * ranges(np.zeros_like(groups), groups)
        owner = np.repeat(self.owner, groups)
        return Chains(
            _offsets(np.bincount(owner, minlength=len(self))), ids, np.ones(len(ids), np.int64)
        )


def ranges(starts: Ints, counts: Ints) -> Ints:
    """``starts[k] .. starts[k] + counts[k] - 1`` for all k, joined."""
    ends = np.cumsum(counts)
    total = int(ends[-1]) if len(ends) else 0
    ids: Ints = np.arange(total, dtype=np.int64) + np.repeat(starts - (ends - counts), counts)
    return ids


def _offsets(counts: Ints) -> Ints:
    return np.concatenate((np.zeros(1, np.int64), np.cumsum(counts, dtype=np.int64)))
