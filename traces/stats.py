"""What a trace holds: lengths, burstiness, and how much an infinite prefix cache would save.

Everything works on runs of block ids, so traces with 10^8 block accesses need no more memory than
their runs.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from traces.chains import Chains, Ints
from traces.schema import Trace

__all__ = ["ideal_hits", "stats"]

_PERCENTILES = (50, 90, 99)
_WINDOWS_S = (1, 10, 60)


def stats(trace: Trace) -> dict[str, Any]:
    """Numbers that describe a trace, ready for JSON (``None`` where one is undefined).

    ``arrival_cv``: standard deviation / mean of the gaps between arrivals. ``iod``: variance / mean
    of arrivals in windows of so many seconds, 1 for Poisson. The ``ideal_`` values hold for an
    infinite cache, requests one at a time in the order of arrival, and prompts only: ``hit_rate``
    counts blocks, ``token_hit_rate`` tokens, and ``vllm_hit_rate`` tokens of full blocks with at
    least one token left to compute.
    """
    arrival_s = trace.requests["arrival_s"].to_numpy()
    prompt_tokens = trace.requests["prompt_tokens"].to_numpy()
    session = trace.requests["session"]
    blocks, hits = trace.chains.lengths, ideal_hits(trace.chains)
    size = trace.block_tokens
    hit_tokens = np.minimum(hits * size, prompt_tokens)
    vllm_tokens = np.minimum(hits, (prompt_tokens - 1) // size) * size if size else hit_tokens
    accesses, total = int(blocks.sum()), trace.prompt_tokens
    return {
        "name": trace.name,
        "synthetic": trace.synthetic,
        "requests": len(trace),
        "prompt_tokens": total,
        "output_tokens": trace.output_tokens,
        "span_s": trace.span_s,
        "rate_per_s": trace.rate_per_s,
        "arrival_cv": _cv(np.diff(arrival_s)),
        "iod": {window_s: _iod(arrival_s, window_s) for window_s in _WINDOWS_S},
        "prompt": _distribution(prompt_tokens),
        "output": _distribution(trace.requests["output_tokens"].to_numpy()),
        "sessions": int(session[session != ""].nunique()),
        "slo_classes": {
            str(name): int(count)
            for name, count in trace.requests["slo_class"].value_counts().sort_index().items()
            if name
        },
        "block_tokens": size,
        "block_accesses": accesses,
        "distinct_blocks": accesses - int(hits.sum()),
        "ideal_hit_blocks": int(hits.sum()),
        "ideal_hit_rate": int(hits.sum()) / accesses if accesses else None,
        "ideal_token_hit_rate": int(hit_tokens.sum()) / total if accesses else None,
        "ideal_vllm_hit_rate": int(vllm_tokens.sum()) / total if accesses else None,
        "longest_request_blocks": int(blocks.max()),
    }


def ideal_hits(chains: Chains) -> Ints:
    """Leading blocks of each request that an earlier request had: hits of an infinite cache.

    With chained ids a run always starts with the same id after the same predecessor, and two runs
    overlap only if their first ids are equal. So what is new in a run is what goes beyond the
    longest earlier run with its first id.
    """
    runs = len(chains.start)
    order = np.argsort(chains.start, kind="stable")
    start, count = chains.start[order], chains.count[order]
    longest = int(count.max()) if runs else 0
    group = np.cumsum(np.diff(start, prepend=start[:1]) != 0)
    reach = np.maximum.accumulate(group * (longest + 1) + count) - group * (longest + 1)
    seen = np.zeros(runs, dtype=np.int64)
    seen[1:] = np.where(group[1:] == group[:-1], reach[:-1], 0)
    hit = np.bincount(chains.owner[order], weights=np.minimum(seen, count), minlength=len(chains))
    return hit.astype(np.int64)


def _cv(gaps_s: NDArray[np.float64]) -> float | None:
    if len(gaps_s) == 0 or gaps_s.mean() == 0:
        return None
    return float(gaps_s.std() / gaps_s.mean())


def _iod(arrival_s: NDArray[np.float64], window_s: float) -> float:
    first, last = arrival_s[0] // window_s, arrival_s[-1] // window_s
    windows = int(last - first) + 1
    counts = np.unique(arrival_s // window_s, return_counts=True)[1]
    mean = len(arrival_s) / windows
    return float(np.sum(counts.astype(np.float64) ** 2) / windows - mean**2) / mean


def _distribution(values: Ints) -> dict[str, float]:
    points = np.percentile(values, _PERCENTILES).tolist()
    return {
        "mean": float(values.mean()),
        **{f"p{p}": v for p, v in zip(_PERCENTILES, points, strict=True)},
        "max": int(values.max()),
    }
