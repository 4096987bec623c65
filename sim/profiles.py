"""Reads the YAML files of ``hardware_profiles`` and of users, key by key.

Every problem becomes one ``ProfileError`` that names the file, the key and what was allowed.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Hashable, Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypeVar

import yaml

__all__ = ["Group", "ProfileError", "Section", "build", "names", "nearest", "read", "stem"]

SUFFIXES = (".yaml", ".yml")
T = TypeVar("T")
Group: TypeAlias = Literal["chip", "link", "model"]

TAGS = {
    "V": "vendor datasheet, vendor repository or page",
    "P": "press or third party",
    "R": "measured, or computed from published measurements",
    "E": "estimate",
}
"""Trust tags of numbers."""

OWN_KEYS = {"calibrated", "calibration"}
"""Not inherited through ``extends``: a changed copy of a measured chip was not measured."""


class ProfileError(ValueError):
    """A profile is unknown, malformed, or cannot do what was asked of it."""


def names(group: Group) -> tuple[str, ...]:
    """The profiles of a group that come with the package, sorted."""
    folder = resources.files("hardware_profiles").joinpath(group)
    return tuple(
        sorted({file.name[:-5] for file in folder.iterdir() if file.name.endswith(".yaml")})
    )


def nearest(word: str, words: Iterable[str]) -> str:
    """``"; did you mean 'x'?"`` or, with nothing near, the words themselves."""
    known = sorted(words)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else f"; known: {', '.join(known)}"


def read(group: Group, name: str) -> Section:
    """A profile by name, or by the path of a YAML file, with its ``extends`` filled in."""
    where, data = _document(group, name)
    seen = [name]
    while (parent := data.pop("extends", None)) is not None:
        if not isinstance(parent, str):
            raise ProfileError(f"{where}: extends: expected a profile name, got {parent!r}")
        if parent in seen:
            raise ProfileError(f"{where}: extends: circle {' -> '.join([*seen, parent])}")
        seen.append(parent)
        above = _document(group, parent)[1]
        data = _merged({key: above[key] for key in above if key not in OWN_KEYS}, data)
    return Section(data, where)


class Section:
    """A mapping of a profile; each key is asked for once, and ``close`` refuses the rest.

    A number is written plainly or as ``{value: 3.0, tag: V, source: "..."}``.
    """

    def __init__(self, data: Mapping[str, object], where: str, prefix: str = "") -> None:
        self.where = where
        self._data = data
        self.prefix = prefix
        self._asked: set[str] = set()

    def __contains__(self, key: str) -> bool:
        """Whether the key is there and not null."""
        self._asked.add(key)
        return self._data.get(key) is not None

    def error(self, key: str, problem: str) -> ProfileError:
        """An error that names file and key."""
        return ProfileError(f"{self.where}: {self.prefix}{key}: {problem}")

    def number(self, key: str, default: float | None = None) -> float:
        """A finite or infinite number; whether its range is right is for the caller."""
        value = self._get(key, default)
        if isinstance(value, Mapping):
            value = self._tagged(key, value)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.error(key, f"expected a number, got {value!r}")
        return float(value)

    def optional_number(self, key: str) -> float | None:
        """A number, or None where the key is absent or null."""
        return self.number(key) if key in self else None

    def integer(self, key: str, default: int | None = None) -> int:
        """A whole number."""
        value = self.number(key, default)
        if not value.is_integer():
            raise self.error(key, f"expected a whole number, got {value!r}")
        return int(value)

    def text(self, key: str, default: str | None = None) -> str:
        """A string."""
        value = self._get(key, default)
        if not isinstance(value, str):
            raise self.error(key, f"expected text, got {value!r}")
        return value

    def choice(self, key: str, allowed: Iterable[str], default: str | None = None) -> str:
        """A string out of a few."""
        value = self.text(key, default)
        if value not in (words := tuple(allowed)):
            raise self.error(key, f"unknown value {value!r}{nearest(value, words)}")
        return value

    def flag(self, key: str, default: bool | None = None) -> bool:
        """A truth value."""
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise self.error(key, f"expected true or false, got {value!r}")
        return value

    def section(self, key: str) -> Section:
        """A nested mapping."""
        value = self._get(key, None)
        if not isinstance(value, Mapping):
            raise self.error(key, f"expected a mapping, got {value!r}")
        texts = {str(name): inner for name, inner in value.items()}
        return Section(texts, self.where, f"{self.prefix}{key}.")

    def keys(self) -> tuple[str, ...]:
        """All keys, for mappings whose keys are data."""
        return tuple(self._data)

    def provenance(self) -> None:
        """Checks the ``tag`` of a block of numbers that share one; ``source`` says whence."""
        self.text("source", "")
        self.choice("tag", TAGS, "E")

    def close(self) -> None:
        """Refuses keys that nobody asked for."""
        for key in self._data:
            if key not in self._asked:
                raise self.error(key, f"unknown key{nearest(key, self._asked)}")

    def _get(self, key: str, default: object) -> object:
        self._asked.add(key)
        value = self._data.get(key)
        if value is not None:
            return value
        if default is None:
            raise self.error(key, "missing")
        return default

    def _tagged(self, key: str, value: Mapping[str, object]) -> object:
        inner = Section(value, self.where, f"{self.prefix}{key}.")
        inner.provenance()
        number = inner.number("value")
        inner.close()
        return number


def build(kind: type[T], section: Section, values: Mapping[str, Any]) -> T:
    """``kind(**values)``; what its own checks refuse is reported with file and key."""
    try:
        return kind(**values)
    except ValueError as error:
        raise ProfileError(f"{section.where}: {section.prefix}{error}") from error


def stem(name: str) -> str:
    """The name of a profile that was given by name or by path."""
    return Path(name).stem if name.endswith(SUFFIXES) else name


class _Loader(yaml.SafeLoader):
    """YAML 1.2 floats (``312e12`` is a number) and no duplicate keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[object] = set()
        for key_node, _ in node.value:
            if key_node.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key_node.value!r} appears twice", key_node.start_mark
                )
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*(\.[\d_]*)?|\.\d[\d_]*)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


def _document(group: Group, name: str) -> tuple[str, dict[str, object]]:
    if name.endswith(SUFFIXES):
        where = name
        try:
            text = Path(name).read_text(encoding="utf-8")
        except OSError as error:
            raise ProfileError(f"{name}: {error.strerror or error}") from error
    else:
        if name not in (known := names(group)):
            raise ProfileError(f"no {group} '{name}'{nearest(name, known)}")
        where = f"hardware_profiles/{group}/{name}.yaml"
        file = resources.files("hardware_profiles").joinpath(group).joinpath(f"{name}.yaml")
        text = file.read_text(encoding="utf-8")
    try:
        data = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ProfileError(f"{where}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict):
        raise ProfileError(f"{where}: expected a mapping, got {type(data).__name__}")
    return where, {str(key): value for key, value in data.items()}


def _merged(parent: Mapping[str, object], child: Mapping[str, object]) -> dict[str, object]:
    """The parent with the child's keys; nested mappings are merged, tagged numbers replaced."""
    result = dict(parent)
    for key, value in child.items():
        below = result.get(key)
        if isinstance(value, Mapping) and isinstance(below, Mapping) and "value" not in value:
            value = _merged(below, value)  # noqa: PLW2901
        result[key] = value
    return result
