"""Sending the requests of a trace to live engines when they are due, whatever the engines do.

A turn of a chat is due at its recorded arrival, or a think time after the answer to the turn
before it, whichever is later: the rules of ``sim.simulator``, on the clock of the machine.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from math import nan
from typing import Any

from policies.api import PDPolicy, PolicyError, RequestView
from sim.arrivals import requests_of, turns_of
from sim.request import Request
from traces import Trace
from traces.schema import Chains
from validate.prompts import Prompts

__all__ = ["EngineDied", "Fate", "Instance", "Replay"]

LEAD_S = 0.05
"""Between the start of the replay and time 0, so that the first arrivals are not late."""


class EngineDied(RuntimeError):  # noqa: N818 - reads as what it is
    """An engine is gone; the message says why, as far as that is known."""


@dataclass(slots=True)
class Fate:
    """What happened to one request. Times are on ``time.monotonic()``, NaN where nothing was."""

    state: str = ""
    """``finished``, ``rejected``, ``failed``, ``timed_out`` or ``cancelled``; empty: not yet."""
    reason: str = ""
    engine: int = -1
    due: float = nan
    arrival: float = nan
    """When it was handed to its engine; ``arrival - due`` is how late the client was."""
    admitted: float = nan
    first: float = nan
    finish: float = nan
    received: float = nan
    """When the client had the last token."""
    output_tokens: int = 0
    cached_tokens: int = 0
    preemptions: int = 0


class Instance:
    """A live engine as a router sees it (an ``InstanceView``); subclasses serve requests.

    The client knows exactly what it has sent and what has ended, so ``inflight_tokens`` and
    ``waiting + running`` are exact; which of them run, and ``kv_usage``, are what the engine said
    last. ``matched_tokens`` is an estimate from above: the prompts sent there, as far as the
    engine's KV cache could hold them if it dropped the least recently used.
    """

    role = "both"

    def __init__(self, ident: int, *, model: str, chip: str) -> None:
        self.id = ident
        self.model = model
        self.chip = chip
        self.kv_usage = 0.0
        self.inflight_tokens = 0
        self.block_tokens = 1
        self.kv_blocks = 0
        self.max_model_len = 0
        self.died = ""
        """Why it can serve no more; empty while it can."""
        self._sent = 0
        self._said_running = 0
        self._said_at = time.monotonic()
        self._cached: OrderedDict[int, None] = OrderedDict()

    @property
    def running(self) -> int:
        return min(self._said_running, self._sent)

    @property
    def waiting(self) -> int:
        return self._sent - self.running

    @property
    def signal_age_s(self) -> float:
        """Time since the engine said something; 0 while it has nothing to do."""
        return time.monotonic() - self._said_at if self._sent else 0.0

    def matched_tokens(self, request: RequestView) -> int:
        matched = 0
        for ident in request.block_hashes[: (request.prompt_tokens - 1) // self.block_tokens]:
            if ident not in self._cached:
                break
            matched += 1
        return matched * self.block_tokens

    def said(self, running: int, kv_usage: float) -> None:
        """The engine reported after a step."""
        self._said_running, self.kv_usage = running, kv_usage
        self._said_at = time.monotonic()

    def sent(self, request: Request) -> None:
        self._sent += 1
        self.inflight_tokens += request.prompt_tokens
        for ident in reversed(request.block_hashes):  # the end of a prompt is dropped first
            self._cached[ident] = None
            self._cached.move_to_end(ident)
        while len(self._cached) > self.kv_blocks:
            self._cached.popitem(last=False)

    def ended(self, request: Request) -> None:
        self._sent -= 1
        self.inflight_tokens -= request.prompt_tokens

    async def serve(self, request: Request, prompt: list[int], fate: Fate) -> None:
        """Generate the answer and fill in the fate, its state included.

        Raises:
            EngineDied: the engine is gone; the fate has what was known until then.
            Any other exception fails this request alone.
        """
        raise NotImplementedError


class Replay:
    """One replay of a trace; ``instances`` is what makes it a ``ClusterView``.

    Engines that died are not among them; the list is another one then, never a changed one.

    Args:
        trace: what arrives.
        chains: its block ids in the engines' block size.
        prompts: the token ids of each request.
        instances: started engines.
        pd: places requests on them.
        model: what requests ask for that name no model.
        timeout_s: after which everything is given up; ``None`` waits for ever.
        progress: called with (requests done, requests).
    """

    def __init__(
        self,
        trace: Trace,
        chains: Chains,
        prompts: Prompts,
        instances: Sequence[Instance],
        pd: PDPolicy,
        *,
        model: str,
        timeout_s: float | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self.instances = list(instances)
        self.fates = [Fate() for _ in range(len(trace))]
        self.start = nan
        """``time.monotonic()`` at time 0 of the trace."""
        self.incomplete = ""
        """Why not every request was answered (or refused); empty if all were."""
        self._pd = pd
        self._listening = bool(getattr(pd, "listens", False))
        self._requests = requests_of(trace, chains, model, None)
        self._prompts = prompts
        self._turns = turns_of(trace)
        self._think_s: list[float] = trace.requests["think_s"].tolist()
        self._waiting_turns: dict[int, Request] = {}
        """Turns whose time has come but whose predecessor has not ended, by its row."""
        self._ended: dict[int, float] = {}
        """When predecessors ended whose successor's time has not come."""
        self._timeout_s = timeout_s
        self._progress = progress
        self._done = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._error: BaseException | None = None
        self._verdict = ("failed", "")
        """State and reason of what has no fate when the replay is over."""
        self._loop: asyncio.AbstractEventLoop | None = None
        self._over: asyncio.Event | None = None

    async def run(self) -> None:
        """Send everything and wait for all answers.

        Raises:
            PolicyError: the placement policy broke its contract.
        """
        self._loop = asyncio.get_running_loop()
        self._over = asyncio.Event()
        for instance in self.instances if self._listening else ():
            self._pd.changed(instance)
        self.start = time.monotonic() + LEAD_S
        self._spawn(self._feed)
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._over.wait()
        except TimeoutError:
            self._give_up("timed_out", f"the run took longer than timeout_s={self._timeout_s:g}")
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._error is not None:
            raise self._error
        state, reason = self._verdict
        lost = [fate for fate in self.fates if not fate.state]
        for fate in lost:
            fate.state, fate.reason = state, reason
        failed = sum(fate.state not in ("finished", "rejected") for fate in self.fates)
        if failed:
            why = reason or next(f.reason for f in self.fates if f.state == "failed")
            self.incomplete = f"{why}; {failed} of {len(self.fates)} requests have no answer"
        if self._progress is not None:
            self._progress(self._done, len(self.fates))

    def interrupt(self) -> None:
        """Give up; may be called from any thread."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._give_up, "cancelled", "interrupted by the user")

    # ------------------------------------------------------------------ arrivals

    def _spawn(self, work: Callable[..., Coroutine[Any, Any, None]], *args: Any) -> None:
        task = asyncio.create_task(self._guarded(work, *args))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _guarded(self, work: Callable[..., Coroutine[Any, Any, None]], *args: Any) -> None:
        try:
            await work(*args)
        except Exception as error:
            self._error = self._error or error
            self._finish()

    async def _feed(self) -> None:
        for request in self._requests:
            prompt = self._prompts[request.index].tolist()
            await _until(self.start + request.arrival_s)
            before = -1 if self._turns is None else int(self._turns[0][request.index])
            if before < 0:
                self._spawn(self._send, request, prompt, self.start + request.arrival_s)
            elif before in self._ended:
                self._release(request, self._ended.pop(before))
            else:
                self._waiting_turns[before] = request

    def _release(self, request: Request, ended: float) -> None:
        """The predecessor has ended: the turn comes after the think time, if not later anyway."""
        due = max(self.start + request.arrival_s, ended + self._think_s[request.index])
        self._spawn(self._send, request, self._prompts[request.index].tolist(), due)

    async def _send(self, request: Request, prompt: list[int], due: float) -> None:
        await _until(due)
        assert self._over is not None
        if self._over.is_set():
            return  # nobody is left to serve it, or nobody wants it any more
        fate = self.fates[request.index]
        now = time.monotonic()
        fate.due, fate.arrival = due, now
        request.arrival_s = now - self.start
        instance = self._place(request)
        fate.engine = instance.id
        room = request.max_tokens = instance.max_model_len - request.prompt_tokens
        if room < 1:
            fate.state = "rejected"
            fate.reason = (
                f"prompt_too_long: {request.prompt_tokens} prompt tokens, "
                f"but at most {instance.max_model_len - 1} fit"
            )
        else:
            request._true_output_tokens = min(request._true_output_tokens, room)
            instance.sent(request)
            self._changed(instance)
            try:
                await instance.serve(request, prompt, fate)
            except EngineDied as error:
                fate.state, fate.reason = "failed", str(error)
                self._lose(instance, str(error))
            except Exception as error:
                fate.state, fate.reason = "failed", _said(error)
            finally:
                instance.ended(request)
            self._changed(instance)
        self._ends(request, fate)

    def _lose(self, instance: Instance, why: str) -> None:
        """Routers no longer see it."""
        instance.died = why
        if instance in self.instances:
            self.instances = [other for other in self.instances if other is not instance]

    def _place(self, request: Request) -> Instance:
        placement = self._pd.place(request, self, request.arrival_s)
        both = getattr(placement, "prefill", None), getattr(placement, "decode", None)
        chosen: list[Instance] = [i for i in self.instances if i is both[0] and i is both[1]]
        if not chosen:
            raise PolicyError(
                f"{type(self._pd).__qualname__}.place({request.id}) answered {placement!r}; "
                f"a Placement of one instance of the cluster was expected"
            )
        return chosen[0]

    def _changed(self, instance: Instance) -> None:
        if self._listening:
            self._pd.changed(instance)

    # ------------------------------------------------------------------ ends

    def _ends(self, request: Request, fate: Fate) -> None:
        self._done += 1
        if self._progress is not None:
            self._progress(self._done, len(self.fates))
        row = request.index
        if self._turns is not None and self._turns[1][row] >= 0:
            # An answer ends for the client when it has it; a refusal when it was sent.
            ended = fate.arrival if fate.received != fate.received else fate.received
            turn = self._waiting_turns.pop(row, None)
            if turn is None:
                self._ended[row] = ended
            else:
                self._release(turn, ended)
        if self._done == len(self.fates):
            self._finish()
        elif not self.instances:
            self._give_up("failed", fate.reason)

    def _give_up(self, state: str, reason: str) -> None:
        if self._over is not None and not self._over.is_set():
            self._verdict = (state, reason)
            self._finish()

    def _finish(self) -> None:
        assert self._over is not None
        self._over.set()


def _said(error: BaseException) -> str:
    """An error in one line; one without a message says what caused it."""
    text = " ".join(str(error).split())
    if not text and error.__cause__ is not None:
        return _said(error.__cause__)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


async def _until(moment: float) -> None:
    """Sleep until ``time.monotonic()`` is there; gives others a turn in any case."""
    await asyncio.sleep(max(0.0, moment - time.monotonic()))
