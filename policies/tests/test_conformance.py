"""Every policy of the bench keeps the contract, and the package stands on its own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import MISSING
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

import policies
from policies import registry
from policies.parameters import parameters_of
from policies.registry import catalog, create
from policies.testing import check, main

ROOT = Path(policies.__file__).resolve().parents[1]
OURS = ("policies", "hardware_profiles", "traces", "sim", "experiments", "validate")


@pytest.mark.parametrize("name", catalog())
def test_the_policy_keeps_the_contract(name: str) -> None:
    check(name)


@pytest.mark.parametrize("name", catalog())
def test_the_policy_is_documented(name: str) -> None:
    entry = catalog()[name]
    assert entry.summary.endswith(".")
    for parameter in entry.parameters:
        assert parameter.doc.endswith("."), parameter.name
        assert parameter.default is not MISSING
        assert parameter.type in (int, float, str, bool)


@pytest.mark.parametrize("name", catalog())
def test_the_policy_shows_its_parameters_and_hides_its_state(name: str) -> None:
    cls = catalog()[name].cls
    shown = ", ".join(f"{p.name}={p.default!r}" for p in parameters_of(cls))
    assert repr(create(name)) == f"{cls.__name__}({shown})"


def bench() -> list[str]:
    """Names of our own policies; other tests of the same process may register more."""
    return [
        name for name, entry in catalog().items() if entry.cls.__module__.startswith("policies.")
    ]


def test_the_readme_lists_every_policy() -> None:
    readme = (ROOT / "policies" / "README.md").read_text(encoding="utf-8")
    assert [name for name in bench() if f"`{name}`" not in readme] == []


def test_the_policy_of_the_readme_has_20_lines_and_keeps_the_contract(tmp_path: Path) -> None:
    readme = (ROOT / "policies" / "README.md").read_text(encoding="utf-8")
    code = readme.split("```python\n")[1].split("```")[0]
    assert len([line for line in code.splitlines() if line]) <= 20
    with users_file(tmp_path, "eviction/mine", code) as path:
        assert main(["eviction/mine", "--policy-module", str(path)]) == 0


def test_the_bench_loads_with_the_standard_library_alone() -> None:
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from policies.registry import catalog\n"
        "import policies.testing\n"
        "print(len(catalog()))\n"
        "tops = {name.partition('.')[0] for name in sys.modules} - {'__main__', 'policies'}\n"
        "print(sorted(tops - sys.stdlib_module_names))\n"
    )
    done = subprocess.run(
        [sys.executable, "-S", "-I", "-c", code, str(ROOT)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr == ""
    assert done.stdout.splitlines() == [str(len(bench())), "[]"]


@pytest.mark.parametrize("name", OURS)
def test_no_other_distribution_installs_a_package_of_our_name(name: str) -> None:
    assert set(packages_distributions().get(name, [])) <= {"servelab"}


@contextmanager
def users_file(folder: Path, name: str, code: str) -> Iterator[Path]:
    """A file outside the tree that registers ``name``, forgotten in the end."""
    path = folder / f"servelab_test_{name.partition('/')[2]}.py"
    path.write_text(code, encoding="utf-8")
    try:
        yield path
    finally:
        registry._registered.pop(name, None)
        sys.modules.pop(path.stem, None)


def test_the_command_line_checks_the_policies_it_is_given(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["eviction/lru", "reuse/cap"]) == 0
    assert capsys.readouterr().out == "eviction/lru: ok\nreuse/cap: ok\n"


def test_the_command_line_says_what_is_wrong_with_a_users_policy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = (
        "from policies.api import ReusePolicy\n"
        "from policies.registry import register\n"
        "@register('reuse/greedy')\n"
        "class Greedy(ReusePolicy):\n"
        "    def use(self, request, match, engine, now):\n"
        "        return match.tokens + 16\n"
    )
    with users_file(tmp_path, "reuse/greedy", code) as path:
        assert main(["reuse/greedy", "--policy-module", str(path)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("reuse/greedy.use(request r0, match of ")
    assert error.count("\n") == 1


def test_the_command_line_refuses_an_unknown_policy(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["eviction/slo_awre"])
    assert "did you mean 'eviction/slo_aware'?" in capsys.readouterr().err
