"""Shortest job first, with the prompt as the job."""

from __future__ import annotations

from dataclasses import dataclass

from policies.api import AdmissionPolicy, RequestView
from policies.registry import register


@register("admission/shortest_prompt")
@dataclass(slots=True, eq=False)
class ShortestPrompt(AdmissionPolicy):
    """Admit the request with the shortest prompt first.

    Least mean waiting time of all orders that know only the prompt, but long prompts can starve.
    """

    def order(self, request: RequestView, now: float) -> float:
        return request.prompt_tokens
