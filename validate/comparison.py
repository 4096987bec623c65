"""A simulated and a live run of one trace side by side: as a table and as plain data.

Where the trace was served live more than once, the live figures are means over those runs, and
what they differ by among themselves (the noise) stands beside what the simulator is off.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from math import isfinite
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from rich.console import Group
from rich.table import Table
from rich.text import Text

from sim.metrics import e2e_s, tpot_s, ttft_s
from sim.result import Result

__all__ = ["BAND", "Comparison", "ComparisonError", "Figure", "Parity", "RequestErrors"]

BAND = 0.15
"""How far simulated mean latencies may be off."""

MEANS = {"TTFT": "ttft_mean_s", "TPOT": "tpot_mean_s", "E2E": "e2e_mean_s"}
"""The figures that are held against ``BAND``."""

Floats = NDArray[np.float64]
Latency = Callable[[pd.DataFrame], Floats]
LATENCIES: dict[str, Latency] = {"TTFT": ttft_s, "TPOT": tpot_s, "E2E": e2e_s}


class ComparisonError(ValueError):
    """Results that are not of the same trace."""


class Row(NamedTuple):
    """A figure of the summary as it is shown."""

    label: str
    key: str
    """Of ``Result.summary``."""
    scale: float = 1.0
    digits: int = 0


ROWS = (
    Row("requests finished", "finished"),
    Row("requests rejected", "rejected"),
    *(
        Row(f"{name} {part} ({unit})", f"{name.lower()}_{part}_s", scale, digits)
        for name, unit, scale, digits in (
            ("TTFT", "ms", 1e3, 2),
            ("TPOT", "ms", 1e3, 3),
            ("E2E", "ms", 1e3, 1),
            ("queue", "ms", 1e3, 2),
        )
        for part in ("mean", "p50", "p90", "p99")
    ),
    Row("throughput (requests/s)", "throughput_per_s", 1.0, 3),
    Row("output tokens/s", "output_tokens_per_s", 1.0, 1),
    Row("prefix hit rate, HBM (%)", "prefix_hit_rate", 100.0, 2),
    Row("preemptions", "preemptions"),
    Row("evictions (blocks)", "evictions"),
)


class Figure(NamedTuple):
    """One figure of both sides, in the unit that the label names."""

    label: str
    key: str
    simulated: float | None
    live: float | None
    """Mean over the live runs."""
    error: float | None
    """``simulated / live - 1``; ``None`` where that is nothing."""
    noise: float | None
    """Largest difference between two live runs over their mean; ``None`` for one run."""


class RequestErrors(NamedTuple):
    """How far single requests are off, relative to live; means over the live runs."""

    metric: str
    requests: int
    mape: float
    median: float
    live_mape: float | None
    """The same between live runs: no simulator can do better than that."""


class Parity(NamedTuple):
    """Decisions of the live engine held against those of the same scheduler without a model."""

    rows: int
    equal: int
    first: str = ""
    """The first difference, in words."""

    @property
    def line(self) -> str:
        if self.equal == self.rows:
            return f"decisions: all {self.rows} engine steps as the scheduler alone decides them"
        return (
            f"decisions: {self.rows - self.equal} of {self.rows} engine steps differ from what "
            f"the scheduler alone decides; first: {self.first}"
        )


@dataclass(frozen=True)
class Comparison:
    """Both sides of one trace.

    Args:
        simulated: the simulator's result.
        live: one or more results of live engines.
        parity: of the live engine's decisions, where they were compared.
        unchecked: why they were not, in words.

    Raises:
        ComparisonError: the results do not have the same requests.
    """

    simulated: Result
    live: Sequence[Result]
    parity: Parity | None = None
    unchecked: str = ""

    def __post_init__(self) -> None:
        if not self.live:
            raise ComparisonError("no live result to compare with")
        ids = self.simulated.requests["id"].tolist()
        for result in self.live:
            others = result.requests["id"].tolist()
            if others != ids:
                at = next(
                    (i for i, (a, b) in enumerate(zip(ids, others, strict=False)) if a != b),
                    min(len(ids), len(others)),
                )
                raise ComparisonError(
                    f"not the same requests: {len(ids)} simulated and {len(others)} live, "
                    f"which differ from request {at} on"
                )

    # ------------------------------------------------------------------ numbers

    @cached_property
    def figures(self) -> list[Figure]:
        """The aggregate figures of both sides."""
        simulated = self.simulated.summary()
        live = [result.summary() for result in self.live]
        return [
            _figure(row, simulated[row.key], [summary[row.key] for summary in live]) for row in ROWS
        ]

    @cached_property
    def request_errors(self) -> list[RequestErrors]:
        """The errors of single requests, for those that finished on both sides."""
        errors = []
        for metric, latency in LATENCIES.items():
            simulated = latency_of(self.simulated, latency)
            live = [latency_of(result, latency) for result in self.live]
            off = [_relative(simulated, truth) for truth in live]
            between = [_relative(a, b) for a, b in combinations(live, 2)]
            errors.append(
                RequestErrors(
                    metric,
                    requests=min(map(len, off)),
                    mape=_mean([np.mean(part) for part in off if len(part)]),
                    median=_mean([np.median(part) for part in off if len(part)]),
                    live_mape=_mean([np.mean(part) for part in between]) if between else None,
                )
            )
        return errors

    @cached_property
    def cached_equal(self) -> int:
        """Requests that found as many cached tokens on both sides (in the first live run)."""
        ours, theirs = (
            result.requests["cached_tokens"].to_numpy() for result in (self.simulated, self.live[0])
        )
        return int((ours == theirs).sum())

    @cached_property
    def mean_errors(self) -> dict[str, float | None]:
        """Relative errors of mean TTFT, TPOT and E2E."""
        by_key = {figure.key: figure.error for figure in self.figures}
        return {name: by_key[key] for name, key in MEANS.items()}

    def within(self, band: float = BAND) -> bool:
        """Whether mean TTFT, TPOT and E2E are all known and no further off than ``band``."""
        return all(error is not None and abs(error) <= band for error in self.mean_errors.values())

    @property
    def agrees(self) -> bool:
        """``within``, and no decision differs as far as they were compared."""
        same = self.parity is None or self.parity.equal == self.parity.rows
        return self.within() and same

    def verdict(self, band: float = BAND) -> str:
        """``within`` in words."""
        parts = ", ".join(
            f"{name} {'unknown' if error is None else f'{100 * error:+.1f} %'}"
            for name, error in self.mean_errors.items()
        )
        are = "are" if self.within(band) else "are not all"
        return f"mean latencies {are} within {100 * band:g} % of the live engine: {parts}"

    def document(self) -> dict[str, Any]:
        """Everything as plain data."""
        return {
            "trace": self.simulated.meta["trace"],
            "requests": len(self.simulated.requests),
            "live_runs": len(self.live),
            "figures": {figure.key: _plain(figure) for figure in self.figures},
            "per_request": {errors.metric: _plain(errors) for errors in self.request_errors},
            "cached_tokens_equal": self.cached_equal,
            "parity": None if self.parity is None else self.parity._asdict(),
            "parity_unchecked": self.unchecked,
            "within_band": self.within(),
            "band": BAND,
        }

    # ------------------------------------------------------------------ table

    def page(self) -> Group:
        """The table of both sides, the errors of single requests, and what to know."""
        runs = len(self.live)
        shown = Table("", show_header=True)
        for title in ("simulated", "live" if runs == 1 else f"live, mean of {runs}", "error"):
            shown.add_column(title, justify="right")
        if runs > 1:
            shown.add_column("live noise", justify="right")
        for row, figure in zip(ROWS, self.figures, strict=True):
            if figure.key in ("rejected", "preemptions") and not (figure.simulated or figure.live):
                continue
            cells = [
                _number(figure.simulated, row.digits),
                _number(figure.live, row.digits if float(figure.live or 0).is_integer() else 2)
                if row.digits == 0
                else _number(figure.live, row.digits),
                _percent(figure.error, "+"),
            ]
            style = None
            if figure.key in MEANS.values():
                close = figure.error is not None and abs(figure.error) <= BAND
                style = "bold green" if close else "bold red"
            noise = [_percent(figure.noise)] if runs > 1 else []
            shown.add_row(figure.label, *cells, *noise, style=style)
        single = Table("single requests", show_header=True)
        for title in ("requests", "mean error", "median error"):
            single.add_column(title, justify="right")
        if runs > 1:
            single.add_column("live against live", justify="right")
        for errors in self.request_errors:
            cells = [str(errors.requests), _percent(errors.mape), _percent(errors.median)]
            noise = [_percent(errors.live_mape)] if runs > 1 else []
            single.add_row(errors.metric, *cells, *noise)
        count = len(self.simulated.requests)
        lines = [
            f"cached tokens are equal for {self.cached_equal} of {count} requests",
        ]
        if self.parity is not None:
            lines.append(self.parity.line)
        elif self.unchecked:
            lines.append(f"decisions: not compared, because {self.unchecked}")
        meta = self.simulated.meta
        title = f"{meta['trace']} on {meta['engines']} x {meta['model']}: simulated and live"
        return Group(
            Text(title, style="bold"),
            shown,
            single,
            *map(Text, lines),
            Text(self.verdict(), style="bold"),
        )


# --------------------------------------------------------------------------- numbers


def _figure(row: Row, simulated: float | None, live: Sequence[float | None]) -> Figure:
    known = [value for value in live if value is not None]
    mean = _mean(known) if known else None
    error = noise = None
    if simulated is not None and mean is not None and (mean or not simulated):
        error = simulated / mean - 1 if mean else 0.0
    if len(known) > 1 and mean is not None:
        noise = (max(known) - min(known)) / mean if mean else 0.0
    return Figure(
        row.label,
        row.key,
        None if simulated is None else simulated * row.scale,
        None if mean is None else mean * row.scale,
        error,
        noise,
    )


def latency_of(result: Result, latency: Latency) -> Floats:
    """Of each request in trace order; NaN where it did not finish."""
    finished = (result.requests["state"] == "finished").to_numpy()
    return np.where(finished, latency(result.requests), np.nan)


def _relative(value: Floats, truth: Floats) -> Floats:
    """Absolute relative errors where both are known."""
    both = np.isfinite(value) & np.isfinite(truth) & (truth > 0)
    return np.abs(value[both] / truth[both] - 1)


def _mean(values: Sequence[Any]) -> float:
    return float(np.mean(values)) if len(values) else float("nan")


def _plain(values: Figure | RequestErrors) -> dict[str, Any]:
    """Without names and labels; ``None`` for what is no number."""
    table = {k: v for k, v in values._asdict().items() if k not in ("label", "key", "metric")}
    return {k: v if v is None or isfinite(v) else None for k, v in table.items()}


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def _percent(value: float | None, sign: str = "") -> str:
    return "-" if value is None or not isfinite(value) else f"{100 * value:{sign}.1f} %"
