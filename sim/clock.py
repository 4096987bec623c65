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
    """Calls a function at set times; unlike a SimPy event it can be armed again and again.

    Arming it again does not cancel the earlier time: the function is called for both, and tells
    them apart by the number that ``arm`` returned, which is in ``Clock.serial``.
    """

    __slots__ = ("call", "payload")

    def __init__(self, call: Callable[[Timer], None], payload: Any = None) -> None:
        self.call = call
        self.payload = payload


class Clock(simpy.Environment):
    """Time is in integer picoseconds; holds SimPy's events and processes, and timers."""

    _now: int
    _queue: list[tuple[int, int, int, Any]]  # type: ignore[assignment]
    serial = -1
    """The number of the event being processed."""

    def arm(self, delay_ps: int, priority: int, timer: Timer) -> int:
        """Fire ``timer`` after ``delay_ps``; among equal times by priority, then in order."""
        serial = next(self._eid)
        heappush(self._queue, (self._now + delay_ps, priority, serial, timer))
        return serial

    def step(self) -> None:
        """Process the next event, as SimPy does, or the next timer."""
        if self._queue and type(self._queue[0][3]) is Timer:
            self._now, _, self.serial, timer = heappop(self._queue)
            timer.call(timer)
        else:
            super().step()

    def run_out(self) -> None:
        """Process events until none is left.

        As ``run()``, without a method call and an exception handler per event.
        """
        queue = self._queue
        while queue:
            self._now, _, self.serial, event = heappop(queue)
            if type(event) is Timer:
                event.call(event)
                continue
            callbacks = event.callbacks
            event.callbacks = None
            for callback in callbacks:
                callback(event)
            if not event._ok and not hasattr(event, "_defused"):
                raise event._value
