"""What a run is worth: pure functions of a ``Result``'s tables.

Times are seconds, rates per second; a request counts only if it finished, unless said otherwise.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

if TYPE_CHECKING:
    from sim.result import Result

PERCENTILES = (50, 90, 99)
PS_PER_S = 10**12
Floats = NDArray[np.float64]


def ttft_s(requests: pd.DataFrame) -> Floats:
    """Time to first token of each request; NaN where there is none."""
    return _floats(requests, "first_token_s") - _floats(requests, "arrival_s")


def tpot_s(requests: pd.DataFrame) -> Floats:
    """Mean time per output token after the first; NaN for one-token answers."""
    after_first = _floats(requests, "output_tokens") - 1
    spent = _floats(requests, "finish_s") - _floats(requests, "first_token_s")
    return np.where(after_first > 0, spent / np.maximum(after_first, 1), np.nan)


def e2e_s(requests: pd.DataFrame) -> Floats:
    """Time from arrival to last token; NaN where there is none."""
    return _floats(requests, "finish_s") - _floats(requests, "arrival_s")


def queue_s(requests: pd.DataFrame) -> Floats:
    """Time from arrival to first admission; NaN where there is none."""
    return _floats(requests, "admitted_s") - _floats(requests, "arrival_s")


def met_slo(requests: pd.DataFrame) -> NDArray[np.bool_]:
    """Which requests finished within all their latency targets."""
    finished = (requests["state"] == "finished").to_numpy()
    tpot = np.nan_to_num(tpot_s(requests), nan=0.0)
    return (
        finished
        & (ttft_s(requests) <= _floats(requests, "slo_ttft_s"))
        & (tpot <= _floats(requests, "slo_tpot_s"))
        & (e2e_s(requests) <= _floats(requests, "slo_e2e_s"))
    )


def makespan_s(requests: pd.DataFrame) -> float:
    """From the first arrival to the last event of any request."""
    last = np.nanmax([requests["finish_s"].max(), requests["arrival_s"].max()])
    return float(last - requests["arrival_s"].min())


def itl_percentile_s(runs: pd.DataFrame, percent: float) -> float:
    """Inter-token latency percentile over all tokens but first ones; NaN without decoding.

    Exact over the runs: step j of a run lasts ``first_s + j * slope_s`` for each of its decoders.
    The gap that a preemption leaves is in TPOT and E2E, not here.
    """
    decoding = runs[runs["decodes"] > 0]
    if decoding.empty:
        return float("nan")
    # In whole picoseconds, because sums of seconds would depend on how steps are cut into runs.
    first, slope = _ps(decoding, "first_s"), _ps(decoding, "slope_s")
    steps = decoding["steps"].to_numpy(dtype=np.int64)
    weight = decoding["decodes"].to_numpy(dtype=np.int64)
    safe = np.maximum(slope, 1)
    wanted = percent / 100 * int(steps @ weight)
    low, high = int(first.min()), int((first + slope * (steps - 1)).max())
    while low < high:
        middle = (low + high) // 2
        within = np.where(slope > 0, (middle - first) // safe + 1, steps)
        within = np.where(middle < first, 0, np.clip(within, 0, steps))
        if int(within @ weight) >= wanted:
            high = middle
        else:
            low = middle + 1
    return high / PS_PER_S


def summarise(result: Result) -> dict[str, Any]:
    """The figures of a run as plain numbers (``None`` where there is no value).

    ``goodput_per_s`` counts requests that met their own targets; ``usd_per_million_tokens`` is
    the price of all chips for the makespan over prompt and output tokens served.
    """
    requests, meta = result.requests, result.meta
    finished = requests[requests["state"] == "finished"]
    span = makespan_s(requests)
    admitted = requests["admitted_s"].notna()
    prompt = int(requests.loc[admitted, "prompt_tokens"].sum())
    generated = int(finished["output_tokens"].sum())
    served = int(finished["prompt_tokens"].sum()) + generated
    good = int(met_slo(requests).sum())
    price = meta.get("price_usd_per_s")
    cost = None if price is None else price * span
    summary: dict[str, Any] = {
        "requests": len(requests),
        "finished": len(finished),
        "rejected": int((requests["state"] == "rejected").sum()),
        "makespan_s": span,
    }
    for name, values in (
        ("ttft", ttft_s(finished)),
        ("tpot", tpot_s(finished)),
        ("e2e", e2e_s(finished)),
        ("queue", queue_s(finished)),
    ):
        summary |= _spread(name, values)
    for percent in PERCENTILES:
        summary[f"itl_p{percent}_s"] = itl_percentile_s(result.runs, percent)
    summary |= {
        "goodput_per_s": _ratio(good, span),
        "slo_attainment": _ratio(good, len(requests)),
        "throughput_per_s": _ratio(len(finished), span),
        "output_tokens_per_s": _ratio(generated, span),
        "tokens_per_s": _ratio(served, span),
        "prefix_hit_rate": _ratio(int(requests.loc[admitted, "cached_tokens"].sum()), prompt),
        "preemptions": int(result.engines["preemptions"].sum()),
        "evictions": int(result.engines["evictions"].sum()),
        "usd_per_million_tokens": None if cost is None else _ratio(cost * 1e6, served),
        "usd_per_million_output_tokens": None if cost is None else _ratio(cost * 1e6, generated),
        "calibrated": bool(meta.get("calibrated", False)),
        "calibration": str(meta.get("calibration", "")),
    }
    return {key: _plain(value) for key, value in summary.items()}


def _spread(name: str, values: Floats) -> dict[str, float]:
    known = values[~np.isnan(values)]
    if not len(known):
        return {f"{name}_mean_s": np.nan} | {f"{name}_p{p}_s": np.nan for p in PERCENTILES}
    points = np.percentile(known, PERCENTILES)
    return {f"{name}_mean_s": float(known.mean())} | {
        f"{name}_p{p}_s": float(point) for p, point in zip(PERCENTILES, points, strict=True)
    }


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else float("nan")


def _floats(table: pd.DataFrame, column: str) -> Floats:
    return table[column].to_numpy(dtype=np.float64)


def _ps(table: pd.DataFrame, column: str) -> NDArray[np.int64]:
    return np.rint(_floats(table, column) * PS_PER_S).astype(np.int64)


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not np.isfinite(value) else value
