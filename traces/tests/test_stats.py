"""Statistics against plain loops and hand-worked numbers."""

from __future__ import annotations

import json
from math import isclose
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from traces import Chains, Trace, generate, stats
from traces.stats import ideal_hits


def trace(lists: list[list[int]], **columns: Any) -> Trace:
    values: dict[str, Any] = {
        "arrival_s": np.arange(len(lists)),
        "prompt_tokens": [max(16 * len(ids), 1) for ids in lists],
        "output_tokens": 1,
    }
    return Trace.build("t", {**values, **columns}, Chains.from_lists(lists), block_tokens=16)


@st.composite
def forests(draw: st.DrawFn) -> list[list[int]]:
    parents: list[int] = []
    for node in range(draw(st.integers(1, 30))):
        near = node - 1 if draw(st.booleans()) else draw(st.integers(-1, node - 1))
        parents.append(near)
    lists: list[list[int]] = []
    for _ in range(draw(st.integers(1, 10))):
        ids: list[int] = []
        node = draw(st.integers(-1, len(parents) - 1))
        while node >= 0:
            ids.append(node)
            node = parents[node]
        lists.append(ids[::-1])
    return lists


@given(forests())
def test_ideal_hits_are_the_leading_blocks_seen_before(lists: list[list[int]]) -> None:
    seen: set[int] = set()
    expected = []
    for ids in lists:
        hits = 0
        while hits < len(ids) and ids[hits] in seen:
            hits += 1
        expected.append(hits)
        seen.update(ids)
    assert ideal_hits(Chains.from_lists(lists)).tolist() == expected


@given(forests())
def test_accesses_are_hits_and_distinct_blocks(lists: list[list[int]]) -> None:
    described = stats(trace(lists))
    assert described["distinct_blocks"] == len({i for ids in lists for i in ids})
    assert described["block_accesses"] == sum(map(len, lists))
    assert (
        described["ideal_hit_blocks"] == described["block_accesses"] - described["distinct_blocks"]
    )


def test_a_hand_worked_trace() -> None:
    lists = [[0, 1, 2], [0, 1, 5], [0, 1, 2, 3]]
    described = stats(trace(lists, prompt_tokens=[40, 48, 50], output_tokens=[1, 2, 3]))
    assert described["ideal_hit_blocks"] == 5
    assert described["ideal_hit_rate"] == 5 / 10
    assert described["ideal_token_hit_rate"] == (32 + 48) / 138
    assert described["longest_request_blocks"] == 4
    assert described["prompt"] == {
        "mean": 46.0,
        "p50": 48.0,
        "p90": pytest.approx(49.6),
        "p99": pytest.approx(49.96),
        "max": 50,
    }


def test_the_partial_last_block_counts_its_tokens_only_and_vllm_skips_it() -> None:
    described = stats(trace([[0, 1, 2], [0, 1, 2]], prompt_tokens=[40, 40]))
    assert described["ideal_token_hit_rate"] == 40 / 80
    assert described["ideal_vllm_hit_rate"] == 32 / 80


def test_vllm_always_computes_one_token() -> None:
    described = stats(trace([[0, 1], [0, 1]]))
    assert described["ideal_token_hit_rate"] == 32 / 64
    assert described["ideal_vllm_hit_rate"] == 16 / 64


def test_burstiness_of_regular_and_of_bunched_arrivals() -> None:
    regular = stats(trace([[i] for i in range(100)]))
    assert regular["arrival_cv"] == 0
    assert regular["iod"] == {1: 0, 10: 0, 60: pytest.approx(10**2 / 50)}
    bunched = stats(trace([[0]] * 4, arrival_s=[0.0, 0.0, 3.0, 3.0]))
    assert bunched["iod"][1] == pytest.approx(1.0)
    assert isclose(bunched["arrival_cv"], 2**0.5)


def test_what_is_undefined_is_none() -> None:
    columns = {"arrival_s": [1.0], "prompt_tokens": [1], "output_tokens": [1]}
    described = stats(Trace.build("x", columns))
    for key in ("arrival_cv", "ideal_hit_rate", "ideal_token_hit_rate", "ideal_vllm_hit_rate"):
        assert described[key] is None


def test_statistics_are_plain_json() -> None:
    described = stats(
        generate(
            "chat", sessions=20, session_rate_per_s=1.0, classes=[{"name": "a"}, {"name": "b"}]
        )
    )
    text = json.dumps(described, allow_nan=False)
    assert json.loads(text)["sessions"] == 20
    assert sum(described["slo_classes"].values()) == described["requests"]
