"""The error of this package and the wording its messages share.

Every message names the file, row or argument, the value, what was allowed and what is near.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from math import isfinite

__all__ = ["TraceError", "at_least", "did_you_mean", "listed", "positive", "unknown"]


class TraceError(ValueError):
    """A trace, a trace file or a request for one makes no sense."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """``"; did you mean 'x'?"`` for the nearest known name, or nothing."""
    names = sorted(known)
    near = get_close_matches(name, names, n=1)
    if not near:
        near = [n for n in names if n.lower() == name.lower()][:1]
    return f"; did you mean {near[0]!r}?" if near else ""


def unknown(what: str, name: str, known: Iterable[str]) -> TraceError:
    """The error for a name that is not among the known ones."""
    names = list(known)
    near = did_you_mean(name, names) or ";"
    return TraceError(f"no {what} {name!r}{near} known: {listed(names)}")


def listed(names: Iterable[object]) -> str:
    """Names for a message: ``a, b, c``."""
    return ", ".join(str(n) for n in names)


def positive(name: str, value: float) -> None:
    """Raises unless the argument is a finite number above 0."""
    if not (isfinite(value) and value > 0):
        raise TraceError(f"{name} must be a positive number, not {value}")


def at_least(name: str, value: float, least: float) -> None:
    """Raises unless the argument is a finite number of ``least`` or more."""
    if not (isfinite(value) and value >= least):
        raise TraceError(f"{name} must be at least {least:g}, not {value}")
