"""The fast engine with asynchronous scheduling: a step is planned while the one before executes.

vLLM's default on GPUs. When step x begins to execute, the tokens of step x - 1 arrive and step
x + 1 is planned. So what arrives during step x - 1 runs in step x + 1 at the earliest, and a
request whose last token comes out of step x keeps its seat and its blocks while x + 1 is planned:
it is in limbo. A flight is the step that begins to execute and, where the planned step repeats
itself, all of those but the last, which is planned and not executed. Equal to ``sim.stepwise``.
"""

from __future__ import annotations

from heapq import heappop

from sim.batch import Prefills
from sim.clock import Timer
from sim.engine import FastEngine, _batch, _pack, _seat
from sim.request import ENDLESS, Request


class AheadEngine(FastEngine):
    """One instance; ``_step`` and the sums over decoders are those of the step being planned."""

    __slots__ = ("_durations", "_fresh", "_next", "_rested", "_stale")

    def __init__(self, *args: object, **options: object) -> None:
        super().__init__(*args, **options)
        self._next = (0, 0, 0)
        """The step that executes next: duration (ps, 0 for an empty step), decodes, prompt tokens.
        During a flight, the step that executes first."""
        self._fresh: set[Request] = set()
        """Decoders whose prompt was completed by that step."""
        self._rested: set[Request] = set()
        """Decoders that are not in that step."""
        self._stale: list[Request] = []
        """Requests that were preempted while a token of theirs was in flight."""
        self._durations: list[int] = []
        """Of the planned steps of a run over prompt chunks."""
        # self._limbo: True where the last token is also the first since the admission.

    # ------------------------------------------------------------------ time inside a flight

    def sync(self) -> None:
        if self._count <= 1:
            return
        steps = min(self._boundary(self.env._now), self._count) - 1
        if steps < 1:
            return
        self._log(steps)
        elapsed = self._elapsed(steps)
        self._next = self._planned(steps - 1)
        self._fold(steps)
        self._start_ps += elapsed
        self._count -= steps
        self._open_ps = self._next[0]
        if self._ends is not None:
            self._ends = [end - elapsed for end in self._ends[steps:]]
            self._durations = self._durations[steps:]
            self._prefill_tokens = self._chunk
        else:
            self._first_ps += self._slope_ps * steps

    def _planned(self, index: int) -> tuple[int, int, int]:
        """One of the planned steps, as ``_next`` has it."""
        if self._ends is None:
            return self._first_ps + self._slope_ps * index, self._batched, self._prefill_tokens
        chunk = self._chunk if index else self._prefill_tokens
        return self._durations[index], self._batched, chunk

    def _fold(self, steps: int) -> None:
        self.steps_done += steps
        self._fold_alike(steps)

    def _log(self, steps: int) -> None:
        ident, start, waiting, free = self.id, self._start_ps, self._waited, self.pool.free
        lead_ps, decodes, prefill_tokens = self._next
        self._ran(_pack(ident, start, lead_ps, 0, 1, decodes, prefill_tokens, waiting, free))
        start += lead_ps
        if self._ends is not None:
            for index in range(steps - 1):
                duration, decodes, chunk = self._planned(index)
                self._ran(_pack(ident, start, duration, 0, 1, decodes, chunk, waiting, free))
                start += duration
        elif steps > 1:
            self._ran(
                _pack(
                    ident, start, self._first_ps, self._slope_ps, steps - 1, self._batched,
                    self._prefill_tokens, waiting, free,
                )
            )  # fmt: skip

    # ------------------------------------------------------------------ a step was planned

    def _launch(self, prefills: Prefills, left: int, preempted: bool = False) -> None:
        now = self.env._now
        decodes = self._decodes
        self._batched = decodes
        self._prefill_tokens = self._budget - left - decodes if prefills else 0
        self._ends = None
        self._slope_ps = self._first_ps = 0
        alone = not (self._limbo or self._stale or self._completing or preempted or self._fragile)
        count = 1
        lead_ps = self._next[0]
        self._start_ps, self._opening, self._open_ps = now, True, lead_ps
        if prefills:
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
            if lead_ps and alone and self._prefilling and left == 0 and not self._limited:
                count = self._plan_chunks(duration)
        elif decodes:
            self._first_ps, self._slope_ps, count = self.steps.decode_run(
                decodes, self._context + decodes
            )
            count = self._until_change(count) if lead_ps and alone else 1
        self.steps_done += bool(self._first_ps)
        self._waited = len(self._queue)
        if lead_ps:
            self._count = count
            self._schedule(self._on_end, self._elapsed(count))
        elif self._first_ps or preempted:  # nothing was ready to execute: the planned step is
            self._proceed(self._planned(0), now)
        else:
            self._count = 0
            self._sleep(now)

    def _plan_chunks(self, first_ps: int) -> int:
        """Plan on over the full-budget chunks of the one prompt in progress; how many steps."""
        self._count = 1
        self._extend_chunks(first_ps)
        if self._ends is not None:
            ends, lead_ps = self._ends, self._open_ps
            self._durations = [b - a for a, b in zip([0, *ends], ends, strict=False)]
            self._ends = [lead_ps, *(lead_ps + end for end in ends[:-1])]
        return self._count

    def _proceed(self, step: tuple[int, int, int], now: int) -> None:
        """A planned step begins to execute; plan the next."""
        self._next = step
        self._count = 0
        self._step += 1
        self._context += self._decodes
        self._fresh = set()
        heap = self._due_heap
        while heap and heap[0] <= self._step:
            for request in self._due.pop(heappop(heap)):
                self._leave(request)
                request.blocks = -(-request.computed_tokens // self.block_tokens)
                self._limbo[request] = False
        for request in self._completing:
            request.output_tokens += 1
            if request.first_ps < 0:
                request.first_ps = now + step[0]
            if request.output_tokens < request._true_output_tokens:
                self._join(request)
                self._fresh.add(request)
            else:
                self._limbo[request] = True
        self._completing = []
        self._rested = set(self._stalled)
        for request in self._stalled:
            self._join(request)
        self._stalled = []
        self._begin()

    # ------------------------------------------------------------------ a step ends

    def _end(self, timer: Timer) -> None:
        now = self.env._now
        count = self._count
        self._log(count)
        step = self._planned(count - 1)
        if count > 1:
            self._fold(count - 1)
        self._ends = None
        self._count = 0
        if self._tellers:
            self._tell(ENDLESS)  # all are scheduled for the step that executes next
        if self._aborts:
            self._drop_aborted(now)
        if self._limbo or self._stale:
            self._deliver(now)
        self._proceed(step, now)

    def _deliver(self, now: int) -> None:
        """The tokens of the step that ended: who has all of them leaves (rule 17)."""
        ended = list(self._limbo)
        self._limbo.clear()
        for request in self._stale:
            request.output_tokens += 1
            if request.output_tokens >= request._true_output_tokens:
                ended.append(request)
        self._stale = []
        ended.sort(key=_seat)
        for request in ended:
            if request in self._running:
                self._finish(request, now)
            else:
                self._unqueue(request)
                self._left(request)
                self.sink.finished(request, self.id, now)

    def _hashed(self, request: Request, kv_tokens: int, planned: int) -> int:
        """As there. A token in flight has no hash yet: blocks are hashed when it arrives."""
        if request in self._rested:
            return kv_tokens + planned
        return kv_tokens if request in self._fresh else kv_tokens + planned - 1

    # ------------------------------------------------------------------ leaving early

    def _strip(self, victim: Request, planned: int, prefills: Prefills) -> int:
        """As there; who has a token in flight gets it in the queue."""
        if victim in self._limbo:
            known = victim.computed_tokens - (not self._limbo.pop(victim))
        elif victim.decoding:
            known = super()._strip(victim, planned, prefills)
            if victim in self._rested:
                return known
        else:
            return super()._strip(victim, planned, prefills)
        victim.output_tokens -= 1
        self._stale.append(victim)
        return known

    def _withdraw(self, request: Request, now_ps: int) -> bool:
        if request not in self._running:
            if request in self._stale:
                self._stale.remove(request)
            return False
        flying = request in self._limbo or request.decoding or request in self._stalled
        flying = flying and request not in self._rested
        if request in self._limbo:
            known = request.computed_tokens - (not self._limbo.pop(request))
        elif request.decoding:  # it is in the step that was planned
            self._leave(request)
            self._drop_due(request)
            known = request.computed_tokens + (not flying)
            request.blocks = -(-(request.computed_tokens + 1) // self.block_tokens)
        else:
            known = request.computed_tokens
            if request in self._stalled and flying and request not in self._fresh:
                known -= 1
            self._forget(request)
        request.output_tokens -= flying
        if request.first_ps >= now_ps:
            request.first_ps = -1
        self._give_up(request, known, now_ps)
        return True
