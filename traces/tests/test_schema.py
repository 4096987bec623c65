"""Traces: what is refused, and what cutting, scaling and recoding keep."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from traces import Chains, Trace, TraceError, generate
from traces.schema import COLUMNS


def small(**changes: Any) -> Trace:
    columns: dict[str, Any] = {
        "arrival_s": [0.0, 1.0, 2.0],
        "prompt_tokens": [32, 32, 48],
        "output_tokens": 7,
    }
    options = {k: changes.pop(k) for k in ("chains", "block_tokens", "where") if k in changes}
    return Trace.build("small", {**columns, **changes}, **options)


def chat() -> Trace:
    return generate("chat", sessions=40, session_rate_per_s=1.0, seed=3)


def test_missing_columns_get_their_defaults_and_all_have_their_dtype() -> None:
    trace = small()
    assert {c: str(t) for c, t in trace.requests.dtypes.items()} == {
        name: column.dtype for name, column in COLUMNS.items()
    }
    assert trace.requests["id"].tolist() == ["0", "1", "2"]
    assert trace.requests["slo_ttft_s"].tolist() == [np.inf] * 3
    assert trace.requests["session"].tolist() == ["", "", ""]


def test_requests_are_sorted_by_arrival_and_ties_keep_their_order() -> None:
    trace = small(
        arrival_s=[1.0, 0.0, 0.0],
        chains=Chains.from_lists([[1, 2], [3, 4], [5, 6, 7]]),
        block_tokens=16,
    )
    assert trace.requests["id"].tolist() == ["1", "2", "0"]
    assert trace.chains.blocks(0).tolist() == [3, 4]
    assert trace.chains.blocks(2).tolist() == [1, 2]


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("arrival_s", [0.0, -1.0, 2.0], r"row 1: arrival_s=-1.0 must be at least 0"),
        ("arrival_s", [0.0, np.nan, 2.0], r"arrival_s=nan must be a finite number"),
        ("arrival_s", [0.0, np.inf, 2.0], r"arrival_s=inf must be a finite number"),
        ("prompt_tokens", [1, 0, 3], r"row 1: prompt_tokens=0 must be at least 1"),
        ("output_tokens", [1, 2, 0], r"row 2: output_tokens=0 must be at least 1"),
        ("output_tokens", [1, 2.5, 3], r"row 1: output_tokens=2.5 must be a whole number"),
        ("output_tokens", [1, np.nan, 3], r"row 1: output_tokens=nan must be a whole number"),
        ("output_tokens", ["a", "b", "c"], r"column 'output_tokens' must hold numbers"),
        ("prompt_tokens", [1, 2], r"column 'prompt_tokens' has 2 rows, others have 3"),
        ("think_s", [0.0, -0.5, 0.0], r"row 1: think_s=-0.5 must be at least 0"),
        ("slo_ttft_s", [0.0, 1.0, 1.0], r"row 0: slo_ttft_s=0.0 must be above 0"),
        ("slo_e2e_s", np.nan, r"row 0: slo_e2e_s=nan must be above 0"),
        ("id", ["a", "b", "a"], r"row 2: id 'a' is taken by row 0; ids must differ"),
        ("model", ["a", None, "a"], r"row 1: model is missing; it must be text"),
        ("turn", [0, 1, 0], r"row 1: turn=1 must be 0 where there is no session"),
        ("promt_tokens", [1, 2, 3], r"no column 'promt_tokens'; did you mean 'prompt_tokens'\?"),
        ("arrival_s", [], r"no requests"),
    ],
)
def test_a_bad_column_is_refused_with_row_value_and_rule(
    column: str, values: Any, message: str
) -> None:
    with pytest.raises(TraceError, match=message):
        small(**{column: values})


def test_a_missing_required_column_is_named() -> None:
    with pytest.raises(TraceError, match="column 'output_tokens' is missing"):
        Trace.build("x", {"arrival_s": [0.0], "prompt_tokens": [1]})


def test_errors_name_rows_as_the_caller_does_even_after_sorting() -> None:
    with pytest.raises(TraceError, match=r"line 12: prompt_tokens=0"):
        small(arrival_s=[2.0, 1.0, 0.0], prompt_tokens=[1, 1, 0], where=lambda r: f"line {r + 10}")


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ([1, 2, 3], "row 0: session 's' has turn 1 where turn 0 was due"),
        ([0, 2, 1], "row 1: session 's' has turn 2 where turn 1 was due"),
        ([0, 1, 1], "row 2: session 's' has turn 1 where turn 2 was due"),
    ],
)
def test_turns_must_count_up_in_the_order_of_arrival(turns: list[int], message: str) -> None:
    with pytest.raises(TraceError, match=message):
        small(session="s", turn=turns)


def test_interleaved_sessions_are_fine() -> None:
    trace = small(session=["a", "b", "a"], turn=[0, 0, 1])
    assert trace.requests["turn"].tolist() == [0, 0, 1]


def test_a_chain_of_the_wrong_length_says_what_was_needed_and_what_would_fit() -> None:
    chains = Chains.from_lists([[0, 1], [0, 1], [0, 1, 2]])
    message = "row 0: 2 block ids for 32 prompt tokens; blocks of 32 tokens need 1; block_tokens=16"
    with pytest.raises(TraceError, match=message):
        small(chains=chains, block_tokens=32)


def test_the_partial_last_block_may_have_an_id_or_not() -> None:
    for ids in ([0, 1], [0, 1, 2]):
        Trace.build(
            "x",
            {"arrival_s": [0.0], "prompt_tokens": [40], "output_tokens": [1]},
            Chains.from_lists([ids]),
            block_tokens=16,
        )


def test_block_ids_without_a_block_size_are_refused() -> None:
    with pytest.raises(TraceError, match="must be 0 when block_tokens is 0"):
        small(chains=Chains.from_lists([[0], [], []]))


@pytest.mark.parametrize(
    ("lists", "message"),
    [
        ([[1, 9], [2, 9], [3, 4, 5]], "block id 9 follows block 1 in row 0 but block 2 in row 1"),
        ([[1, 9], [9, 2], [3, 4, 5]], "block id 9 follows block 1 in row 0 but no block in row 1"),
        ([[1, 2], [2, 3], [4, 5, 6]], "block id 2 follows no block in row 1 but block 1 in row 0"),
        ([[1, 1], [2, 3], [4, 5, 6]], "block id 1 follows no block in row 0 but block 1 in row 0"),
        ([[7, 8], [0, 1], [7, 8, 7]], "block id 7 follows no block in row 2 but block 8 in row 2"),
    ],
)
def test_ids_with_two_predecessors_are_refused(lists: list[list[int]], message: str) -> None:
    with pytest.raises(TraceError, match=message):
        small(chains=Chains.from_lists(lists), block_tokens=16)


@given(st.lists(st.lists(st.integers(0, 6), min_size=1, max_size=5), min_size=1, max_size=5))
def test_the_check_for_predecessors_agrees_with_a_plain_one(lists: list[list[int]]) -> None:
    before: dict[int, set[int]] = {}
    for ids in lists:
        for previous, block in zip([-1, *ids], ids, strict=False):
            before.setdefault(block, set()).add(previous)
    chained = all(len(previous) == 1 for previous in before.values())
    columns = {
        "arrival_s": np.arange(len(lists)),
        "prompt_tokens": [16 * len(ids) for ids in lists],
        "output_tokens": 1,
    }
    try:
        Trace.build("x", columns, Chains.from_lists(lists), block_tokens=16)
        accepted = True
    except TraceError:
        accepted = False
    assert accepted == chained


def test_head_keeps_the_first_arrivals_with_their_chains() -> None:
    trace = chat()
    assert len(trace.head(5)) == 5
    assert trace.head(5).requests.equals(trace.requests.iloc[:5])
    assert trace.head(5).chains == trace.chains.take(range(5))
    assert trace.head(10**9) == trace
    with pytest.raises(TraceError, match="count must be at least 1, not 0"):
        trace.head(0)


def test_between_starts_a_new_clock_and_renumbers_turns_of_cut_sessions() -> None:
    trace = small(session="s", turn=[0, 1, 2], think_s=[0.0, 0.5, 0.25])
    cut = trace.between(0.5, 2.5)
    assert cut.requests["arrival_s"].tolist() == [0.5, 1.5]
    assert cut.requests["turn"].tolist() == [0, 1]
    assert cut.requests["think_s"].tolist() == [0.0, 0.25]
    assert cut.requests["id"].tolist() == ["1", "2"]


def test_between_leaves_a_valid_trace() -> None:
    cut = chat().between(20.0, 45.0)
    columns = {name: cut.requests[name] for name in COLUMNS}
    again = Trace.build(
        cut.name, columns, cut.chains, block_tokens=16, synthetic=cut.synthetic, notes=cut.notes
    )
    assert again == cut


def test_between_includes_its_start_and_excludes_its_end() -> None:
    assert small().between(1.0, 2.0).requests["id"].tolist() == ["1"]


def test_between_without_requests_says_what_there_is() -> None:
    with pytest.raises(TraceError, match=r"no request between 5 s and 6 s; .* 0.0 s to 2.0 s"):
        small().between(5, 6)


def test_scaled_compresses_arrivals_but_not_thinking() -> None:
    trace, fast = chat(), chat().scaled(8)
    assert np.array_equal(fast.requests["arrival_s"] * 8, trace.requests["arrival_s"])
    assert fast.requests["think_s"].equals(trace.requests["think_s"])
    assert fast.rate_per_s == pytest.approx(8 * trace.rate_per_s)
    assert fast.notes[-1] == "arrivals 8 times as fast as recorded"


@pytest.mark.parametrize("rate", [0.0, -1.0, np.nan, np.inf])
def test_a_rate_that_is_not_positive_is_refused(rate: float) -> None:
    with pytest.raises(TraceError, match="rate must be a positive number"):
        small().scaled(rate)


def ticks() -> Trace:
    arrival_s = np.repeat([3.0, 5.999, 9.0, 12.001], 25)
    return Trace.build("t", {"arrival_s": arrival_s, "prompt_tokens": 1, "output_tokens": 1})


@given(st.integers(0, 1000))
def test_dequantised_keeps_the_order_and_stays_within_the_tick(seed: int) -> None:
    spread = ticks().dequantised(3.0, seed)
    arrival_s = spread.requests["arrival_s"].to_numpy()
    assert spread.requests["id"].tolist() == [str(i) for i in range(100)]
    assert np.all(np.diff(arrival_s) >= 0)
    for tick in range(4):
        part = arrival_s[25 * tick : 25 * tick + 25]
        assert part.min() >= 3.0 + 3.0 * tick
        assert part.max() <= 6.0 + 3.0 * tick


def test_dequantised_says_so_and_depends_on_its_seed_only() -> None:
    assert ticks().dequantised(3.0).synthetic == "arrivals within 3 s ticks"
    assert ticks().dequantised(3.0, 1) == ticks().dequantised(3.0, 1)
    assert ticks().dequantised(3.0, 1) != ticks().dequantised(3.0, 2)


def test_a_trace_without_ticks_is_not_dequantised() -> None:
    with pytest.raises(
        TraceError, match=r"small is not quantised to 0.7 s: row 1 arrives at 1.0 s"
    ):
        small().dequantised(0.7)


def coded() -> Trace:
    return small(
        prompt_tokens=[1000, 1024, 1100],
        chains=Chains.from_lists([[0, 1], [0, 2], [0, 2, 3]]),
        block_tokens=512,
    )


def test_recoding_to_smaller_blocks_covers_full_blocks_of_the_prompt() -> None:
    chains = coded().recoded(16)
    assert chains.lengths.tolist() == [1000 // 16, 1024 // 16, 1100 // 16]
    assert chains.runs(0) == [(0, 62)]
    assert chains.runs(1) == [(0, 32), (64, 32)]
    assert coded().recoded(16, full_blocks_only=False).lengths.tolist() == [63, 64, 69]


def test_recoding_to_larger_blocks_keeps_the_last_id_of_each_group() -> None:
    chains = coded().recoded(1024)
    assert [chains.blocks(i).tolist() for i in range(3)] == [[], [2], [2]]


def test_recoding_to_the_same_size_keeps_the_chains() -> None:
    assert coded().recoded(512, full_blocks_only=False) == coded().chains


@given(st.sampled_from([1, 2, 4, 8, 16, 32, 48, 64]), st.booleans())
def test_recoded_chains_are_chained_and_cover_the_prompt(size: int, full: bool) -> None:
    trace = chat()
    chains = trace.recoded(size, full_blocks_only=full)
    prompt = trace.requests["prompt_tokens"].to_numpy()
    if size <= 16 or full:
        assert np.all(chains.lengths <= -(-prompt // size))
    if size >= 16:
        assert np.array_equal(chains.lengths, prompt // size)
    before: dict[int, int] = {}
    for i in range(60):
        ids = chains.blocks(i).tolist()
        for previous, block in zip([-1, *ids], ids, strict=False):
            assert before.setdefault(block, previous) == previous


@pytest.mark.parametrize("size", [48, 0, -16, 700])
def test_a_block_size_that_does_not_fit_is_refused(size: int) -> None:
    with pytest.raises(TraceError, match=r"it must be one of 1, 2, 4, .*512 or a multiple of 512"):
        coded().recoded(size)


def test_a_trace_without_block_ids_recodes_to_nothing() -> None:
    assert small().recoded(16) == Chains.empty(3)


def test_totals_span_and_rate() -> None:
    trace = small()
    assert (len(trace), trace.prompt_tokens, trace.output_tokens) == (3, 112, 21)
    assert trace.span_s == 2.0
    assert trace.rate_per_s == 1.0
    assert trace.head(1).rate_per_s == 0.0


def test_a_million_requests_fit_in_250_megabytes() -> None:
    trace = generate("independent", count=100_000, rate_per_s=100.0, block_tokens=16)
    table = trace.requests.memory_usage(deep=True).sum()
    chains = sum(a.nbytes for a in (trace.chains.offset, trace.chains.start, trace.chains.count))
    assert 10 * (table + chains) < 250e6
