"""The batch of a fast engine: who runs, what each step schedules, and the decoders as sums.

A decoder is not touched from the step it joins to the step it finishes: what it needs and when
follows from three numbers that never change (``Request.phase``, ``due``, ``longest_key``), and
the batch keeps the sums over all decoders. Rule numbers as in ``docs/engine.md``.
"""

from __future__ import annotations

from heapq import heappop, heappush

from policies.api import EvictionPolicy
from sim.cache import BlockPool, Found
from sim.request import ENDLESS, PS_PER_S, Request
from sim.scheduler import Engine, _name

Prefills = list[tuple[int, int]]
"""Prompt chunks of a step: (new tokens, tokens before them)."""


class Batching(Engine):
    """An engine's running requests and blocks; ``sim.engine`` adds time."""

    __slots__ = (
        "_completing",
        "_context",
        "_count",
        "_decodes",
        "_due",
        "_due_heap",
        "_fragile",
        "_lead",
        "_limbo",
        "_phase",
        "_prefilling",
        "_running",
        "_stalled",
        "_step",
        "_tellers",
        "eviction",
        "pool",
    )

    def __init__(self, *args: object, eviction: EvictionPolicy, **options: object) -> None:
        super().__init__(*args, **options)  # type: ignore[arg-type]
        self.eviction = eviction
        self.pool = BlockPool(
            self.total,
            self.block_tokens,
            eviction,
            policy_name=_name(eviction),
            prefill_s=self.prefill_s,
            clock=lambda: self.env.now / PS_PER_S,
        )
        self._running: dict[Request, None] = {}
        """In order of admission."""
        self._prefilling: dict[Request, None] = {}
        """Those of them whose prompt is not complete."""
        self._completing: list[Request] = []
        """Prompts that the step in progress completes, in order."""
        self._stalled: list[Request] = []
        """Decoders that the step in progress leaves out (only after a preemption by order)."""
        self._tellers: dict[Request, None] = {}
        """Decoders whose answer others may know: its blocks must be stored before one matches."""
        self._limbo: dict[Request, bool] = {}
        """Requests whose last token is in flight (asynchronous scheduling only; see there)."""
        self._fragile = False
        """The head of the queue may become admissible without a change."""
        self._step = 0
        self._decodes = 0
        self._context = 0
        """Sum of the KV tokens of all decoders at ``_step``."""
        self._phase = [0] * self.block_tokens
        """Decoders by (KV tokens - step) mod block size: who needs a block in which step."""
        self._due: dict[int, list[Request]] = {}
        self._due_heap: list[int] = []
        self._lead: int | None = None
        """Step - KV tokens of the longest decoder, which never changes; ``None``: not known."""
        self._count = 0
        """Steps in the flight; 0 while the engine is asleep."""

    @property
    def running(self) -> int:
        return len(self._running)

    # ------------------------------------------------------------------ decoders

    def _kv(self, request: Request) -> int:
        """KV tokens of a decoder at ``_step``: its last generated token has none."""
        return request.prompt_tokens + request._true_output_tokens - 1 - (request.due - self._step)

    def _join(self, request: Request) -> None:
        """The request decodes from ``_step`` on."""
        step = self._step
        kv = request.computed_tokens
        request.decoding = True
        request.phase = (kv - step) % self.block_tokens
        self._phase[request.phase] += 1
        self._decodes += 1
        self._context += kv
        due = step + request._true_output_tokens - request.output_tokens
        request.due = due
        bucket = self._due.get(due)
        if bucket is None:
            self._due[due] = [request]
            heappush(self._due_heap, due)
        else:
            bucket.append(request)
        if request.stored < request.chain_blocks and self._caching:
            self._tellers[request] = None
        request.longest_key = key = step - kv
        if self._decodes == 1 or (self._lead is not None and key < self._lead):
            self._lead = key

    def _leave(self, request: Request) -> None:
        """The request no longer decodes; brings its counters up to date."""
        if self._tellers:
            self._tellers.pop(request, None)
        kv = self._kv(request)
        request.computed_tokens = kv
        request.output_tokens = kv + 1 - request.prompt_tokens
        request.decoding = False
        self._phase[request.phase] -= 1
        self._decodes -= 1
        self._context -= kv
        if request.longest_key == self._lead:
            self._lead = None

    def _longest_decode(self) -> int:
        """KV tokens of the longest decoder, the one computed now included."""
        if self._lead is None:  # it left: look for the next
            self._lead = min(r.longest_key for r in self._running if r.decoding)
        return self._step - self._lead + 1

    # ------------------------------------------------------------------ scheduling

    def _compute(self, request: Request, tokens: int, prefills: Prefills) -> None:
        """Put ``tokens`` more of a prompt into the step."""
        prefills.append((tokens, request.computed_tokens))
        request.computed_tokens += tokens
        if request.stored < request.chain_blocks and self._caching:
            if self._tellers:
                self._tell(request.seat)
            self._store_chain(request)
        if request.computed_tokens == request.prompt_tokens + request.output_tokens:
            if self._prefilling:
                self._prefilling.pop(request, None)
            self._completing.append(request)
        else:
            self._prefilling[request] = None

    def _store_chain(self, request: Request) -> None:
        """Hash what is computed of the known chain.

        A request's own blocks can wait until it lets go of them: nobody else can match them.
        """
        blocks = request.computed_tokens // self.block_tokens
        self.pool.store(request, min(blocks, request.chain_blocks))

    def _tell(self, seat: int) -> None:
        """Store what is hashed by now of answers that others may know, in the order of hashing.

        Args:
            seat: decoders with a smaller one are scheduled for ``_step``, the others not yet.
        """
        tokens = self.block_tokens
        ready: list[tuple[int, int, int, Request]] = []
        for request in self._tellers:
            kv = self._kv(request)
            planned = self._hashed(request, kv, 1)
            known = planned if request.seat < seat else self._hashed(request, kv, 0)
            blocks = min(known // tokens, request.chain_blocks)
            ready += [
                ((block + 1) * tokens - planned, request.seat, block, request)
                for block in range(request.stored, blocks)
            ]
        for _, _, block, request in sorted(ready):
            self.pool.store(request, block + 1)

    def _hashed(self, request: Request, kv_tokens: int, planned: int) -> int:
        """Of how many tokens of a decoder the full blocks have a hash."""
        return kv_tokens + planned

    def _admit(self, left: int, threshold: int, prefills: Prefills) -> int:
        """Admit from the head of the queue while the budget lasts (rules 9, 10, 12-15)."""
        limits, pool, tokens = self.limits, self.pool, self.block_tokens
        now = self.env._now
        now_s = now / PS_PER_S
        running = self._running
        if self._tellers:
            self._tell(ENDLESS)
        while left > 0 and len(running) < self._most:
            request = self._head(now)
            if request is None:
                break
            total = request.prompt_tokens + request.output_tokens
            hit = idle = 0
            found: Found = []
            if self._caching and (request.chain_blocks or request.preemptions):
                found, hit, idle = pool.match(request, (total - 1) // tokens)
                if hit and not self._plain_use:
                    hit = self._used_blocks(request, hit, now)
                    found, idle = pool.truncate(found, hit)
            chunk = total - hit * tokens
            if 0 < threshold < chunk:
                chunk = threshold
            if chunk > left:
                if not limits.enable_chunked_prefill:
                    self._fragile = bool(self._tellers)
                    break
                chunk = left
            free = pool.free - idle - (self._watermark if running else 0)
            need = -(-(hit * tokens + chunk) // tokens) - hit
            if need > free or (
                limits.scheduler_reserve_full_isl and -(-total // tokens) - hit > free
            ):
                # Inside a run free blocks only get fewer, so a blocked head stays blocked; unless
                # it has no reservation and loses some of its cached prefix, or gains some of it.
                losing = idle > 0 and not limits.scheduler_reserve_full_isl
                self._fragile = losing or bool(self._tellers)
                break
            heappop(self._queue)
            self._seats += 1
            request.seat = self._seats
            running[request] = None
            if request.admitted_ps < 0:
                request.admitted_ps = now
                request.cached_tokens = hit * tokens
                if not self._plain_retain:
                    request.retain_blocks = self._retained_blocks(request, now)
            if found:
                pool.acquire(request, found, now_s)
            pool.take(need)
            request.blocks = hit + need
            request.computed_tokens = hit * tokens
            left -= chunk
            self._compute(request, chunk, prefills)
        return left

    def _schedule_running(self, threshold: int, prefills: Prefills) -> tuple[int, bool]:
        """Rules 6-8 request by request.

        For steps in which blocks run out or prompts are cut short by the threshold. Returns the
        budget left and whether anybody was preempted.
        """
        tokens, pool = self.block_tokens, self.pool
        left = self._budget
        order = list(self._running)
        planned: dict[Request, int] = {}
        preempted = False
        i = 0
        while i < len(order) and left > 0:
            request = order[i]
            if request in self._limbo:
                i += 1
                continue
            if request.decoding:
                kv = self._kv(request)
                chunk, need = 1, int(kv % tokens == 0)
            else:
                kv = request.computed_tokens
                chunk = request.prompt_tokens + request.output_tokens - kv
                if 0 < threshold < chunk:
                    chunk = threshold
                chunk = min(chunk, left)
                need = -(-(kv + chunk) // tokens) - request.blocks
            while need > pool.free:
                preempted = True
                if self.admission.preempts == "order":
                    victim = max(order, key=lambda r: (r.order, r.rank))
                else:
                    victim = order[-1]
                place = order.index(victim) if victim is not order[-1] else len(order) - 1
                del order[place]
                i -= place < i
                left += planned.get(victim, 0)
                self._preempt(victim, planned.pop(victim, 0), prefills, request)
                if victim is request:
                    break
            else:
                if need:
                    pool.take(need)
                left -= chunk
                planned[request] = chunk
                if not request.decoding:
                    request.blocks += need
                    self._compute(request, chunk, prefills)
                i += 1
                continue
            break
        for request in order:
            if request.decoding and request not in planned:
                self._leave(request)
                request.blocks = -(-request.computed_tokens // tokens)
                self._drop_due(request)
                self._stalled.append(request)
        return left, preempted

    def _drop_due(self, request: Request) -> None:
        self._due[request.due].remove(request)

    def _preempt(
        self, victim: Request, planned: int, prefills: Prefills, beneficiary: Request
    ) -> None:
        """Take everything from a running request and put it back into the queue (rule 8)."""
        if self._tellers:
            self._tell(beneficiary.seat)
        known = self._strip(victim, planned, prefills)
        now = self.env._now
        if self._caching:
            self.pool.store(victim, known // self.block_tokens)
        self.pool.release(victim, victim.blocks, now / PS_PER_S)
        victim.blocks = 0
        victim.computed_tokens = 0
        victim.preemptions += 1
        self.preempted += 1
        self.changes += 1
        del self._running[victim]
        self._enqueue(victim, now)

    def _strip(self, victim: Request, planned: int, prefills: Prefills) -> int:
        """Take a request out of the step; its full blocks of so many tokens have a hash."""
        if victim.decoding:
            self._leave(victim)
            self._drop_due(victim)
            kv = victim.computed_tokens
            victim.blocks = -(-(kv + planned) // self.block_tokens)
            return self._hashed(victim, kv, planned)
        if planned:
            prefills.remove((planned, victim.computed_tokens - planned))
            if victim in self._completing:
                self._completing.remove(victim)
        self._prefilling.pop(victim, None)
        return victim.computed_tokens

    def _finish(self, request: Request, now: int) -> None:
        self._give_up(request, request.computed_tokens, now)
        self._left(request)
        self.sink.finished(request, self.id, now)

    def _withdraw(self, request: Request, now_ps: int) -> bool:
        if request not in self._running:
            return False
        if request.decoding:
            self._leave(request)
            self._drop_due(request)
            request.blocks = -(-request.computed_tokens // self.block_tokens)
        else:
            self._forget(request)
        self._give_up(request, request.computed_tokens, now_ps)
        return True

    def _forget(self, request: Request) -> None:
        """Take a request that does not decode out of the step in progress."""
        self._prefilling.pop(request, None)
        for group in (self._completing, self._stalled):
            if request in group:
                group.remove(request)

    def _give_up(self, request: Request, known: int, now_ps: int) -> None:
        """The request leaves for good; full blocks of ``known`` tokens have a hash."""
        full = known // self.block_tokens if self._caching else 0
        self.pool.retire(request, full, request.blocks, now_ps / PS_PER_S)
        del self._running[request]

    # ------------------------------------------------------------------ checking

    def audit(self) -> None:
        tokens = self.block_tokens
        loose = 0
        for request in self._running:
            if request.decoding:
                kv = self._kv(request) + (self._count > 0)
                loose += -(-kv // tokens) - request.stored
            else:
                loose += request.blocks - request.stored
        self.pool.audit(loose)
        assert self._decodes == sum(request.decoding for request in self._running)
        assert sum(self._phase) == self._decodes
