"""The benchmark's promises that do not depend on the machine: counts, and ratios side by side."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from experiments import bench

APP = typer.Typer()
APP.command()(bench.main)


def test_the_fast_engine_is_eight_times_as_fast_as_the_stepwise_one_on_generated_requests() -> None:
    score = bench.measure(bench.cases()["generated"], limit=1_500, repeats=1)
    assert score.ratio_to_stepwise >= 8
    assert score.events_per_request <= 6
    assert score.steps_per_request > 2 * score.events_per_request


@pytest.mark.data
@pytest.mark.parametrize("name", ["azure", "mooncake", "mooncake_16", "mooncake_prefix"])
def test_public_traces_need_few_events_and_beat_the_stepwise_engine(name: str) -> None:
    case = bench.cases()[name]
    assert case.needs is not None
    if not case.needs.exists():
        pytest.skip(f"{case.needs} is not there; set SERVELAB_DATA")
    score = bench.measure(case, limit=1_500, repeats=1)
    assert score.ratio_to_stepwise >= 8
    assert score.events_per_request <= 6


def test_one_case_is_printed_as_json() -> None:
    done = CliRunner().invoke(
        APP,
        ["--case", "generated", "--limit", "200", "--json"],
    )
    assert done.exit_code == 0
    (score,) = json.loads(done.stdout)
    assert score["case"] == "generated"
    assert score["requests"] == 200
    assert score["rss_bytes"] > 10_000_000


def test_a_case_without_its_data_is_skipped_with_a_reason(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(bench, "_AZURE", tmp_path / "absent.csv.gz")
    done = CliRunner().invoke(APP, ["--case", "azure"])
    assert done.exit_code == 0
    assert "absent.csv.gz is not there" in done.stderr.replace("\n", "")


def test_an_unknown_case_is_refused_with_the_known_ones() -> None:
    done = CliRunner().invoke(APP, ["--case", "azur"])
    assert done.exit_code == 2
    assert "no case 'azur'; known are azure" in done.stderr
