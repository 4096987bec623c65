"""The KV blocks of one engine: paged, reference counted, with a prefix cache (vLLM rules 12-16).

vLLM keeps one object per block. Here consecutive blocks of one chain that were stored together
are one ``Extent``, split when a request uses only part of it, so that matching, storing and
evicting a prompt costs a few operations whatever its length. Decisions are those of single
blocks; ``sim.stepwise`` keeps the block-by-block version that the tests compare with.

Which block is where::

    free = blank (never hashed: taken first)  +  cached and unused (the eviction policy's order)
    used = held by requests (hashed ones can be matched by others)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from policies.api import EvictionPolicy, PolicyError, Slo
from sim.request import PS_PER_S, Request

INF = float("inf")
BULK = 2_000
"""Blocks that are worth evicting at once, where their order is sure."""
Found = list[tuple["Extent", int]]
"""Matched extents, each with the number of its leading blocks that match."""


class Extent:
    """Consecutive blocks of one chain with one history; a ``BlockView``."""

    __slots__ = (
        "blocks",
        "depth",
        "head",
        "hits",
        "kids",
        "next_use_s",
        "parent",
        "pool",
        "refs",
        "slo",
        "start",
        "stored_s",
        "twin",
        "used_s",
    )

    def __init__(
        self, pool: BlockPool, start: int, depth: int, blocks: int, stored_s: float, slo: Slo
    ) -> None:
        self.pool = pool
        self.start = start
        self.depth = depth
        self.blocks = blocks
        self.stored_s = stored_s
        self.slo = slo
        self.used_s = stored_s
        self.next_use_s = INF
        self.hits = 0
        self.refs = 1
        self.head: Extent | None = None
        """The shallower part that was split off; whoever held all of it holds both."""
        self.twin: Extent | None = None
        """The next younger extent with the same ids (vLLM does not merge identical blocks)."""
        self.parent: Extent | None = None
        self.kids = 0
        """Extents stored right behind this one and still cached."""

    @property
    def hash(self) -> int:
        return self.start

    @property
    def recompute_s(self) -> float:
        tokens = self.pool.block_tokens
        return self.pool.prefill_s(self.blocks * tokens, self.depth * tokens)

    def __repr__(self) -> str:
        return f"<blocks {self.start}+{self.blocks}, {self.refs} users>"


class BlockPool:
    """One tier of KV blocks. ``match`` asks; ``acquire take store release`` act."""

    def __init__(
        self,
        blocks: int,
        block_tokens: int,
        policy: EvictionPolicy,
        *,
        policy_name: str = "eviction",
        prefill_s: Callable[[int, int], float] = lambda tokens, context: 0.0,
        clock: Callable[[], float] = lambda: 0.0,
    ) -> None:
        self.total = blocks
        self.block_tokens = block_tokens
        self.policy = policy
        self.policy_name = policy_name
        self.prefill_s = prefill_s
        self.clock = clock
        self.free = blocks
        """Blocks that can be taken: blank ones and cached ones nobody uses."""
        self.blank = blocks
        """Free blocks that hold nothing worth keeping."""
        self.evictions = 0
        """Cached blocks that were given up so far (after ``settle``)."""
        self._debt = 0
        """Blocks that were taken from the cached ones, but not yet chosen."""
        self.log: list[tuple[str, int, int]] | None = None
        """When a list: every ("store" | "evict", first id, blocks) in order."""
        self._map: dict[int, Extent] = {}
        self._patience = BULK if policy.in_order else 0
        """Debt that need not be settled before the eviction order changes."""
        self._longest = 1 if policy.single_blocks else 1 << 62
        self._closed = True
        """Every cached extent's predecessor is cached: nothing can lie behind a miss."""

    # ------------------------------------------------------------------ asking

    def match(self, request: Request, limit: int) -> tuple[Found, int, int]:
        """The cached prefix: its extents, its blocks (at most ``limit``), those without a user."""
        if self._debt:
            self.settle()
        found: Found = []
        position = idle = 0
        get = self._map.get
        for first, start, count in request.runs:
            end = min(first + count, limit)
            while position < end:
                extent = get(start + position - first)
                if extent is None:
                    return found, position, idle
                blocks = extent.blocks
                blocks = min(blocks, end - position)
                found.append((extent, blocks))
                if not extent.refs:
                    idle += blocks
                position += blocks
            if position >= limit:
                break
        return found, position, idle

    @staticmethod
    def truncate(found: Found, blocks: int) -> tuple[Found, int]:
        """The first ``blocks`` of a match, and how many of those have no user."""
        kept: Found = []
        idle = 0
        for extent, count in found:
            if blocks <= 0:
                break
            part = min(count, blocks)
            kept.append((extent, part))
            idle += 0 if extent.refs else part
            blocks -= part
        return kept, idle

    # ------------------------------------------------------------------ acting

    def acquire(self, request: Request, found: Found, now_s: float) -> None:
        """Give a matched prefix to the request, before it takes blank blocks (rule 14)."""
        held = request.held
        slo = request.slo
        future = request.future_s
        for matched, blocks in found:
            extent = matched
            if blocks < extent.blocks:
                extent = self._split(extent, blocks, claimed=True)
                if not extent.refs:
                    self.free -= blocks  # the policy goes on knowing the deep part only
            elif not extent.refs:
                self.policy.remove(extent, now_s)
                self.free -= blocks
            extent.refs += 1
            extent.hits += 1
            if slo.ttft_s < extent.slo.ttft_s:
                extent.slo = slo
            if future is not None:
                extent.next_use_s = self._future(request, extent)
            held.append((extent, blocks))
            request.stored += blocks

    def take(self, blocks: int) -> None:
        """Take free blocks for a running request; the caller has checked that there are enough.

        Which cached blocks must go is asked when somebody could tell the difference: before the
        eviction order changes and before the cache is looked at. That is far less often.
        """
        self.free -= blocks
        if blocks <= self.blank:
            self.blank -= blocks
        else:
            self._debt += blocks - self.blank
            self.blank = 0

    def settle(self) -> None:
        """Choose and drop the cached blocks that were taken."""
        blocks, self._debt = self._debt, 0
        if blocks:
            self._evict(blocks, self.clock())

    def store(self, request: Request, upto: int) -> None:
        """Hash the request's blocks up to index ``upto``: they can be matched from now on."""
        position = request.stored
        upto = min(upto, request.retain_blocks)
        if upto <= position:
            return
        if self._debt:
            self.settle()
        request.stored = upto
        for first, start, count in request.runs:
            end = first + count
            if end <= position:
                continue
            end = min(end, upto)
            while position < end:
                position += self._store(request, start + position - first, position, end - position)
            if position >= upto:
                return

    def release(self, request: Request, blocks: int, now_s: float) -> None:
        """The request gives up all its ``blocks`` (rule 16).

        Unhashed ones become blank, the others join the eviction order deepest first.
        """
        if self._debt > self._patience:
            self.settle()
        loose = blocks - request.stored
        self.blank += loose
        self.free += loose
        add = self.policy.add
        for extent, count in reversed(request.held):
            left = count
            piece: Extent | None = extent
            while left > 0:
                assert piece is not None
                left -= piece.blocks
                piece.refs -= 1
                if not piece.refs:
                    piece.used_s = now_s
                    self.free += piece.blocks
                    add(piece, now_s)
                piece = piece.head
        request.held = []
        request.stored = 0

    def retire(self, request: Request, full: int, blocks: int, now_s: float) -> None:
        """``store`` the first ``full`` blocks and ``release``, for a request that is done.

        Most have nothing but blocks of their own, which nobody will match: one extent, no chain.
        """
        if request.held or request.chain_blocks or request.preemptions or self._longest == 1:
            self.store(request, full)
            self.release(request, blocks, now_s)
            return
        if self._debt > self._patience:
            self.settle()
        full = min(full, request.retain_blocks)
        self.free += blocks
        self.blank += blocks - full
        if full:
            ident = request.runs[0][1]
            extent = Extent(self, ident, 0, full, request.admitted_ps / PS_PER_S, request.slo)
            extent.refs = 0
            extent.used_s = now_s
            self._map[ident] = extent
            self.policy.add(extent, now_s)
            if self.log is not None:
                self.log.append(("store", ident, full))

    # ------------------------------------------------------------------ inside

    def _store(self, request: Request, ident: int, depth: int, room: int) -> int:
        """Store at most ``room`` consecutive blocks from ``ident`` on; how many it did."""
        held = request.held
        blocks = min(room, self._longest)
        oldest = self._map.get(ident)
        last: Extent
        if oldest is not None:  # the same content is cached already: a twin
            if oldest.blocks > blocks:
                oldest = self._split(oldest, blocks, claimed=False)
            blocks = oldest.blocks
        else:
            if not self._closed:
                blocks = self._gap(ident, blocks)
            if held and self._longest > 1:
                last, count = held[-1]
                if (
                    last.refs == 1
                    and not last.hits
                    and not last.kids
                    and last.twin is None
                    and last.start + last.blocks == ident
                    and self._map.get(last.start) is last
                ):
                    last.blocks += blocks
                    held[-1] = (last, count + blocks)
                    if self.log is not None:
                        self.log.append(("store", ident, blocks))
                    return blocks
        extent = Extent(self, ident, depth, blocks, request.admitted_ps / PS_PER_S, request.slo)
        if held:
            parent = held[-1][0]
            extent.parent = parent
            parent.kids += 1
        if request.future_s is not None:
            extent.next_use_s = self._future(request, extent)
        if oldest is None:
            self._map[ident] = extent
        else:
            while oldest.twin is not None:
                oldest = oldest.twin
            oldest.twin = extent
        held.append((extent, blocks))
        if self.log is not None:
            self.log.append(("store", ident, blocks))
        return blocks

    def _gap(self, ident: int, blocks: int) -> int:
        """Blocks from ``ident`` on before the next one that is cached."""
        known = self._map
        for i in range(1, blocks):
            if ident + i in known:
                return i
        return blocks

    @staticmethod
    def _future(request: Request, extent: Extent) -> float:
        future = request.future_s
        assert future is not None
        return float(future[extent.depth]) if extent.depth < len(future) else INF

    def _split(self, extent: Extent, blocks: int, *, claimed: bool) -> Extent:
        """Cut all extents with these ids after ``blocks``; the new head of the given one.

        The old object becomes the deep part, so policies, children and holders keep what they
        know. An extent that nobody uses leaves two unused parts, and the policy must learn of the
        head, except of the given one's when the caller claims that.
        """
        heads: list[Extent] = []
        start = extent.start
        tail: Extent | None = self._map[start]
        self._map[start + blocks] = self._map[start]
        result = extent
        unknown: list[tuple[Extent, Extent]] = []
        while tail is not None:
            head = Extent(self, start, tail.depth, blocks, tail.stored_s, tail.slo)
            head.used_s, head.next_use_s = tail.used_s, tail.next_use_s
            head.hits, head.refs = tail.hits, tail.refs
            head.head, head.parent, head.kids = tail.head, tail.parent, 1
            tail.start += blocks
            tail.depth += blocks
            tail.blocks -= blocks
            tail.head = tail.parent = head
            if heads:
                heads[-1].twin = head
            heads.append(head)
            if tail is extent:
                result = head
            if not tail.refs and not (claimed and tail is extent):
                unknown.append((tail, head))
            tail = tail.twin
        self._map[start] = heads[0]
        if unknown:
            self._insert_behind(unknown, result)
        return result

    def _insert_behind(self, pairs: list[tuple[Extent, Extent]], claimed: Extent) -> None:
        """Tell the policy of heads that come right behind their tails in its order.

        Policies have no such call because it is rare: everything is taken out and added again in
        the same order, each block with the time it was added before.
        """
        policy = self.policy
        behind = {id(tail): head for tail, head in pairs}
        unknown = {id(claimed), *(id(head) for _, head in pairs)}
        known = sum(e.blocks for e in self._extents() if not e.refs and id(e) not in unknown)
        order = list(policy.victims(known, 0.0))
        for block in order:
            policy.remove(block, block.used_s)
        for block in order:
            policy.add(block, block.used_s)
            head = behind.get(id(block))
            if head is not None:
                policy.add(head, head.used_s)

    def _evict(self, blocks: int, now_s: float) -> None:
        """Give up cached blocks in the policy's order."""
        wanted = blocks
        policy, known, log = self.policy, self._map, self.log
        victims = policy.victims(blocks, now_s)
        if not isinstance(victims, Sequence):
            raise PolicyError(
                f"{self.policy_name}.victims({blocks}, now={now_s}) answered {victims!r}; "
                f"a sequence of blocks was expected"
            )
        for victim in victims:
            if type(victim) is not Extent or victim.refs or not victim.blocks:
                raise PolicyError(
                    f"{self.policy_name}.victims named {victim!r}, which is "
                    + ("in use" if isinstance(victim, Extent) and victim.refs else "not cached")
                )
            count = victim.blocks
            if count <= blocks:
                self._drop(victim, now_s)
            else:
                count = blocks
                if victim.kids:
                    self._closed = False
                if victim.twin is None and known[victim.start] is victim:
                    victim.blocks -= count
                    if log is not None:
                        log.append(("evict", victim.start + victim.blocks, count))
                else:
                    self._split(victim, victim.blocks - count, claimed=False)
                    self._drop(victim, now_s)
            self.evictions += count
            blocks -= count
            if not blocks:
                return
        raise PolicyError(
            f"{self.policy_name}.victims({wanted}, now={now_s}) named only {wanted - blocks} "
            f"blocks, but {self.free + wanted} can be evicted"
        )

    def _drop(self, victim: Extent, now_s: float) -> None:
        """Forget a whole extent."""
        self.policy.remove(victim, now_s)
        if victim.kids:
            self._closed = False
        if victim.parent is not None:
            victim.parent.kids -= 1
            victim.parent = None
        start = victim.start
        if victim.twin is None and self._map[start] is victim:
            del self._map[start]
        else:
            self._unlink(victim)
        if self.log is not None:
            self.log.append(("evict", start, victim.blocks))
        victim.blocks = 0

    def _unlink(self, victim: Extent) -> None:
        """Take one of several extents with the same ids out of their list."""
        oldest = self._map[victim.start]
        if oldest is victim:
            assert victim.twin is not None
            self._map[victim.start] = victim.twin
        else:
            while oldest.twin is not victim:
                assert oldest.twin is not None
                oldest = oldest.twin
            oldest.twin = victim.twin
        victim.twin = None

    # ------------------------------------------------------------------ checking

    def _extents(self) -> Iterator[Extent]:
        for oldest in self._map.values():
            extent: Extent | None = oldest
            while extent is not None:
                yield extent
                extent = extent.twin

    def cached(self) -> dict[int, int]:
        """How many copies of each block id are cached: for tests and stale router signals."""
        self.settle()
        copies: dict[int, int] = {}
        for extent in self._extents():
            for ident in range(extent.start, extent.start + extent.blocks):
                copies[ident] = copies.get(ident, 0) + 1
        return copies

    def audit(self, loose: int) -> None:
        """Invariant I2: free + used = total, and what can be evicted is what nobody uses.

        Args:
            loose: blocks of running requests that are not hashed.
        """
        self.settle()
        used = idle = 0
        for extent in self._extents():
            oldest = self._map[extent.start]
            assert extent.blocks == oldest.blocks > 0, f"{extent!r} is misaligned"
            if extent.refs:
                used += extent.blocks
            else:
                idle += extent.blocks
        assert self.blank >= 0, f"{self.blank} blank blocks"
        assert self.free == self.blank + idle, (
            f"{self.free} free blocks, but {self.blank} blank and {idle} cached without a user"
        )
        assert self.free + used + loose == self.total, (
            f"{self.free} free + {used} cached and used + {loose} unhashed != {self.total}"
        )
