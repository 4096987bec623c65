"""Trace files: opening them, lines, JSON rows, and errors that name file and line.

Files are plain or gzip, told apart by their first bytes and not by their name.
"""

from __future__ import annotations

import csv
import gzip
import json
import re
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from os import PathLike
from pathlib import Path
from typing import IO, Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from traces.errors import TraceError, did_you_mean, listed

__all__ = ["Rows", "Source"]


@dataclass(frozen=True, slots=True)
class Source:
    """An existing, non-empty text file, perhaps compressed."""

    path: Path

    @classmethod
    def at(cls, path: str | PathLike[str]) -> Source:
        """The file at ``path``; raises ``TraceError`` if there is none to read."""
        source = cls(Path(path))
        if source.path.is_dir():
            raise TraceError(f"{path} is a folder; a trace is one file")
        if not source.path.exists():
            folder = source.path.parent
            if not folder.is_dir():
                raise TraceError(f"{path} does not exist: there is no folder {folder}")
            near = did_you_mean(source.path.name, (p.name for p in folder.iterdir()))
            raise TraceError(f"{path} does not exist{near}")
        with source.binary() as file:
            if not file.read(1):
                raise TraceError(f"{path} is empty")
        return source

    @property
    def name(self) -> str:
        """The file name without its endings."""
        return re.sub(r"(?<=.)(\.(jsonl|json|csv|txt))?(\.gz)?$", "", self.path.name)

    def where(self, line: int) -> str:
        """A line of the file, for messages."""
        return f"{self.path}:{line}"

    @contextmanager
    def binary(self) -> Iterator[IO[bytes]]:
        """The uncompressed bytes; failures to read or to decompress become ``TraceError``."""
        try:
            with self.path.open("rb") as raw:
                compressed = raw.read(2) == b"\x1f\x8b"
                raw.seek(0)
                if compressed:
                    with gzip.GzipFile(fileobj=raw) as file:
                        yield file  # type: ignore[misc]
                else:
                    yield raw
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise TraceError(f"{self.path} is a broken gzip file: {error}") from error
        except OSError as error:
            raise TraceError(f"{self.path} cannot be read: {error.strerror or error}") from error

    def lines(self) -> Iterator[tuple[int, str]]:
        """(line number from 1, text) of every line that is not blank."""
        with self.binary() as file:
            for number, raw in enumerate(file, 1):
                try:
                    text = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                except UnicodeDecodeError as error:
                    raise TraceError(
                        f"{self.where(number)}: not text: byte 0x{raw[error.start]:02x} "
                        f"is not UTF-8"
                    ) from None
                if "\0" in text:
                    raise TraceError(f"{self.where(number)}: not text: it holds zero bytes")
                if text:
                    yield number, text

    def rows(self, *, skip: int = 0, limit: int | None = None) -> Rows:
        """The JSON objects of the file, one per line; raises if there is none."""
        numbers: list[int] = []
        objects: list[dict[str, Any]] = []
        stop = None if limit is None else skip + limit
        for number, text in islice(self.lines(), skip, stop):
            numbers.append(number)
            objects.append(parse_object(text, self.where(number)))
        if not objects:
            raise TraceError(f"{self.path} holds no requests")
        return Rows(self, numbers, objects)

    def csv_rows(self, required: Sequence[str], *, limit: int | None = None) -> Rows:
        """The rows of a CSV table as text by column name; raises if a column is missing."""
        lines = self.lines()
        number, text = next(lines, (1, ""))
        names = _cells(text)
        for name in required:
            if name not in names:
                near = did_you_mean(name, names) or ";"
                raise TraceError(
                    f"{self.where(number)}: column {name!r} is missing{near} the header has "
                    f"{listed(names)}"
                )
        numbers: list[int] = []
        objects: list[dict[str, Any]] = []
        for number, text in islice(lines, limit):
            cells = _cells(text)
            if len(cells) != len(names):
                raise TraceError(
                    f"{self.where(number)}: {len(cells)} cells where the header has {len(names)}; "
                    f"the line is {_short(text)}"
                )
            numbers.append(number)
            objects.append(dict(zip(names, cells, strict=True)))
        if not objects:
            raise TraceError(f"{self.path} holds no requests")
        return Rows(self, numbers, objects)


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in next(csv.reader([line]), [])]


def parse_object(text: str, where: str) -> dict[str, Any]:
    """The JSON object in ``text``."""
    try:
        value = _DECODER.decode(text)
    except ValueError as error:
        raise TraceError(f"{where}: not JSON: {error}; the line is {_short(text)}") from None
    except RecursionError:
        raise TraceError(f"{where}: JSON nested too deeply") from None
    if not isinstance(value, dict):
        raise TraceError(f"{where}: a line must hold a JSON object, not {_short(text)}")
    return value


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


_DECODER = json.JSONDecoder(parse_constant=_no_constant)


def _short(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."


@dataclass(frozen=True, slots=True)
class Rows:
    """JSON objects with the lines they stand on, read column by column."""

    source: Source
    lines: Sequence[int]
    objects: Sequence[dict[str, Any]]

    def __len__(self) -> int:
        return len(self.objects)

    def where(self, row: int) -> str:
        """File and line of a row, for messages."""
        return self.source.where(self.lines[row])

    def has(self, key: str) -> list[bool]:
        """Which rows give the key (null counts as not given)."""
        return [row.get(key) is not None for row in self.objects]

    def values(self, key: str, types: set[type], allowed: str, default: object = None) -> list[Any]:
        """The values of a key, all of the given types; required unless there is a default."""
        values = [row.get(key) for row in self.objects]
        if default is not None:
            values = [default if v is None else v for v in values]
        if not set(map(type, values)) <= types:
            row = next(i for i, v in enumerate(values) if type(v) not in types)
            if key not in self.objects[row]:
                self.missing(row, key)
            self.refuse(row, key, allowed)
        return values

    def integers(
        self, key: str, *, least: int = 0, default: int | None = None
    ) -> NDArray[np.int64]:
        """A column of whole numbers from ``least`` to 2^63 - 1."""
        values = self.values(key, {int}, "a whole number", default)
        if not (min(values) >= least and max(values) < 2**63):
            row = next(i for i, v in enumerate(values) if not least <= v < 2**63)
            self.refuse(row, key, f"a whole number of {least} to 2^63 - 1")
        return np.array(values, dtype=np.int64)

    def digits(self, key: str, *, least: int = 0) -> NDArray[np.int64]:
        """A column of whole numbers written as text, from ``least`` to 10^15."""
        values = self.values(key, {str}, "text")
        for row, text in enumerate(values):
            if not (text.isascii() and text.isdigit() and len(text) < 16 and int(text) >= least):
                self.refuse(row, key, f"a whole number of at least {least}")
        return np.array([int(text) for text in values], dtype=np.int64)

    def numbers(self, key: str, *, default: float | None = None) -> NDArray[np.float64]:
        """A column of numbers."""
        values = self.values(key, {int, float}, "a number", default)
        try:
            return np.array(values, dtype=np.float64)
        except OverflowError:
            row = next(i for i, v in enumerate(values) if type(v) is int and abs(v) > 2**1000)
            self.refuse(row, key, "a number below 2^1000")

    def missing(self, row: int, key: str) -> NoReturn:
        """Raises: the row lacks a key."""
        near = did_you_mean(key, self.objects[row])
        raise TraceError(f"{self.where(row)}: key {key!r} is missing{near}")

    def refuse(self, row: int, key: str, allowed: str) -> NoReturn:
        """Raises: the value of this row is not allowed."""
        value = _short(repr(self.objects[row].get(key)))
        raise TraceError(f"{self.where(row)}: {key}={value} must be {allowed}")

    def id_lists(self, key: str) -> list[list[int]]:
        """A column of lists of block ids; a row without the key has none."""
        lists = [row.get(key) or [] for row in self.objects]
        for row, ids in enumerate(lists):
            if type(ids) is not list or not set(map(type, ids)) <= {int}:
                self.refuse(row, key, "a list of whole numbers")
            if ids and not (min(ids) >= 0 and max(ids) < 2**63 - 1):
                self.refuse(row, key, "a list of block ids of 0 to 2^63 - 2")
        return lists
