"""Every option of every group composes, and its node holds what the thing itself says."""

from __future__ import annotations

import pytest

from experiments.composing import compose
from experiments.configs import GROUPS, options
from policies.registry import catalog, lookup
from sim.scheduler import EngineLimits

EVERY = [(group, name) for group in GROUPS for name in options(group)]


@pytest.mark.parametrize(("group", "name"), [e for e in EVERY if e[0] not in ("chip", "model")])
def test_every_option_composes(group: str, name: str) -> None:
    config = compose([f"{group}={name}"])
    node = config
    for part in group.split("/"):
        node = node[part]
    assert node.get("name", name) == name
    if group.startswith("policies/"):
        parameters = lookup(f"{group.removeprefix('policies/')}/{name}").parameters
        assert list(node) == ["name", *(parameter.name for parameter in parameters)]


def test_every_registered_policy_is_an_option() -> None:
    for entry in catalog().values():
        assert entry.name in options(f"policies/{entry.kind}")


def test_every_chip_and_model_composes() -> None:
    # One composition checks that the store has them all; one each would take a minute.
    for group in ("chip", "model"):
        names = options(group)
        assert len(names) > 15
        for name in (names[0], names[-1]):
            assert compose([f"{group}={name}"])[group].name == name


def test_engine_options_are_those_of_engine_limits() -> None:
    assert EngineLimits(**compose().engine) == EngineLimits()


def test_the_defaults_are_the_documented_ones() -> None:
    config = compose()
    assert (config.chip.name, config.model.name) == ("a100_80g", "llama3_8b")
    assert (config.trace.name, config.policies.eviction.name) == ("demo", "lru")
    assert dict(config.slo) == {"ttft_s": None, "tpot_s": None, "e2e_s": None}
