"""What a run is worth, against tables worked by hand and brute force."""

from __future__ import annotations

from math import ceil, inf, nan
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sim import metrics
from sim.result import Result

RUN_COLUMNS = ["first_s", "slope_s", "steps", "decodes"]


def table(*rows: dict[str, Any]) -> pd.DataFrame:
    """Requests that arrive at 0, are admitted at 1 and finish, unless a row says otherwise."""
    usual = {
        "arrival_s": 0.0, "admitted_s": 1.0, "first_token_s": 2.0, "finish_s": 6.0,
        "prompt_tokens": 100, "output_tokens": 5, "cached_tokens": 0, "state": "finished",
        "slo_ttft_s": inf, "slo_tpot_s": inf, "slo_e2e_s": inf,
    }  # fmt: skip
    return pd.DataFrame([{"id": str(i)} | usual | row for i, row in enumerate(rows)])


REJECTED: dict[str, Any] = {
    "admitted_s": nan, "first_token_s": nan, "finish_s": nan, "output_tokens": 0,
    "state": "rejected",
}  # fmt: skip

THREE = table(
    {},  # TTFT 2, TPOT 4 / 4, E2E 6
    {"arrival_s": 1.0, "admitted_s": 2.0, "first_token_s": 5.0, "finish_s": 5.0,
     "output_tokens": 1, "cached_tokens": 64, "slo_ttft_s": 3.9},  # TTFT 4: misses its target
    {"arrival_s": 3.0, "prompt_tokens": 7} | REJECTED,
)  # fmt: skip


def result(requests: pd.DataFrame, **meta: Any) -> Result:
    runs = pd.DataFrame([[1.0, 0.0, 4, 1]], columns=RUN_COLUMNS)
    engines = pd.DataFrame({"engine": [0, 1], "preemptions": [1, 2], "evictions": [10, 0]})
    return Result(requests=requests, runs=runs, engines=engines, meta=meta)


def test_latencies_by_hand() -> None:
    np.testing.assert_array_equal(metrics.ttft_s(THREE), [2.0, 4.0, nan])
    np.testing.assert_array_equal(metrics.tpot_s(THREE), [1.0, nan, nan])
    np.testing.assert_array_equal(metrics.e2e_s(THREE), [6.0, 4.0, nan])
    np.testing.assert_array_equal(metrics.queue_s(THREE), [1.0, 1.0, nan])


def test_the_makespan_ends_with_the_last_event() -> None:
    assert metrics.makespan_s(THREE) == 6.0
    late = table({}, {"arrival_s": 50.0} | REJECTED)
    assert metrics.makespan_s(late) == 50.0


@pytest.mark.parametrize(
    ("targets", "met"),
    [
        ({}, True),
        ({"slo_ttft_s": 2.0}, True),  # to the instant
        ({"slo_ttft_s": 1.999}, False),
        ({"slo_tpot_s": 1.0, "slo_e2e_s": 6.0}, True),
        ({"slo_tpot_s": 0.999}, False),
        ({"slo_e2e_s": 5.999}, False),
        ({"output_tokens": 1, "slo_tpot_s": 0.001}, True),  # one token has no gaps
        (REJECTED, False),
    ],
)
def test_an_slo_is_met_when_all_its_targets_are(targets: dict[str, Any], met: bool) -> None:
    assert metrics.met_slo(table(targets)).tolist() == [met]


def test_a_summary_by_hand() -> None:
    summary = result(THREE, price_usd_per_s=0.5, calibrated=True, calibration="by hand").summary()
    assert summary == {
        "requests": 3,
        "finished": 2,
        "rejected": 1,
        "makespan_s": 6.0,
        "ttft_mean_s": 3.0, "ttft_p50_s": 3.0,
        "ttft_p90_s": pytest.approx(3.8), "ttft_p99_s": pytest.approx(3.98),
        "tpot_mean_s": 1.0, "tpot_p50_s": 1.0, "tpot_p90_s": 1.0, "tpot_p99_s": 1.0,
        "e2e_mean_s": 5.0, "e2e_p50_s": 5.0,
        "e2e_p90_s": pytest.approx(5.8), "e2e_p99_s": pytest.approx(5.98),
        "queue_mean_s": 1.0, "queue_p50_s": 1.0, "queue_p90_s": 1.0, "queue_p99_s": 1.0,
        "itl_p50_s": 1.0, "itl_p90_s": 1.0, "itl_p99_s": 1.0,
        "goodput_per_s": pytest.approx(1 / 6),
        "slo_attainment": pytest.approx(1 / 3),
        "throughput_per_s": pytest.approx(2 / 6),
        "output_tokens_per_s": pytest.approx(6 / 6),
        "tokens_per_s": pytest.approx(206 / 6),
        "prefix_hit_rate": pytest.approx(64 / 200),  # of admitted prompts
        "preemptions": 3,
        "evictions": 10,
        "usd_per_million_tokens": pytest.approx(3.0 * 1e6 / 206),
        "usd_per_million_output_tokens": pytest.approx(3.0 * 1e6 / 6),
        "calibrated": True,
        "calibration": "by hand",
    }  # fmt: skip


def test_a_run_in_which_nothing_finished_has_no_latencies_and_no_cost() -> None:
    summary = result(table(REJECTED)).summary()
    assert summary["ttft_mean_s"] is None
    assert summary["prefix_hit_rate"] is None
    assert summary["throughput_per_s"] is None  # zero requests in zero seconds
    assert summary["usd_per_million_tokens"] is None
    assert (summary["finished"], summary["rejected"], summary["slo_attainment"]) == (0, 1, 0.0)


def test_inter_token_latency_by_hand() -> None:
    # Two decoders see steps of 10, 11, 12 ms; one sees two of 30 ms; prefill steps do not count.
    runs = pd.DataFrame(
        [[0.010, 0.001, 3, 2], [0.030, 0.0, 2, 1], [9.0, 0.0, 5, 0]], columns=RUN_COLUMNS
    )
    # Gaps in order: 10 10 11 11 12 12 30 30.
    for percent, expected in ((1, 0.010), (50, 0.011), (75, 0.012), (76, 0.030), (100, 0.030)):
        assert metrics.itl_percentile_s(runs, percent) == pytest.approx(expected, rel=1e-9)


def test_without_decoding_there_is_no_inter_token_latency() -> None:
    runs = pd.DataFrame([[9.0, 0.0, 5, 0]], columns=RUN_COLUMNS)
    assert np.isnan(metrics.itl_percentile_s(runs, 50))
    assert np.isnan(metrics.itl_percentile_s(runs.iloc[:0], 50))


@given(
    rows=st.lists(
        st.tuples(
            st.integers(10**6, 10**12),
            st.one_of(st.just(0), st.integers(0, 10**9)),
            st.integers(1, 50),
            st.integers(0, 5),
        ),
        min_size=1,
        max_size=12,
    ),
    percent=st.sampled_from([0.1, 1, 25, 50, 90, 99, 99.9, 100]),
)
@settings(deadline=None)
def test_inter_token_latency_equals_sorting_every_gap(
    rows: list[tuple[int, int, int, int]], percent: float
) -> None:
    runs = pd.DataFrame(rows, columns=RUN_COLUMNS)
    runs[["first_s", "slope_s"]] /= 1e12
    gaps = sorted(
        first + j * slope
        for first, slope, steps, decodes in rows
        for j in range(steps)
        for _ in range(decodes)
    )
    found = metrics.itl_percentile_s(runs, percent)
    if not gaps:
        assert np.isnan(found)
        return
    exact = percent / 100 * len(gaps)
    # Where rounding decides between two neighbours, either will do.
    low, high = (gaps[max(ceil(exact + e), 1) - 1] for e in (-1e-9, 0.0))
    assert low / 1e12 * (1 - 1e-9) <= found <= high / 1e12 * (1 + 1e-9)
