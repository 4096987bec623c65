"""vLLM's waiting queue, ordered and guarded by an admission policy.

``Scheduler.schedule`` asks the truth value of the queue, then its head: so a queue that is false
while its head may not run holds requests without losing them (``v1/core/sched/scheduler.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from heapq import heapify, heappop, heappush
from math import isnan
from typing import Any

from vllm.v1.core.sched.request_queue import RequestQueue

from policies.api import ADMIT, Admission, AdmissionPolicy, Admit, Defer, PolicyError, Reject
from sim.latency import PS_PER_S
from validate.vllm_plugin.views import EngineView, RequestView, policy_name

__all__ = ["PolicyQueue"]


class PolicyQueue(RequestQueue):
    """Waiting requests by ``AdmissionPolicy.order``, held back or rejected by ``admit``.

    Ties go by arrival at the engine, like vLLM's ``policy="fcfs"``; where the policy also picks
    who is preempted (``preempts = "order"``), by arrival time and id, like its
    ``policy="priority"``. In that mode vLLM preempts the largest ``(request.priority,
    request.arrival_time)``, so ``request.priority`` is set to the order; nothing else of vLLM
    reads it, and views show the original.

    Raises:
        PolicyError: an answer of the policy is of the wrong kind. The engine stops; its log ends
            with the message.
    """

    def __init__(
        self,
        policy: AdmissionPolicy,
        engine: EngineView,
        views: Mapping[str, RequestView],
        reject: Callable[[Any, str], None],
    ) -> None:
        self.policy = policy
        self._engine = engine
        self._views = views
        self._reject = reject
        self._by_order = policy.preempts == "order"
        self._plain_order = type(policy).order is AdmissionPolicy.order
        self._plain_admit = type(policy).admit is AdmissionPolicy.admit
        self._heap: list[tuple[Any, ...]] = []
        self._answer: Admission = ADMIT
        self._asked: Any = None
        self._asked_change = -1
        self._asked_step = 0

    # ------------------------------------------------------------------ joining and leaving

    def add_request(self, request: Any) -> None:
        """A new request, or one that got more input."""
        self._join(request)

    def prepend_request(self, request: Any) -> None:
        """A preempted request: the policy orders it anew."""
        self._join(request)

    def prepend_requests(self, requests: Iterable[Any]) -> None:
        """Requests that this step could not consider: they keep their places."""
        for request in requests:
            heappush(self._heap, self._entry(request))

    def pop_request(self) -> Any:
        """Take the head."""
        return heappop(self._heap)[-1]

    def peek_request(self) -> Any:
        """The head, whether it may run or not."""
        return self._heap[0][-1]

    def remove_request(self, request: Any) -> None:
        """Take out one request."""
        self.remove_requests((request,))

    def remove_requests(self, requests: Iterable[Any]) -> None:
        """Take out those that are here."""
        gone = set(requests)
        kept = [entry for entry in self._heap if entry[-1] not in gone]
        if len(kept) < len(self._heap):
            heapify(kept)
            self._heap = kept

    def __len__(self) -> int:
        return len(self._heap)

    def __iter__(self) -> Iterator[Any]:
        return iter([entry[-1] for entry in sorted(self._heap)])

    def __bool__(self) -> bool:
        """Whether the head may run now; rejects those that the policy refuses.

        Outside ``schedule``, and where no seat is free, the policy is not asked.
        """
        if not self._engine.planning:
            return bool(self._heap)
        if self._engine.seats < 1:
            return False
        while self._heap:
            if self._plain_admit:
                return True
            request = self._heap[0][-1]
            answer = self._verdict(request)
            if isinstance(answer, Reject):
                self._reject(request, answer.reason)
            else:
                return isinstance(answer, Admit)
        return False

    # ------------------------------------------------------------------ asking the policy

    def deferred_until_s(self) -> float | None:
        """When the deferred head must be asked again (``inf``: on a change); ``None``: now."""
        answer = self._answer
        if (
            self._heap
            and type(answer) is Defer
            and self._asked is self._heap[0][-1]
            and self._asked_change == self._engine.changes
        ):
            return answer.until_s
        return None

    def _join(self, request: Any) -> None:
        view = self._views[request.request_id]
        order = 0.0
        if not self._plain_order:
            order = self.policy.order(view, self._engine.now_s)
            if not isinstance(order, int | float) or isnan(order):
                raise PolicyError(
                    f"{policy_name(self.policy)}.order({view.id}) answered {order!r}; "
                    f"a number was expected"
                )
        view.order = order
        if self._by_order:
            request.priority = order
        heappush(self._heap, self._entry(request))

    def _entry(self, request: Any) -> tuple[Any, ...]:
        view = self._views[request.request_id]
        if self._by_order:
            return (view.order, request.arrival_time, request.request_id, request)
        return (view.order, view.rank, request)

    def _verdict(self, request: Any) -> Admission:
        """The answer for the head, asked when it may differ (``sim.scheduler.Engine._verdict``)."""
        engine, policy, answer = self._engine, self.policy, self._answer
        if (
            self._asked is request
            and self._asked_change == engine.changes
            and not (type(answer) is Defer and _passed(answer, engine.now_s))
            and (
                policy.horizon_steps is None
                or engine.steps_done < self._asked_step + policy.horizon_steps
            )
        ):
            return answer
        view = self._views[request.request_id]
        answer = policy.admit(view, engine, engine.now_s)
        if not isinstance(answer, Admit | Defer | Reject):
            raise PolicyError(
                f"{policy_name(policy)}.admit({view.id}) answered {answer!r}; "
                f"Admit, Defer or Reject was expected"
            )
        if type(answer) is Defer and _passed(answer, engine.now_s):
            raise PolicyError(
                f"{policy_name(policy)}.admit({view.id}, now={engine.now_s}) deferred "
                f"until {answer.until_s}, which has passed"
            )
        self._asked = request
        self._asked_change = engine.changes
        self._asked_step = engine.steps_done
        self._answer = answer
        return answer


def _passed(answer: Defer, now_s: float) -> bool:
    """In whole picoseconds, as in the simulator: both round a policy's time in the same way."""
    return answer.until_s * PS_PER_S <= round(now_s * PS_PER_S)
