"""Tables and figures hold the numbers of the results they were made of, by hand."""

from __future__ import annotations

from collections.abc import Sequence
from io import StringIO
from math import inf, nan
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from rich.console import Console
from rich.table import Table

from sim.result import Result
from validate.comparison import Comparison, ComparisonError, Parity
from validate.comparison_figure import figure, save


def _result(
    ttft_ms: Sequence[float],
    *,
    e2e_ms: Sequence[float] | None = None,
    cached: Sequence[int] | None = None,
    state: Sequence[str] | None = None,
    preemptions: int = 0,
) -> Result:
    """Requests that arrive every second and generate 11 tokens, 10 ms per token by default."""
    count = len(ttft_ms)
    arrival = np.arange(count, dtype=float)
    first = arrival + 1e-3 * np.asarray(ttft_ms)
    finish = first + 0.1 if e2e_ms is None else arrival + 1e-3 * np.asarray(e2e_ms)
    states = ["finished"] * count if state is None else list(state)
    lost = np.array([s != "finished" for s in states])
    requests = pd.DataFrame(
        {
            "id": [f"r{i}" for i in range(count)],
            "arrival_s": arrival,
            "recorded_s": arrival,
            "admitted_s": np.where(lost, nan, arrival),
            "first_token_s": np.where(lost, nan, first),
            "finish_s": np.where(lost, nan, finish),
            "prompt_tokens": 100,
            "output_tokens": 11,
            "cached_tokens": [0] * count if cached is None else list(cached),
            "preemptions": 0,
            "engine": 0,
            "state": states,
            "reason": "",
            "slo_ttft_s": inf,
            "slo_tpot_s": inf,
            "slo_e2e_s": inf,
        }
    )
    runs = pd.DataFrame(
        {
            "engine": [0], "start_s": [0.0], "first_s": [0.01], "slope_s": [0.0], "steps": [1],
            "decodes": [1], "prefill_tokens": [0], "waiting": [0], "free_blocks": [1],
        }
    )  # fmt: skip
    engines = pd.DataFrame(
        {"engine": [0], "steps": [1], "preemptions": [preemptions], "evictions": [0]}
    )
    meta = {"trace": "by hand", "model": "tiny", "engines": 1, "chip": "cpu"}
    return Result(requests=requests, runs=runs, engines=engines, meta=meta)


def _figure(comparison: Comparison, key: str) -> tuple[Any, ...]:
    figure = next(figure for figure in comparison.figures if figure.key == key)
    return figure.simulated, figure.live, figure.error, figure.noise


def _text(comparison: Comparison) -> str:
    console = Console(width=120, file=StringIO())
    console.print(comparison.page())
    assert isinstance(console.file, StringIO)
    return console.file.getvalue()


# --------------------------------------------------------------------------- numbers


def test_means_and_their_errors_by_hand() -> None:
    comparison = Comparison(_result([20.0, 40.0]), [_result([20.0, 30.0])])
    simulated, live, error, noise = _figure(comparison, "ttft_mean_s")
    assert (simulated, live) == pytest.approx((30.0, 25.0))
    assert error == pytest.approx(0.2)
    assert noise is None
    assert comparison.mean_errors["TPOT"] == pytest.approx(0.0, abs=1e-9)
    assert comparison.mean_errors["E2E"] == pytest.approx(130 / 125 - 1)


def test_several_live_runs_are_averaged_and_their_difference_is_noise() -> None:
    comparison = Comparison(_result([33.0]), [_result([20.0]), _result([40.0])])
    simulated, live, error, noise = _figure(comparison, "ttft_mean_s")
    assert (simulated, live, error) == pytest.approx((33.0, 30.0, 0.1))
    assert noise == pytest.approx(20 / 30)


def test_errors_of_single_requests_by_hand() -> None:
    simulated = _result([11.0, 18.0, 30.0])
    live = [_result([10.0, 20.0, 30.0]), _result([10.0, 20.0, 60.0])]
    ttft = Comparison(simulated, live).request_errors[0]
    assert ttft.requests == 3
    assert ttft.mape == pytest.approx(np.mean([(0.1 + 0.1 + 0) / 3, (0.1 + 0.1 + 0.5) / 3]))
    assert ttft.median == pytest.approx(np.mean([0.1, 0.1]))
    assert ttft.live_mape == pytest.approx(0.5 / 3)
    assert Comparison(simulated, live[:1]).request_errors[0].live_mape is None


def test_only_what_finished_on_both_sides_is_compared_request_by_request() -> None:
    simulated = _result([10.0, 10.0, 10.0], state=["finished", "rejected", "finished"])
    live = _result([20.0, 10.0, 10.0], state=["finished", "finished", "failed"])
    comparison = Comparison(simulated, [live])
    assert comparison.request_errors[0].requests == 1
    assert comparison.request_errors[0].mape == pytest.approx(0.5)


def test_equal_cached_tokens_are_counted() -> None:
    comparison = Comparison(
        _result([10.0, 10.0, 10.0], cached=[0, 32, 64]),
        [_result([10.0, 10.0, 10.0], cached=[0, 32, 32])],
    )
    assert comparison.cached_equal == 2
    assert "cached tokens are equal for 2 of 3 requests" in _text(comparison)


@pytest.mark.parametrize(
    ("ttft_ms", "within"), [(11.4, True), (11.6, False), (8.6, True), (8.4, False)]
)
def test_the_band_is_15_percent_either_way(ttft_ms: float, within: bool) -> None:
    comparison = Comparison(_result([ttft_ms]), [_result([10.0])])
    assert comparison.within() is within
    assert ("are within" if within else "are not all within") in comparison.verdict()


def test_nothing_live_is_never_within() -> None:
    lost = _result([10.0], state=["failed"])
    comparison = Comparison(_result([10.0]), [lost])
    assert not comparison.within()
    assert "TTFT unknown" in comparison.verdict()
    assert comparison.document()["per_request"]["TTFT"]["mape"] is None


def test_different_traces_are_refused() -> None:
    with pytest.raises(ComparisonError, match="2 simulated and 1 live, which differ from request"):
        Comparison(_result([1.0, 2.0]), [_result([1.0])])
    with pytest.raises(ComparisonError, match="no live result"):
        Comparison(_result([1.0]), [])


# --------------------------------------------------------------------------- what is shown


def test_the_table_shows_both_sides() -> None:
    text = _text(Comparison(_result([20.0, 40.0]), [_result([20.0, 30.0])]))
    row = next(line for line in text.splitlines() if "TTFT mean" in line)
    assert [cell.strip() for cell in row.split("│")[2:5]] == ["30.00", "25.00", "+20.0 %"]
    assert "preemptions" not in text
    assert "mean latencies are not all within 15 %" in text


def test_preemptions_are_shown_where_there_were_any() -> None:
    live = [_result([10.0], preemptions=3), _result([10.0], preemptions=4)]
    text = _text(Comparison(_result([10.0], preemptions=4), live))
    row = next(line for line in text.splitlines() if "preemptions" in line)
    assert [cell.strip() for cell in row.split("│")[2:6]] == ["4", "3.50", "+14.3 %", "28.6 %"]


def test_parity_is_one_line() -> None:
    equal = Parity(rows=853, equal=853)
    assert "all 853 engine steps" in _text(Comparison(_result([1.0]), [_result([1.0])], equal))
    other = Parity(rows=853, equal=850, first="step 12: scheduled")
    text = _text(Comparison(_result([1.0]), [_result([1.0])], other))
    assert "3 of 853 engine steps differ" in text
    assert "first: step 12: scheduled" in " ".join(text.split())


def test_a_page_says_why_decisions_were_not_compared() -> None:
    comparison = Comparison(_result([1.0]), [_result([1.0])], unchecked="nobody looked")
    assert "decisions: not compared, because nobody looked" in _text(comparison)
    assert comparison.document()["parity_unchecked"] == "nobody looked"
    assert comparison.agrees


@pytest.mark.parametrize(
    ("live_ms", "equal", "agrees"), [(10.0, 9, True), (10.0, 8, False), (20.0, 9, False)]
)
def test_both_sides_agree_in_times_and_decisions(live_ms: float, equal: int, agrees: bool) -> None:
    parity = Parity(rows=9, equal=equal)
    live = _result([live_ms], e2e_ms=[110.0])
    assert Comparison(_result([10.0]), [live], parity).agrees is agrees


def test_an_unknown_error_is_not_green() -> None:
    page = Comparison(_result([10.0]), [_result([10.0], state=["failed"])]).page()
    shown = page.renderables[1]
    assert isinstance(shown, Table)
    styles = [row.style for row in shown.rows if row.style is not None]
    assert styles == ["bold red"] * 3


def test_the_document_has_plain_numbers() -> None:
    document = Comparison(
        _result([20.0, 40.0]), [_result([20.0, 30.0])], Parity(rows=2, equal=2)
    ).document()
    assert document["requests"] == 2
    assert document["figures"]["ttft_mean_s"] == pytest.approx(
        {"simulated": 30.0, "live": 25.0, "error": 0.2, "noise": None}
    )
    assert document["parity"] == {"rows": 2, "equal": 2, "first": ""}
    assert document["within_band"] is False


def test_the_figure_draws_every_request(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    ttft = rng.lognormal(3, 1, 50)
    comparison = Comparison(
        _result((1.1 * ttft).tolist()), [_result(ttft.tolist()), _result(ttft.tolist())]
    )
    canvas = figure(comparison)
    above, below = canvas.axes[0], canvas.axes[3]
    live, again, simulated = (np.asarray(line.get_xdata()) for line in above.lines)
    assert live == pytest.approx(np.sort(ttft))
    assert again == pytest.approx(live)
    assert simulated == pytest.approx(1.1 * live)
    dots = np.asarray(below.collections[-1].get_offsets())
    assert dots[:, 1] == pytest.approx(1.1 * dots[:, 0])
    assert "100 % of requests within 15 %" in below.get_title()
    path = save(canvas, tmp_path / "comparison.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert [file.name for file in tmp_path.iterdir()] == ["comparison.png"]
