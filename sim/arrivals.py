"""The requests of a trace, made when they arrive, and which turn of a chat follows which."""

from __future__ import annotations

from collections.abc import Iterator
from math import inf
from typing import Any

import numpy as np
from numpy.typing import NDArray

from policies.api import Slo
from sim.oracle import TraceOracle
from sim.request import NO_SLO, PS_PER_S, Request
from traces.schema import Chains, Trace

CHUNK = 65_536
"""Rows of the trace that are converted at a time."""


def requests_of(
    trace: Trace, chains: Chains | None, model: str, oracle: TraceOracle | None
) -> Iterator[Request]:
    """Requests in order of the trace's arrival times.

    Args:
        trace: what arrives.
        chains: its block ids in the engines' block size; ``None`` where nothing is cached.
        model: what requests ask for that name no model.
        oracle: who knows the future, where a policy needs that.
    """
    table = trace.requests
    texts = ("session", "tenant", "model", "kind")
    slo_columns = ("slo_class", "slo_ttft_s", "slo_tpot_s", "slo_e2e_s")
    slos: dict[Any, Slo] = {("", inf, inf, inf): NO_SLO}
    chain: list[tuple[int, int]] = []
    offsets: list[int] = []
    runs: list[tuple[int, int]] = []
    for low in range(0, len(trace), CHUNK):
        part = table.iloc[low : low + CHUNK]
        arrivals = map(int, (part["arrival_s"] * PS_PER_S).round().tolist())
        plain = ("prompt_tokens", "output_tokens", "id", "priority")
        values = (part[name].tolist() for name in plain)
        classes = list(zip(*(part[name].tolist() for name in slo_columns), strict=True))
        for key in set(classes):
            if key not in slos:
                slos[key] = Slo(name=key[0] or "none", ttft_s=key[1], tpot_s=key[2], e2e_s=key[3])
        # Most traces say nothing here: then requests keep the defaults.
        told = [name for name in texts if (part[name] != "").any()]
        tellings = list(zip(*(part[name].tolist() for name in told), strict=True))
        if chains is not None:
            span = chains.offset[low : low + len(part) + 1]
            offsets = (span - span[0]).tolist()
            starts = chains.start[span[0] : span[-1]].tolist()
            runs = list(zip(starts, chains.count[span[0] : span[-1]].tolist(), strict=True))
        targets = [slos[key] for key in classes]
        rows = zip(range(low, low + len(part)), arrivals, *values, targets, strict=True)
        for row, arrival_ps, prompt, output, ident, priority, slo in rows:
            if chains is not None:
                chain = runs[offsets[row - low] : offsets[row - low + 1]]
            request = Request(row, arrival_ps, prompt, output, chain)
            request.name = ident
            request.priority = priority
            request.slo = slo
            request.model = model
            if told:
                for name, value in zip(told, tellings[row - low], strict=True):
                    if value:
                        setattr(request, name, value)
            if oracle is not None:
                request.future_s = oracle.of(row)
            yield request


def turns_of(trace: Trace) -> tuple[NDArray[np.int64], NDArray[np.int64]] | None:
    """Per row the rows of the chat's previous and next turn, -1 for none; ``None``: no chats."""
    table = trace.requests
    rows = np.flatnonzero((table["session"] != "").to_numpy())
    if not len(rows):
        return None
    previous = np.full(len(trace), -1, dtype=np.int64)
    following = np.full(len(trace), -1, dtype=np.int64)
    codes = table["session"].iloc[rows].astype("category").cat.codes.to_numpy()
    order = np.lexsort((table["turn"].to_numpy()[rows], codes))
    rows, codes = rows[order], codes[order]
    same = codes[1:] == codes[:-1]
    previous[rows[1:][same]] = rows[:-1][same]
    following[rows[:-1][same]] = rows[1:][same]
    return previous, following
