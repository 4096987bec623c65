"""Factories make policies: a class, a ``functools.partial`` of one, or anything callable.

Each engine calls the factory for a policy of its own, with a random seed of its own.
"""

from __future__ import annotations

import inspect
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from policies.api import PolicyError
from policies.parameters import name_of

__all__ = ["Assembly", "build", "describe"]

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Assembly:
    """A factory of a policy that is made of other policies."""

    whole: Callable[..., Any]
    parts: Mapping[str, Callable[..., Any]]

    def __call__(self, *, seed: int = 0) -> Any:
        parts = {name: build(part, seed, name) for name, part in self.parts.items()}
        return build(partial(self.whole, **parts), seed, "whole")


def build(factory: Callable[..., T], seed: int, stream: str) -> T:
    """Call a factory, with a seed of its own if it takes one that is not set yet.

    Args:
        factory: a policy class, a partial of one, or anything callable.
        seed: the run's.
        stream: what sets this policy apart from the others of the run, ``"eviction/3"``.

    Raises:
        PolicyError: the factory failed.
    """
    options = {"seed": zlib.crc32(f"{seed}/{stream}".encode())} if _takes_seed(factory) else {}
    try:
        return factory(**options)
    except Exception as error:
        raise PolicyError(
            f"policy factory {describe(factory)} failed: {type(error).__name__}: {error}"
        ) from error


def describe(policy: object) -> str:
    """The name of a policy, of its class, or of its factory, for messages."""
    if isinstance(policy, partial):
        options = ", ".join(f"{key}={value!r}" for key, value in policy.keywords.items())
        return f"{describe(policy.func)}({options})" if options else describe(policy.func)
    if isinstance(policy, Assembly):
        parts = ", ".join(f"{key}={describe(part)}" for key, part in policy.parts.items())
        return f"{describe(policy.whole)} with {parts}"
    thing = inspect.unwrap(policy) if callable(policy) else policy
    if not hasattr(thing, "__qualname__"):
        thing = type(thing)
    return str(getattr(thing, "__dict__", {}).get("policy_name", name_of(thing)))


def _takes_seed(factory: Callable[..., Any]) -> bool:
    if "seed" in getattr(factory, "keywords", {}):
        return False
    try:
        seed = inspect.signature(factory).parameters.get("seed")
    except (TypeError, ValueError):
        return False
    return seed is not None and seed.kind is not seed.POSITIONAL_ONLY
