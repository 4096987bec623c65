"""First come, first served. The default of vLLM and of this lab."""

from __future__ import annotations

from dataclasses import dataclass

from policies.api import AdmissionPolicy
from policies.registry import register


@register("admission/fcfs")
@dataclass(slots=True, eq=False)
class Fcfs(AdmissionPolicy):
    """Admit requests in order of arrival; when blocks run out, preempt the last admitted.

    Source: vLLM ``v1/core/sched/scheduler.py`` with ``policy="fcfs"``
    """
