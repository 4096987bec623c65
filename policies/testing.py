"""Does a policy keep the contract? ``check`` plays through every rule of its kind.

As a command: ``python -m policies.testing eviction/mine --policy-module my_policy.py``.
"""

from __future__ import annotations

import argparse
import collections
import datetime
import os
import random
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING
from types import ModuleType
from typing import Any, NoReturn

from policies.api import PolicyError
from policies.contract import PLAYS, Subject
from policies.parameters import parameters_of
from policies.recorder import Decision, Recorder, recorded
from policies.registry import KINDS, build, catalog, describe, load_module, lookup
from policies.strict import strict

__all__ = ["Decision", "Recorder", "check", "main", "recorded", "strict"]

MUTABLE = (list, dict, set, bytearray, collections.deque, random.Random, *KINDS.values())


def check(policy: str | Callable[..., Any]) -> None:
    """Raise unless the policy keeps every rule of its kind.

    Args:
        policy: a name (``"eviction/mine"``), a class, or a factory.

    Raises:
        UnknownPolicy: no policy has this name.
        PolicyError: it breaks a rule; one line with the policy, the call and the rule.
    """
    factory: Callable[..., Any] = lookup(policy).cls if isinstance(policy, str) else policy
    name = describe(factory)

    if isinstance(factory, type):
        _check_parameters(name, factory)
    first = build(factory, 1, "check")
    kind = next((kind for kind, base in KINDS.items() if isinstance(first, base)), None)
    if kind is None:
        bases = ", ".join(base.__name__ for base in KINDS.values())
        raise PolicyError(f"{name}: {type(first).__name__} derives from none of {bases}")
    cls = type(first)
    if not isinstance(factory, type):
        _check_parameters(name, cls)
    play, meaning = PLAYS[kind]
    modules = [
        module
        for c in cls.__mro__
        if (module := sys.modules.get(c.__module__))
        and c.__module__ not in ("policies.api", "abc", "builtins")
    ]
    with _no_clock(modules):
        before = _outside(cls, modules)
        first = build(factory, 1, "check")
        once = play(Subject(name, first), 1)
        changed = [place for place, now in _outside(cls, modules).items() if now != before[place]]
        if changed:
            raise PolicyError(
                f"{name}: it keeps state outside the object: {changed[0]} changed in the run"
            )
        second = build(factory, 1, "check")
        again = play(Subject(name, second), 1)
        mine = {id(value): field for field, value in _fields(first)}
        for _, value in _fields(second):
            if id(value) in mine:
                raise PolicyError(f"{name}: two objects share one {mine[id(value)]}")
        _check_same(name, once, again, "two objects answered the same calls differently")
        thrice = play(Subject(name, build(factory, 1, "check")), 3)
        _check_same(name, once, thrice, meaning)


def main(arguments: list[str] | None = None) -> int:
    """The command line: check the policies named, or all; 1 if one breaks a rule."""
    parser = argparse.ArgumentParser(prog="python -m policies.testing", description=main.__doc__)
    parser.add_argument("names", nargs="*", metavar="kind/name", help="default: every policy")
    parser.add_argument(
        "--policy-module", action="append", default=[], metavar="FILE", help="import this first"
    )
    options = parser.parse_args(arguments)
    broken = 0
    try:
        for module in options.policy_module:
            load_module(module)
        names = options.names or list(catalog())
        for name in names:
            lookup(name)
    except (PolicyError, KeyError, OSError) as error:
        parser.error(str(error))
    for name in names:
        try:
            check(name)
        except PolicyError as error:
            broken += 1
            print(error, file=sys.stderr)
        else:
            print(f"{name}: ok")
    return 1 if broken else 0


# --------------------------------------------------------------------------- rules of all kinds


def _check_parameters(name: str, cls: type) -> None:
    for parameter in parameters_of(cls):
        if parameter.type in (MISSING, Any):
            raise PolicyError(f"{name}: parameter {parameter.name} has no type")
        if parameter.default is MISSING:
            raise PolicyError(f"{name}: parameter {parameter.name} has no default")


def _check_same(name: str, some: list[Any], others: list[Any], meaning: str) -> None:
    if some != others:
        at = next((i for i, (a, b) in enumerate(zip(some, others, strict=False)) if a != b), None)
        if at is None:
            at = min(len(some), len(others)) - 1
        raise PolicyError(
            f"{name}: {meaning}: answer {at + 1} was {some[at]!r}, then {others[at]!r}"
        )


def _fields(policy: object) -> Iterator[tuple[str, object]]:
    """The attributes of an object that can change without being set."""
    names = {name for c in type(policy).__mro__ for name in getattr(c, "__slots__", ())}
    for name in sorted(names | set(getattr(policy, "__dict__", {}))):
        value = getattr(policy, name, None)
        if isinstance(value, MUTABLE):
            yield name, value


def _outside(cls: type, modules: list[ModuleType]) -> dict[str, Any]:
    """Everything a policy could change outside its objects: class and module variables."""
    found: dict[str, Any] = {}
    owners: list[tuple[str, Mapping[str, Any]]] = [
        *((c.__name__, vars(c)) for c in cls.__mro__ if c.__module__ != "policies.api"),
        *((module.__name__, vars(module)) for module in modules),
    ]
    for owner, variables in owners:
        for name, value in variables.items():
            if not name.startswith(("__", "_abc_")):
                found[f"{owner}.{name}"] = (id(value), _content(value))
    return found


def _content(value: object) -> object:
    if isinstance(value, dict):
        return [(id(key), id(item)) for key, item in value.items()]
    if isinstance(value, list | set | frozenset | collections.deque):
        return [id(item) for item in value]
    return value.getstate() if isinstance(value, random.Random) else None


@contextmanager
def _no_clock(modules: list[ModuleType]) -> Iterator[None]:
    """Make the clocks and the global random generator raise, also where imported by name."""

    def refuse(what: str, instead: str) -> Callable[..., NoReturn]:
        def call(*args: object, **options: object) -> NoReturn:
            raise PolicyError(f"{what}() is out of bounds; {instead}")

        return call

    clock = "use the argument `now`"
    seed = "give the policy a field `seed: int` and a random.Random(seed)"
    traps: list[tuple[ModuleType, str, Any]] = [(os, "urandom", refuse("os.urandom", seed))]
    traps += [
        (time, name, refuse(f"time.{name}", clock))
        for name in dir(time)
        if name.removesuffix("_ns") in ("time", "monotonic", "perf_counter", "process_time")
    ]
    traps += [
        (random, name, refuse(f"random.{name}", seed))
        for name in random.__all__
        if isinstance(getattr(getattr(random, name), "__self__", None), random.Random)
    ]
    calls = {name: refuse(f"datetime.{name}", clock) for name in ("now", "utcnow", "today")}
    date = type("datetime", (datetime.datetime,), {k: staticmethod(v) for k, v in calls.items()})
    traps.append((datetime, "datetime", date))
    undo: list[tuple[ModuleType, str, Any]] = []
    for module, name, trap in traps:
        real = getattr(module, name)
        for place in [module, *modules]:
            for known, value in list(vars(place).items()):
                if value is real:
                    undo.append((place, known, real))
                    setattr(place, known, trap)
    try:
        yield
    finally:
        for place, name, real in undo:
            setattr(place, name, real)


if __name__ == "__main__":
    sys.exit(main())
