"""A policy on the stage, and how its calls are shown in messages.

A play (one per kind of policy) makes the calls a backend could make on hand-made views, checks
each answer, and returns all answers as plain values, so that two plays can be compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

from policies.api import PolicyError, PrefixMatch, Slo
from policies.fakes import FakeBlock, FakeCluster, FakeEngine, FakeInstance, FakeRequest
from policies.strict import strict, unwrapped

__all__ = ["SLOS", "Answers", "Subject", "guarded", "ids", "show"]

T = TypeVar("T")
Answers = list[Any]
SLOS = (Slo(), Slo(name="chat", ttft_s=0.5), Slo(name="agent", ttft_s=2.0), Slo(ttft_s=1e-3))


class Subject:
    """A policy on the stage: a call that fails becomes a ``PolicyError`` that names it."""

    def __init__(self, name: str, policy: Any) -> None:
        self.name = name
        self.policy = policy

    def ask(self, call: str, *args: Any) -> Any:
        """The policy's answer."""
        try:
            return getattr(self.policy, call)(*args)
        except PolicyError as error:
            raise self.broke(call, args, str(error)) from error
        except Exception as error:
            raise self.broke(call, args, f"raised {type(error).__name__}: {error}") from error

    def broke(self, call: str, args: Sequence[Any], what: str) -> PolicyError:
        """The error for a call, in one line."""
        shown = ", ".join(show(arg) for arg in args)
        return PolicyError(f"{self.name}.{call}({shown}): {' '.join(what.split())}")


def guarded(view: T) -> T:
    """The view as a policy under test sees it."""
    return strict(view, policy="it")


def ids(blocks: Sequence[Any]) -> list[Any]:
    """The hashes of blocks."""
    return [block.hash for block in blocks]


def show(thing: Any) -> str:
    """An argument or an answer, for a message."""
    thing = unwrapped(thing)
    if isinstance(thing, FakeBlock):
        return f"block {thing.hash}"
    if isinstance(thing, FakeRequest | FakeInstance | FakeEngine):
        return f"{type(thing).__name__[4:].lower()} {thing.id}"
    if isinstance(thing, FakeCluster):
        return f"cluster of {len(thing.instances)}"
    if isinstance(thing, PrefixMatch):
        return f"match of {thing.tokens} tokens"
    if isinstance(thing, list):
        return f"[{', '.join(map(show, thing))}]"
    return f"{thing:g}" if isinstance(thing, float) else repr(thing)
