"""What a policy can be told: its parameters, read from the class, and whether a value fits one.

Parameters are the fields of a dataclass (or the arguments of ``__init__``); the string below a
field is its documentation.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import sys
import textwrap
import types
import typing
from collections.abc import Iterable
from dataclasses import MISSING, dataclass
from difflib import get_close_matches
from itertools import pairwise
from typing import Any, Literal

from policies.api import PolicyError

__all__ = ["Parameter", "check_value", "name_of", "nearest", "parameters_of", "type_name"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameter:
    """One parameter of a policy."""

    name: str
    type: Any
    """Its annotation, resolved (``float``, ``int | None``); ``dataclasses.MISSING`` without one."""
    default: Any
    """``dataclasses.MISSING`` where there is none."""
    doc: str = ""
    """The string below it in the source, in one line."""


def parameters_of(cls: type) -> list[Parameter]:
    """What the class can be called with, in order.

    Raises:
        PolicyError: an annotation names something that does not exist.
    """
    try:
        if dataclasses.is_dataclass(cls):
            hints = typing.get_type_hints(cls)
            docs = _docs(cls)
            return [
                Parameter(
                    name=field.name,
                    type=hints[field.name],
                    default=(
                        field.default
                        if field.default_factory is MISSING
                        else field.default_factory()
                    ),
                    doc=docs.get(field.name, ""),
                )
                for field in dataclasses.fields(cls)
                if field.init
            ]
        init = vars(cls).get("__init__", cls.__init__)  # type: ignore[misc]
        hints = {} if init is object.__init__ else typing.get_type_hints(init)
    except NameError as error:
        raise PolicyError(f"{name_of(cls)}: type of a parameter: {error}") from error
    return [
        Parameter(
            name=argument.name,
            type=hints.get(argument.name, MISSING),
            default=MISSING if argument.default is argument.empty else argument.default,
        )
        for argument in inspect.signature(cls).parameters.values()
    ]


def check_value(what: str, hint: Any, value: object) -> object:
    """The value, if it is of the type; a whole number for a float becomes one.

    Raises:
        TypeError: it is not; the message begins with ``what``.
    """
    options = _options(hint)
    for option in options:
        if typing.get_origin(option) is Literal:
            if any(value == v and type(value) is type(v) for v in typing.get_args(option)):
                return value
        elif option in (Any, MISSING):
            return value
        elif option in (int, float):
            if type(value) is option:
                return value
        elif isinstance(value, typing.get_origin(option) or option):
            return value
    if float in options and type(value) is int:
        return float(value)
    raise TypeError(f"{what} is {value!r}; allowed: {type_name(hint)}")


def type_name(hint: Any) -> str:
    """A type as a reader would write it: ``float``, ``int or None``, ``'a' or 'b'``."""
    names: list[str] = []
    for option in _options(hint):
        if typing.get_origin(option) is Literal:
            names += [repr(value) for value in typing.get_args(option)]
        elif option is types.NoneType:
            names.append("None")
        else:
            names.append(option.__name__ if isinstance(option, type) else str(option))
    return " or ".join(names)


def name_of(thing: object) -> str:
    """Module and name of a class or function."""
    return f"{getattr(thing, '__module__', '?')}.{getattr(thing, '__qualname__', repr(thing))}"


def nearest(what: str, given: object, valid: Iterable[str]) -> str:
    """``no policy 'x'; did you mean 'y'? Valid: ...``."""
    names = list(valid)
    near = get_close_matches(str(given), names, 1)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    return f"no {what} {given!r}{hint} Valid: {', '.join(names)}"


def _options(hint: Any) -> tuple[Any, ...]:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return typing.get_args(hint)
    return (hint,)


def _docs(cls: type) -> dict[str, str]:
    """The strings right below the fields of a class and its bases."""
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(base) or base.__module__ not in sys.modules:
            continue
        try:
            (node,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        except (OSError, TypeError, ValueError, SyntaxError):  # typed at a prompt: no source
            continue
        body = node.body if isinstance(node, ast.ClassDef) else []
        for field, text in pairwise(body):
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(field.target, ast.Name)
                and isinstance(text, ast.Expr)
                and isinstance(text.value, ast.Constant)
                and isinstance(text.value.value, str)
            ):
                docs[field.target.id] = " ".join(text.value.value.split())
    return docs
