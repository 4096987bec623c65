"""Invariant I5: the fast engine and the reference engine agree on everything, to the bit."""

from __future__ import annotations

import pytest

from sim.tests.twins import compare

CHUNK = 50


@pytest.mark.parametrize("first", range(0, 1000, CHUNK))
def test_the_fast_engine_equals_the_reference_engine_on_random_cases(first: int) -> None:
    outcomes = [compare(seed) for seed in range(first, first + CHUNK)]
    # A chunk in which nothing goes wrong on the engines would prove little.
    rows = [row for outcome in outcomes for row in outcome["requests"].values()]
    rejected = [row for row in rows if len(row) == 3]
    hits = [row for row in rows if len(row) > 3 and row[5]]
    assert len(rejected) > 0
    assert len(hits) > 100
    assert sum(sum(outcome["preemptions"]) for outcome in outcomes) > 10
    assert sum(sum(outcome["evictions"]) for outcome in outcomes) > 1000
