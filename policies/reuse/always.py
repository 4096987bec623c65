"""Use and keep everything. The default of vLLM and of this lab."""

from __future__ import annotations

from dataclasses import dataclass

from policies.api import ReusePolicy
from policies.registry import register


@register("reuse/always")
@dataclass(slots=True, eq=False)
class Always(ReusePolicy):
    """Use all of a cached prefix and keep all of every prompt."""
