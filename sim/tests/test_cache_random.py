"""The pool of KV blocks against a model of vLLM's rules with one object per block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from policies.api import EvictionPolicy
from policies.eviction.fifo import Fifo
from policies.eviction.lru import Lru
from sim.cache import BlockPool
from sim.request import PS_PER_S, Request


@dataclass(eq=False, slots=True)
class Single:
    """One KV block of the model."""

    ident: int | None = None
    users: int = 0
    stored_s: float = 0.0
    released: int = -1


class Model:
    """vLLM's rules 12-16 with one object per block, as its documents say them."""

    def __init__(self, blocks: int, fifo: bool) -> None:
        self.fifo = fifo
        self.blocks = [Single() for _ in range(blocks)]
        self.known: dict[int, list[Single]] = {}
        self.evicted: list[int] = []
        self.releases = 0

    def free(self) -> list[Single]:
        """What can be taken, first first: never hashed, then by the policy."""
        idle = [block for block in self.blocks if not block.users]

        def place(block: Single) -> tuple[float, ...]:
            if block.ident is None:
                return (0,)
            return (1, block.stored_s if self.fifo else 0, block.released)

        return sorted(idle, key=place)

    def match(self, ids: Sequence[int]) -> list[Single]:
        hits = []
        for ident in ids:
            if ident not in self.known:
                break
            hits.append(self.known[ident][0])
        return hits

    def take(self, count: int) -> list[Single]:
        taken = self.free()[:count]
        for block in taken:
            if block.ident is not None:
                self.evicted.append(block.ident)
                self.known[block.ident].remove(block)
                if not self.known[block.ident]:
                    del self.known[block.ident]
                block.ident = None
            block.users = 1
        return taken

    def store(self, block: Single, ident: int, now_s: float) -> None:
        block.ident, block.stored_s = ident, now_s
        self.known.setdefault(ident, []).append(block)

    def release(self, held: Sequence[Single]) -> None:
        for block in reversed(held):
            block.users -= 1
            if not block.users:
                block.released = self.releases
                self.releases += 1


@dataclass(eq=False, slots=True)
class Live:
    """A request in both worlds."""

    request: Request
    ids: list[int]
    held: list[Single]
    hashed: int
    admitted_s: float


class SingleLru(Lru):
    single_blocks: ClassVar[bool] = True


POLICIES: dict[str, type[EvictionPolicy]] = {"lru": Lru, "fifo": Fifo, "lru by block": SingleLru}


def _chains() -> list[tuple[tuple[int, int], ...]]:
    """A small tree of chained ids: a trunk of 8, branches of 4 off it, twigs of 3 off those."""
    chains: list[tuple[tuple[int, int], ...]] = [((0, n),) for n in range(9)]
    for cut in (1, 3, 8):
        for side in (0, 1):
            branch = 1000 * (cut + 1) + 100 * side
            chains += [((0, cut), (branch, n)) for n in range(1, 5)]
            chains += [((0, cut), (branch, 2), (branch + 50, n)) for n in (1, 3)]
    return chains


class PoolMachine(RuleBasedStateMachine):
    """Random requests against the pool and the model at once."""

    @initialize(blocks=st.integers(6, 30), policy=st.sampled_from(sorted(POLICIES)))
    def make(self, blocks: int, policy: str) -> None:
        self.now_s = 0.0
        self.pool = BlockPool(blocks, 1, POLICIES[policy](), clock=lambda: self.now_s)
        self.pool.log = []
        self.model = Model(blocks, fifo=policy == "fifo")
        self.live: list[Live] = []
        self.serial = 0

    @rule(
        chain=st.sampled_from(_chains()),
        own=st.integers(0, 4),
        used=st.one_of(st.none(), st.integers(0, 8)),
        first=st.integers(1, 12),
        tick=st.booleans(),
    )
    def admit(
        self, chain: tuple[tuple[int, int], ...], own: int, used: int | None, first: int, tick: bool
    ) -> None:
        """Match, perhaps use only part of it, acquire, take and hash a first chunk."""
        self.now_s += 0.5 * tick
        request = Request(self.serial, round(self.now_s * PS_PER_S), 1, 1, chain)
        request.admitted_ps = request.arrival_ps
        self.serial += 1
        ids = [i for start, count in chain for i in range(start, start + count)]
        depth = len(ids)
        ids += [request.runs[-1][1] + i for i in range(own)]
        hits = self.model.match(ids)
        found, hit, idle = self.pool.match(request, len(ids))
        assert hit == len(hits)
        assert idle == sum(not block.users for block in hits)
        if used is not None and used < hit:
            hits = hits[:used]
            found, idle = self.pool.truncate(found, used)
            hit = used
            assert idle == sum(not block.users for block in hits)
        need = max(min(first, len(ids)) - hit, 0)
        if need + idle > self.pool.free:
            return
        self.pool.acquire(request, found, self.now_s)
        for block in hits:
            block.users += 1
        live = Live(request, ids, list(hits), hit, self.now_s)
        self.live.append(live)
        assert request.chain_blocks == depth
        self._grow(live, need)

    def _grow(self, live: Live, blocks: int) -> None:
        self.pool.take(blocks)
        live.held += self.model.take(blocks)
        # As the engine does: own blocks are hashed only when they are let go of.
        full = min(len(live.held), live.request.chain_blocks)
        self.pool.store(live.request, full)
        self._hash(live, full)

    def _hash(self, live: Live, upto: int) -> None:
        for depth in range(live.hashed, upto):
            self.model.store(live.held[depth], live.ids[depth], live.admitted_s)
        live.hashed = max(live.hashed, upto)

    @precondition(lambda self: self.live)
    @rule(which=st.integers(0, 99), blocks=st.integers(1, 6))
    def grow(self, which: int, blocks: int) -> None:
        live = self.live[which % len(self.live)]
        self._grow(live, min(blocks, self.pool.free, len(live.ids) - len(live.held)))

    @precondition(lambda self: self.live)
    @rule(which=st.integers(0, 99), partial=st.booleans(), tick=st.booleans())
    def end(self, which: int, partial: bool, tick: bool) -> None:
        """Hash what is complete (all blocks, or all but the last) and release everything."""
        self.now_s += 0.5 * tick
        live = self.live.pop(which % len(self.live))
        full = max(len(live.held) - partial, live.hashed)
        self.pool.store(live.request, full)
        self._hash(live, full)
        self.pool.release(live.request, len(live.held), self.now_s)
        self.model.release(live.held)

    @rule()
    def compare(self) -> None:
        """Look at everything: this also makes the pool settle what it owes."""
        self.pool.audit(sum(len(live.held) - live.hashed for live in self.live))
        assert self.pool.cached() == {i: len(copies) for i, copies in self.model.known.items()}
        assert self.pool.evictions == len(self.model.evicted)
        assert self.pool.log is not None
        assert self.model.evicted == [
            ident
            for event, start, count in self.pool.log
            if event == "evict"
            for ident in range(start + count - 1, start - 1, -1)
        ]

    @invariant()
    def the_same_number_of_blocks_is_free(self) -> None:
        assert self.pool.free == len(self.model.free())

    def teardown(self) -> None:
        while self.live:
            self.end(which=0, partial=True, tick=True)
        self.compare()


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
