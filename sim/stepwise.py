"""The reference engine: one event per step, one object per KV block, vLLM's rules word by word.

It exists to be obviously right and to check ``sim.engine`` against; ``mode="stepwise"`` runs it.
Rule numbers are those listed in ``docs/engine.md``.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Container
from dataclasses import dataclass, field
from heapq import heappop

from policies.api import EvictionPolicy, RequestView, Tier
from sim.blocks import Block, Blocks
from sim.clock import LATE, Timer
from sim.latency import Batch
from sim.request import PS_PER_S, Request
from sim.scheduler import RUN, Engine, _name


@dataclass(slots=True, eq=False)
class Step:
    """What one call of the scheduler decided."""

    scheduled: dict[Request, int] = field(default_factory=dict)
    """Tokens of each request, in scheduling order."""
    decodes: set[Request] = field(default_factory=set)
    """Those of them that had generated a token since they were admitted."""
    before: dict[Request, int] = field(default_factory=dict)
    """Computed tokens before the step."""
    sampling: set[Request] = field(default_factory=set)
    """Who gets a token when the step ends."""
    stale: set[Request] = field(default_factory=set)
    """Who was preempted while the step was in flight."""
    new: list[Request] = field(default_factory=list)
    resumed: list[Request] = field(default_factory=list)
    preempted: list[Request] = field(default_factory=list)
    hits: dict[Request, int] = field(default_factory=dict)
    """Cached tokens that the admitted requests use."""
    blocks: dict[Request, list[int]] = field(default_factory=dict)
    """Numbers of the blocks that requests got; of admitted ones all."""
    evicted: list[Block] = field(default_factory=list)


class StepEngine(Engine):
    """One instance, step by step."""

    __slots__ = (
        "_depth",
        "_on_end",
        "_on_wake",
        "_pipeline",
        "_running",
        "_stepping",
        "blocks",
        "eviction",
    )

    def __init__(self, *args: object, eviction: EvictionPolicy, **options: object) -> None:
        super().__init__(*args, **options)  # type: ignore[arg-type]
        self.eviction = eviction
        self.blocks = Blocks(
            self.total,
            self.block_tokens,
            eviction,
            policy_name=_name(eviction),
            prefill_s=self.prefill_s,
        )
        self._running: list[Request] = []
        self._depth = 2 if self.limits.async_scheduling else 1
        self._pipeline: deque[Step] = deque()
        """Steps that were scheduled and have not ended; the first one executes."""
        self._stepping = False
        self._on_wake = Timer(self._wake)
        self._on_end = Timer(self._end)

    # ------------------------------------------------------------------ views

    @property
    def running(self) -> int:
        return len(self._running)

    def free_blocks(self, tier: Tier = Tier.HBM) -> int:
        return self.blocks.free if tier is Tier.HBM else 0

    def matched_tokens(self, request: RequestView) -> int:
        assert isinstance(request, Request)
        if not self.limits.enable_prefix_caching:
            return 0
        return len(self.blocks.match(request, request.prompt_tokens)) * self.block_tokens

    @property
    def evictions(self) -> int:
        """Cached blocks given up so far."""
        return len(self.blocks.evicted)

    def publish(self) -> None:
        """Nothing to prepare: ``published`` copies the cache's content."""

    def published(self) -> Container[int]:
        """Ids of the blocks that are cached now."""
        return set(self.blocks.known)

    # ------------------------------------------------------------------ loop

    def add(self, request: Request) -> None:
        """A request arrives."""
        if self._accept(request, self.env._now) and not self._stepping:
            self._schedule(self._on_wake, 0)

    def abort(self, request: Request) -> None:
        """The client of a request that has not ended goes away (rule 18)."""
        self._aborts.append(request)
        if not self._stepping:
            self._schedule(self._on_wake, 0)

    def stepped(self, step: Step) -> None:
        """Called when a step was scheduled; for subclasses that record decisions."""

    def _schedule(self, timer: Timer, delay_ps: int) -> None:
        self.events += 1
        self.env.arm(delay_ps, LATE + self.id, timer)

    def _wake(self, timer: Timer) -> None:
        self._drop_aborted(self.env._now)
        self._advance()

    def _advance(self) -> None:
        """Schedule as far ahead as the pipeline allows and let its first step execute.

        Empty steps take no time. Without asynchronous scheduling the pipeline holds one step.
        """
        now = self.env._now
        pipeline = self._pipeline
        while True:
            while len(pipeline) < self._depth and (self._running or self._queue):
                pipeline.append(self._plan(now))
            if not any(step.scheduled or step.preempted for step in pipeline):
                break
            if pipeline[0].scheduled:
                self._execute(pipeline[0], now)
                return
            pipeline.popleft()
        pipeline.clear()
        self._stepping = False
        until = self._deferred_until_ps()
        if until is not None:
            self._schedule(self._on_wake, until - now)

    def _execute(self, step: Step, now: int) -> None:
        self._stepping = True
        prefills = []
        context = longest = 0
        for request, tokens in step.scheduled.items():
            before = step.before[request]
            if request in step.decodes:
                context += before + 1
                longest = max(longest, before + 1)
            else:
                prefills.append((tokens, before))
        decodes = len(step.decodes)
        duration = self.steps.step_ps(Batch(tuple(prefills), decodes, context, longest))
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
        self._drop_aborted(now)
        step = self._pipeline.popleft()
        for request in step.scheduled:
            if request not in step.sampling:
                continue
            stale = request in step.stale
            request.output_tokens += 1
            if request.first_ps < 0:
                request.first_ps = now
            if not stale:
                request.decoding = True
                if self._depth > 1:
                    request.placeholders -= 1
                    if self._caching:
                        self.blocks.store(request, request.computed_tokens - request.placeholders)
            if request.output_tokens >= request._true_output_tokens:
                if stale:
                    self._unqueue(request)
                else:
                    self.blocks.release(request, now / PS_PER_S)
                    self._running.remove(request)
                self._left(request)
                self.sink.finished(request, self.id, now)
        self._advance()

    def _withdraw(self, request: Request, now_ps: int) -> bool:
        for step in self._pipeline:
            step.sampling.discard(request)
        if request not in self._running:
            return False
        self._running.remove(request)
        self.blocks.release(request, now_ps / PS_PER_S)
        return True

    # ------------------------------------------------------------------ rules 5 to 11

    def _plan(self, now: int) -> Step:
        limits = self.limits
        left = limits.max_num_batched_tokens
        threshold = self._threshold()
        step = Step()
        evicted = len(self.blocks.evicted)
        i = 0
        while i < len(self._running) and left > 0:
            request = self._running[i]
            flying = request.placeholders
            end = request.prompt_tokens + request._true_output_tokens
            if flying and request.computed_tokens + 2 - flying >= end:
                i += 1  # its last token is in flight
                continue
            tokens = (
                request.prompt_tokens + request.output_tokens + flying - request.computed_tokens
            )
            if 0 < threshold < tokens:
                tokens = threshold
            tokens = min(tokens, left)
            while not self._allocate(step, request, tokens, [], now, admission=False):
                if self.admission.preempts == "order":
                    victim = max(self._running, key=lambda r: (r.order, r.rank))
                else:
                    victim = self._running[-1]
                place = self._running.index(victim)
                del self._running[place]
                i -= place < i
                left += step.scheduled.pop(victim, 0)
                step.blocks.pop(victim, None)
                step.preempted.append(victim)
                self._preempt(victim, now)
                if victim is request:
                    break
            else:
                step.scheduled[request] = tokens
                left -= tokens
                i += 1
                continue
            break
        if not step.preempted:
            self._admit(step, left, threshold, now)
        for request, tokens in step.scheduled.items():
            step.before[request] = request.computed_tokens
            if request.decoding or request.placeholders:
                step.decodes.add(request)
            request.computed_tokens += tokens
            known = request.prompt_tokens + request.output_tokens + request.placeholders
            if request.computed_tokens == known:
                step.sampling.add(request)
                request.placeholders += self._depth > 1
        step.evicted = self.blocks.evicted[evicted:]
        self.steps_done += bool(step.scheduled)
        self.stepped(step)
        return step

    def _admit(self, step: Step, left: int, threshold: int, now: int) -> None:
        """Rules 9 and 10."""
        limits = self.limits
        while left > 0 and len(self._running) < limits.max_num_seqs:
            head = self._head(now)
            if head is None:
                break
            total = head.prompt_tokens + head.output_tokens
            hits = self.blocks.match(head, total) if self._caching else []
            if hits and not self._plain_use:
                hits = hits[: self._used_blocks(head, len(hits), now)]
            tokens = total - len(hits) * self.block_tokens
            if 0 < threshold < tokens:
                tokens = threshold
            if not limits.enable_chunked_prefill and tokens > left:
                break
            tokens = min(tokens, left)
            if not self._allocate(step, head, tokens, hits, now, admission=True):
                break
            heappop(self._queue)
            self._running.append(head)
            (step.resumed if head.preemptions else step.new).append(head)
            step.hits[head] = head.computed_tokens = len(hits) * self.block_tokens
            step.scheduled[head] = tokens
            left -= tokens

    def _preempt(self, victim: Request, now: int) -> None:
        """Rule 8."""
        for step in self._pipeline:
            if victim in step.scheduled:
                step.stale.add(victim)
        self.blocks.release(victim, now / PS_PER_S)
        victim.computed_tokens = 0
        victim.placeholders = 0
        victim.decoding = False
        victim.preemptions += 1
        self.preempted += 1
        self.changes += 1
        self._enqueue(victim, now)

    def _allocate(
        self,
        step: Step,
        request: Request,
        tokens: int,
        hits: list[Block],
        now: int,
        *,
        admission: bool,
    ) -> bool:
        """Rules 13 to 15; ``False`` if there are not enough blocks."""
        size, blocks = self.block_tokens, self.blocks
        held = 0 if admission else len(blocks.held[request])
        free = blocks.free - sum(block.refs == 0 for block in hits)
        if admission and self._running:
            free -= self._watermark
        total = request.prompt_tokens + request.output_tokens
        reserve = admission and self.limits.scheduler_reserve_full_isl
        if reserve and -(-total // size) - len(hits) > free:
            return False
        computed = len(hits) * size if admission else request.computed_tokens
        need = max(-(-(computed + tokens) // size) - held - len(hits), 0)
        if need > free:
            return False
        now_s = now / PS_PER_S
        if admission:
            if request.admitted_ps < 0:
                request.admitted_ps = now
                request.cached_tokens = computed
                if not self._plain_retain:
                    request.retain_blocks = self._retained_blocks(request, now)
            blocks.claim(request, hits, now_s)
        blocks.take(request, need, now_s)
        if need or admission:
            given = blocks.held[request][held:]
            step.blocks[request] = [b if isinstance(b, int) else b.id for b in given]
        if self._caching:
            blocks.store(request, min(computed + tokens, total))
        return True

    # ------------------------------------------------------------------ checking

    def cached(self) -> dict[int, int]:
        """How many copies of each block id are cached."""
        return {ident: len(copies) for ident, copies in self.blocks.known.items()}

    def audit(self) -> None:
        self.blocks.audit(self.total)
