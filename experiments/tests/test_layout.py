"""Who may import whom, and that nothing else is installed under our names."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest

from policies.registry import KINDS

ROOT = Path(__file__).parents[2]
PACKAGES = ("policies", "traces", "sim", "experiments", "validate", "hardware_profiles")
OTHERS = ("hydra", "omegaconf", "matplotlib", "vllm", "experiments", "validate", "rich", "typer")
SIM_FILES = [file for file in sorted((ROOT / "sim").rglob("*.py")) if "tests" not in file.parts]


def imported(file: Path) -> Iterator[str]:
    """Names of all modules that a file imports, wherever in it that is."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} has a relative import"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def within(module: str, packages: tuple[str, ...]) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


@pytest.mark.parametrize("file", SIM_FILES, ids=lambda file: file.stem)
def test_the_simulator_knows_no_policy_and_no_front_end(file: Path) -> None:
    forbidden = (*(f"policies.{kind}" for kind in KINDS), *OTHERS)
    assert [module for module in imported(file) if within(module, forbidden)] == []


def test_the_walk_sees_the_simulator() -> None:
    assert {"engine", "simulator", "cache"} <= {file.stem for file in SIM_FILES}


def test_policies_need_nothing_but_the_standard_library() -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); before = set(sys.modules)\n"
        "from policies.registry import catalog; assert catalog()\n"
        "roots = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "assert roots - {'policies'} <= sys.stdlib_module_names, roots"
    )
    done = subprocess.run(
        [sys.executable, "-S", "-I", "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", PACKAGES)
def test_a_package_name_is_ours_alone(name: str) -> None:
    owners = set(metadata.packages_distributions().get(name, []))
    assert owners <= {"servelab"}, f"{owners} install a package {name!r} too; uninstall the other"


@pytest.mark.parametrize("target", ["demo", "test", "lint", "fuzz", "bench", "wheel", "clean"])
def test_the_makefile_has_the_target(target: str) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert re.search(rf"^{target}:", makefile, re.MULTILINE)
    assert re.search(rf"^\.PHONY:.*\b{target}\b", makefile, re.MULTILINE)


def test_every_dependency_is_pinned() -> None:
    pinned = {
        re.sub(r"[-_.]+", "-", line.partition("==")[0]).lower()
        for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
        if "==" in line
    }
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (block,) = re.findall(r"^dependencies = \[(.*?)^\]", text, re.MULTILINE | re.DOTALL)
    for name in re.findall(r'"([A-Za-z0-9-]+)', block):
        assert name.lower() in pinned
