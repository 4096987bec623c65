"""Chips and links: every profile loads, topologies differ as in life, bad files are named."""

from __future__ import annotations

import re
from importlib import resources
from math import inf
from pathlib import Path

import pytest
import yaml

from sim.hardware import ProfileError, chips, links, load_chip, load_link
from sim.model import models

GROUPS = {"chip": chips, "link": links, "model": models}


@pytest.mark.parametrize("name", chips())
def test_every_chip_loads_and_is_plausible(name: str) -> None:
    chip = load_chip(name)
    assert chip.name == name
    assert 10e9 < chip.memory_bytes < 300e9
    assert 100e9 < chip.memory_bytes_per_s < 10e12
    assert 10 < chip.bf16_flops / chip.memory_bytes_per_s < 500
    assert chip.price_usd_per_h is None or 0.1 < chip.price_usd_per_h < 10
    assert bool(chip.warnings) == (chip.trust == "D")
    assert chip.calibrated != chip.calibration.startswith("uncalibrated")


@pytest.mark.parametrize("name", links())
def test_every_link_loads_and_is_plausible(name: str) -> None:
    link = load_link(name)
    assert 1e9 < link.bytes_per_s < 1e12
    assert link.write_bytes_per_s <= link.bytes_per_s
    assert 0 < link.latency_s < 1e-3


def test_only_chips_with_kernel_measurements_are_calibrated() -> None:
    calibrated = {name for name in chips() if load_chip(name).calibrated}
    assert calibrated == {"a100_80g", "h100", "h200", "b200", "l40s", "rtx4090", "rtx_pro_6000"}
    assert all("no serving run" in load_chip(name).calibration for name in calibrated)


@pytest.mark.parametrize("group", GROUPS)
def test_the_readme_lists_every_profile(group: str) -> None:
    readme = resources.files("hardware_profiles").joinpath("README.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"^\| `(\w+)` \|", readme, flags=re.MULTILINE))
    assert set(GROUPS[group]()) <= listed


@pytest.mark.parametrize("group", GROUPS)
def test_every_shipped_number_has_a_tag_and_a_source(group: str) -> None:
    def check(value: object, where: str, sourced: bool) -> None:
        if isinstance(value, dict):
            assert value.get("tag", "E") in {"V", "P", "R", "E"}, where
            below = sourced or "tag" in value
            for key, inner in value.items():
                check(inner, f"{where}.{key}", below)
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            assert sourced or where.endswith(("devices_per_node", "dies_per_package")), where

    for name in GROUPS[group]():
        file = resources.files("hardware_profiles").joinpath(group).joinpath(f"{name}.yaml")
        data = yaml.safe_load(file.read_text(encoding="utf-8"))
        assert "source" in data or "extends" in data, name
        check(data, f"{group}/{name}", "tag" in data)


def test_a_switch_gives_its_full_rate_to_any_group() -> None:
    chip = load_chip("a100_80g")
    assert [chip.link_bytes_per_s(ranks) for ranks in (1, 2, 4, 8)] == [inf, 300e9, 300e9, 300e9]


def test_a_mesh_gives_a_pair_only_one_of_its_links() -> None:
    chip = load_chip("ascend_910b")
    assert [chip.link_bytes_per_s(ranks) for ranks in (2, 4, 8)] == [28e9, 84e9, 196e9]


def test_measured_all_reduce_of_the_mesh_grows_with_the_group() -> None:
    chip = load_chip("ascend_910b2")
    assert [chip.collective(ranks)[1] for ranks in (2, 4, 8)] == [18e9, 45e9, 126e9]


def test_groups_beyond_the_node_use_the_network() -> None:
    assert load_chip("h100").link_bytes_per_s(16) == 50e9
    assert load_chip("h100").collective(16)[1] < 50e9


def test_groups_beyond_the_bridge_use_pcie() -> None:
    chip = load_chip("mlu370_x8")
    assert [chip.link_bytes_per_s(ranks) for ranks in (4, 8)] == [100e9, 32e9]


def test_spanning_nodes_without_a_network_is_refused() -> None:
    with pytest.raises(ProfileError, match=r"32 ranks span nodes of 16.*no network_link"):
        load_chip("atlas_300i_duo").link_bytes_per_s(32)


def test_910c_is_two_dies_with_a_fast_link_between_them() -> None:
    die = load_chip("ascend_910c")
    assert (die.dies_per_package, die.devices_per_node) == (2, 16)
    assert (die.bf16_flops, die.memory_bytes_per_s) == (376e12, 1.6e12)
    assert die.memory_bytes == pytest.approx(60.3 * 2**30, rel=1e-3)
    assert [die.link_bytes_per_s(ranks) for ranks in (2, 4, 16)] == [224e9, 196e9, 196e9]


def test_910b_is_another_name_for_910b2() -> None:
    alias, part = load_chip("ascend_910b"), load_chip("ascend_910b2")
    assert alias.kernels == part.kernels
    assert alias.memory_bytes == part.memory_bytes


def test_memory_is_what_the_engine_sees() -> None:
    assert load_chip("a100_80g").memory_bytes == 80 * 2**30
    assert load_chip("l40s").memory_bytes == 46068 * 2**20
    assert load_chip("rtx_pro_6000").memory_bytes == 97887 * 2**20
    assert load_chip("mi300x").memory_bytes == 192_000_000_000


def test_unknown_names_bring_the_nearest_one() -> None:
    with pytest.raises(ProfileError, match=r"no chip 'a100_80gb'; did you mean 'a100_80g'\?"):
        load_chip("a100_80gb")
    with pytest.raises(ProfileError, match=r"no link 'nvlink'; did you mean 'nvlink\d'\?"):
        load_link("nvlink")


def own(folder: Path, text: str, name: str = "mine.yaml") -> str:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_a_file_of_ones_own_extends_a_shipped_chip(tmp_path: Path) -> None:
    chip = load_chip(own(tmp_path, "extends: h100\ntitle: Mine\nbf16_flops: 500e12\n"))
    assert (chip.name, chip.bf16_flops) == ("mine", 500e12)
    assert chip.kernels == load_chip("h100").kernels


def test_calibration_is_not_inherited(tmp_path: Path) -> None:
    chip = load_chip(own(tmp_path, "extends: h100\ntitle: Mine\n"))
    assert not chip.calibrated
    assert chip.calibration == "uncalibrated: generic constants of its class"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("extends: h100\nbf16_flop: 1e12\n", r"bf16_flop: unknown key; did you mean 'bf16_flops'"),
        ("extends: h100\nbf16_flops: fast\n", r"bf16_flops: expected a number, got 'fast'"),
        ("extends: h100\nbf16_flops: -1.0\n", r"bf16_flops: must be positive, got -1.0"),
        ("extends: h100\nparallel_units: 1.5\n", r"parallel_units: expected a whole number"),
        ("extends: h100\nlink: nvlink44\n", r"no link 'nvlink44'; did you mean 'nvlink4'"),
        ("extends: h100\ntrust: D\n", r"warning: missing"),
        ("extends: h100\ncalibrated: yess\n", r"calibrated: expected true or false, got 'yess'"),
        ("extends: h101\n", r"no chip 'h101'; did you mean 'h100'"),
        ("extends: h100\nkernels: {gemm: {tiles: 1}}\n", r"kernels.gemm.tiles: unknown key"),
        ("extends: h100\nkernels: {gemm: {knee: 0.5}}\n", r"kernels.gemm.knee >= 1"),
        ("extends: h100\ntdp_w: {value: 3, tag: X}\n", r"tdp_w.tag: unknown value 'X'"),
        ("extends: h100\ntdp_w: 3\ntdp_w: 4\n", r"not YAML: key 'tdp_w' appears twice"),
        ("title: Mine\n", r"trust: missing"),
        ("- 1\n", r"expected a mapping, got list"),
        ("a: [\n", r"not YAML"),
    ],
)
def test_bad_files_are_named_with_their_key(tmp_path: Path, text: str, message: str) -> None:
    path = own(tmp_path, text)
    with pytest.raises(ProfileError, match=message) as caught:
        load_chip(path)
    assert (
        "mine.yaml" in str(caught.value)
        or "no link" in str(caught.value)
        or "no chip" in str(caught.value)
    )


def test_a_circle_of_extends_is_refused(tmp_path: Path) -> None:
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text(f"extends: {second}\n", encoding="utf-8")
    second.write_text(f"extends: {first}\n", encoding="utf-8")
    with pytest.raises(ProfileError, match="circle"):
        load_chip(str(first))


def test_a_missing_file_is_named() -> None:
    with pytest.raises(ProfileError, match=r"nowhere\.yaml: No such file"):
        load_link("nowhere.yaml")


def test_a_mesh_whose_numbers_disagree_is_refused(tmp_path: Path) -> None:
    text = "topology: mesh\nbytes_per_s: 196e9\npeers: 3\npeer_bytes_per_s: 28e9\nlatency_s: 0\n"
    with pytest.raises(ProfileError, match=r"mine\.yaml: peer_bytes_per_s: 3 peers at 2\.8e\+10"):
        load_link(own(tmp_path, text))
