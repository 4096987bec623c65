"""Strict priorities, as vLLM's scheduler has them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from policies.api import AdmissionPolicy, RequestView
from policies.registry import register


@register("admission/priority")
@dataclass(slots=True, eq=False)
class Priority(AdmissionPolicy):
    """Admit the smallest ``priority`` first; when blocks run out, preempt the largest.

    A waiting request never preempts a running one. Low priorities can starve.

    Source: vLLM ``v1/core/sched/request_queue.py`` with ``policy="priority"``
    """

    preempts: ClassVar[Literal["last", "order"]] = "order"

    def order(self, request: RequestView, now: float) -> float:
        return request.priority
