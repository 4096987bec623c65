"""Overrides in, a configuration or one helpful line out."""

from __future__ import annotations

from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given
from hypothesis import strategies as st

from experiments.composing import ConfigError, compose, override, overrides_of, resolved
from policies.api import PolicyError

MISTAKES = {
    "policies/eviction=slo_awre": "did you mean 'slo_aware'",
    "chip=h10": "did you mean 'h100'",
    "trace=mooncke": "did you mean 'mooncake'",
    "policys/eviction=lru": "did you mean 'policies/eviction'",
    "enginez=3": "did you mean 'engines'",
    "engine.max_num_sqes=3": "did you mean 'engine.max_num_seqs'",
    "polices.engine=3": "no key 'polices.engine'",
    "engines=many": "'many'",
    "engines=1,2": "sweep",
    "slo.ttft_s=soon": "'soon'",
    "+engine.more=1": "write key=value",
    "~engines": "write key=value",
    "policies.eviction=lru": "policies/eviction=",
    "policies.eviction.grace_s=1": "policies.eviction has none",
    "a b": "key=value",
    "engines=[1": "key=value",
    "policy_modules=mine.py": "is a list",
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_with_the_nearest_name(mistake: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose([mistake])
    assert MISTAKES[mistake] in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_typo_in_a_policy_parameter_names_the_right_one() -> None:
    with pytest.raises(ConfigError, match=r"did you mean 'policies\.eviction\.grace_s'"):
        compose(["policies/eviction=slo_aware", "policies.eviction.grase_s=3"])


def test_a_policy_parameter_of_the_wrong_type_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"policies.eviction.grace_s=x: .*'x'"):
        compose(["policies/eviction=slo_aware", "policies.eviction.grace_s=x"])


def test_a_policy_parameter_is_set_on_the_command_line() -> None:
    config = compose(["policies/eviction=slo_aware", "policies.eviction.grace_s=3"])
    assert dict(config.policies.eviction) == {"name": "slo_aware", "grace_s": 3.0, "floor_s": 0.05}


def test_a_path_stands_where_a_profile_has_a_name(tmp_path: Path) -> None:
    assert compose([f"chip={tmp_path}/mine.yaml"]).chip.name == f"{tmp_path}/mine.yaml"


def test_a_path_stands_where_a_trace_has_a_name(tmp_path: Path) -> None:
    trace = compose([f"trace={tmp_path}/mine.jsonl"]).trace
    assert (trace.name, trace.path) == ("file", f"{tmp_path}/mine.jsonl")


def test_a_missing_value_is_named() -> None:
    with pytest.raises(ConfigError, match=r"trace.path has no value"):
        resolved(compose(["trace=file"]))


def test_own_policies_become_options(tmp_path: Path) -> None:
    file = tmp_path / "keep_all_of_it.py"
    file.write_text(
        "from dataclasses import dataclass\n"
        "from policies.api import ReusePolicy\n"
        "from policies.registry import register\n"
        '@register("reuse/keep_all_of_it")\n'
        "@dataclass(slots=True, eq=False)\n"
        "class KeepAllOfIt(ReusePolicy):\n"
        '    """Keeps all of it."""\n'
        "    extra: int = 4\n"
    )
    config = compose(
        [
            override("policy_modules", [str(file)]),
            "policies/reuse=keep_all_of_it",
            "policies.reuse.extra=5",
        ]
    )
    assert dict(config.policies.reuse) == {"name": "keep_all_of_it", "extra": 5}


def test_own_policies_that_cannot_be_imported_are_named(tmp_path: Path) -> None:
    file = tmp_path / "broken_policy_file.py"
    file.write_text("import no_such_module_anywhere\n")
    with pytest.raises(PolicyError, match=r"broken_policy_file\.py"):
        compose([override("policy_modules", [str(file)])])


@given(
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats(allow_nan=False)
        # Hydra reads ${...} as an interpolation; no path of ours holds one.
        | st.text(st.characters(exclude_categories=["C"], exclude_characters="$")),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.from_regex(r"[a-z_]{1,5}", fullmatch=True), inner, max_size=3)
        ),
        max_leaves=4,
    )
)
def test_hydra_reads_back_every_value_that_an_override_is_written_with(value: object) -> None:
    parsed = OverridesParser.create().parse_override(override("key", value)).value()
    assert parsed == value


def test_a_file_that_is_no_configuration_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    with pytest.raises(ConfigError, match="No such file"):
        overrides_of(file)
    file.write_text("- 1\n")
    with pytest.raises(ConfigError, match=r"not the config\.yaml"):
        overrides_of(file)
    file.write_text("a: [")
    with pytest.raises(ConfigError, match="not YAML"):
        overrides_of(file)
