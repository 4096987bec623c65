"""The pool of KV blocks against vLLM's rules, block by block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from policies.api import EvictionPolicy
from policies.eviction.fifo import Fifo
from policies.eviction.lru import Lru
from sim.cache import BlockPool
from sim.request import PS_PER_S, Request

# --------------------------------------------------------------------------- tables


class Bench:
    """A pool and shorthands to fill it: blocks of 1 token, times in seconds."""

    def __init__(self, blocks: int, policy: EvictionPolicy) -> None:
        self.pool = BlockPool(blocks, 1, policy)
        self.pool.log = []
        self.loose = 0
        self.serial = 0

    def start(self, *chain: tuple[int, int], at: float = 0.0, use: int | None = None) -> Request:
        """Admit a prompt of these blocks: match, acquire, take and store all of it."""
        request = Request(self.serial, int(at * PS_PER_S), 1, 1, chain)
        request.admitted_ps = request.arrival_ps
        self.serial += 1
        blocks = request.chain_blocks
        found, hit, _ = self.pool.match(request, blocks)
        if use is not None:
            found, _ = self.pool.truncate(found, use)
            hit = use
        self.pool.acquire(request, found, at)
        self.pool.take(blocks - hit)
        self.pool.store(request, blocks)
        return request

    def end(self, request: Request, at: float) -> None:
        self.pool.release(request, request.chain_blocks, at)
        self.pool.audit(self.loose)

    def serve(self, *chain: tuple[int, int], at: float, use: int | None = None) -> None:
        self.end(self.start(*chain, at=at, use=use), at)

    def evict(self, blocks: int) -> list[int]:
        """What goes, in order, when somebody takes blocks (and keeps them)."""
        known = len(self.pool.log or [])
        self.pool.take(blocks)
        self.loose += blocks
        self.pool.audit(self.loose)
        return [
            ident
            for event, start, count in (self.pool.log or [])[known:]
            if event == "evict"
            for ident in range(start + count - 1, start - 1, -1)
        ]

    def cached(self, *chain: tuple[int, int]) -> int:
        """Leading blocks of a chain that are cached."""
        request = Request(10**6, 0, 1, 1, chain)
        return self.pool.match(request, request.chain_blocks)[1]


def test_the_end_of_a_prompt_is_evicted_before_its_beginning() -> None:
    bench = Bench(4, Lru())
    bench.serve((10, 4), at=1.0)
    assert bench.evict(1) == [13]
    assert bench.evict(2) == [12, 11]
    assert bench.cached((10, 4)) == 1


def test_blocks_go_in_the_order_of_their_release_not_of_their_storing() -> None:
    bench = Bench(4, Lru())
    first = bench.start((10, 2), at=0.0)
    second = bench.start((20, 2), at=1.0)
    bench.end(second, at=2.0)
    bench.end(first, at=3.0)
    assert bench.evict(4) == [21, 20, 11, 10]


def test_blank_blocks_are_taken_before_cached_ones() -> None:
    bench = Bench(4, Lru())
    bench.serve((10, 2), at=0.0)
    assert bench.evict(2) == []
    assert bench.evict(1) == [11]


def test_a_hit_moves_the_blocks_it_uses_to_the_end_and_no_others() -> None:
    bench = Bench(6, Lru())
    bench.serve((10, 4), at=0.0)
    bench.serve((20, 2), at=1.0)
    bench.serve((10, 2), at=2.0)
    assert bench.evict(6) == [13, 12, 21, 20, 11, 10]


def test_blocks_in_use_cannot_be_evicted() -> None:
    bench = Bench(4, Lru())
    bench.serve((10, 2), at=0.0)
    user = bench.start((10, 1), at=1.0)
    assert bench.pool.free == 3
    assert bench.evict(3) == [11]
    bench.loose -= 3
    bench.pool.free += 3  # as if those that took the blocks had given them back
    bench.pool.blank += 3
    bench.end(user, at=2.0)
    assert bench.cached((10, 1)) == 1


def test_identical_blocks_are_kept_apart_and_the_oldest_is_hit() -> None:
    # The second request refuses the hit and computes the same two blocks again.
    bench = Bench(4, Lru())
    bench.serve((10, 2), at=0.0)
    bench.serve((10, 2), at=1.0, use=0)
    assert bench.pool.cached() == {10: 2, 11: 2}
    bench.serve((10, 2), at=2.0)  # hits the older copies: the younger ones are now older in use
    assert bench.evict(2) == [11, 10]
    assert bench.pool.cached() == {10: 1, 11: 1}
    assert bench.cached((10, 2)) == 2


def test_a_twin_takes_over_when_the_oldest_copy_goes() -> None:
    bench = Bench(4, Lru())
    bench.serve((10, 2), at=0.0)
    bench.serve((10, 2), at=1.0, use=1)  # hits block 10 and stores a copy of block 11
    assert bench.pool.cached() == {10: 1, 11: 2}
    assert bench.evict(2) == [11]  # one block was blank
    assert bench.cached((10, 2)) == 2
    assert bench.evict(2) == [11, 10]


def test_a_shared_prefix_is_split_from_what_follows() -> None:
    # 10-13 then 10, 11, 30, 31: the common part is counted once and outlives both tails.
    bench = Bench(6, Lru())
    bench.serve((10, 4), at=0.0)
    bench.serve((10, 2), (30, 2), at=1.0)
    assert bench.pool.cached() == {10: 1, 11: 1, 12: 1, 13: 1, 30: 1, 31: 1}
    assert bench.evict(6) == [13, 12, 31, 30, 11, 10]


def test_both_users_of_a_shared_prefix_must_release_it() -> None:
    bench = Bench(8, Lru())
    first = bench.start((10, 4), at=0.0)
    second = bench.start((10, 2), (30, 2), at=1.0)
    bench.end(first, at=2.0)
    assert bench.pool.free == 4  # two blank ones, 12 and 13
    bench.end(second, at=3.0)
    assert bench.pool.free == 8


def test_fifo_leaves_holes_in_chains() -> None:
    # The beginning of the chain is older than its end, so it goes first and hides the rest.
    bench = Bench(5, Fifo())
    bench.serve((10, 2), at=0.0)
    bench.serve((10, 4), at=1.0)
    assert bench.evict(2) == [11]
    assert bench.cached((10, 4)) == 1
    bench.loose -= 2  # as if those that took the blocks had given them back
    bench.pool.free += 2
    bench.pool.blank += 2
    bench.serve((10, 3), at=2.0)  # fills the hole with block 11 and computes 12 again
    assert bench.pool.cached() == {10: 1, 11: 1, 12: 2, 13: 1}
    assert bench.cached((10, 4)) == 4


def test_a_request_that_keeps_only_its_beginning_leaves_no_more_in_the_cache() -> None:
    bench = Bench(4, Lru())
    request = Request(0, 0, 1, 1, ((10, 4),))
    request.retain_blocks = 1
    bench.pool.take(4)
    bench.pool.store(request, 4)
    bench.end(request, at=0.0)
    assert bench.pool.cached() == {10: 1}
    assert (bench.pool.free, bench.pool.blank) == (4, 3)


def test_the_policy_sees_what_a_block_has_been_through() -> None:
    policy = Fifo()
    bench = Bench(4, policy)
    bench.serve((10, 4), at=1.0)
    bench.serve((10, 4), at=2.0)
    bench.serve((10, 2), at=3.0)
    views = {view.depth: view for view in policy.victims(4, 4.0)}
    assert [(v.hash, v.blocks, v.hits, v.stored_s, v.used_s) for v in views.values()] == [
        (12, 2, 1, 1.0, 2.0),
        (10, 2, 2, 1.0, 3.0),
    ]


# --------------------------------------------------------------------------- random play


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


TestPool = pytest.mark.filterwarnings("default")(PoolMachine.TestCase)
TestPool.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
