"""The fast engine: one event per change of the batch instead of one per step, with equal results.

While every running request decodes, a run of steps is one event whose duration is the closed-form
sum of its steps; a change in mid-run shortens it to the step it falls in. All times are integers,
so the outcome is ``==`` to that of ``sim.stepwise``. The algorithm is explained in
``docs/engine.md``.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Container
from functools import partial
from heapq import heappop, heappush
from math import isqrt
from operator import attrgetter
from struct import Struct

from policies.api import RequestView, Tier
from sim.batch import Batching, Prefills
from sim.clock import LATE, Timer
from sim.latency import Batch
from sim.request import ENDLESS, Request
from sim.scheduler import RUN

CHUNK_RUN = 256
"""Most prompt chunks in one event; only bounds how much is thrown away when it is cut."""


_batch = partial(tuple.__new__, Batch)
"""``Batch`` from a tuple, in half the time of calling the class."""
_seat = attrgetter("seat")
_pack = RUN.pack
_pack_two = Struct(2 * RUN.format).pack


class FastEngine(Batching):
    """One instance; see the module for the idea and the attributes below for the state."""

    __slots__ = (
        "_batched",
        "_chunk",
        "_ends",
        "_first_ps",
        "_limited",
        "_on_end",
        "_on_wake",
        "_open_ps",
        "_opening",
        "_prefill_tokens",
        "_priority",
        "_published",
        "_ran",
        "_restless",
        "_skewed",
        "_slope_ps",
        "_start_ps",
        "_waited",
        "_wake_ps",
    )

    def __init__(self, *args: object, **options: object) -> None:
        super().__init__(*args, **options)  # type: ignore[arg-type]
        self._limited = self.limits.long_prefill_token_threshold > 0
        adaptive = self._limited and self.limits.long_prefill_token_threshold_adaptive
        self._restless = adaptive or not self._plain_admission
        """Any arrival may let the head run: it shortens chunks, or changes the policy's mind."""
        # The flight: what the pending event stands for.
        self._priority = LATE + self.id
        self._on_end = Timer(self._end)
        self._on_wake = Timer(self._wake)
        self._ran = self.sink.ran
        self._skewed = self.steps.longest_matters
        self._wake_ps = -1
        self._start_ps = 0
        self._first_ps = 0
        self._slope_ps = 0
        self._opening = False
        """The flight begins with a step that completes prompts, ``_open_ps`` long; the others are
        a decode run in which those take part."""
        self._open_ps = 0
        self._ends: list[int] | None = None
        """Ends of the steps of a run over prompt chunks, from ``_start_ps``; else ``None``."""
        self._chunk = 0
        self._prefill_tokens = 0
        self._batched = 0
        """Decoders in the flight's steps."""
        self._waited = 0
        """Requests that waited when the flight began."""

    # ------------------------------------------------------------------ views

    def free_blocks(self, tier: Tier = Tier.HBM) -> int:
        self.sync()
        return self.pool.free if tier is Tier.HBM else 0

    def matched_tokens(self, request: RequestView) -> int:
        assert isinstance(request, Request)
        if not self._caching:
            return 0
        self._look()
        limit = (request.prompt_tokens - 1) // self.block_tokens
        return self.pool.match(request, limit)[1] * self.block_tokens

    @property
    def evictions(self) -> int:
        """Cached blocks given up so far."""
        self.pool.settle()
        return self.pool.evictions

    def publish(self) -> None:
        """Keep a copy of the cache's content for routers, brought up to date on demand."""
        self.pool.log = []
        self._published: dict[int, int] = {}

    def published(self) -> Container[int]:
        """Ids of the blocks that are cached now; what an earlier call returned changes too."""
        self._look()
        self.pool.settle()
        copies = self._published
        assert self.pool.log is not None
        for event, start, blocks in self.pool.log:
            for ident in range(start, start + blocks):
                if event == "store":
                    copies[ident] = copies.get(ident, 0) + 1
                elif copies[ident] == 1:
                    del copies[ident]
                else:
                    copies[ident] -= 1
        self.pool.log.clear()
        return copies

    def _look(self) -> None:
        """Bring the cache up to date for somebody who looks at its content."""
        self.sync()
        if self._tellers:
            self._tell(ENDLESS)

    # ------------------------------------------------------------------ arrivals

    def add(self, request: Request) -> None:
        """A request arrives."""
        now = self.env._now
        if not self._accept(request, now):
            return
        if self._count == 0:  # asleep: the step begins when all arrivals of this instant are in
            if self._wake_ps != now:
                self._wake_ps = now
                self._schedule(self._on_wake, 0)
        elif (
            self._count > 1
            and self._ends is None
            and (self._queue[0][2] is request or self._restless)
            and len(self._running) < self._most
        ):
            # It (or the head, by its mere presence) could be admitted at the next step. Otherwise
            # it stands behind a head that stays blocked: inside a run blocks only get fewer.
            self._cut(now)

    def abort(self, request: Request) -> None:
        """The client of a request that has not ended goes away (rule 18)."""
        now = self.env._now
        self._aborts.append(request)
        if self._count == 0:
            self._wake_ps = now
            self._schedule(self._on_wake, 0)
        elif self._count > 1:
            self._cut(now)

    def _cut(self, now_ps: int) -> None:
        """End the flight with the step in progress."""
        steps = self._boundary(now_ps)
        if steps < self._count:
            self._count = steps
            self._schedule(self._on_end, self._start_ps + self._elapsed(steps) - now_ps)

    def _schedule(self, timer: Timer, delay_ps: int) -> None:
        """Arm one of the engine's timers."""
        self.events += 1
        env = self.env  # as Clock.arm, without the call
        timer.serial = serial = next(env._eid)
        heappush(env._queue, (env._now + delay_ps, self._priority, serial, timer))

    def _wake(self, timer: Timer) -> None:
        self._drop_aborted(self.env._now)
        self._begin()

    # ------------------------------------------------------------------ time inside a flight

    def _elapsed(self, steps: int) -> int:
        """Duration of the flight's first ``steps`` steps."""
        if self._ends is not None:
            return self._ends[steps - 1]
        steps -= self._opening
        return self._open_ps + steps * self._first_ps + self._slope_ps * (steps * (steps - 1) // 2)

    def _boundary(self, now_ps: int) -> int:
        """The step of the flight in progress at ``now``: the first that ends then or later."""
        elapsed = now_ps - self._start_ps
        if self._ends is not None:
            return bisect_left(self._ends, elapsed) + 1
        opening = self._opening
        if opening:
            elapsed -= self._open_ps
            if elapsed <= 0:
                return 1
        first, slope = self._first_ps, self._slope_ps
        if elapsed <= first:
            return opening + 1
        if not slope:
            return opening - (-elapsed // first)
        m = 2 * first - slope
        steps = max((isqrt(m * m + 8 * slope * elapsed) - m) // (2 * slope), 1)
        while steps * first + slope * (steps * (steps - 1) // 2) < elapsed:
            steps += 1
        return opening + steps

    def sync(self) -> None:
        """Bring the state up to the step in progress (vLLM allocates when a step starts)."""
        if self._count <= 1:
            return
        steps = min(self._boundary(self.env._now), self._count) - 1
        if steps < 1:
            return
        self._log(steps)
        elapsed = self._elapsed(steps)
        opened = int(self._opening)
        self._fold(steps)
        self._start_ps += elapsed
        self._count -= steps
        if self._ends is not None:
            self._ends = [end - elapsed for end in self._ends[steps:]]
        else:
            self._first_ps += self._slope_ps * (steps - opened)

    def _fold(self, steps: int) -> None:
        """Account for the start of ``steps`` more steps of the flight."""
        if self._opening:
            self._open()
            need = self._phase[-self._step % self.block_tokens]
            if need:
                self.pool.take(need)
            steps -= 1
            if not steps:
                return
        self._fold_alike(steps)

    def _fold_alike(self, steps: int) -> None:
        """``_fold`` for steps that are like the one before them."""
        tokens = self.block_tokens
        cycles, rest = divmod(steps, tokens)
        need = cycles * self._decodes
        if rest:  # those whose turn comes in the next `rest` steps stand side by side
            low = -(self._step + rest) % tokens
            need += sum(self._phase[low : low + rest])
            if low + rest > tokens:
                need += sum(self._phase[: low + rest - tokens])
        partial: Request | None = None
        if self._ends is not None:
            partial = next(iter(self._prefilling))
            partial.computed_tokens += steps * self._chunk
            blocks = -(-partial.computed_tokens // tokens)
            need += blocks - partial.blocks
            partial.blocks = blocks
        if need:
            self.pool.take(need)
        if partial is not None and self._caching:
            self._store_chain(partial)
        self._step += steps
        self._context += steps * self._decodes

    def _open(self) -> None:
        """The opening step of the flight is over: the prompts that it completed decode."""
        self._opening = False
        self._step += 1
        self._context += self._decodes
        first_ps = self._start_ps + self._open_ps
        for request in self._completing:
            request.output_tokens += 1
            if request.first_ps < 0:
                request.first_ps = first_ps
            self._join(request)
        self._completing = []
        self._open_ps = 0

    def _log(self, steps: int) -> None:
        """Report ``steps`` steps of the flight, from its start."""
        self.steps_done += steps
        ident, start, decodes = self.id, self._start_ps, self._batched
        waiting, free = self._waited, self.pool.free
        if self._ends is None:
            if self._opening:
                prefill_tokens, self._prefill_tokens = self._prefill_tokens, 0
                self._batched = decodes + len(self._completing)
                first = ident, start, self._open_ps, 0, 1, decodes, prefill_tokens, waiting, free
                if steps == 1:
                    self._ran(_pack(*first))
                    return
                self._ran(
                    _pack_two(
                        *first, ident, start + self._open_ps, self._first_ps, self._slope_ps,
                        steps - 1, self._batched, 0, waiting, free,
                    )
                )  # fmt: skip
                return
            self._ran(
                _pack(
                    ident, start, self._first_ps, self._slope_ps, steps, decodes,
                    self._prefill_tokens, waiting, free,
                )
            )  # fmt: skip
            return
        before = 0
        for end in self._ends[:steps]:
            self._ran(
                _pack(
                    ident, start + before, end - before, 0, 1, decodes, self._prefill_tokens,
                    waiting, free,
                )
            )  # fmt: skip
            self._prefill_tokens = self._chunk
            before = end

    # ------------------------------------------------------------------ a step begins

    def _begin(self) -> None:
        """Schedule one step by vLLM's rules and launch as many as must be alike."""
        if self._completing:
            self._completing = []
        decodes = self._decodes
        pool = self.pool
        need = self._phase[-self._step % self.block_tokens] if decodes else 0
        if self._prefilling or self._stalled or need > pool.free:
            self._begin_crowded(need)
            return
        # Every decoder takes its token; whoever waits may use the rest of the budget.
        self._fragile = False
        if need:
            pool.take(need)
        left = self._budget - decodes
        prefills: Prefills = []
        if self._queue and left > 0:
            left = self._admit(left, self._threshold() if self._limited else 0, prefills)
        self._launch(prefills, left)

    def _begin_crowded(self, need: int) -> None:
        """As ``_begin``, with prompts in progress or too few blocks."""
        self._stalled = []
        self._fragile = False
        prefills: Prefills = []
        threshold = self._threshold() if self._limited else 0
        left = self._budget - self._decodes
        plain = need <= self.pool.free
        partial: Request | None = None
        chunk = blocks = 0
        if plain and self._prefilling:
            partial = next(reversed(self._running))
            plain = not threshold and len(self._prefilling) == 1 and partial in self._prefilling
            if plain:
                total = partial.prompt_tokens + partial.output_tokens
                chunk = min(total - partial.computed_tokens, left)
                blocks = -(-(partial.computed_tokens + chunk) // self.block_tokens)
                need += blocks - partial.blocks
                plain = need <= self.pool.free
        preempted = False
        if plain:
            self.pool.take(need)
            if partial is not None:
                partial.blocks = blocks
                left -= chunk
                self._compute(partial, chunk, prefills)
        else:
            left, preempted = self._schedule_running(threshold, prefills)
        if not preempted and self._queue and left > 0:
            left = self._admit(left, threshold, prefills)
        self._launch(prefills, left, preempted)

    # ------------------------------------------------------------------ launch

    def _launch(self, prefills: Prefills, left: int, preempted: bool = False) -> None:
        """Arm the timer for the step that was scheduled and those that must follow alike."""
        decodes = self._decodes
        self._start_ps = now = self.env._now
        self._batched = decodes
        self._waited = len(self._queue)
        self._ends = None
        if prefills:
            # What was scheduled is the budget without what is left, in tokens.
            self._prefill_tokens = self._budget - left - decodes
            self._first_ps = duration = self.steps.step_ps(
                _batch(
                    (
                        tuple(prefills),
                        decodes,
                        self._context + decodes,
                        self._longest_decode() if decodes and self._skewed else 0,
                    )
                )
            )
            self._slope_ps = 0
            self._count = 1
            if self._prefilling:
                if left == 0 and not (self._limited or preempted or self._completing):
                    duration = self._extend_chunks(duration)
            elif not (self._queue or preempted):
                duration = self._extend_decodes(duration)
        elif decodes:
            self._prefill_tokens = 0
            first, slope, count = self.steps.decode_run(decodes, self._context + decodes)
            self._first_ps, self._slope_ps = first, slope
            # After a preemption nobody was admitted, so the next step must look at the queue.
            self._count = count = 1 if preempted or self._fragile else self._until_change(count)
            duration = count * first + slope * (count * (count - 1) // 2)
        else:
            self._count = 0
            if self._running:  # the first in line preempted itself: an empty step, no time
                for request in self._stalled:
                    self._join(request)
                self._stalled = []
                self._begin()
            else:
                self._sleep(now)
            return
        self._schedule(self._on_end, duration)

    def _sleep(self, now: int) -> None:
        """Nothing to run: wait for an arrival, or for the end of a deferral."""
        until = self._deferred_until_ps()
        if until is not None:
            self._schedule(self._on_wake, until - now)

    def _until_change(self, count: int) -> int:
        """How many of ``count`` decode steps are alike."""
        heap, due = self._due_heap, self._due
        while not due.get(heap[0]):  # a bucket that a preemption emptied
            due.pop(heappop(heap), None)
        count = min(count, heap[0] - self._step)
        if (count // self.block_tokens + 1) * self._decodes > self.pool.free:
            count = self._until_blocks_run_out(count)
        if self._queue and count > 1 and not self._plain_admission:
            count = self._until_asked_again(count)
        return count

    def _until_blocks_run_out(self, count: int) -> int:
        """How many of ``count`` decode steps have blocks; those of the first are taken already."""
        tokens, decodes, free = self.block_tokens, self._decodes, self.pool.free
        cycles = min((count - 1) // tokens, free // decodes)
        free -= cycles * decodes
        steps = 1 + cycles * tokens
        phase, step = self._phase, self._step
        while steps < count:
            need = phase[-(step + steps) % tokens]
            if need > free:
                break
            free -= need
            steps += 1
        return steps

    def _until_asked_again(self, count: int) -> int:
        """Stop where the admission policy wants to be asked about the head again."""
        if len(self._running) >= self._most:
            return count
        horizon = self.admission.horizon_steps
        if horizon is not None:
            count = min(count, max(self._asked_step + horizon - self.steps_done, 1))
        until = self._deferred_until_ps()
        if until is not None:
            count = min(count, self._boundary(until))
        return count

    def _extend_chunks(self, duration: int) -> int:
        """Fly over the full-budget chunks of the one prompt in progress (nobody can be admitted).

        Returns the duration of the whole flight; ``duration`` is that of its first step.
        """
        if len(self._prefilling) > 1 or self._tellers:
            return duration
        tokens, decodes = self.block_tokens, self._decodes
        partial = next(iter(self._prefilling))
        chunk = self._budget - decodes
        rest = partial.prompt_tokens + partial.output_tokens - partial.computed_tokens
        more = min((rest - 1) // chunk, CHUNK_RUN)
        if decodes:
            more = min(more, self._due_heap[0] - self._step - 1)
        if more < 1:
            return duration
        blocks = -(-(partial.computed_tokens + more * chunk) // tokens) - partial.blocks
        if blocks + (more // tokens + 1) * decodes > self.pool.free:
            return duration
        longest = self._longest_decode() if decodes and self._skewed else 0
        context = self._context + decodes
        end = duration
        ends = [end]
        done = partial.computed_tokens
        for i in range(1, more + 1):
            batch = Batch(
                ((chunk, done),), decodes, context + i * decodes, longest + i if longest else 0
            )
            end += self.steps.step_ps(batch)
            ends.append(end)
            done += chunk
        self._ends = ends
        self._chunk = chunk
        self._count = more + 1
        return end

    def _extend_decodes(self, duration: int) -> int:
        """Fly on from a step that completes prompts to the decode run behind it.

        Only where nobody waits and nobody finishes with that step. Returns as ``_extend_chunks``.
        """
        step = self._step + 1
        heap = self._due_heap
        if heap:
            count = heap[0] - step
            if count < 1:
                return duration
        else:
            count = ENDLESS
        decodes = self._decodes
        context = self._context + decodes
        for request in self._completing:
            rest = request._true_output_tokens - request.output_tokens - 1
            if rest < count:
                if not rest:
                    return duration
                count = rest
            context += request.computed_tokens
        decodes += len(self._completing)
        first, slope, most = self.steps.decode_run(decodes, context + decodes)
        count = min(count, most)
        if (count // self.block_tokens + 2) * decodes > self.pool.free:
            return duration
        self._opening = True
        self._open_ps = duration
        self._first_ps, self._slope_ps = first, slope
        self._count = count + 1
        return duration + count * first + slope * (count * (count - 1) // 2)

    # ------------------------------------------------------------------ a step ends

    def _end(self, timer: Timer) -> None:
        """The last step of the flight is over (rule 17)."""
        now = self.env._now
        count = self._count
        self._log(count)
        if count > 1:
            self._fold(count - 1)
            self._ends = None
        if self._opening:
            self._opening = False
            self._open_ps = 0
        self._count = 0
        self._step = step = self._step + 1
        self._context += self._decodes
        if self._tellers:
            self._tell(0)
        if self._aborts:
            self._drop_aborted(now)
        heap = self._due_heap
        ended: list[Request] | None = None
        if heap and heap[0] <= step:
            ended = []
            while heap and heap[0] <= step:
                ended += self._due.pop(heappop(heap))
            for request in ended:
                self._leave(request)
                request.blocks = -(-request.computed_tokens // self.block_tokens)
        for request in self._completing:
            request.output_tokens += 1
            if request.first_ps < 0:
                request.first_ps = now
            if request.output_tokens < request._true_output_tokens:
                self._join(request)
            elif ended is None:
                ended = [request]
            else:
                ended.append(request)
        if self._stalled:
            for request in self._stalled:
                self._join(request)
            self._stalled = []
        if ended:
            if len(ended) > 1:
                ended.sort(key=_seat)
            for request in ended:
                self._finish(request, now)
        self._begin()

    def audit(self) -> None:
        self.sync()
        super().audit()
