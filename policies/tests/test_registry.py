"""Names, parameters and factories: what is accepted, and what refusals say."""

from __future__ import annotations

import functools
import importlib
import inspect
import pickle
import random
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from policies import registry
from policies.api import (
    AdmissionPolicy,
    EvictionPolicy,
    InstanceView,
    PDPolicy,
    Placement,
    PolicyError,
    RequestView,
    Router,
)
from policies.eviction.lru import Lru
from policies.eviction.slo_aware import SloAware
from policies.fakes import FakeCluster, FakeInstance, FakeRequest
from policies.parameters import check_value, parameters_of, type_name
from policies.pd.colocated import Colocated
from policies.recorder import recorded
from policies.registry import (
    UnknownPolicy,
    build,
    catalog,
    create,
    describe,
    factory,
    load_module,
    lookup,
    policy_set,
    register,
)
from policies.routing.least_loaded import LeastLoaded
from policies.routing.random import Random
from policies.routing.round_robin import RoundRobin

MINE = '''"""A user's own."""
from dataclasses import dataclass
from policies.api import ReusePolicy
from policies.registry import register

@register("reuse/{name}")
@dataclass(slots=True, eq=False)
class Mine(ReusePolicy):
    """Uses what it likes."""

    share: float = 0.5
    """How much
    it likes."""
'''


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    """Forget what a test registers or imports."""
    catalog()
    known, modules = dict(registry._registered), set(sys.modules)
    yield
    registry._registered.clear()
    registry._registered.update(known)
    for name in set(sys.modules) - modules:
        if name.startswith("servelab_test_"):
            del sys.modules[name]


# --------------------------------------------------------------------------- registering


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lru", "'lru' is not of the form kind/name"),
        ("eviction/Lru", "'eviction/Lru' is not of the form kind/name"),
        ("eviction/a/b", "'eviction/a/b' is not of the form kind/name"),
        ("evition/mine", "no kind 'evition'; did you mean 'eviction'?"),
    ],
)
def test_a_malformed_name_is_refused(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        register(name)


def test_a_taken_name_is_refused() -> None:
    class Other(Lru):
        pass

    with pytest.raises(ValueError, match=r"'eviction/lru' is taken by policies\.eviction\.lru\.Lr"):
        register("eviction/lru")(Other)
    assert lookup("eviction/lru").cls is Lru


def test_the_same_class_defined_again_replaces_the_earlier_one() -> None:
    def cell() -> type:
        @register("eviction/cell")
        class Cell(Lru):
            pass

        return Cell

    first, second = cell(), cell()
    assert first is not second
    assert lookup("eviction/cell").cls is second


def test_a_class_of_another_kind_is_refused() -> None:
    with pytest.raises(TypeError, match=r"eviction/mine: .*RoundRobin must be .* EvictionPolicy$"):
        register("eviction/mine")(RoundRobin)


# --------------------------------------------------------------------------- finding


def test_an_entry_holds_what_the_class_says() -> None:
    entry = catalog()["eviction/slo_aware"]
    assert (entry.kind, entry.name, entry.key) == ("eviction", "slo_aware", "eviction/slo_aware")
    assert entry.cls is SloAware
    assert entry.summary.startswith("LRU, but a block with a TTFT target")
    assert [(p.name, p.type, p.default) for p in entry.parameters] == [
        ("grace_s", float, 10.0),
        ("floor_s", float, 0.05),
    ]
    assert entry.parameters[1].doc == "Tighter targets count as this one (seconds)."
    assert not entry.needs_oracle
    assert catalog()["eviction/belady"].needs_oracle
    assert catalog()["eviction/belady"].source.endswith("IBM Systems Journal 5(2), 1966")
    assert catalog()["pd/colocated"].parts == {"router": "routing"}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("eviction/slo_awre", "no policy 'eviction/slo_awre'; did you mean 'eviction/slo_aware'?"),
        ("evicton/lru", "no policy 'evicton/lru': no kind 'evicton'; did you mean 'eviction'?"),
        ("lru", "no policy 'lru'; did you mean 'eviction/lru'?"),
        ("zzz", "no policy 'zzz'; a name is of the form kind/name"),
    ],
)
def test_an_unknown_name_gets_the_nearest(name: str, message: str) -> None:
    with pytest.raises(UnknownPolicy) as caught:
        lookup(name)
    assert str(caught.value).startswith(message)


def test_an_unknown_name_gets_all_valid_names_of_its_kind() -> None:
    with pytest.raises(KeyError) as caught:
        lookup("pd/x")
    assert str(caught.value) == "no policy 'pd/x'. Valid: pd/colocated"


def test_a_users_file_is_loaded_once(tmp_path: Path) -> None:
    path = tmp_path / "servelab_test_mine.py"
    path.write_text(MINE.format(name="mine"), encoding="utf-8")
    module = load_module(path)
    assert load_module(str(path)) is module
    entry = lookup("reuse/mine")
    assert entry.summary == "Uses what it likes."
    assert [p.doc for p in entry.parameters] == ["How much it likes."]
    assert repr(create("reuse/mine", share=1)) == "Mine(share=1.0)"
    assert pickle.loads(pickle.dumps(entry.cls)) is entry.cls


def test_a_missing_file_is_named_with_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "my_policy.py").write_text("", encoding="utf-8")
    with pytest.raises(FileNotFoundError, match=r"my_polcy\.py; did you mean 'my_policy\.py'\?"):
        load_module(tmp_path / "my_polcy.py")


def test_a_file_that_hides_a_module_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "random.py"
    path.write_text("", encoding="utf-8")
    with pytest.raises(PolicyError, match=r"a module named 'random' exists already; rename"):
        load_module(path)


def test_a_file_that_cannot_be_imported_leaves_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "servelab_test_bad.py"
    path.write_text("import nothing_of_that_name", encoding="utf-8")
    with pytest.raises(PolicyError, match=r"cannot import .*bad\.py: ModuleNotFoundError: No mod"):
        load_module(path)
    assert "servelab_test_bad" not in sys.modules


def test_installed_policies_are_found_by_their_entry_point(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "servelab_test_plugin.py").write_text(MINE.format(name="installed"), "utf-8")
    info = tmp_path / "servelab_test_plugin-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: servelab-test-plugin\n", "utf-8")
    (info / "entry_points.txt").write_text(
        "[servelab.policies]\nmine = servelab_test_plugin\n", "utf-8"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    monkeypatch.setattr(registry, "_imported", set())
    assert "reuse/installed" in catalog()


# --------------------------------------------------------------------------- parameters


def test_a_policy_is_made_with_its_parameters() -> None:
    policy = create("eviction/slo_aware", grace_s=3)
    assert repr(policy) == "SloAware(grace_s=3.0, floor_s=0.05)"
    assert isinstance(policy.grace_s, float)


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        (
            "eviction/slo_aware",
            {"grac_s": 3},
            TypeError,
            "eviction/slo_aware: no parameter 'grac_s'; did you mean 'grace_s'? "
            "Valid: grace_s, floor_s",
        ),
        (
            "eviction/slo_aware",
            {"grace_s": "3"},
            TypeError,
            "eviction/slo_aware: grace_s is '3'; allowed: float",
        ),
        (
            "eviction/slo_aware",
            {"grace_s": True},
            TypeError,
            "eviction/slo_aware: grace_s is True; allowed: float",
        ),
        (
            "reuse/cap",
            {"max_tokens": 1.5},
            TypeError,
            "reuse/cap: max_tokens is 1.5; allowed: int",
        ),
        (
            "eviction/lru",
            {"size": 3},
            TypeError,
            "eviction/lru has no parameters, but size=3 was given",
        ),
        (
            "eviction/slo_aware",
            {"grace_s": -1},
            ValueError,
            "eviction/slo_aware: grace_s is -1.0; at least 0 is allowed",
        ),
    ],
)
def test_a_wrong_parameter_is_refused_before_the_run(
    name: str, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error) as caught:
        factory(name, **options)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("hint", "good", "bad", "allowed"),
    [
        (int, [3], [3.0, True, "3", None], "int"),
        (float, [3.5], [True, "3", None], "float"),
        (bool, [True], [1, "true"], "bool"),
        (int | None, [3, None], [3.0, "x"], "int or None"),
        (Literal["a", "b"], ["a"], ["c", 1], "'a' or 'b'"),
        (tuple[int, ...], [(1, 2)], [[1, 2]], "tuple[int, ...]"),
        (Any, [3, "x", None], [], "Any"),
    ],
)
def test_values_are_checked_against_the_annotation(
    hint: Any, good: list[object], bad: list[object], allowed: str
) -> None:
    for value in good:
        assert check_value("it", hint, value) is value
    for value in bad:
        with pytest.raises(TypeError, match=r"^it is "):
            check_value("it", hint, value)
    assert type_name(hint) == allowed


def test_the_arguments_of_a_plain_class_are_its_parameters() -> None:
    class Plain(AdmissionPolicy):
        def __init__(self, limit: int, name: str = "x") -> None:
            pass

    assert [(p.name, p.type) for p in parameters_of(Plain)] == [("limit", int), ("name", str)]
    assert parameters_of(AdmissionPolicy) == []


# --------------------------------------------------------------------------- policy sets


def router_of(policy: PDPolicy) -> Router:
    assert isinstance(policy, Colocated)
    return policy.router


def cluster(count: int = 3) -> FakeCluster:
    return FakeCluster([FakeInstance(id=i, running=count - i) for i in range(count)])


def test_the_default_set_is_vllm_behind_round_robin() -> None:
    chosen = policy_set()
    made = [build(f, 0, "x") for f in (chosen.admission, chosen.eviction, chosen.reuse, chosen.pd)]
    assert [describe(policy) for policy in made] == [
        "admission/fcfs",
        "eviction/lru",
        "reuse/always",
        "pd/colocated",
    ]
    assert isinstance(router_of(chosen.pd()), RoundRobin)


def test_policies_are_given_by_name_mapping_class_or_factory() -> None:
    for given in (
        "slo_aware",
        "eviction/slo_aware",
        {"name": "slo_aware", "grace_s": 10},
        SloAware,
        functools.partial(SloAware, grace_s=10.0),
        lambda grace_s=10.0: SloAware(grace_s),
    ):
        assert repr(policy_set(eviction=given).eviction()) == "SloAware(grace_s=10.0, floor_s=0.05)"


def test_every_call_of_a_factory_makes_a_new_policy_with_its_own_router() -> None:
    chosen = policy_set(routing="least_loaded")
    first, second = chosen.pd(), chosen.pd()
    assert first is not second
    assert router_of(first) is not router_of(second)


def test_the_router_is_put_into_the_pd_policy() -> None:
    for pd in ("colocated", Colocated, {"name": "colocated"}):
        policy = policy_set(pd=pd, routing="least_loaded").pd()
        assert isinstance(router_of(policy), LeastLoaded)
        assert policy.place(FakeRequest(), cluster(), 0.0).prefill.id == 2
    policy = policy_set(pd={"name": "colocated", "router": "random"}).pd()
    assert isinstance(router_of(policy), Random)


@dataclass(slots=True, eq=False)
class Fixed(PDPolicy):
    def place(self, request: RequestView, cluster: Any, now: float) -> Placement:
        return Placement(cluster.instances[0], cluster.instances[0])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"eviction": "lruu"}, KeyError, "no policy 'eviction/lruu'; did you mean 'eviction/lru'?"),
        ({"eviction": "reuse/cap"}, ValueError, "eviction is 'reuse/cap', which is of another ki"),
        ({"eviction": {"grace_s": 3}}, TypeError, "eviction is {'grace_s': 3}; it needs a 'name'"),
        ({"eviction": Lru()}, TypeError, "eviction is a eviction/lru object; give its class"),
        ({"eviction": RoundRobin}, TypeError, "eviction is routing/round_robin; allowed: a Evict"),
        ({"eviction": 3}, TypeError, "eviction is 3; allowed: a name, a mapping with a name, a "),
        ({"pd": Fixed, "routing": "random"}, ValueError, "routing is 'random', but pd="),
    ],
)
def test_a_wrong_set_is_refused(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error) as caught:
        policy_set(**options)
    assert str(caught.value).startswith(message)


def test_sets_can_be_sent_to_other_processes() -> None:
    chosen = policy_set(eviction={"name": "slo_aware", "grace_s": 3}, routing="random")
    again = pickle.loads(pickle.dumps(chosen))
    assert again.eviction().grace_s == 3.0
    assert repr(again.pd(seed=5)) == repr(chosen.pd(seed=5))


# --------------------------------------------------------------------------- seeds


def test_a_policy_that_takes_a_seed_gets_one_of_its_stream() -> None:
    assert build(Random, 7, "routing/0").seed == zlib.crc32(b"7/routing/0")
    assert build(functools.partial(Random), 7, "a").seed != build(Random, 7, "b").seed
    assert build(lambda seed: Random(seed + 0), 7, "c").seed == zlib.crc32(b"7/c")


def test_a_seed_that_is_set_stays() -> None:
    assert build(functools.partial(Random, seed=3), 7, "x").seed == 3
    assert build(functools.partial(Random, 3), 7, "x").seed == 3
    assert build(lambda: Random(seed=3), 7, "x").seed == 3
    assert build(recorded(functools.partial(Random, seed=3), []), 7, "x").policy.seed == 3


def test_the_seed_reaches_the_router_of_a_pd_policy() -> None:
    chosen = policy_set(routing="random")
    routers = {repr(router_of(build(chosen.pd, seed, "pd"))) for seed in range(5)}
    assert len(routers) == 5
    assert "seed" in inspect.signature(chosen.pd).parameters
    fixed = policy_set(routing={"name": "random", "seed": 4})
    assert repr(router_of(build(fixed.pd, 1, "pd"))) == "Random(seed=4)"


def test_a_factory_that_fails_is_named() -> None:
    def broken() -> EvictionPolicy:
        raise OSError("no file")

    for make, message in (
        (functools.partial(SloAware, grace_s=-1), r"eviction/slo_aware\(grace_s=-1\) failed: Val"),
        (broken, r"broken failed: OSError: no file"),
    ):
        with pytest.raises(PolicyError, match=message):
            build(make, 0, "x")


@dataclass(slots=True, eq=False)
class Dice(Router):
    """Needs a seed."""

    seed: int
    _dice: random.Random = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._dice = random.Random(self.seed)

    def route(self, request: Any, instances: Any, now: float) -> InstanceView:
        picked: InstanceView = self._dice.choice(instances)
        return picked


def test_a_seed_without_a_default_is_passed_too() -> None:
    make: Callable[..., Dice] = Dice
    assert build(make, 1, "x").seed == zlib.crc32(b"1/x")
