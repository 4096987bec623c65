"""Run folders: whole or absent, and equal to what was saved."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from sim.result import Result, ResultError
from sim.tests.bench import Job, serve


@pytest.fixture(scope="module")
def run() -> Result:
    """One request that finished and one that was rejected."""
    return serve(Job(0, 8, 3), Job(5, 400, 1), blocks=20).result


def listing(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_was_saved_is_loaded_again(run: Result, tmp_path: Path) -> None:
    config = {"chip": "a100_80g", "policies": {"eviction": "lru"}, "seed": 3}
    folder = run.save(tmp_path / "runs" / "one", config=config)
    again = Result.load(folder)
    for name in ("requests", "runs", "engines"):
        pd.testing.assert_frame_equal(getattr(again, name), getattr(run, name))
    assert again.decisions.empty
    assert again.meta == run.meta
    assert again.summary() == run.summary() == json.loads((folder / "summary.json").read_text())
    assert yaml.safe_load((folder / "config.yaml").read_text()) == config


def test_a_log_of_decisions_is_kept_where_there_is_one(run: Result, tmp_path: Path) -> None:
    decisions = pd.DataFrame({"now_s": [0.0], "call": ["admit"], "answer": ["admit"]})
    logged = Result(
        requests=run.requests, runs=run.runs, engines=run.engines, meta={}, decisions=decisions
    )
    again = Result.load(logged.save(tmp_path / "run"))
    pd.testing.assert_frame_equal(again.decisions, decisions)


def test_saving_again_replaces_the_run(run: Result, tmp_path: Path) -> None:
    folder = run.save(tmp_path / "run", config={"seed": 1})
    (folder / "figure.png").write_bytes(b"old")
    run.save(folder, config={"seed": 2})
    assert yaml.safe_load((folder / "config.yaml").read_text()) == {"seed": 2}
    assert not (folder / "figure.png").exists()
    assert listing(tmp_path) == ["run"]


def _fail(*args: Any, **options: Any) -> None:
    raise OSError("disk full")


FAILURES: dict[str, tuple[Any, str]] = {
    "a table": (pd.DataFrame, "to_parquet"),
    "the configuration": (yaml, "safe_dump"),
    "the summary": (Result, "summary"),
    "the last move": (os, "replace"),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_a_failure_while_saving_leaves_nothing(
    run: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: str
) -> None:
    owner, name = FAILURES[failure]
    monkeypatch.setattr(owner, name, _fail)
    with pytest.raises(OSError, match="disk full"):
        run.save(tmp_path / "run")
    assert listing(tmp_path) == []


@pytest.mark.parametrize("failure", FAILURES)
def test_a_failure_while_saving_again_keeps_the_earlier_run(
    run: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: str
) -> None:
    folder = run.save(tmp_path / "run", config={"seed": 1})
    owner, name = FAILURES[failure]
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, _fail)
        with pytest.raises(OSError, match="disk full"):
            run.save(folder, config={"seed": 2})
    assert listing(tmp_path) == ["run"]
    assert yaml.safe_load((folder / "config.yaml").read_text()) == {"seed": 1}
    assert len(Result.load(folder).requests) == 2


def test_a_folder_with_other_things_is_not_overwritten(run: Result, tmp_path: Path) -> None:
    folder = tmp_path / "home"
    folder.mkdir()
    (folder / "thesis.tex").write_text("years of work")
    with pytest.raises(ResultError, match=r"home: exists and is not a run folder"):
        run.save(folder)
    assert listing(folder) == ["thesis.tex"]


def test_an_empty_folder_may_become_a_run(run: Result, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    assert len(Result.load(run.save(tmp_path / "run")).requests) == 2


def test_a_file_is_not_overwritten(run: Result, tmp_path: Path) -> None:
    (tmp_path / "run").write_text("mine")
    with pytest.raises(ResultError, match="exists and is not a run folder"):
        run.save(tmp_path / "run")
    assert (tmp_path / "run").read_text() == "mine"


def test_a_folder_without_a_run_is_refused(run: Result, tmp_path: Path) -> None:
    with pytest.raises(ResultError, match=r"nothing: not a run folder \(no summary.json\)"):
        Result.load(tmp_path / "nothing")
    folder = run.save(tmp_path / "run")
    (folder / "runs.parquet").unlink()
    with pytest.raises(ResultError, match=r"run: runs\.parquet is missing"):
        Result.load(folder)


def test_figures_without_a_value_are_null_in_the_summary(tmp_path: Path) -> None:
    rejected = serve(Job(0, 400, 1), blocks=20).result
    text = (rejected.save(tmp_path / "run") / "summary.json").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    assert json.loads(text)["ttft_p99_s"] is None


@pytest.mark.parametrize(
    ("column", "value"),
    [("arrival_s", 1.0), ("admitted_s", -1.0), ("first_token_s", 0.0), ("finish_s", 0.0)],
)
def test_a_result_whose_times_are_out_of_order_cannot_be(
    run: Result, column: str, value: float
) -> None:
    requests = run.requests.copy()
    requests.loc[0, column] = value
    with pytest.raises(ResultError, match="request 0: arrival, admission, first token and finish"):
        Result(requests=requests, runs=run.runs, engines=run.engines, meta={})
