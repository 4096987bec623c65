"""ServeLab's own trace format: JSON lines that lose nothing of a ``Trace``.

The first line is a header; each further line is one request with its columns under their own names.
Values at their default are left out, and block ids are written as runs: [start, count, ...].
"""

from __future__ import annotations

import gzip
import json
import os
from itertools import chain
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from traces.chains import MAX_ID, Chains
from traces.columns import COLUMNS
from traces.errors import TraceError, did_you_mean, unknown
from traces.reader import ReadOptions, Sample, reader
from traces.schema import Trace
from traces.source import Rows, Source, parse_object

__all__ = ["FORMAT", "VERSION", "read_native", "write"]

FORMAT = "servelab-trace"
VERSION = 1
_HEADER: dict[str, type] = {
    "format": str,
    "version": int,
    "name": str,
    "block_tokens": int,
    "synthetic": str,
    "notes": list,
    "time_unit": str,
    "requests": int,
}


def write(trace: Trace, path: str | PathLike[str]) -> None:
    """Writes a trace to ``path`` (``.jsonl``, or ``.jsonl.gz`` for gzip), all of it or nothing.

    The same trace gives the same bytes. Raises ``TraceError`` for a path that
    cannot be a trace file.
    """
    target = Path(path)
    if not target.name.endswith((".jsonl", ".jsonl.gz")):
        raise TraceError(f"{path}: a trace file ends in .jsonl or .jsonl.gz")
    if not target.parent.is_dir():
        raise TraceError(f"{path}: there is no folder {target.parent}")
    try:
        data = _encode(trace)
    except UnicodeEncodeError as error:
        raise TraceError(f"{trace.name} holds text that is no Unicode: {error}") from None
    if target.suffix == ".gz":
        data = gzip.compress(data, mtime=0)
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        part.write_bytes(data)
        os.replace(part, target)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def _encode(trace: Trace) -> bytes:
    header = {
        "format": FORMAT,
        "version": VERSION,
        "name": trace.name,
        "block_tokens": trace.block_tokens,
        "synthetic": trace.synthetic,
        "notes": list(trace.notes),
        "time_unit": "s",
        "requests": len(trace),
    }
    rows: list[dict[str, Any]] = [{} for _ in range(len(trace))]
    for name, column in COLUMNS.items():
        for row, value in enumerate(trace.requests[name].tolist()):
            if value != (str(row) if name == "id" else column.default):
                rows[row][name] = value
    if trace.block_tokens:
        for row, values in enumerate(rows):
            values["runs"] = [n for run in trace.chains.runs(row) for n in run]
    encode = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode
    return "".join(f"{encode(line)}\n" for line in (header, *rows)).encode()


def _sniff(sample: Sample) -> str:
    return f"header with format {FORMAT!r}" if sample.keys.get("format") == FORMAT else ""


@reader("native", about=f"JSON lines after a header {FORMAT!r}", sniff=_sniff)
def read_native(source: Source, options: ReadOptions) -> Trace:
    """The trace that ``write`` wrote."""
    header = _header(source)
    size = header["block_tokens"]
    for option, given, holds in (
        ("block_tokens", options.block_tokens, size),
        ("time_unit", options.time_unit, "s"),
    ):
        if given is not None and given != holds:
            raise TraceError(f"{source.path}: {option}={given}, but the file says {holds}")
    rows = source.rows(skip=1, limit=options.limit)
    expected = min(header["requests"], options.limit or header["requests"])
    if len(rows) != expected:
        raise TraceError(
            f"{source.path} is cut short or edited: its header promises {header['requests']} "
            f"requests, it holds {len(rows)}"
        )
    known = dict.fromkeys((*COLUMNS, "runs") if size else COLUMNS)
    for row, values in enumerate(rows.objects):
        if not values.keys() <= known.keys():
            key = next(k for k in values if k not in known)
            error = unknown("key", key, known)
            raise TraceError(f"{rows.where(row)}: {error}")
        values.setdefault("id", str(row))
    columns: dict[str, Any] = {}
    for name, column in COLUMNS.items():
        if column.dtype == "str":
            columns[name] = rows.values(name, {str}, "text", column.default)
        elif column.dtype == "int64":
            least = -(2**63) if column.least is None else int(column.least)
            columns[name] = rows.integers(name, least=least, default=column.default)
        else:
            columns[name] = rows.numbers(name, default=column.default)
    return Trace.build(
        header["name"],
        columns,
        _chains(rows) if size else None,
        block_tokens=size,
        synthetic=header["synthetic"],
        notes=tuple(header["notes"]),
        where=rows.where,
    )


def _header(source: Source) -> dict[str, Any]:
    number, text = next(source.lines(), (1, ""))
    where = source.where(number)
    header = parse_object(text, where)
    if header.get("format") != FORMAT:
        raise TraceError(f"{where}: the header's format must be {FORMAT!r}")
    if header.get("version") != VERSION:
        raise TraceError(
            f"{where}: version {header.get('version')} of {FORMAT!r} is not known; "
            f"this program reads version {VERSION}"
        )
    for key, value in header.items():
        if key not in _HEADER:
            raise TraceError(f"{where}: {unknown('key', key, _HEADER)}")
        if type(value) is not _HEADER[key]:
            raise TraceError(f"{where}: {key}={value!r} must be a {_HEADER[key].__name__}")
    for key in _HEADER:
        if key not in header:
            raise TraceError(f"{where}: key {key!r} is missing{did_you_mean(key, header)}")
    if header["time_unit"] != "s":
        raise TraceError(f"{where}: time_unit={header['time_unit']!r} must be 's'")
    for note in header["notes"]:
        if type(note) is not str:
            raise TraceError(f"{where}: notes={note!r} must be text")
    return header


def _chains(rows: Rows) -> Chains:
    runs = rows.values("runs", {list}, "a list of whole numbers", default=[])
    for row, values in enumerate(runs):
        if not set(map(type, values)) <= {int} or len(values) % 2:
            rows.refuse(row, "runs", "a list [start, count, start, count, ...] of whole numbers")
        if values and not (min(values) >= 0 and min(values[1::2]) > 0):
            rows.refuse(row, "runs", "starts of at least 0 and counts of at least 1")
        if values and max(map(sum, zip(values[::2], values[1::2], strict=True))) > MAX_ID + 1:
            rows.refuse(row, "runs", "runs of block ids up to 2^63 - 2")
    flat = np.fromiter(chain.from_iterable(runs), np.int64, sum(map(len, runs)))
    offset = np.cumsum([0, *(len(values) // 2 for values in runs)])
    return Chains(offset, flat[::2], flat[1::2])
