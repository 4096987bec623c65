"""SLO classes for traces, which never record them: targets and priorities drawn at random."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import inf, isfinite
from typing import Any

import pandas as pd

from traces.arrivals import stream
from traces.errors import TraceError, unknown
from traces.schema import Trace

__all__ = ["SloClasses", "assign_slo"]

SloClasses = Sequence[Mapping[str, Any]]
"""``{"name": ..., "share": ..., "ttft_s": ..., "tpot_s": ..., "e2e_s": ..., "priority": ...}``;
all but ``name`` may be left out (share 1, no target, priority 0); shares are relative."""

_SLO_KEYS: dict[str, Any] = {
    "name": "",
    "share": 1.0,
    "ttft_s": inf,
    "tpot_s": inf,
    "e2e_s": inf,
    "priority": 0,
}


def assign_slo(trace: Trace, classes: SloClasses, *, seed: int = 0) -> Trace:
    """The trace with SLO classes and priorities drawn at random; a session has one class.

    No public trace records them, so the result is marked as synthetic in this respect.
    """
    table = _slo_table(classes)
    share = table.pop("share").to_numpy()
    session = trace.requests["session"]
    unit = session.where(session != "", "request " + trace.requests["id"])
    code, units = pd.factorize(unit)
    drawn = stream(seed, "slo classes").choice(len(table), len(units), p=share / share.sum())
    rows = table.iloc[drawn[code]].reset_index(drop=True)
    requests = trace.requests.assign(**{str(column): rows[column] for column in rows})
    parts = [part for part in trace.synthetic.split(", ") if part and part != "SLO classes"]
    return replace(trace, requests=requests, synthetic=", ".join([*parts, "SLO classes"]))


def _slo_table(classes: SloClasses) -> pd.DataFrame:
    if len(classes) == 0:
        raise TraceError("classes must name at least one SLO class")
    filled: list[dict[str, Any]] = []
    for one in classes:
        for key in one:
            if key not in _SLO_KEYS:
                raise unknown("key of an SLO class", str(key), _SLO_KEYS)
        row = {**_SLO_KEYS, **one}
        if not row["name"] or row["name"] in (other["name"] for other in filled):
            raise TraceError(f"SLO classes need names that differ, not {row['name']!r}")
        for key in ("share", "ttft_s", "tpot_s", "e2e_s"):
            if not row[key] > 0 or (key == "share" and not isfinite(row[key])):
                raise TraceError(f"SLO class {row['name']!r}: {key}={row[key]} must be above 0")
        if int(row["priority"]) != row["priority"]:
            raise TraceError(f"SLO class {row['name']!r}: priority must be a whole number")
        filled.append(row)
    frame = pd.DataFrame(filled)
    return pd.DataFrame(
        {
            "share": frame["share"].astype("float64"),
            "slo_class": frame["name"].astype("str"),
            "slo_ttft_s": frame["ttft_s"].astype("float64"),
            "slo_tpot_s": frame["tpot_s"].astype("float64"),
            "slo_e2e_s": frame["e2e_s"].astype("float64"),
            "priority": frame["priority"].astype("int64"),
        }
    )
