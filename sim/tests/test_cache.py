"""The pool of KV blocks: vLLM's rules as tables worked by hand."""

from __future__ import annotations

from policies.api import EvictionPolicy
from policies.eviction.fifo import Fifo
from policies.eviction.lru import Lru
from sim.cache import BlockPool
from sim.request import PS_PER_S, Request


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
