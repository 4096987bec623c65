"""SimPy's environment with a tighter loop: the simulator processes events by the million."""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush
from typing import Any

import simpy

SIGNAL = 0
"""Priority of signal collection: routers see the state before the arrivals of that instant."""
ARRIVAL = 1
"""Priority of arrivals (and of SimPy's own timeouts): before the step ends of that instant."""
LATE = 2
"""Priority of engine 0's step ends; engine i has ``LATE + i``, so that ties have an order."""


class Timer:
    """Calls a function at a set time; unlike a SimPy event it can be armed again and again.

    Arming it again replaces the earlier time.
    """

    __slots__ = ("call", "payload", "serial")

    def __init__(self, call: Callable[[Timer], None], payload: Any = None) -> None:
        self.call = call
        self.payload = payload
        self.serial = -1
        """The event that counts: entries of SimPy's queue cannot be taken back, only ignored."""


class Clock(simpy.Environment):
    """Time is in integer picoseconds; holds SimPy's events and processes, and timers."""

    _now: int
    _queue: list[tuple[int, int, int, Any]]  # type: ignore[assignment]

    def arm(self, delay_ps: int, priority: int, timer: Timer) -> None:
        """Fire ``timer`` after ``delay_ps``; among equal times by priority, then in order."""
        timer.serial = serial = next(self._eid)
        heappush(self._queue, (self._now + delay_ps, priority, serial, timer))

    def step(self) -> None:
        """Process the next event, as SimPy does, or the next timer."""
        if self._queue and type(self._queue[0][3]) is Timer:
            self._now, _, serial, timer = heappop(self._queue)
            if timer.serial == serial:
                timer.call(timer)
        else:
            super().step()

    def run_out(self) -> None:
        """Process events until none is left.

        As ``run()``, without a method call and an exception handler per event.
        """
        queue = self._queue
        while queue:
            self._now, _, serial, event = heappop(queue)
            if type(event) is Timer:
                if event.serial == serial:
                    event.call(event)
                continue
            callbacks = event.callbacks
            event.callbacks = None
            for callback in callbacks:
                callback(event)
            if not event._ok and not hasattr(event, "_defused"):
                raise event._value
