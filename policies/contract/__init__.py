"""The rules of every kind of policy, as short plays that ``policies.testing`` runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from policies.contract.admission import admission
from policies.contract.eviction import eviction
from policies.contract.placement import pd, routing
from policies.contract.reuse import reuse
from policies.contract.subject import Answers, Subject

__all__ = ["PLAYS", "Subject"]

PLAYS: Mapping[str, tuple[Callable[[Subject, int], Answers], str]] = {
    "admission": (admission, "asking three times instead of once used something up"),
    "eviction": (eviction, "asking three times instead of once changed the order"),
    "reuse": (reuse, "asking three times instead of once used something up"),
    "routing": (routing, "calling `changed` or not made a difference"),
    "pd": (pd, "calling `changed` or not made a difference"),
}
"""The play of each kind, and what it means when its answers differ between 1 and 3 ``asks``."""
