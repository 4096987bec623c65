"""Strict views show the contract and nothing else; recorders write down every decision."""

from __future__ import annotations

import json
from typing import Any

import pytest

from policies.admission.token_bucket import TokenBucket
from policies.api import (
    AdmissionPolicy,
    BlockView,
    ClusterView,
    Defer,
    EngineView,
    EvictionPolicy,
    InstanceView,
    PolicyError,
    PrefixMatch,
    Router,
    Tier,
)
from policies.eviction.belady import Belady
from policies.eviction.lru import Lru
from policies.fakes import (
    FakeBlock,
    FakeCluster,
    FakeEngine,
    FakeInstance,
    FakeOracle,
    FakeRequest,
)
from policies.pd.colocated import Colocated
from policies.reuse.never import Never
from policies.routing.least_loaded import LeastLoaded
from policies.strict import VIEWS
from policies.testing import Decision, Recorder, recorded, strict

EXAMPLES = [FakeRequest(), FakeBlock(), FakeEngine(), FakeInstance(), FakeCluster([FakeInstance()])]


@pytest.mark.parametrize("view", EXAMPLES, ids=lambda view: type(view).__name__)
def test_a_strict_view_finds_its_kind_and_shows_its_members(view: Any) -> None:
    guard = strict(view, policy="eviction/mine")
    kind = type(view).__name__.replace("Fake", "") + "View"
    with pytest.raises(PolicyError, match=rf"^eviction/mine read {kind}\.secret, which is not in"):
        _ = guard.secret
    with pytest.raises(PolicyError, match=rf"^eviction/mine set {kind}\.running; views are read-"):
        guard.running = 3
    with pytest.raises(PolicyError, match=rf"^eviction/mine deleted {kind}\.running; views are"):
        del guard.running
    assert strict(guard) is guard


def test_what_is_read_is_what_is_behind() -> None:
    view = FakeInstance(id=3, waiting=2, matched={"r": 48})
    guard = strict(view)
    view.running = 7
    assert (guard.id, guard.waiting, guard.running) == (3, 2, 7)
    assert guard.matched_tokens(strict(FakeRequest(id="r"))) == 48
    assert strict(FakeEngine(free=5)).free_blocks(tier=Tier.HBM) == 5
    hashes = [1, 2]
    assert strict(FakeRequest(block_hashes=hashes)).block_hashes == (1, 2)


def test_private_state_cannot_be_reached_through_the_guard() -> None:
    guard: Any = strict(FakeBlock())
    for name in ("_view", "__dict__", "__slots__"):
        with pytest.raises(PolicyError, match=rf"read BlockView\.{name}, which is not in the view"):
            getattr(guard, name)


def test_the_instances_of_a_strict_cluster_are_strict_and_stay_the_same() -> None:
    cluster = strict(FakeCluster([FakeInstance(id=0), FakeInstance(id=1)]))
    first, again = cluster.instances, cluster.instances
    assert all(a is b for a, b in zip(first, again, strict=True))
    with pytest.raises(PolicyError, match=r"read InstanceView\.matched, .*'matched_tokens'\?$"):
        _ = first[0].matched  # type: ignore[attr-defined]


def test_a_view_of_no_kind_or_of_two_is_refused() -> None:
    with pytest.raises(TypeError, match="is no view; say which kind"):
        strict(object())

    class Both(FakeInstance):
        block_tokens = 16
        free_blocks = total_blocks = prefill_s = None

    with pytest.raises(TypeError, match="is EngineView and InstanceView; say which kind"):
        strict(Both())
    assert strict(Both(id=4), EngineView).id == 4
    assert strict(Both(id=4), InstanceView).id == 4


def test_the_views_of_the_contract_are_known_with_all_their_members() -> None:
    assert set(VIEWS[BlockView]) == {
        "hash",
        "depth",
        "blocks",
        "hits",
        "stored_s",
        "used_s",
        "slo",
        "recompute_s",
    }
    assert VIEWS[ClusterView] == ("instances",)


# --------------------------------------------------------------------------- recorder


def test_a_recorder_writes_down_what_was_asked_and_answered() -> None:
    log: list[Decision] = []
    request, engine = FakeRequest(id="r", prompt_tokens=10), FakeEngine(id=2)
    admission = Recorder(TokenBucket(rate_tokens_per_s=1.0, burst_tokens=10), log)
    admission.order(request, 0.5)
    admission.admit(request, engine, 0.5)
    late = admission.admit(FakeRequest(id="s", prompt_tokens=4), engine, 0.5)
    assert isinstance(late, Defer)
    reuse = Recorder(Never(), log)
    reuse.use(request, PrefixMatch(((Tier.HBM, 48),)), engine, 1.0)
    reuse.retain(request, engine, 1.0)
    eviction = Recorder(Lru(), log)
    a, b = FakeBlock(hash=7, blocks=2), FakeBlock(hash=9)
    eviction.add(a, 2.0)
    eviction.add(b, 2.0)
    assert eviction.victims(3, 3.0) == [a, b]
    eviction.remove(a, 3.0)
    assert log == [
        (0.5, "order", ("r",), 0.0),
        (0.5, "admit", ("r", 2), ("admit",)),
        (0.5, "admit", ("s", 2), ("defer", late.until_s, "rate limit")),
        (1.0, "use", ("r", (("hbm", 48),), 2), 0),
        (1.0, "retain", ("r", 2), (("hbm", 0),)),
        (2.0, "add", (7, 2), None),
        (2.0, "add", (9, 1), None),
        (3.0, "victims", (3,), ((7, 2), (9, 1))),
        (3.0, "remove", (7, 2), None),
    ]
    json.dumps(log)


def test_a_recorder_of_a_router_writes_down_ids() -> None:
    some = [FakeInstance(id=0, running=2), FakeInstance(id=1)]
    router = Recorder(LeastLoaded())
    pd = Recorder(Colocated(router=router), router.log)  # type: ignore[arg-type]
    pd.changed(some[0])
    assert pd.place(FakeRequest(), FakeCluster(some), 4.0).decode is some[1]
    assert router.log == [
        (None, "changed", (0, 0, 2), None),
        (None, "changed", (0, 0, 2), None),
        (4.0, "route", ("r", (0, 1)), 1),
        (4.0, "place", ("r",), (1, 1)),
    ]


def test_a_recorder_stands_in_for_its_policy() -> None:
    recorder = Recorder(Belady())
    assert isinstance(recorder, EvictionPolicy)
    assert not isinstance(recorder, Router)
    assert recorder.needs_oracle
    assert recorder.single_blocks
    recorder.attach_oracle(FakeOracle({1: 5.0}))
    recorder.add(FakeBlock(hash=1), 0.0)
    # A backend that skips methods which are not overridden must not skip these.
    admission = Recorder(AdmissionPolicy())
    assert "admit" in vars(type(admission))
    assert (admission.preempts, admission.horizon_steps) == ("last", None)


def test_recorded_factories_share_a_log() -> None:
    log: list[Decision] = []
    make = recorded(Lru, log)
    make().add(FakeBlock(hash=1), 0.0)
    make().add(FakeBlock(hash=2), 0.0)
    assert [row[2] for row in log] == [(1, 1), (2, 1)]
