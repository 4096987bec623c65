"""Mooncake's JSON lines, and the files of AIPerf, vLLM and GuideLLM that look alike.

One object per request: ``timestamp``, ``input_length``, ``output_length``, perhaps ``hash_ids``,
``session_id`` and, for later turns, ``delay`` in place of ``timestamp``. Neither the time unit nor
the block size is in the file; both follow from stated rules or must be given.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from math import inf

import numpy as np

from traces.chains import Chains, Ints
from traces.columns import BLOCK_SIZES, covers, fitting
from traces.errors import TraceError, listed
from traces.reader import TIME_UNITS, ReadOptions, Sample, reader
from traces.schema import Trace
from traces.source import Rows, Source

__all__ = ["MOONCAKE_BLOCK_TOKENS", "read_mooncake"]

MOONCAKE_BLOCK_TOKENS = 512
"""Block size of the published Mooncake traces (FAST'25); every row has ceil(input/512) ids."""

_LATEST_S = 1e10
"""No clock of a trace shows this: seconds since 1970 reach it in 2286."""
_EPOCH_S = 1e9
"""Clocks beyond this (2001) count from 1970 and are rebased to the first arrival."""
_TEXT = ("text_input", "messages", "payload")
_OTHERS = {
    "hash_runs": "the run-length form of WEKA traces",
    "chat_id": "Qwen-Bailian, whose timestamps are seconds",
}


def _sniff(sample: Sample) -> str:
    keys = sample.keys.keys()
    clock = [k for k in ("timestamp", "delay") if k in keys]
    size = [k for k in ("input_length", *_TEXT) if k in keys]
    if clock and size and not keys & _OTHERS.keys():
        return f"JSON lines with {clock[0]!r} and {size[0]!r}"
    return ""


@reader("mooncake", about="JSON lines with timestamp, input_length, hash_ids", sniff=_sniff)
def read_mooncake(source: Source, options: ReadOptions) -> Trace:
    """The requests of a Mooncake file; a later turn arrives ``delay`` after its predecessor.

    That is the earliest it can: the pause really starts when the predecessor ends (``think_s``).
    """
    rows = source.rows(limit=options.limit)
    for key, other in _OTHERS.items():
        if any(rows.has(key)):
            row = rows.has(key).index(True)
            raise TraceError(f"{rows.where(row)}: key {key!r} belongs to {other}, not to mooncake")
    for row, has_length in enumerate(rows.has("input_length")):
        text = [key for key in _TEXT if key in rows.objects[row]]
        if text and not has_length:
            raise TraceError(
                f"{rows.where(row)}: {text[0]!r} gives a prompt as text, which has no length in "
                f"tokens; give 'input_length'"
            )
    prompt_tokens = rows.integers("input_length", least=1)
    sessions = [
        "" if s == "" else str(s) for s in rows.values("session_id", {str, int}, "text", default="")
    ]
    times, delays, notes = _times(rows, sessions, options.time_unit)
    arrival_s, turn = _timeline(rows, sessions, times, delays)
    if any(b < a for a, b in pairwise(arrival_s)):
        notes.append("rows are not in the order of arrival: sorted")
    lists = rows.id_lists("hash_ids")
    chains = Chains.from_lists(lists)
    block_tokens, note = _block_tokens(rows, prompt_tokens, chains, options.block_tokens)
    return Trace.build(
        source.name,
        {
            "arrival_s": arrival_s,
            "prompt_tokens": prompt_tokens,
            "output_tokens": rows.integers("output_length", least=1),
            "session": sessions,
            "turn": turn,
            "think_s": [0.0 if d is None else d for d in delays],
        },
        chains,
        block_tokens=block_tokens,
        notes=(*notes, note),
        where=rows.where,
    )


def _times(
    rows: Rows, sessions: Sequence[str], given: str | None
) -> tuple[list[float | None], list[float | None], list[str]]:
    """Timestamps and delays in seconds (``None`` where a row has none), and notes."""
    timed, delayed = rows.has("timestamp"), rows.has("delay")
    for row, (has_time, has_delay) in enumerate(zip(timed, delayed, strict=True)):
        if has_time and has_delay:
            raise TraceError(f"{rows.where(row)}: 'timestamp' and 'delay' exclude each other")
        if has_delay and not sessions[row]:
            raise TraceError(f"{rows.where(row)}: 'delay' needs a 'session_id'")
        if not has_time and not has_delay:
            rows.missing(row, "timestamp")
    raw = [row.get("timestamp") for row in rows.objects]
    for row, value in enumerate(raw):
        if isinstance(value, str):
            if not (value.isascii() and value.isdigit() and len(value) < 100):
                rows.refuse(row, "timestamp", "a number, or a whole number as a string")
        elif value is not None and type(value) not in (int, float):
            rows.refuse(row, "timestamp", "a number")
        elif value is not None and not 0 <= value < inf:
            rows.refuse(row, "timestamp", "a finite number of 0 or more")
    kinds = {type(v) for v in raw if v is not None}
    if str in kinds and len(kinds) > 1:
        row = next(i for i, v in enumerate(raw) if type(v) is str)
        rows.refuse(row, "timestamp", "a number as in other rows")
    values = [int(v) if isinstance(v, str) else v for v in raw]
    known = [v for v in values if v is not None]
    if not known:
        raise TraceError(f"{rows.source.path}: no row has a 'timestamp'")
    unit, why = _unit(rows, known, kinds, bool(any(sessions)), given)
    per_s = TIME_UNITS[unit]
    base, notes = 0, [f"timestamps read as {unit} ({why})"]
    if min(known) >= _EPOCH_S * per_s:
        base = min(known)
        notes.append(f"clock rebased: the first arrival was at {base} {unit}")
    delays = rows.values("delay", {int, float}, "a number", default=0)
    if min(delays) < 0 or max(delays) >= _LATEST_S * per_s:
        row = next(i for i, d in enumerate(delays) if not 0 <= d < _LATEST_S * per_s)
        rows.refuse(row, "delay", f"0 or more {unit}")
    return (
        [None if v is None else (v - base) / per_s for v in values],
        [d / per_s if has else None for d, has in zip(delays, delayed, strict=True)],
        notes,
    )


def _unit(
    rows: Rows,
    values: Sequence[float],
    kinds: set[type],
    has_sessions: bool,
    given: str | None,
) -> tuple[str, str]:
    """The unit of the timestamps and why; raises where the rows contradict or do not settle it."""
    path, low, high = rows.source.path, min(values), max(values)
    ask = f"pass time_unit ({listed(TIME_UNITS)})"
    if given is not None:
        if high >= _LATEST_S * TIME_UNITS[given]:
            raise TraceError(
                f"{path}: timestamp {high} cannot be in {given}: it would be after the year 2286"
            )
        if given == "ns" and any(v % 1 for v in values):
            raise TraceError(f"{path}: timestamps with fractions cannot be in ns")
        return given, "given"
    if kinds == {str}:
        if low >= _EPOCH_S * TIME_UNITS["ns"] and high < _LATEST_S * TIME_UNITS["ns"]:
            return "ns", "19-digit strings: ns since 1970"
        raise TraceError(f"{path}: string timestamps such as {low} have no known unit; {ask}")
    if high >= _LATEST_S * TIME_UNITS["ms"]:
        raise TraceError(f"{path}: timestamp {high} is too large for ms; us or ns? {ask}")
    if low >= _EPOCH_S and high < _LATEST_S:
        raise TraceError(f"{path}: timestamps such as {low} could be s since 1970 or ms; {ask}")
    if float not in kinds:
        return "ms", "whole numbers: Mooncake's unit"
    if has_sessions:
        return "ms", "rows with session_id: AIPerf's unit"
    fraction = next((v for v in values if v % 1), low)
    raise TraceError(
        f"{path}: timestamps such as {fraction} could be ms (AIPerf) or s (GuideLLM); {ask}"
    )


def _timeline(
    rows: Rows,
    sessions: Sequence[str],
    times: Sequence[float | None],
    delays: Sequence[float | None],
) -> tuple[list[float], list[int]]:
    """Arrival and turn of each row; the turns of a session stand in their order."""
    arrival_s: list[float] = []
    turns: list[int] = []
    last: dict[str, tuple[int, float]] = {}
    for row, (session, time, delay) in enumerate(zip(sessions, times, delays, strict=True)):
        turn, previous = last.get(session, (-1, 0.0)) if session else (-1, 0.0)
        if time is None and turn < 0:
            raise TraceError(
                f"{rows.where(row)}: the first turn of session {session!r} has a 'delay'; "
                f"it needs a 'timestamp'"
            )
        now = time if time is not None else previous + (delay or 0.0)
        if now < previous:
            raise TraceError(
                f"{rows.where(row)}: turn {turn + 1} of session {session!r} arrives at {now} s, "
                f"before its predecessor ({previous} s)"
            )
        last[session] = (turn + 1, now)
        arrival_s.append(now)
        turns.append(turn + 1)
    return arrival_s, turns


def _block_tokens(
    rows: Rows, prompt_tokens: Ints, chains: Chains, given: int | None
) -> tuple[int, str]:
    """The block size and a note; raises where no size, or more than one, fits all rows."""
    blocks = chains.lengths
    if not blocks.any():
        if given is not None:
            raise TraceError(
                f"{rows.source.path} has no block ids, so block_tokens={given} means nothing"
            )
        return 0, "no block ids"
    has = rows.has("hash_ids")
    if not all(has):
        row = has.index(False)
        raise TraceError(f"{rows.where(row)}: 'hash_ids' is missing; other rows have it")
    if given is not None:
        return given, f"block size {given} tokens (given)"
    sizes = fitting(prompt_tokens, blocks)
    needed = -(-prompt_tokens // MOONCAKE_BLOCK_TOKENS)
    if np.array_equal(blocks, needed):
        return MOONCAKE_BLOCK_TOKENS, (
            "block size 512 tokens (every row has ceil(input_length / 512) ids: Mooncake's rule)"
        )
    if len(sizes) == 1:
        return sizes[0], f"block size {sizes[0]} tokens (the only known size that fits every row)"
    if sizes:
        raise TraceError(
            f"{rows.source.path}: the block size could be {listed(sizes)}; pass block_tokens"
        )
    best = max(BLOCK_SIZES, key=lambda size: int(covers(prompt_tokens, blocks, size).sum()))
    row = int(np.flatnonzero(~covers(prompt_tokens, blocks, best))[0])
    prompt = int(prompt_tokens[row])
    raise TraceError(
        f"{rows.where(row)}: {blocks[row]} hash_ids for input_length={prompt}; no known block size "
        f"({listed(BLOCK_SIZES)}) fits every row: {best} fits most, but needs {prompt // best} to "
        f"{-(-prompt // best)} ids here; pass block_tokens for other sizes"
    )
