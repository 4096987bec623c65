"""The catalogue of policies: names, parameters, and how to make one.

A policy registers itself with a decorator; ``catalog`` imports every module of the bench and of
the entry-point group ``servelab.policies``, so a new file needs no edit anywhere else.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import pkgutil
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any, TypeAlias, TypeVar

from policies.api import (
    AdmissionPolicy,
    EvictionPolicy,
    PDPolicy,
    PolicyError,
    PolicySet,
    ReusePolicy,
    Router,
)
from policies.factories import Assembly, build, describe
from policies.parameters import Parameter, check_value, name_of, nearest, parameters_of

__all__ = [
    "KINDS",
    "Entry",
    "Parameter",
    "PolicySpec",
    "UnknownPolicy",
    "build",
    "catalog",
    "create",
    "describe",
    "factory",
    "load_module",
    "lookup",
    "policy_set",
    "register",
]

T = TypeVar("T")
PolicySpec: TypeAlias = str | Mapping[str, Any] | Callable[..., Any]
"""A policy by name, by name and parameters (``{"name": "cap", "max_tokens": 9}``), or a factory."""

KINDS: Mapping[str, type] = {
    "admission": AdmissionPolicy,
    "eviction": EvictionPolicy,
    "reuse": ReusePolicy,
    "routing": Router,
    "pd": PDPolicy,
}
"""Every kind of policy and the class that its policies derive from."""

GROUP = "servelab.policies"
"""Entry-point group of installed packages that bring policies: ``my_name = my_package.module``."""

_registered: dict[str, type] = {}
_imported: set[str] = set()
"""Holds ``GROUP`` once everything has been imported."""


class UnknownPolicy(KeyError):  # noqa: N818 - reads as what it is
    """No policy has this name."""

    def __str__(self) -> str:
        return str(self.args[0])


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """What the catalogue knows of a policy."""

    kind: str
    name: str
    """Without the kind: ``lru``."""
    cls: type
    summary: str
    """First line of the docstring."""
    source: str
    """What the docstring says after ``Source:``, in one line; empty where it says nothing."""
    needs_oracle: bool
    parameters: tuple[Parameter, ...]
    """What a user can set."""
    parts: Mapping[str, str]
    """Arguments that are policies themselves, and their kinds: ``{"router": "routing"}``."""

    @property
    def key(self) -> str:
        """``kind/name``."""
        return f"{self.kind}/{self.name}"


# --------------------------------------------------------------------------- registering


def register(name: str) -> Callable[[type[T]], type[T]]:
    """Class decorator that enters a policy under ``kind/name``.

    The same class defined again (a notebook cell that is run twice) replaces the earlier one.

    Raises:
        ValueError: the name is malformed, of no known kind, or taken.
        TypeError: the class does not derive from the base class of its kind.
    """
    if not isinstance(name, str) or not re.fullmatch(r"[^/]+/[a-z][a-z0-9_]*", name):
        raise ValueError(
            f"policy name {name!r} is not of the form kind/name in lower case, for example "
            f"'eviction/slo_aware'"
        )
    kind = name.partition("/")[0]
    if kind not in KINDS:
        raise ValueError(f"policy name {name!r}: {nearest('kind', kind, KINDS)}")

    def enter(cls: type[T]) -> type[T]:
        base = KINDS[kind]
        if not isinstance(cls, type) or not issubclass(cls, base):
            raise TypeError(f"{name}: {name_of(cls)} must be a class derived from {base.__name__}")
        known = _registered.get(name)
        if known is not None and name_of(known) != name_of(cls):
            raise ValueError(
                f"policy name {name!r} is taken by {name_of(known)}; "
                f"{name_of(cls)} needs another one"
            )
        _registered[name] = cls
        cls.policy_name = name  # type: ignore[attr-defined]
        return cls

    return enter


def load_module(path_or_module: str | Path) -> ModuleType:
    """Import a user's own policies: a file (``my_policy.py``) or the dotted name of a module.

    Raises:
        FileNotFoundError: there is no such file.
        PolicyError: the module cannot be imported.
    """
    text = str(path_or_module)
    if not text.endswith(".py") and "/" not in text and "\\" not in text:
        return _import(text)
    path = Path(text).resolve()
    if not path.is_file():
        near = get_close_matches(path.name, [p.name for p in path.parent.glob("*.py")], 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise FileNotFoundError(f"no policy file {text}{hint}")
    stem = path.stem
    known = sys.modules.get(stem)
    if known is not None and getattr(known, "__file__", None) == str(path):
        return known
    if known is not None or stem in sys.stdlib_module_names:
        raise PolicyError(f"{text}: a module named {stem!r} exists already; rename the file")
    spec = importlib.util.spec_from_file_location(stem, path)
    if spec is None or spec.loader is None:
        raise PolicyError(f"{text} is no Python file; its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[stem] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[stem]
        raise PolicyError(f"cannot import {text}: {type(error).__name__}: {error}") from error
    return module


def catalog() -> dict[str, Entry]:
    """Every policy by ``kind/name``, in order of kind and name.

    Raises:
        PolicyError: a module with policies cannot be imported.
    """
    if GROUP not in _imported:
        for kind in KINDS:
            package = _import(f"policies.{kind}")
            for module in pkgutil.iter_modules(package.__path__):
                _import(f"{package.__name__}.{module.name}")
        from importlib.metadata import entry_points  # noqa: PLC0415 - slow, needed only here

        for point in entry_points(group=GROUP):
            _import(point.module, f" (entry point {point.name!r} of group {GROUP!r})")
        _imported.add(GROUP)
    order = list(KINDS)
    names = sorted(_registered, key=lambda name: (order.index(name.partition("/")[0]), name))
    return {name: _entry(name, _registered[name]) for name in names}


def lookup(name: str) -> Entry:
    """The catalogue's entry for ``kind/name``.

    Raises:
        UnknownPolicy: there is none; the message has the nearest and all valid names.
    """
    known = catalog()
    if name in known:
        return known[name]
    kind, slash, _ = str(name).partition("/")
    if not slash:
        fits = [key for key in known if key.partition("/")[2] == name]
        hint = f"did you mean {fits[0]!r}?" if fits else "a name is of the form kind/name"
        raise UnknownPolicy(f"no policy {name!r}; {hint}")
    if kind not in KINDS:
        raise UnknownPolicy(f"no policy {name!r}: {nearest('kind', kind, KINDS)}")
    raise UnknownPolicy(nearest("policy", name, [k for k in known if k.startswith(f"{kind}/")]))


# --------------------------------------------------------------------------- making


def create(name: str, /, **parameters: Any) -> Any:
    """A new policy: ``create("eviction/slo_aware", grace_s=3)``; errors as ``factory``."""
    return factory(name, **parameters)()


def factory(name: str, /, **parameters: Any) -> Callable[..., Any]:
    """What makes policies of this name with these parameters, which are checked at once.

    A part of the policy (the router of a PD policy) is given as a ``PolicySpec``.

    Raises:
        UnknownPolicy: no policy has the name.
        TypeError: a parameter is unknown or has the wrong type.
        ValueError: a parameter is out of range.
    """
    entry = lookup(name)
    known = {parameter.name: parameter for parameter in entry.parameters}
    options: dict[str, object] = {}
    parts: dict[str, Callable[..., Any]] = {}
    for key, value in parameters.items():
        if key in entry.parts:
            parts[key] = _factory(entry.parts[key], value)
        elif key in known:
            options[key] = check_value(f"{name}: {key}", known[key].type, value)
        elif not known and not entry.parts:
            raise TypeError(f"{name} has no parameters, but {key}={value!r} was given")
        else:
            raise TypeError(f"{name}: {nearest('parameter', key, [*known, *entry.parts])}")
    made: Callable[..., Any] = partial(entry.cls, **options)
    if parts:
        made = Assembly(made, parts)
    try:
        made()
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    except TypeError as error:
        raise TypeError(f"{name}: {error}") from None
    return made


def policy_set(
    admission: PolicySpec = "fcfs",
    eviction: PolicySpec = "lru",
    reuse: PolicySpec = "always",
    pd: PolicySpec = "colocated",
    routing: PolicySpec | None = None,
) -> PolicySet:
    """The policies of a run, each by name (without the kind), by name and parameters, or ready.

    Args:
        admission: per engine.
        eviction: per engine and tier.
        reuse: per engine.
        pd: per cluster.
        routing: router for every part of the PD policy that is one; round robin if not given.

    Raises:
        UnknownPolicy: no policy has the name.
        TypeError: a parameter is unknown or has the wrong type.
        ValueError: a parameter is out of range, or the PD policy has no use for ``routing``.
    """
    place = _factory("pd", pd)
    target = place.func if isinstance(place, partial) else place
    given = place.keywords if isinstance(place, partial) else {}
    routers = [
        parameter.name
        for parameter in (parameters_of(target) if isinstance(target, type) else [])
        if _kind_of(parameter.type) == "routing" and parameter.name not in given
    ]
    if routers:
        router = _factory("routing", "round_robin" if routing is None else routing)
        place = Assembly(place, dict.fromkeys(routers, router))
    elif routing is not None:
        raise ValueError(f"routing is {_show(routing)}, but pd={_show(pd)} takes no router")
    return PolicySet(
        admission=_factory("admission", admission),
        eviction=_factory("eviction", eviction),
        reuse=_factory("reuse", reuse),
        pd=place,
    )


# --------------------------------------------------------------------------- inside


def _factory(kind: str, spec: PolicySpec) -> Callable[..., Any]:
    """A factory from what a user gave for a policy of this kind."""
    options: dict[str, Any] = {}
    name: object = spec
    if isinstance(spec, Mapping):
        options = dict(spec)
        name = options.pop("name", None)
        if not isinstance(name, str):
            raise TypeError(f"{kind} is {dict(spec)!r}; it needs a 'name', for example 'lru'")
    if isinstance(name, str):
        given, slash, _ = name.partition("/")
        if slash and given != kind:
            raise ValueError(f"{kind} is {name!r}, which is of another kind; allowed: {kind}/...")
        return factory(name if slash else f"{kind}/{name}", **options)
    if isinstance(spec, KINDS[kind]):
        raise TypeError(f"{kind} is a {describe(spec)} object; give its class: engines share none")
    if not callable(spec):
        raise TypeError(f"{kind} is {spec!r}; allowed: a name, a mapping with a name, a factory")
    target = spec.func if isinstance(spec, partial) else spec
    if isinstance(target, type) and not issubclass(target, KINDS[kind]):
        raise TypeError(f"{kind} is {describe(spec)}; allowed: a {KINDS[kind].__name__}")
    return spec


def _kind_of(hint: object) -> str | None:
    for kind, base in KINDS.items():
        if isinstance(hint, type) and issubclass(hint, base):
            return kind
    return None


def _show(spec: Any) -> str:
    return repr(spec) if isinstance(spec, str | Mapping) else describe(spec)


def _import(name: str, why: str = "") -> ModuleType:
    try:
        return importlib.import_module(name)
    except Exception as error:
        raise PolicyError(
            f"cannot import policies from {name}{why}: {type(error).__name__}: {error}"
        ) from error


@cache
def _entry(name: str, cls: type) -> Entry:
    kind, _, short = name.partition("/")
    doc = inspect.getdoc(cls) or ""
    if doc.startswith(f"{cls.__name__}("):  # what dataclass() writes where there is no docstring
        doc = inspect.getdoc(sys.modules.get(cls.__module__)) or ""
    source = re.search(r"^Source:\s*(.+?)(?:\n\s*\n|\Z)", doc, re.MULTILINE | re.DOTALL)
    every = parameters_of(cls)
    parts = {p.name: part for p in every if (part := _kind_of(p.type)) is not None}
    return Entry(
        kind=kind,
        name=short,
        cls=cls,
        summary=doc.partition("\n")[0].strip(),
        source=" ".join(source[1].split()) if source else "",
        needs_oracle=bool(getattr(cls, "needs_oracle", False)),
        parameters=tuple(p for p in every if p.name not in parts),
        parts=parts,
    )
