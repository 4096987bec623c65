"""The columns of a trace and the checks that every trace has passed.

Checks are vectorised and name the first row that fails; ``where(row)`` says how rows are named.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import inf
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from traces.chains import Chains, Ints
from traces.errors import TraceError, did_you_mean, listed, unknown

__all__ = [
    "BLOCK_SIZES",
    "COLUMNS",
    "Column",
    "check_chains",
    "check_rows",
    "covers",
    "fitting",
    "table",
]

Where = Callable[[int], str]

BLOCK_SIZES = (16, 32, 64, 128, 256, 512, 1024)
"""Block sizes that traces are known to use, in tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """One column of ``Trace.requests``."""

    dtype: str
    """A pandas dtype: ``str``, ``int64`` or ``float64``."""
    default: Any = None
    """The value of rows that do not give one; ``None`` if they must (``id``: the row number)."""
    least: float | None = None
    """The smallest value allowed."""
    finite: bool = True
    about: str


COLUMNS: Mapping[str, Column] = {
    "id": Column(dtype="str", about="unique name of the request"),
    "arrival_s": Column(dtype="float64", least=0, about="arrival time"),
    "prompt_tokens": Column(dtype="int64", least=1, about="tokens of the prompt"),
    "output_tokens": Column(dtype="int64", least=1, about="tokens generated"),
    "session": Column(dtype="str", default="", about='chat of the request; "" if none'),
    "turn": Column(dtype="int64", default=0, least=0, about="place in the session, from 0"),
    "think_s": Column(
        dtype="float64",
        default=0.0,
        least=0,
        about="recorded pause after the predecessor turn ended; 0 if not recorded",
    ),
    "model": Column(dtype="str", default="", about="model asked for"),
    "kind": Column(dtype="str", default="", about="kind of request, e.g. chat"),
    "tenant": Column(dtype="str", default="", about="who asks"),
    "priority": Column(dtype="int64", default=0, about="lower runs earlier"),
    "slo_class": Column(dtype="str", default="", about="name of the SLO class"),
    "slo_ttft_s": Column(dtype="float64", default=inf, finite=False, about="TTFT target"),
    "slo_tpot_s": Column(dtype="float64", default=inf, finite=False, about="TPOT target"),
    "slo_e2e_s": Column(dtype="float64", default=inf, finite=False, about="latency target"),
}


def table(columns: Mapping[str, Any], where: Where) -> pd.DataFrame:
    """The columns with their dtypes, defaults filled in."""
    for name in columns:
        if name not in COLUMNS:
            raise unknown("column", name, COLUMNS)
    for name in ("arrival_s", "prompt_tokens", "output_tokens"):
        if name not in columns:
            raise TraceError(f"column {name!r} is missing{did_you_mean(name, columns)}")
    lengths = {n for values in columns.values() if (n := _length(values)) is not None}
    rows = max(lengths, default=1)
    if 0 in lengths:
        raise TraceError("no requests: a trace has at least one")
    filled: dict[str, Any] = {}
    for name, column in COLUMNS.items():
        values = columns.get(name, column.default)
        if values is None:
            filled[name] = pd.Series(np.arange(rows)).astype("str")
            continue
        if _length(values) not in (None, rows):
            raise TraceError(f"column {name!r} has {_length(values)} rows, others have {rows}")
        filled[name] = _typed(name, column, values, rows, where)
    return pd.DataFrame(filled)


def _length(values: Any) -> int | None:
    """The number of rows, or ``None`` for a scalar."""
    if isinstance(values, str) or getattr(values, "ndim", 1) == 0:
        return None
    return len(values) if hasattr(values, "__len__") else None


def _typed(name: str, column: Column, values: Any, rows: int, where: Where) -> Any:
    if column.dtype == "str":
        if _length(values) is None:
            return pd.Series([values], dtype="str").repeat(rows).reset_index(drop=True)
        series = pd.Series(values)
        wrong = np.flatnonzero(series.isna().to_numpy())
        if len(wrong):
            raise TraceError(f"{where(int(wrong[0]))}: {name} is missing; it must be text")
        try:
            return series.astype("str").reset_index(drop=True)
        except UnicodeEncodeError as error:
            raise TraceError(f"column {name!r} holds text that is no Unicode: {error}") from None
    array = np.atleast_1d(np.asarray(values))
    if array.dtype.kind not in "iuf":
        raise TraceError(f"column {name!r} must hold numbers, not {array.dtype}")
    if column.dtype == "int64" and array.dtype.kind != "i":
        with np.errstate(invalid="ignore"):
            whole = (array % 1 == 0) & (array < 2**63) & (array >= -(2**63))
        _require(name, np.broadcast_to(array, (rows,)), whole, "a whole number below 2^63", where)
    return np.broadcast_to(array.astype(column.dtype), (rows,)).copy()


def check_rows(requests: pd.DataFrame, where: Where) -> None:
    """Raises where a value is out of range, an id occurs twice or a session is out of order."""
    for name, column in COLUMNS.items():
        if column.dtype == "str":
            continue
        values = requests[name].to_numpy()
        if not column.finite:
            _require(name, values, values > 0, "above 0 (inf: no target)", where)
        if column.finite and column.dtype == "float64":
            _require(name, values, np.isfinite(values), "a finite number", where)
        if column.least is not None:
            _require(name, values, values >= column.least, f"at least {column.least:g}", where)
    again = np.flatnonzero(requests["id"].duplicated().to_numpy())
    if len(again):
        row = int(again[0])
        name = requests["id"].iloc[row]
        first = int(np.flatnonzero((requests["id"] == name).to_numpy())[0])
        raise TraceError(f"{where(row)}: id {name!r} is taken by {where(first)}; ids must differ")
    _check_sessions(requests, where)


def _require(name: str, values: NDArray[Any], good: Any, rule: str, where: Where) -> None:
    if not np.all(good):
        row = int(np.flatnonzero(~good)[0])
        raise TraceError(f"{where(row)}: {name}={values[row]} must be {rule}")


def _check_sessions(requests: pd.DataFrame, where: Where) -> None:
    turn = requests["turn"].to_numpy()
    has = (requests["session"] != "").to_numpy()
    _require("turn", turn, has | (turn == 0), "0 where there is no session", where)
    if not has.any():
        return
    rows = np.flatnonzero(has)
    session = pd.factorize(requests["session"].iloc[rows])[0]
    order = np.argsort(session, kind="stable")
    session, rows = session[order], rows[order]
    starts = np.flatnonzero(np.diff(session, prepend=-1))
    expected = np.arange(len(rows)) - np.repeat(starts, np.diff(starts, append=len(rows)))
    wrong = np.flatnonzero(turn[rows] != expected)
    if len(wrong):
        row, turn_due = int(rows[wrong[0]]), int(expected[wrong[0]])
        raise TraceError(
            f"{where(row)}: session {requests['session'].iloc[row]!r} has turn {turn[row]} where "
            f"turn {turn_due} was due; turns count 0, 1, 2, ... in the order of arrival"
        )


def fitting(prompt_tokens: Ints, blocks: Ints) -> list[int]:
    """The known sizes with floor(prompt / size) <= blocks <= ceil(prompt / size) in all rows."""
    return [size for size in BLOCK_SIZES if bool(covers(prompt_tokens, blocks, size).all())]


def covers(prompt_tokens: Ints, blocks: Ints, size: int) -> NDArray[np.bool_]:
    """Which rows have as many blocks as their prompt, the partial last one with or without."""
    return (blocks >= prompt_tokens // size) & (blocks <= -(-prompt_tokens // size))


def check_chains(prompt_tokens: Ints, chains: Chains, block_tokens: int, where: Where) -> None:
    """Raises where a chain does not cover its prompt or a block id has two predecessors."""
    blocks = chains.lengths
    if block_tokens == 0:
        _require("blocks", blocks, blocks == 0, "0 when block_tokens is 0", where)
        return
    wrong = np.flatnonzero(~covers(prompt_tokens, blocks, block_tokens))
    if len(wrong):
        row = int(wrong[0])
        prompt = int(prompt_tokens[row])
        least, most = prompt // block_tokens, -(-prompt // block_tokens)
        need = f"{least}" if least == most else f"{least} or {most}"
        fits = fitting(prompt_tokens, blocks)
        hint = f"; block_tokens={listed(fits)} would fit all rows" if fits else ""
        raise TraceError(
            f"{where(row)}: {blocks[row]} block ids for {prompt} prompt tokens; blocks of "
            f"{block_tokens} tokens need {need}{hint}"
        )
    _check_predecessors(chains, where)


def _check_predecessors(chains: Chains, where: Where) -> None:
    """Raises where a block id follows different ids: such ids are not hashes of a prefix.

    Inside a run each id follows id - 1, so only the heads of runs need a look: heads of the same id
    must follow the same id, and no head may lie inside another run.
    """
    if len(chains.start) == 0:
        return
    last = np.concatenate(([-1], (chains.start + chains.count - 1)[:-1]))
    previous = np.where(chains.before == 0, -1, last)
    order = np.argsort(chains.start, kind="stable")
    head, previous, owner = chains.start[order], previous[order], chains.owner[order]
    differs = np.flatnonzero((head[1:] == head[:-1]) & (previous[1:] != previous[:-1]))
    if len(differs):
        k = int(differs[0])
        _unchained(head[k], previous[k], previous[k + 1], where(owner[k]), where(owner[k + 1]))
    end = (chains.start + chains.count)[order]
    reach = np.maximum.accumulate(end)
    inside = np.flatnonzero((head[1:] < reach[:-1]) & (head[1:] != head[:-1]))
    if len(inside):
        k = int(inside[0]) + 1
        other = int(np.argmax(end[:k]))
        _unchained(head[k], previous[k], head[k] - 1, where(owner[k]), where(owner[other]))


def _unchained(block: int, one: int, two: int, here: str, there: str) -> None:
    after = ["no block" if p < 0 else f"block {p}" for p in (one, two)]
    raise TraceError(
        f"block id {block} follows {after[0]} in {here} but {after[1]} in {there}; ids must be "
        f"chained: an id stands for a block and all blocks before it"
    )
