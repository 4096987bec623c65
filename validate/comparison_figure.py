"""A simulated and a live run of one trace in one figure."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from validate.comparison import BAND, LATENCIES, Comparison, Floats, latency_of

__all__ = ["figure", "save"]


def figure(comparison: Comparison) -> Any:
    """CDFs of TTFT, TPOT and E2E above, single requests simulated against live below."""
    # matplotlib takes longer to import than everything else here.
    from matplotlib.figure import Figure  # noqa: PLC0415

    canvas = Figure(figsize=(12, 7.2), layout="constrained")
    axes = canvas.subplots(2, 3)
    for above, below, (metric, latency) in zip(*axes, LATENCIES.items(), strict=True):
        simulated = 1e3 * latency_of(comparison.simulated, latency)
        live = [1e3 * latency_of(result, latency) for result in comparison.live]
        _draw_cdfs(above, metric, simulated, live)
        _draw_scatter(below, metric, simulated, live[0])
    errors = [
        f"{name} {'?' if error is None else f'{100 * error:+.1f} %'}"
        for name, error in comparison.mean_errors.items()
    ]
    ours = comparison.simulated
    canvas.suptitle(
        f"{ours.meta['trace']}: {len(ours.requests)} requests, simulated and live; "
        f"error of means: {', '.join(errors)}"
    )
    return canvas


def save(canvas: Any, path: str | Path) -> Path:
    """A figure as a PNG file, all of it or nothing."""
    target = Path(path)
    scratch = target.with_name(f".{target.name}")
    canvas.savefig(scratch, dpi=130, format="png")
    os.replace(scratch, target)
    return target


# --------------------------------------------------------------------------- drawing

BLUE, ORANGE = "#0072B2", "#D55E00"  # of Okabe and Ito's palette, as in experiments.plots


def _draw_cdfs(ax: Any, metric: str, simulated: Floats, live: Sequence[Floats]) -> None:
    for i, values in enumerate(live):
        label = "live" if len(live) == 1 else f"live, {len(live)} runs"
        x, y = _steps(values)
        ax.step(x, y, where="post", color=ORANGE, alpha=0.8, label=None if i else label)
    x, y = _steps(simulated)
    ax.step(x, y, where="post", color=BLUE, linestyle="--", label="simulated")
    ax.set_xscale("log")
    ax.set_ylim(0, 1.02)
    ax.set_xlabel(f"{metric} (ms)")
    ax.set_ylabel("share of requests")
    ax.legend(frameon=False, loc="lower right")
    _finish(ax, "x")


def _draw_scatter(ax: Any, metric: str, simulated: Floats, live: Floats) -> None:
    both = np.isfinite(simulated) & np.isfinite(live) & (live > 0) & (simulated > 0)
    x, y = live[both], simulated[both]
    ends = np.array([1.0, 10.0])
    if len(x):
        ends = np.array([min(x.min(), y.min()) / 1.15, max(x.max(), y.max()) * 1.15])
    ax.fill_between(ends, ends * (1 - BAND), ends * (1 + BAND), color="0.9", linewidth=0)
    ax.plot(ends, ends, color="0.5", linewidth=1)
    ax.scatter(x, y, s=14, color=BLUE, alpha=0.6, linewidth=0)
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xlim(*ends)
    ax.set_ylim(*ends)
    ax.set_aspect("equal")
    inside = float(np.mean(np.abs(y / x - 1) <= BAND)) if len(x) else 0.0
    ax.set_title(
        f"{100 * inside:.0f} % of requests within {100 * BAND:g} % (grey)", fontsize="medium"
    )
    ax.set_xlabel(f"live {metric} (ms)")
    ax.set_ylabel(f"simulated {metric} (ms)")
    _finish(ax, "xy")


def _steps(values: Floats) -> tuple[Floats, Floats]:
    known = np.sort(values[np.isfinite(values)])
    return known, np.arange(1, len(known) + 1) / max(len(known), 1)


def _finish(ax: Any, logarithmic: str) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter  # noqa: PLC0415

    for axis in _axes(ax, logarithmic):
        low, high = axis.get_view_interval()
        # Narrow axes need ticks between the powers of ten, wide ones must not have them.
        subs: tuple[float, ...] = (1.0,) if high > 100 * low else (1.0, 2.0, 5.0)
        if high <= 4 * low:
            subs = (1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0)
        axis.set_major_locator(LogLocator(10, subs))
        axis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.set_minor_formatter(NullFormatter())
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(color="0.92", linewidth=0.8)
    ax.set_axisbelow(True)


def _axes(ax: Any, names: str) -> Iterator[Any]:
    return (getattr(ax, f"{name}axis") for name in names)
