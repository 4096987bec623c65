"""Reading traces: finds out which format a file has and hands it to that format's reader.

A format is one module of this package with a function under ``@reader``; nothing else lists it.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from os import PathLike
from types import MappingProxyType
from typing import Any, NamedTuple

from traces.errors import TraceError, listed, unknown
from traces.schema import Trace
from traces.source import Source, parse_object

__all__ = [
    "TIME_UNITS",
    "Detection",
    "Format",
    "ReadOptions",
    "Sample",
    "detect",
    "formats",
    "read",
    "reader",
]

TIME_UNITS: Mapping[str, int] = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}
"""Names of time units, with how many make a second."""


class Detection(NamedTuple):
    """Which format a file has, and what told."""

    format: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadOptions:
    """What the caller of ``read`` knows about a file; ``None`` where the file must tell."""

    block_tokens: int | None = None
    time_unit: str | None = None
    limit: int | None = None
    """Read only so many requests from the start of the file."""

    def __post_init__(self) -> None:
        for name, value in (("block_tokens", self.block_tokens), ("limit", self.limit)):
            if value is not None and value < 1:
                raise TraceError(f"{name} must be at least 1, not {value}")
        if self.time_unit is not None and self.time_unit not in TIME_UNITS:
            raise TraceError(f"time_unit must be one of {listed(TIME_UNITS)}, not {self.time_unit}")


@dataclass(frozen=True, slots=True)
class Sample:
    """The first line of a file that is not blank."""

    text: str
    keys: Mapping[str, Any]
    """The line as a JSON object; empty if it is none."""

    @property
    def columns(self) -> list[str]:
        """The line as a CSV header."""
        return [name.strip().strip('"') for name in self.text.split(",")]


@dataclass(frozen=True, slots=True)
class Format:
    """A registered trace format."""

    name: str
    about: str
    sniff: Callable[[Sample], str]
    """Why the sample is of this format, or an empty string."""
    read: Callable[[Source, ReadOptions], Trace]


_FORMATS: dict[str, Format] = {}


def reader(
    name: str, *, about: str, sniff: Callable[[Sample], str]
) -> Callable[[Callable[[Source, ReadOptions], Trace]], Callable[[Source, ReadOptions], Trace]]:
    """Registers a function as the reader of a format."""

    def register(
        function: Callable[[Source, ReadOptions], Trace],
    ) -> Callable[[Source, ReadOptions], Trace]:
        old = _FORMATS.get(name)
        if old is not None and old.read.__module__ != function.__module__:
            raise TraceError(
                f"format {name!r} is registered by {old.read.__module__} and "
                f"{function.__module__}; names must differ"
            )
        _FORMATS[name] = Format(name, about, sniff, function)
        return function

    return register


@cache
def _discover() -> None:
    package = import_module(__name__.rpartition(".")[0])
    for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
        import_module(module.name)


def formats() -> Mapping[str, Format]:
    """All formats by name."""
    _discover()
    return MappingProxyType(dict(sorted(_FORMATS.items())))


def detect(path: str | PathLike[str]) -> Detection:
    """The format of a file, from its first line. Raises ``TraceError`` if none or several fit."""
    return _detect(Source.at(path))


def _detect(source: Source) -> Detection:
    known = formats()
    catalogue = "; ".join(f"{f.name} ({f.about})" for f in known.values())
    try:
        number, text = next(source.lines(), (0, ""))
        keys = parse_object(text, source.where(number)) if text.startswith("{") else {}
    except TraceError as error:
        raise TraceError(f"{error}. Known formats: {catalogue}") from error
    if not text:
        raise TraceError(f"{source.path} holds only blank lines")
    sample = Sample(text, keys)
    found = [Detection(f.name, why) for f in known.values() if (why := f.sniff(sample))]
    if len(found) == 1:
        return found[0]
    if found:
        which = "; ".join(f"{f.format} ({f.reason})" for f in found)
        raise TraceError(f"{source.path} could be {which}: pass format")
    seen = f"the keys {listed(keys)}" if keys else f"{text[:60]!r}"
    raise TraceError(
        f"{source.path} is of no known format: its first line has {seen}. "
        f"Known formats: {catalogue}"
    )


def read(
    path: str | PathLike[str],
    *,
    format: str | None = None,
    block_tokens: int | None = None,
    time_unit: str | None = None,
    limit: int | None = None,
) -> Trace:
    """The trace in a file, plain or gzip.

    ``block_tokens`` and ``time_unit`` (s, ms, us, ns) settle what a file leaves open; contradicting
    the file is an error. ``limit`` keeps only so many requests from the start of the file.
    ``Trace.notes`` says what was decided. Raises ``TraceError``.
    """
    options = ReadOptions(block_tokens=block_tokens, time_unit=time_unit, limit=limit)
    if format is not None and format not in formats():
        raise unknown("trace format", format, formats())
    source = Source.at(path)
    return formats()[format or _detect(source).format].read(source, options)
