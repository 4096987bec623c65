"""Figures show the numbers of their results."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import pytest

from experiments import plots
from experiments.composing import compose
from experiments.runs import simulate
from sim.metrics import ttft_s
from sim.result import Result


def test_the_distribution_passes_through_the_median(results: dict[str, Result]) -> None:
    ax = plots.latency_cdf(results)
    for line, result in zip(ax.lines, results.values(), strict=False):
        x, y = np.asarray(line.get_xdata()), np.asarray(line.get_ydata())
        at_median = float(np.median(ttft_s(result.requests)))
        assert np.interp(at_median, x, y) == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("metric", ["ttft", "tpot", "e2e"])
def test_axes_name_their_units(
    metric: Literal["ttft", "tpot", "e2e"], results: dict[str, Result]
) -> None:
    assert plots.latency_cdf(results, metric).get_xlabel().endswith("(s)")


def test_an_unknown_metric_is_refused(results: dict[str, Result]) -> None:
    with pytest.raises(ValueError, match="ttft, tpot, e2e"):
        plots.latency_cdf(results, "itl")  # type: ignore[arg-type]


def test_each_run_is_a_point_of_the_tradeoff(results: dict[str, Result]) -> None:
    ax = plots.tradeoff(results)
    points = [np.asarray(dots.get_offsets())[0] for dots in ax.collections]
    for (x, y), result in zip(points, results.values(), strict=True):
        summary = result.summary()
        assert (x, y) == pytest.approx((100 * summary["prefix_hit_rate"], summary["ttft_p99_s"]))


def test_the_timeline_never_shows_more_than_there_is(results: dict[str, Result]) -> None:
    result = results["round_robin"]
    above, below = plots.timeline(result)
    running = np.asarray(above.lines[0].get_ydata())
    used = np.asarray(below.lines[0].get_ydata())
    assert 0 <= running.min() <= running.max() <= len(result.requests)
    assert 0 <= used.min() <= used.max() <= 100
    assert used.max() > 50


def test_a_timeline_needs_the_table_of_steps() -> None:
    result = simulate(compose(["trace.limit=5", "record_runs=false"]))
    with pytest.raises(ValueError, match="record_runs=true"):
        plots.timeline(result)


def test_a_figure_is_saved_as_png(results: dict[str, Result], tmp_path: Path) -> None:
    path = plots.save(plots.tradeoff(results), tmp_path / "figure.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert [file.name for file in tmp_path.iterdir()] == ["figure.png"]
