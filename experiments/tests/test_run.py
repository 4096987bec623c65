"""``python -m experiments.run``: Hydra's own main, with our errors and our run folder."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from experiments import run
from experiments.console import FULL_ERROR

FOLDER_OF_A_RUN = {
    "config.yaml",
    "engines.parquet",
    "meta.json",
    "requests.parquet",
    "runs.parquet",
    "summary.json",
}


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(FULL_ERROR, "0")


def hydra(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Runs the main program in this process; its exit code."""
    monkeypatch.setattr(sys, "argv", ["experiments.run", *arguments])
    try:
        run.main()
    except SystemExit as left:
        return int(left.code or 0)
    return 0


def test_one_run_fills_the_output_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = hydra(monkeypatch, "trace.limit=30", "policies/eviction=slo_aware", "out=here")
    said = capsys.readouterr()
    assert code == 0, said.err
    assert {path.name for path in (tmp_path / "here").iterdir()} == FOLDER_OF_A_RUN
    assert "TTFT p99 (ms)" in said.out
    assert said.err.splitlines()[-1].endswith("here")
    assert [path.name for path in tmp_path.iterdir()] == ["here"]


def test_without_a_folder_the_run_goes_to_outputs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert hydra(monkeypatch, "trace.limit=5") == 0
    (folder,) = (tmp_path / "outputs").glob("*/*")
    assert {path.name for path in folder.iterdir()} == FOLDER_OF_A_RUN


def test_a_sweep_makes_a_folder_per_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = hydra(monkeypatch, "-m", "trace.limit=5", "out=sweep", "policies/eviction=lru,fifo")
    said = capsys.readouterr()
    assert code == 0, said.err
    for job in "01":
        assert {path.name for path in (tmp_path / "sweep" / job).iterdir()} == FOLDER_OF_A_RUN
    assert said.out.count("TTFT p99 (ms)") == 2
    assert "Launching" not in said.out


@pytest.mark.parametrize(
    ("arguments", "helpful"),
    [
        (["policies/eviction=slo_awre"], "slo_aware"),
        (["enginez=3"], "'engines'"),
        (["-m", "enginez=3,4"], "'engines'"),
        (["engine.max_num_seqs=0"], "max_num_seqs=0"),
        (["trace=mooncake", "data=nowhere"], "SERVELAB_DATA"),
        (["nonsense"], "nonsense"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    arguments: list[str],
    helpful: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    code = hydra(monkeypatch, "out=here", *arguments)
    said = capsys.readouterr()
    assert (code, said.out) == (2, "")
    (line,) = said.err.splitlines()
    assert line.startswith("error: ")
    assert helpful in line
    assert not list(tmp_path.rglob("*.parquet"))


def test_help_lists_the_groups(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert hydra(monkeypatch, "--help") == 0
    out = capsys.readouterr().out
    for shown in ("policies/eviction: belady, fifo", "trace: azure_code", "-m policies/eviction="):
        assert shown in out
