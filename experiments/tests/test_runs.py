"""A configuration becomes a result, and a run folder becomes the same run again."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import yaml

from experiments.composing import ConfigError, compose, override
from experiments.runs import rerun, run, simulate, trace_of
from sim.result import Result
from traces import TraceError

SMALL = ["trace.limit=120", "engines=2"]
SAME = ("requests.parquet", "runs.parquet", "engines.parquet", "summary.json", "config.yaml")


@pytest.mark.parametrize(
    "choices",
    [
        ["policies/eviction=slo_aware", "policies.eviction.grace_s=3", "policies/routing=random"],
        ["trace=chat", "trace.sessions=20", "seed=7", "trace.classes=[{name: a, ttft_s: 1.0}]"],
        [
            "trace=synthetic",
            "trace.count=40",
            "trace.between=[1,inf]",
            "slo.e2e_s=9",
            "mode=stepwise",
        ],
        ["engine.num_gpu_blocks=500", "signal_age_s=0.5", "policies/routing=least_loaded"],
    ],
)
def test_a_run_folder_recreates_itself_to_the_byte(choices: list[str], tmp_path: Path) -> None:
    first = run(compose([*SMALL, *choices]), tmp_path / "first")
    again = rerun(first, tmp_path / "again")
    for name in SAME:
        assert (again / name).read_bytes() == (first / name).read_bytes(), name


def test_a_changed_rerun_differs_only_where_it_was_changed(tmp_path: Path) -> None:
    chosen = ["policies/eviction=slo_aware", "policies.eviction.grace_s=3", "seed=5"]
    first = run(compose([*SMALL, *chosen]), tmp_path / "first")
    again = rerun(first, tmp_path / "again", ["policies/eviction=fifo"])
    before, after = (yaml.safe_load((f / "config.yaml").read_text()) for f in (first, again))
    assert after["policies"].pop("eviction") == {"name": "fifo"}
    assert before["policies"].pop("eviction") == {
        "name": "slo_aware",
        "grace_s": 3.0,
        "floor_s": 0.05,
    }
    assert before == after


def test_the_result_is_what_was_asked_for() -> None:
    meta = simulate(compose([*SMALL, "chip=h100", "policies/routing=least_loaded"])).meta
    assert (meta["chip"], meta["engines"], meta["trace"]) == ("h100", 2, "demo_chat")
    assert "least_loaded" in meta["policies"]["routing"]


def test_progress_ends_at_the_number_of_requests() -> None:
    seen: list[tuple[int, int]] = []
    simulate(compose(SMALL), progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (120, 120)


def test_an_interrupted_run_leaves_no_folder(tmp_path: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(compose(SMALL), tmp_path / "run", progress=interrupt)
    assert list(tmp_path.iterdir()) == []


def test_targets_fill_only_what_the_trace_leaves_open() -> None:
    plain = trace_of(compose(["trace.limit=50"])).requests
    filled = trace_of(compose(["trace.limit=50", "slo.ttft_s=3", "slo.e2e_s=60"]))
    assert (filled.requests["slo_ttft_s"] == plain["slo_ttft_s"].replace(math.inf, 3.0)).all()
    assert (filled.requests["slo_e2e_s"] == 60.0).all()
    assert "SLO targets" in filled.synthetic


def test_a_trace_is_cut_and_then_compressed() -> None:
    whole = trace_of(compose())
    cut = trace_of(compose(["trace.between=[10,60]", "trace.limit=30", "trace.rate_scale=2"]))
    first = whole.between(10, 60).head(30)
    assert np.allclose(cut.requests["arrival_s"] * 2, first.requests["arrival_s"])


def test_the_seed_of_a_run_is_the_seed_of_its_generator() -> None:
    def trace(*more: str) -> object:
        return trace_of(compose(["trace=chat", "trace.sessions=5", *more]))

    assert trace("seed=1") == trace("seed=2", "trace.seed=1")
    assert trace("seed=1") != trace("seed=2")


def test_public_data_that_is_not_there_says_where_it_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match=r"conversation_trace.*SERVELAB_DATA") as caught:
        simulate(compose(["trace=mooncake", override("data", str(tmp_path))]))
    assert str(tmp_path) in str(caught.value)


@pytest.mark.data
def test_public_traces_are_found_by_name(data: Path) -> None:
    for name in ("mooncake", "mooncake_synthetic", "azure_conv", "azure_code"):
        config = compose([f"trace={name}", "trace.limit=10", override("data", str(data))])
        assert len(trace_of(config)) == 10


def test_a_policy_parameter_out_of_range_is_one_error() -> None:
    with pytest.raises(ConfigError, match="grace_s is -1"):
        simulate(compose(["policies/eviction=slo_aware", "policies.eviction.grace_s=-1"]))


def test_a_result_without_a_table_of_steps_is_saved_and_read(tmp_path: Path) -> None:
    folder = run(compose([*SMALL, "record_runs=false"]), tmp_path / "run")
    assert Result.load(folder).runs.empty
