"""The CSV files of Azure's public LLM traces: TIMESTAMP, ContextTokens, GeneratedTokens.

Times have up to 9 fractional digits and are kept exactly until they become seconds after the first
arrival; a column NumImages (2025) only marks requests with images.
"""

from __future__ import annotations

import re

import numpy as np
from numpy.typing import NDArray

from traces.errors import TraceError
from traces.reader import ReadOptions, Sample, reader
from traces.schema import Trace
from traces.source import Rows, Source

__all__ = ["read_azure"]

_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
_TIME = re.compile(r"(\d{4}-\d\d-\d\d)[ T](\d\d:\d\d:\d\d(?:\.\d{1,9})?)(?:Z|\+00:00)?", re.ASCII)


def _sniff(sample: Sample) -> str:
    if {"ContextTokens", "GeneratedTokens"} & set(sample.columns):
        return f"CSV header {sample.text}"
    return ""


@reader("azure", about="CSV with TIMESTAMP, ContextTokens, GeneratedTokens", sniff=_sniff)
def read_azure(source: Source, options: ReadOptions) -> Trace:
    """The requests of an Azure file, on a clock that is 0 at the first arrival."""
    if options.block_tokens is not None or options.time_unit is not None:
        option = "block_tokens" if options.block_tokens is not None else "time_unit"
        raise TraceError(
            f"{source.path}: an azure file has dates and no block ids; {option} means nothing"
        )
    rows = source.csv_rows(_COLUMNS, limit=options.limit)
    times = _times(rows)
    notes = [f"times are seconds after {times.min()}"]
    if np.any(times[1:] < times[:-1]):
        notes.append("rows are not in the order of arrival: sorted")
    kind = np.full(len(rows), "", dtype=object)
    if "NumImages" in rows.objects[0]:
        kind[rows.digits("NumImages") > 0] = "image"
    return Trace.build(
        source.name,
        {
            "arrival_s": (times - times.min()).astype(np.int64) / 1e9,
            "prompt_tokens": rows.digits("ContextTokens", least=1),
            "output_tokens": rows.digits("GeneratedTokens", least=1),
            "kind": kind,
        },
        notes=tuple(notes),
        where=rows.where,
    )


def _times(rows: Rows) -> NDArray[np.datetime64]:
    """The time stamps, exact to 1 ns."""
    rule = "a UTC date and time such as 2023-11-16 18:15:46.6805900"
    text: list[str] = []
    for row, value in enumerate(rows.values("TIMESTAMP", {str}, "text")):
        match = _TIME.fullmatch(value)
        if match is None:
            rows.refuse(row, "TIMESTAMP", rule)
        text.append("T".join(match.groups()))
    try:
        return np.array(text, dtype="datetime64[ns]")
    except ValueError:
        for row, value in enumerate(text):
            try:
                np.datetime64(value, "ns")
            except ValueError:
                rows.refuse(row, "TIMESTAMP", rule)
        raise
