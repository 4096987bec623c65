"""The reference engine: one event per step, one object per KV block, vLLM's rules word by word.

It exists to be obviously right and to check ``sim.engine`` against; ``mode="stepwise"`` runs it.
Rule numbers are those listed in ``docs/engine.md``.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from heapq import heappop

from policies.api import EvictionPolicy, PolicyError, RequestView, Slo, Tier
from sim.clock import LATE, Timer
from sim.latency import Batch
from sim.request import PS_PER_S, Request
from sim.scheduler import RUN, Engine, _name


class Block:
    """One KV block with a hash; a ``BlockView``."""

    __slots__ = (
        "_engine",
        "depth",
        "hash",
        "hits",
        "next_use_s",
        "refs",
        "slo",
        "stored_s",
        "used_s",
    )
    blocks = 1

    def __init__(self, engine: StepEngine, ident: int, depth: int, request: Request) -> None:
        self._engine = engine
        self.hash = ident
        self.depth = depth
        self.refs = 1
        self.hits = 0
        self.stored_s = self.used_s = request.admitted_ps / PS_PER_S
        self.slo: Slo = request.slo
        self.next_use_s = _future_s(request, depth)

    @property
    def recompute_s(self) -> float:
        tokens = self._engine.block_tokens
        return self._engine.prefill_s(tokens, self.depth * tokens)


def _future_s(request: Request, depth: int) -> float:
    future = request.future_s
    return float(future[depth]) if future is not None and depth < len(future) else float("inf")


def _ident(request: Request, depth: int) -> int:
    """The id of the request's block at an index of its chain."""
    for first, start, count in request.runs:
        if depth < first + count:
            return start + depth - first
    raise AssertionError("the last run is endless")


class StepEngine(Engine):
    """One instance, step by step."""

    __slots__ = (
        "_blank",
        "_held",
        "_idle",
        "_known",
        "_on_end",
        "_on_wake",
        "_planned",
        "_running",
        "_stepping",
        "evicted",
        "eviction",
    )

    def __init__(self, *args: object, eviction: EvictionPolicy, **options: object) -> None:
        super().__init__(*args, **options)  # type: ignore[arg-type]
        self.eviction = eviction
        self._running: list[Request] = []
        self._planned: dict[Request, int] = {}
        self._held: dict[Request, list[Block | None]] = {}
        """Blocks of each running request in order; ``None`` has no hash."""
        self._known: dict[int, list[Block]] = {}
        """Cached blocks by hash, oldest first (vLLM keeps identical blocks apart)."""
        self._blank = self.total
        self._idle: set[Block] = set()
        """Cached blocks that nobody uses: what the eviction policy orders."""
        self._stepping = False
        self._on_wake = Timer(self._wake)
        self._on_end = Timer(self._end)
        self.evicted: list[int] = []
        """Hashes in the order of their eviction."""

    # ------------------------------------------------------------------ views

    @property
    def running(self) -> int:
        return len(self._running)

    def free_blocks(self, tier: Tier = Tier.HBM) -> int:
        return self._blank + len(self._idle) if tier is Tier.HBM else 0

    def matched_tokens(self, request: RequestView) -> int:
        assert isinstance(request, Request)
        if not self.limits.enable_prefix_caching:
            return 0
        return len(self._match(request, request.prompt_tokens)) * self.block_tokens

    @property
    def evictions(self) -> int:
        """Cached blocks given up so far."""
        return len(self.evicted)

    def publish(self) -> None:
        """Nothing to prepare: ``published`` copies the cache's content."""

    def published(self) -> Container[int]:
        """Ids of the blocks that are cached now."""
        return set(self._known)

    # ------------------------------------------------------------------ loop

    def add(self, request: Request) -> None:
        """A request arrives."""
        now = self.env._now
        if self._accept(request, now) and not self._stepping:
            self._schedule(self._on_wake, 0)

    def _schedule(self, timer: Timer, delay_ps: int) -> None:
        self.events += 1
        self.env.arm(delay_ps, LATE + self.id, timer)

    def _wake(self, timer: Timer) -> None:
        self._begin()

    def _begin(self) -> None:
        now = self.env._now
        self._plan(now)
        while not self._planned and self._running:  # an empty step takes no time
            self._plan(now)
        if not self._planned:
            self._stepping = False
            until = self._deferred_until_ps()
            if until is not None:
                self._schedule(self._on_wake, until - now)
            return
        self._stepping = True
        prefills = []
        decodes = context = longest = 0
        for request, tokens in self._planned.items():
            before = request.computed_tokens - tokens
            if request.decoding:
                decodes += 1
                context += before + 1
                longest = max(longest, before + 1)
            else:
                prefills.append((tokens, before))
        batch = Batch(tuple(prefills), decodes, context, longest)
        duration = self.steps.step_ps(batch)
        self.steps_done += 1
        self.sink.ran(
            RUN.pack(
                self.id, now, duration, 0, 1, decodes, sum(n for n, _ in prefills),
                len(self._queue), self.free_blocks(),
            )
        )  # fmt: skip
        self._schedule(self._on_end, duration)

    def _end(self, timer: Timer) -> None:
        """Rule 17."""
        now = self.env._now
        ended = []
        for request in self._planned:
            if request.computed_tokens < request.prompt_tokens + request.output_tokens:
                continue
            request.decoding = True
            request.output_tokens += 1
            if request.first_ps < 0:
                request.first_ps = now
            if request.output_tokens >= request._true_output_tokens:
                ended.append(request)
        for request in ended:
            self._free(request, now)
            self._running.remove(request)
            self._left(request)
            self.sink.finished(request, self.id, now)
        self._begin()

    # ------------------------------------------------------------------ rules 5 to 11

    def _plan(self, now: int) -> None:
        limits = self.limits
        left = limits.max_num_batched_tokens
        threshold = self._threshold()
        planned: dict[Request, int] = {}
        self._planned = planned
        preempted = False
        i = 0
        while i < len(self._running) and left > 0:
            request = self._running[i]
            tokens = request.prompt_tokens + request.output_tokens - request.computed_tokens
            if 0 < threshold < tokens:
                tokens = threshold
            tokens = min(tokens, left)
            while not self._allocate(request, tokens, [], now, admission=False):
                preempted = True
                if self.admission.preempts == "order":
                    victim = max(self._running, key=lambda r: (r.order, r.rank))
                else:
                    victim = self._running[-1]
                place = self._running.index(victim)
                del self._running[place]
                i -= place < i
                tokens_back = planned.pop(victim, 0)
                left += tokens_back
                self._preempt(victim, now)
                if victim is request:
                    break
            else:
                planned[request] = tokens
                request.computed_tokens += tokens
                left -= tokens
                i += 1
                continue
            break
        if preempted:
            return
        while left > 0 and len(self._running) < limits.max_num_seqs:
            head = self._head(now)
            if head is None:
                break
            total = head.prompt_tokens + head.output_tokens
            hits = self._match(head, total) if limits.enable_prefix_caching else []
            if hits and not self._plain_use:
                hits = hits[: self._used_blocks(head, len(hits), now)]
            tokens = total - len(hits) * self.block_tokens
            if 0 < threshold < tokens:
                tokens = threshold
            if not limits.enable_chunked_prefill and tokens > left:
                break
            tokens = min(tokens, left)
            if not self._allocate(head, tokens, hits, now, admission=True):
                break
            heappop(self._queue)
            self._running.append(head)
            head.computed_tokens = len(hits) * self.block_tokens + tokens
            planned[head] = tokens
            left -= tokens

    def _preempt(self, victim: Request, now: int) -> None:
        """Rule 8."""
        self._free(victim, now)
        victim.computed_tokens = 0
        victim.decoding = False
        victim.preemptions += 1
        self.preempted += 1
        self.changes += 1
        self._enqueue(victim, now)

    # ------------------------------------------------------------------ rules 12 to 16

    def _match(self, request: Request, total: int) -> list[Block]:
        hits: list[Block] = []
        for depth in range((total - 1) // self.block_tokens):
            copies = self._known.get(_ident(request, depth))
            if not copies:
                break
            hits.append(copies[0])
        return hits

    def _allocate(
        self, request: Request, tokens: int, hits: list[Block], now: int, *, admission: bool
    ) -> bool:
        size = self.block_tokens
        held = self._held.get(request, [])
        free = self.free_blocks() - sum(block.refs == 0 for block in hits)
        if admission and self._running:
            free -= self._watermark
        total = request.prompt_tokens + request.output_tokens
        reserve = admission and self.limits.scheduler_reserve_full_isl
        if reserve and -(-total // size) - len(hits) > free:
            return False
        computed = len(hits) * size if admission else request.computed_tokens
        need = max(-(-(computed + tokens) // size) - len(held) - len(hits), 0)
        if need > free:
            return False
        now_s = now / PS_PER_S
        if admission:
            if request.admitted_ps < 0:
                request.admitted_ps = now
                request.cached_tokens = computed
                if not self._plain_retain:
                    request.retain_blocks = self._retained_blocks(request, now)
            for block in hits:
                if block.refs == 0:
                    self._idle.remove(block)
                    self.eviction.remove(block, now_s)
                block.refs += 1
                block.hits += 1
                if request.slo.ttft_s < block.slo.ttft_s:
                    block.slo = request.slo
                block.next_use_s = _future_s(request, block.depth)
            held = self._held[request] = list(hits)
            request.stored = len(hits)
        self._take(need, now_s)
        held += [None] * need
        if self.limits.enable_prefix_caching:
            full = min(computed + tokens, total) // size
            for depth in range(request.stored, min(full, request.retain_blocks)):
                block = Block(self, _ident(request, depth), depth, request)
                held[depth] = block
                self._known.setdefault(block.hash, []).append(block)
                request.stored = depth + 1
        return True

    def _take(self, blocks: int, now_s: float) -> None:
        for _ in range(blocks):
            if self._blank:
                self._blank -= 1
                continue
            victims = self.eviction.victims(1, now_s)
            block = victims[0] if isinstance(victims, Sequence) and victims else None
            if block not in self._idle:
                raise PolicyError(
                    f"{_name(self.eviction)}.victims(1, now={now_s}) answered {victims!r}; "
                    f"a sequence of blocks that nobody uses was expected"
                )
            assert isinstance(block, Block)
            self._idle.remove(block)
            self.eviction.remove(block, now_s)
            self._known[block.hash].remove(block)
            if not self._known[block.hash]:
                del self._known[block.hash]
            self.evicted.append(block.hash)

    def _free(self, request: Request, now: int) -> None:
        now_s = now / PS_PER_S
        for block in reversed(self._held.pop(request)):
            if block is None:
                self._blank += 1
                continue
            block.refs -= 1
            if block.refs == 0:
                block.used_s = now_s
                self._idle.add(block)
                self.eviction.add(block, now_s)
        request.stored = 0

    # ------------------------------------------------------------------ checking

    def cached(self) -> dict[int, int]:
        """How many copies of each block id are cached."""
        return {ident: len(copies) for ident, copies in self._known.items()}

    def audit(self) -> None:
        cached = [block for copies in self._known.values() for block in copies]
        assert {b for b in cached if not b.refs} == self._idle
        used = sum(1 for block in cached if block.refs)
        loose = sum(held.count(None) for held in self._held.values())
        assert self._blank + len(self._idle) + used + loose == self.total
        users: dict[Block, int] = {}
        for held in self._held.values():
            for block in held:
                if block is not None:
                    users[block] = users.get(block, 0) + 1
        assert all(users.get(block, 0) == block.refs for block in cached)
