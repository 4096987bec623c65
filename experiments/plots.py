"""Figures: functions from results to matplotlib axes.

Nothing is shown here: a notebook shows ``ax.figure``, and ``save`` writes a PNG file.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from itertools import cycle
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator
from numpy.typing import NDArray

from sim.metrics import e2e_s, tpot_s, ttft_s
from sim.result import Result

__all__ = ["latency_cdf", "save", "timeline", "tradeoff"]

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's palette, which colour-blind readers can tell apart."""

STYLES = ("-", "--", "-.", ":")
TIMELINE_POINTS = 400
BUBBLE_POINTS2 = (50.0, 250.0)
"""Areas of the least and the most goodput, in square points."""

METRICS: Mapping[str, tuple[str, Callable[[pd.DataFrame], NDArray[np.float64]]]] = {
    "ttft": ("time to first token (s)", ttft_s),
    "tpot": ("time per output token (s)", tpot_s),
    "e2e": ("time to last token (s)", e2e_s),
}


def latency_cdf(
    results: Mapping[str, Result],
    metric: Literal["ttft", "tpot", "e2e"] = "ttft",
    ax: Axes | None = None,
) -> Axes:
    """How many requests were at least how fast: one line per run, tails readable.

    The y axis is logarithmic in what is left (50 %, 10 %, 1 %, ...), because a p99 decides.

    Raises:
        ValueError: no such metric.
    """
    if metric not in METRICS:
        raise ValueError(f"metric={metric!r}: must be one of {', '.join(METRICS)}")
    ax = ax or _axes()
    label, values_of = METRICS[metric]
    longest = 1
    for (name, result), colour, style in zip(
        results.items(), cycle(COLOURS), cycle(STYLES), strict=False
    ):
        values = values_of(result.requests[result.requests["state"] == "finished"])
        values = np.sort(values[~np.isnan(values)])
        if not len(values):
            continue
        left = 1 - np.arange(len(values)) / len(values)
        longest = max(longest, len(values))
        ax.step(
            values, left, where="post", color=colour, linestyle=style, label=_label(name, result)
        )
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_ylim(1 / longest, 1)
    ax.set_yticks([share for share in (1, 0.5, 0.1, 0.01, 0.001) if share >= 1 / longest])
    ax.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:g} %"))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda seconds, _: f"{seconds:g}"))
    ax.set_xlabel(label)
    ax.set_ylabel("requests that took longer")
    ax.set_title(f"{label.rpartition(' (')[0].capitalize()}: lower left is better")
    ax.axhline(0.01, color="0.4", linewidth=1, zorder=1)
    ax.annotate("p99", (0, 0.01), (4, 2), ("axes fraction", "data"), "offset points", color="0.3")
    ax.legend(frameon=False)
    return _finished(ax)


def tradeoff(results: Mapping[str, Result], ax: Axes | None = None) -> Axes:
    """What cache hits buy: prefix hit rate against tail latency, bubbles as large as goodput."""
    ax = ax or _axes()
    summaries = {name: result.summary() for name, result in results.items()}
    goodput = [float(s["goodput_per_s"] or 0.0) for s in summaries.values()]
    low, high = min(goodput, default=0.0), max(goodput, default=0.0)
    for (name, summary), good, colour in zip(
        summaries.items(), goodput, cycle(COLOURS), strict=False
    ):
        if summary["ttft_p99_s"] is None or summary["prefix_hit_rate"] is None:
            continue
        least, most = BUBBLE_POINTS2
        share = (good - low) / (high - low) if high > low else 0.5
        x, y = 100 * summary["prefix_hit_rate"], summary["ttft_p99_s"]
        ax.scatter(
            x,
            y,
            s=least + share * (most - least),
            color=colour,
            edgecolors="white",
            label=f"{_label(name, results[name])}: {good:.2f} requests/s in time",
        )
    ax.margins(0.2, 0.2)
    ax.set_ylim(bottom=0)
    ax.set_xlabel("prompt tokens found in the cache (%)")
    ax.set_ylabel("time to first token, p99 (s)")
    ax.set_title("Cache hits against tail latency: lower right is better, larger is better")
    ax.legend(frameon=False, loc="best", labelspacing=1.0)
    return _finished(ax)


def timeline(result: Result, axes: tuple[Axes, Axes] | None = None) -> tuple[Axes, Axes]:
    """Requests running and waiting (above) and KV blocks in use (below) over time, all engines.

    Raises:
        ValueError: the run kept no table of steps (``record_runs=false``).
    """
    if result.runs.empty:
        raise ValueError("this run has no table of engine steps; repeat it with record_runs=true")
    if axes is None:
        figure = Figure(figsize=(8, 5), layout="constrained")
        above, below = figure.subplots(2, 1, sharex=True)
    else:
        above, below = axes
    start_s = float(result.runs["start_s"].min())
    end_s = float(np.nanmax(result.requests["finish_s"].to_numpy()))
    grid_s = np.linspace(start_s, end_s, TIMELINE_POINTS)
    running, waiting, used = (np.zeros(len(grid_s)) for _ in range(3))
    total = int(result.engines["kv_blocks"].sum())
    for engine, blocks in zip(result.engines["engine"], result.engines["kv_blocks"], strict=True):
        runs = result.runs[result.runs["engine"] == engine].sort_values("start_s", kind="stable")
        if runs.empty:
            continue
        steps = runs["steps"].to_numpy(dtype=np.float64)
        begins_s = runs["start_s"].to_numpy()
        ends_s = (
            begins_s
            + steps * runs["first_s"].to_numpy()
            + runs["slope_s"].to_numpy() * steps * (steps - 1) / 2
        )
        at = np.searchsorted(begins_s, grid_s, side="right") - 1
        busy = (at >= 0) & (grid_s < ends_s[at])
        waiting += np.where(busy, runs["waiting"].to_numpy()[at], 0)
        used += np.where(busy, blocks - runs["free_blocks"].to_numpy()[at], 0)
    admitted = np.sort(result.requests["admitted_s"].dropna().to_numpy())
    finished = np.sort(result.requests["finish_s"].dropna().to_numpy())
    running += np.searchsorted(admitted, grid_s, "right") - np.searchsorted(
        finished, grid_s, "right"
    )
    above.fill_between(grid_s, running, color=COLOURS[0], alpha=0.35, linewidth=0)
    above.plot(grid_s, running, color=COLOURS[0], label="admitted")
    above.plot(grid_s, waiting, color=COLOURS[1], label="waiting", linestyle="--")
    above.set_ylabel("requests")
    above.set_ylim(bottom=0)
    above.legend(frameon=False)
    above.set_title(_label(f"{result.meta['trace']}: load over time", result))
    below.plot(grid_s, 100 * used / max(total, 1), color=COLOURS[2])
    below.set_ylabel("KV blocks in use (%)")
    below.set_ylim(0, 105)
    below.set_xlabel("time (s)")
    return _finished(above), _finished(below)


def save(ax: Axes, path: str | Path) -> Path:
    """The figure of these axes as a PNG file, all of it or nothing."""
    figure = ax.get_figure(root=True)
    if figure is None:
        raise ValueError("these axes have been removed from their figure")
    target = Path(path)
    scratch = target.with_name(f".{target.name}")
    figure.savefig(scratch, dpi=160, format="png")
    os.replace(scratch, target)
    return target


def _axes() -> Axes:
    return Figure(figsize=(7, 4.5), layout="constrained").subplots()


def _label(name: str, result: Result) -> str:
    return name if result.meta.get("calibrated") else f"{name} (uncalibrated)"


def _finished(ax: Axes) -> Axes:
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(color="0.9", linewidth=0.8)
    ax.set_axisbelow(True)
    return ax
