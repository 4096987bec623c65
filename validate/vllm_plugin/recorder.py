"""What any vLLM scheduler decides, as rows of ``validate.decisions``."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Any

from validate.decisions import Decision


class Recorder:
    """Writes a row for every step of a scheduler that schedules tokens or preempts.

    Wraps attributes of the *instance*: ``schedule``, ``update_from_output``, ``add_request``,
    ``finish_requests`` and ``_preempt_request`` of the scheduler (``v1/core/sched/scheduler.py``),
    and ``cache_full_blocks`` and ``_maybe_evict_cached_block`` of its block pool
    (``v1/core/block_pool.py``). No class is patched, so other schedulers are not affected. Make it
    before the first request and after anything else that wraps these.

    A row is written when the output of its step has been taken in. The name of every content that
    was ever cached is kept for as long as the scheduler lives, about 200 bytes per block: this is
    for tests and measurements, not for an engine that serves for years.
    """

    def __init__(self, scheduler: Any, write: Callable[[Decision], None]) -> None:
        self._scheduler = scheduler
        self._write = write
        self._clock: Callable[[], float] | None = (
            None if hasattr(scheduler, "clock") else time.perf_counter
        )
        self._rows = 0
        self._entered: list[str] = []
        self._aborted: list[str] = []
        self._preempted: list[str] = []
        self._evicted: list[list[Any]] = []
        self._names: dict[Any, str] = {}
        """Who stored a content first, by vLLM's hash of it."""
        self._pending: deque[tuple[Any, Decision]] = deque()
        """Rows of steps whose output is not in yet, with vLLM's object for the step."""
        pool = scheduler.kv_cache_manager.block_pool
        self._schedule = scheduler.schedule
        self._update = scheduler.update_from_output
        self._add = scheduler.add_request
        self._finish = scheduler.finish_requests
        self._preempt = scheduler._preempt_request
        self._cache = pool.cache_full_blocks
        self._evict = pool._maybe_evict_cached_block
        scheduler.schedule = self._on_schedule
        scheduler.update_from_output = self._on_update
        scheduler.add_request = self._on_add
        scheduler.finish_requests = self._on_finish
        scheduler._preempt_request = self._on_preempt
        pool.cache_full_blocks = self._on_cache
        pool._maybe_evict_cached_block = self._on_evict

    def _now(self) -> float:
        clock = self._clock or self._scheduler.clock
        return float(clock())

    def _on_schedule(self, *args: Any, **options: Any) -> Any:
        scheduler = self._scheduler
        began_s = self._now()
        ran = {request.request_id for request in scheduler.running}
        output = self._schedule(*args, **options)
        scheduled: dict[str, int] = dict(output.num_scheduled_tokens)
        if not scheduled and not self._preempted:
            return output
        manager = scheduler.kv_cache_manager
        # With model runner V2 the output shows resumed requests as new ones, so look at who ran.
        admitted = [scheduler.requests[ident] for ident in scheduled if ident not in ran]
        cached = output.scheduled_cached_reqs
        got = dict(zip(cached.req_ids, cached.new_block_ids, strict=True))
        blocks = {ident: list(got[ident][0]) for ident in scheduled if got.get(ident) is not None}
        for request in admitted:
            blocks[request.request_id] = list(manager.get_block_ids(request.request_id)[0])
        row = Decision(
            step=self._rows,
            entered=self._entered,
            aborted=self._aborted,
            scheduled=scheduled,
            new=[r.request_id for r in admitted if not r.num_preemptions],
            resumed=[r.request_id for r in admitted if r.num_preemptions],
            preempted=self._preempted,
            hits={r.request_id: r.num_computed_tokens - scheduled[r.request_id] for r in admitted},
            blocks={ident: blocks[ident] for ident in scheduled if blocks.get(ident)},
            evicted=self._evicted,
            free=manager.block_pool.get_num_free_blocks(),
            waiting=[r.request_id for r in scheduler.waiting],
            running=[r.request_id for r in scheduler.running],
            began_s=began_s,
        )
        self._rows += 1
        self._entered, self._aborted, self._preempted, self._evicted = [], [], [], []
        self._pending.append((output, row))
        return output

    def _on_update(self, output: Any, *args: Any, **options: Any) -> Any:
        answer = self._update(output, *args, **options)
        if self._pending and self._pending[0][0] is output:
            row = self._pending.popleft()[1]
            row["ended_s"] = self._now()
            self._write(row)
        return answer

    def _on_add(self, request: Any, *args: Any, **options: Any) -> Any:
        self._entered.append(request.request_id)
        return self._add(request, *args, **options)

    def _on_finish(self, *args: Any, **options: Any) -> Any:
        ended = self._finish(*args, **options)
        self._aborted += [request.request_id for request in ended]
        return ended

    def _on_preempt(self, request: Any, *args: Any, **options: Any) -> Any:
        self._preempted.append(request.request_id)
        return self._preempt(request, *args, **options)

    def _on_cache(
        self,
        request: Any,
        blocks: Any,
        num_cached_blocks: int,
        num_full_blocks: int,
        *args: Any,
        **options: Any,
    ) -> None:
        # The names are vLLM's, because it calls this with keywords.
        self._cache(request, blocks, num_cached_blocks, num_full_blocks, *args, **options)
        for index in range(num_cached_blocks, num_full_blocks):
            content = blocks[index].block_hash
            if content is not None:  # else a policy kept it out of the cache
                self._names.setdefault(content, f"{request.request_id}:{index}")

    def _on_evict(self, block: Any) -> bool:
        content = block.block_hash
        evicted: bool = self._evict(block)
        if evicted:
            self._evicted.append([self._names[content], block.block_id])
        return evicted
