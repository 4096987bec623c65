"""Eviction policies against tables worked out by hand, and the scored order against sorting."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, nan

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.api import BlockView, EvictionPolicy, PolicyError, Slo
from policies.eviction.belady import Belady
from policies.eviction.fifo import Fifo
from policies.eviction.lfu import Lfu
from policies.eviction.lru import Lru
from policies.eviction.scored import ScoredEviction
from policies.eviction.slo_aware import SloAware
from policies.fakes import FakeBlock, FakeOracle


def order(policy: EvictionPolicy, blocks: Sequence[FakeBlock]) -> str:
    """Add a block every second, in order; the hashes of the victims in theirs."""
    for now, block in enumerate(blocks):
        policy.add(block, float(now))
    return "".join(str(b.hash) for b in policy.victims(len(blocks), 100.0))


def block(name: str, *, blocks: int = 1, hits: int = 0, stored_s: float = 0.0) -> FakeBlock:
    return FakeBlock(hash=name, blocks=blocks, hits=hits, stored_s=stored_s)


def test_lru_by_hand() -> None:
    policy = Lru()
    a, b, c = block("a", hits=9), block("b"), block("c")
    assert order(policy, [a, b, c]) == "abc"
    policy.remove(a, 4.0)
    policy.add(a, 5.0)
    assert policy.victims(3, 6.0) == [b, c, a]


def test_lfu_by_hand() -> None:
    blocks = [block("a", hits=2), block("b", hits=1), block("c", hits=2), block("d", hits=0)]
    assert order(Lfu(), blocks) == "dbac"


def test_fifo_by_hand() -> None:
    blocks = [block("a", stored_s=5.0), block("b", stored_s=1.0), block("c", stored_s=5.0)]
    assert order(Fifo(), blocks) == "bac"


def test_slo_aware_by_hand() -> None:
    # Released at 0, 1, 2, 3; worth 10/2 = 5, 0, 10/0.05 = 200 and 10/5 = 2 seconds more.
    slos = [Slo(ttft_s=2.0), Slo(), Slo(ttft_s=0.001), Slo(ttft_s=5.0)]
    blocks = [FakeBlock(hash=name, slo=slo) for name, slo in zip("abcd", slos, strict=True)]
    assert order(SloAware(), blocks) == "badc"


def test_slo_aware_without_grace_is_lru() -> None:
    blocks = [FakeBlock(hash=name, slo=Slo(ttft_s=s)) for name, s in zip("abc", (1, 2, inf))]  # noqa: B905
    assert order(SloAware(grace_s=0.0), blocks) == "abc"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"grace_s": -0.1}, r"grace_s is -0\.1; at least 0 is allowed"),
        ({"grace_s": nan}, "grace_s is nan; at least 0 is allowed"),
        ({"floor_s": 0.0}, r"floor_s is 0\.0; a number above 0 is allowed"),
    ],
)
def test_slo_aware_refuses_impossible_parameters(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SloAware(**options)


def test_belady_by_hand() -> None:
    policy = Belady()
    policy.attach_oracle(FakeOracle({"a": 50.0, "b": 10.0, "d": 20.0}))
    assert order(policy, [block(name) for name in "abcd"]) == "cadb"
    assert policy.needs_oracle
    assert policy.single_blocks


def test_belady_without_an_oracle_says_so() -> None:
    with pytest.raises(PolicyError, match=r"^eviction/belady\.add: no oracle was attached"):
        Belady().add(block("a"), 0.0)


@pytest.mark.parametrize("policy", [Lru(), Fifo()], ids=["lru", "scored"])
def test_no_more_views_are_named_than_needed(policy: EvictionPolicy) -> None:
    a, b, c = (block(name, blocks=n) for name, n in (("a", 3), ("b", 1), ("c", 5)))
    for view in (a, b, c):
        policy.add(view, 0.0)
    expected = {0: [], 1: [a], 3: [a], 4: [a, b], 5: [a, b, c], 9: [a, b, c]}
    assert {count: list(policy.victims(count, 1.0)) for count in expected} == expected


def test_a_view_that_shrank_counts_with_what_is_left() -> None:
    for policy in (Lru(), Fifo()):
        a, b = block("a", blocks=3), block("b", blocks=3)
        policy.add(a, 0.0)
        policy.add(b, 0.0)
        a.blocks = 1
        assert policy.victims(2, 1.0) == [a, b]


@dataclass(slots=True, eq=False)
class ByHits(ScoredEviction):
    def score(self, block: BlockView, now: float) -> float:
        return block.hits


def test_a_score_that_is_not_a_number_is_refused() -> None:
    view = block("a")
    view.hits = nan  # type: ignore[assignment]
    with pytest.raises(
        PolicyError, match=r"^ByHits\.score answered nan for FakeBlock.*; a number was expected"
    ):
        ByHits().add(view, 0.0)


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("add"), st.integers(0, 5), st.integers(1, 4)),
            st.tuples(st.just("remove"), st.integers(0, 99), st.just(0)),
            st.tuples(st.just("ask"), st.integers(0, 60), st.just(0)),
            st.tuples(st.just("evict"), st.integers(0, 12), st.just(0)),
        ),
        max_size=200,
    )
)
def test_the_scored_order_is_that_of_sorting(calls: list[tuple[str, int, int]]) -> None:
    policy = ByHits()
    known: list[FakeBlock] = []  # in order of add; sorting is stable
    for number, (call, value, blocks) in enumerate(calls):
        if call == "add":
            known.append(FakeBlock(hash=number, hits=value, blocks=blocks))
            policy.add(known[-1], 0.0)
        elif call == "remove" and known:
            policy.remove(known.pop(value % len(known)), 0.0)
        elif call in ("ask", "evict"):
            expected: list[FakeBlock] = []
            for view in sorted(known, key=lambda b: b.hits):
                if sum(b.blocks for b in expected) >= value:
                    break
                expected.append(view)
            assert policy.victims(value, 0.0) == expected
            if call == "evict":
                for view in expected:
                    policy.remove(view, 0.0)
                    known.remove(view)


def test_memory_stays_in_proportion_when_blocks_come_and_go() -> None:
    policy = ByHits()
    kept = [block(str(i), hits=i) for i in range(50)]
    for view in kept:
        policy.add(view, 0.0)
    for i in range(5000):
        guest = block("guest", hits=i % 70)
        policy.add(guest, 0.0)
        if i % 3 == 0:
            policy.victims(20, 0.0)
        policy.remove(guest, 0.0)
    assert len(policy._heap) + len(policy._front) <= 2 * (2 * len(kept) + 64) + 2
    assert policy.victims(50, 0.0) == kept
