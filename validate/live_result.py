"""The tables of a live run: the same as the simulator's, from what clients and schedulers saw."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from math import nan
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd

from sim.result import Result
from sim.tables import labels
from traces import Trace
from validate.calibrate import measured_steps
from validate.decisions import Decision
from validate.replay import Fate

__all__ = ["decision_rows", "length_warnings", "live_result", "on_clock", "uninterrupted"]

RUNS = {
    "engine": "int32", "start_s": "float64", "first_s": "float64", "slope_s": "float64",
    "steps": "int64", "decodes": "int32", "prefill_tokens": "int32", "waiting": "int32",
    "free_blocks": "int64",
}  # fmt: skip


NAMED = 5
"""Most requests that a warning names."""


def live_result(
    trace: Trace,
    fates: Sequence[Fate],
    start: float,
    rows: Sequence[Sequence[Decision]],
    kv_blocks: Sequence[int],
    meta: Mapping[str, Any],
    *,
    record_runs: bool = True,
) -> Result:
    """The result of a replay.

    ``requests`` has two columns that the simulator's does not: ``lateness_s``, from when a request
    was due until it was handed to its engine, and ``client_delay_s``, from when the engine had its
    last token until the client did.

    Args:
        trace: what was replayed.
        fates: one per request.
        start: ``time.monotonic()`` at time 0.
        rows: each engine's decision rows.
        kv_blocks: usable blocks of each engine.
        meta: of the result; figures about lateness are added.
        record_runs: keep the table of steps.
    """
    seen = pd.DataFrame(
        {
            name: [getattr(fate, name) for fate in fates]
            for name in ("due", "arrival", "admitted", "first", "finish", "received")
        },
        dtype="float64",
    )
    lateness_s = seen["arrival"] - seen["due"]
    delay_s = (seen["received"] - seen["finish"]).where(seen["finish"].notna())
    table = trace.requests
    requests = pd.DataFrame(
        {
            "id": table["id"],
            "arrival_s": seen["arrival"] - start,
            "recorded_s": table["arrival_s"],
            "admitted_s": seen["admitted"] - start,
            "first_token_s": seen["first"] - start,
            "finish_s": seen["finish"] - start,
            "prompt_tokens": table["prompt_tokens"],
            "output_tokens": np.array([fate.output_tokens for fate in fates], dtype=np.int64),
            "cached_tokens": np.array([fate.cached_tokens for fate in fates], dtype=np.int64),
            "preemptions": np.array([fate.preemptions for fate in fates], dtype=np.int32),
            "engine": np.array([fate.engine for fate in fates], dtype=np.int32),
            "state": labels([fate.state for fate in fates]),
            "reason": labels([fate.reason for fate in fates]),
            **{name: table[name] for name in ("session", "turn", "tenant", "slo_class")},
            **{name: table[name] for name in ("slo_ttft_s", "slo_tpot_s", "slo_e2e_s")},
            "lateness_s": lateness_s,
            "client_delay_s": delay_s,
        }
    )
    admitted = dict(zip(table["id"], requests["admitted_s"], strict=True))
    lengths = dict(zip(table["id"], table["prompt_tokens"].tolist(), strict=True))
    parts = [
        _runs(engine, on_clock(found, admitted), lengths)
        for engine, found in enumerate(rows)
        if record_runs and found
    ]
    runs = pd.concat([pd.DataFrame({name: [] for name in RUNS}), *parts]).astype(RUNS)
    engines = pd.DataFrame(
        {
            "engine": range(len(rows)),
            "steps": [sum(1 for row in found if row["scheduled"]) for found in rows],
            "preemptions": [sum(len(row["preempted"]) for row in found) for found in rows],
            "evictions": [sum(len(row["evicted"]) for row in found) for found in rows],
            "kv_blocks": list(kv_blocks),
        }
    )
    figures = {
        f"{name}_{kind}_s": float(value)
        for name, column in (("lateness", lateness_s), ("client_delay", delay_s))
        for kind, value in (
            ("p50", column.quantile(0.5)), ("p99", column.quantile(0.99)), ("max", column.max()),
        )
        if pd.notna(value)
    }  # fmt: skip
    return Result(
        requests=requests,
        runs=runs.reset_index(drop=True),
        engines=engines,
        meta={**meta, **figures},
    )


def uninterrupted(result: Result) -> Result:
    """The result of a run that the user did not end.

    Raises:
        KeyboardInterrupt: it has cancelled requests; what would have come next must not.
    """
    if (result.requests["state"] == "cancelled").any():
        raise KeyboardInterrupt
    return result


def length_warnings(trace: Trace, max_model_len: int | None) -> list[str]:
    """What of a trace is too long for an engine, in words.

    Args:
        trace: what is to be served.
        max_model_len: most tokens of a prompt and its output; ``None``: not known yet.
    """
    if max_model_len is None:
        return []
    table, lines = trace.requests, []
    room = max_model_len - table["prompt_tokens"]
    long = table["id"][room < 1].tolist()
    if long:
        named = ", ".join(long[:NAMED]) + (", ..." if len(long) > NAMED else "")
        lines.append(
            f"{len(long)} of {len(trace)} prompts do not fit max_model_len={max_model_len} and are "
            f"rejected: {named}"
        )
    cut = int(((room >= 1) & (table["output_tokens"] > room)).sum())
    if cut:
        lines.append(
            f"{cut} of {len(trace)} outputs end where max_model_len={max_model_len} is reached, "
            f"before their length in the trace"
        )
    return lines


def _runs(
    engine: int,
    rows: Sequence[Decision],
    prompt_tokens: Mapping[str, int],
) -> pd.DataFrame:
    """One run per step; a step lasts until the next one begins if the engine goes on working."""
    worked = [row for row in rows if row["scheduled"]]
    steps = measured_steps(worked, prompt_tokens)
    return pd.DataFrame(
        {
            "engine": engine,
            "start_s": [_times(row)[0] for row in worked],
            "first_s": [step.duration_s for step in steps],
            "slope_s": 0.0,
            "steps": 1,
            "decodes": [step.batch.decodes for step in steps],
            "prefill_tokens": [sum(new for new, _ in step.batch.prefills) for step in steps],
            "waiting": [len(row["waiting"]) for row in worked],
            "free_blocks": [row["free"] for row in worked],
        }
    )


def on_clock(rows: Sequence[Decision], admitted_s: Mapping[str, float]) -> list[Decision]:
    """The rows with their times on the clock of these first admissions, in seconds.

    A scheduler's clock begins when it is made. Requests are admitted right after a step begins,
    so the smallest distance between the two is what lies between the clocks.
    """
    apart_s = [
        admitted_s[name] - _times(row)[0]
        for row in rows
        for name in row["new"]
        if pd.notna(admitted_s.get(name))
    ]
    origin_s = min(apart_s, default=0.0)
    shifted: list[Decision] = []
    for row in rows:
        began_s, ended_s = _times(row)
        shifted.append({**row, "began_s": began_s + origin_s, "ended_s": ended_s + origin_s})
    return shifted


def _times(row: Decision) -> tuple[float, float]:
    """When the step began and ended, on the clock of the scheduler; a live engine always says."""
    return row.get("began_s", nan), row.get("ended_s", nan)


def decision_rows(path: Path, known: Iterable[str]) -> list[Decision]:
    """The rows that an engine wrote, with the requests' own ids; none if it wrote nothing.

    vLLM appends eight random characters to ids. A last line that is cut off (the engine died) is
    left out.
    """
    names = _Names(known)
    rows: list[Decision] = []
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        return rows
    for line in lines[:-1]:
        row: dict[str, Any] = json.loads(line)
        for key in ("entered", "aborted", "new", "resumed", "preempted", "waiting", "running"):
            row[key] = [names[ident] for ident in row[key]]
        for key in ("scheduled", "hits", "blocks"):
            row[key] = {names[ident]: value for ident, value in row[key].items()}
        row["evicted"] = [[names.of_block(name), block] for name, block in row["evicted"]]
        rows.append(cast("Decision", row))
    return rows


class _Names(dict[str, str]):
    """From vLLM's ids of requests to ours."""

    def __init__(self, known: Iterable[str]) -> None:
        super().__init__((name, name) for name in known)

    def __missing__(self, ident: str) -> str:
        short = ident.rpartition("-")[0]
        self[ident] = self.get(short, ident)
        return self[ident]

    def of_block(self, name: str) -> str:
        ident, _, index = name.rpartition(":")
        return f"{self[ident]}:{index}"
