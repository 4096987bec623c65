"""Laws of run-length coded chains, checked against plain lists."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from traces import Chains, TraceError
from traces.chains import MAX_ID

Lists = list[list[int]]


@st.composite
def chained(draw: st.DrawFn) -> Lists:
    """Chains whose ids form a forest, so that each id has one predecessor."""
    parents: list[int] = []
    for node in range(draw(st.integers(1, 30))):
        near = node - 1 if draw(st.booleans()) else draw(st.integers(-1, node - 1))
        parents.append(near)
    lists: Lists = []
    for _ in range(draw(st.integers(1, 8))):
        ids: list[int] = []
        node = draw(st.integers(-1, len(parents) - 1))
        while node >= 0:
            ids.append(node)
            node = parents[node]
        lists.append(ids[::-1])
    return lists


any_lists = st.lists(st.lists(st.integers(0, 20), max_size=10), max_size=8)


def plain(chains: Chains) -> Lists:
    return [chains.blocks(i).tolist() for i in range(len(chains))]


@given(any_lists)
def test_chains_give_back_the_lists_they_were_made_from(lists: Lists) -> None:
    chains = Chains.from_lists(lists)
    assert plain(chains) == lists
    assert chains.lengths.tolist() == [len(ids) for ids in lists]


@given(any_lists)
def test_runs_are_maximal_and_join_to_the_blocks(lists: Lists) -> None:
    chains = Chains.from_lists(lists)
    for i, ids in enumerate(lists):
        runs = chains.runs(i)
        assert [x for start, count in runs for x in range(start, start + count)] == ids
        assert all(b[0] != a[0] + a[1] for a, b in pairwise(runs))


@given(any_lists, st.data())
def test_take_picks_chains_in_the_given_order(lists: Lists, data: st.DataObject) -> None:
    index = data.draw(st.lists(st.integers(0, len(lists) - 1)) if lists else st.just([]))
    assert plain(Chains.from_lists(lists).take(index)) == [lists[i] for i in index]


@given(any_lists, st.integers(0, 12))
def test_truncated_keeps_leading_blocks(lists: Lists, most: int) -> None:
    assert plain(Chains.from_lists(lists).truncated(most)) == [ids[:most] for ids in lists]


@given(any_lists, st.integers(1, 5))
def test_refined_splits_each_id_into_consecutive_ones(lists: Lists, factor: int) -> None:
    expected = [[i * factor + j for i in ids for j in range(factor)] for ids in lists]
    assert plain(Chains.from_lists(lists).refined(factor)) == expected


@given(any_lists, st.integers(1, 5))
def test_coarsened_keeps_the_last_id_of_each_full_group(lists: Lists, factor: int) -> None:
    expected = [ids[factor - 1 :: factor] for ids in lists]
    assert plain(Chains.from_lists(lists).coarsened(factor)) == expected


@given(chained(), st.integers(1, 4), st.integers(1, 4))
def test_refining_and_coarsening_in_steps_is_the_same_as_at_once(
    lists: Lists, one: int, two: int
) -> None:
    chains = Chains.from_lists(lists)
    assert chains.refined(one).refined(two) == chains.refined(one * two)
    assert chains.coarsened(one).coarsened(two) == chains.coarsened(one * two)


def test_adjacent_runs_merge_so_that_equal_chains_are_equal() -> None:
    assert Chains(np.array([0, 2]), np.array([5, 6]), np.array([1, 3])) == Chains.from_lists(
        [[5, 6, 7, 8]]
    )


def test_runs_of_different_requests_do_not_merge() -> None:
    assert plain(Chains.from_lists([[1, 2], [3], [], [4]])) == [[1, 2], [3], [], [4]]


def test_empty_chains_have_no_blocks() -> None:
    assert plain(Chains.empty(3)) == [[], [], []]


def test_arrays_are_read_only() -> None:
    with pytest.raises(ValueError, match="read-only"):
        Chains.from_lists([[1]]).start[0] = 2


@pytest.mark.parametrize("block", [-1, MAX_ID + 1, 2**70, -(2**70)])
def test_ids_out_of_range_are_refused(block: int) -> None:
    with pytest.raises(TraceError, match=r"ids are 0 to 2\^63 - 2"):
        Chains.from_lists([[0, block]])


def test_the_largest_id_is_allowed() -> None:
    assert plain(Chains.from_lists([[MAX_ID]])) == [[MAX_ID]]


def test_ids_too_large_to_split_are_refused() -> None:
    with pytest.raises(TraceError, match="too large to be split into 32"):
        Chains.from_lists([[MAX_ID // 16]]).refined(32)


@pytest.mark.parametrize(
    ("offset", "start", "count"),
    [([0, 2], [1], [1]), ([1, 1], [], []), ([0, 2, 1], [1], [1]), ([0, 1], [1], [0])],
)
def test_inconsistent_arrays_are_refused(
    offset: list[int], start: list[int], count: list[int]
) -> None:
    with pytest.raises(TraceError):
        Chains(np.array(offset), np.array(start, dtype=int), np.array(count, dtype=int))
