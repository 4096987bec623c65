"""What a validation does around the two runs, and one whole validation of the tiny model."""

from __future__ import annotations

import json
from dataclasses import replace
from math import inf, isnan, nan
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from experiments.composing import ConfigError
from policies.registry import policy_set
from sim.backend import Deployment
from sim.latency import AffineStepModel
from sim.result import Result
from sim.simulator import Simulator
from traces import Trace, generate
from validate.live_validation import Overheads, at_load, delayed, overheads, validate

STEPS = AffineStepModel(2_600_000_000, 32_000_000, 100_000_000, 140_000, 14_000)


def _deployment() -> Deployment:
    return Deployment.of("a100_80g", "qwen3_0_6b", num_gpu_blocks=400, max_num_seqs=8)


def _result(
    arrival_s: list[float],
    admitted_s: list[float],
    finish_s: list[float],
    first_s: list[float] | None = None,
) -> Result:
    count = len(arrival_s)
    requests = pd.DataFrame(
        {
            "id": [str(i) for i in range(count)],
            "arrival_s": arrival_s,
            "admitted_s": admitted_s,
            "first_token_s": finish_s if first_s is None else first_s,
            "finish_s": finish_s,
            "prompt_tokens": 10,
            "output_tokens": 1,
            "cached_tokens": 0,
            "engine": 0,
            "state": ["rejected" if isnan(end) else "finished" for end in finish_s],
            "slo_ttft_s": inf,
            "slo_tpot_s": inf,
            "slo_e2e_s": inf,
        }
    )
    empty = pd.DataFrame()
    return Result(requests=requests, runs=empty, engines=empty, meta={"trace": "by hand"})


def test_overheads_are_those_of_requests_that_found_an_idle_engine() -> None:
    # The second comes while the first is served; the others find nobody. A prompt of 10 tokens
    # should take 2.6 + 10 * 0.032 + 100 * 14e-6 = 2.9214 ms.
    first_s = [0.002 + 0.0039214, 1.9, 3.004 + 0.0049214, 5.003 + 0.0059214]
    result = _result(
        [0.0, 0.5, 3.0, 5.0], [0.002, 1.0, 3.004, 5.003], [1.0, 2.0, 4.0, 6.0], first_s
    )
    assert overheads([result], STEPS, 512) == pytest.approx((0.003, 0.002))
    assert overheads([result, result], STEPS, 512) == pytest.approx((0.003, 0.002))
    in_two_steps = overheads([result], STEPS, 5).wake_s
    assert in_two_steps == 0.0  # two steps should have taken longer than it did


def test_requests_that_never_finished_tell_nothing() -> None:
    assert overheads([_result([0.0, 0.5], [nan, nan], [nan, nan])], STEPS, 512) == (0.0, 0.0)


def test_extremes_of_overheads_do_not_count() -> None:
    at = [float(i) for i in range(20)]
    waits = [0.001] * 18 + [0.9, 0.0]
    admitted = [a + w for a, w in zip(at, waits, strict=True)]
    first = [a + 0.0039214 for a in admitted]
    result = _result(at, admitted, [a + 0.95 for a in at], first)
    assert overheads([result], STEPS, 512) == pytest.approx((0.001, 0.001))


def test_a_delay_moves_what_the_engine_does_and_not_the_arrival() -> None:
    before = Simulator(_deployment(), step_model=STEPS).serve(
        generate("independent", count=60, rate_per_s=5.0, output_mean=30), policy_set()
    )
    after = delayed(before, Overheads(travel_s=0.25, wake_s=0.5))
    old, new = before.requests, after.requests
    woken = new["first_token_s"] - old["first_token_s"]
    busy_until_s = old["finish_s"].cummax().shift(1, fill_value=-1.0)
    idle = old["arrival_s"] > busy_until_s
    assert 5 < idle.sum() < 55
    assert np.allclose(woken, np.where(idle, 0.75, 0.25))
    assert new["arrival_s"].equals(old["arrival_s"])
    assert np.allclose(new["admitted_s"] - old["admitted_s"], 0.25)
    assert np.allclose(new["finish_s"] - old["finish_s"], woken)
    assert after.summary()["tpot_mean_s"] == pytest.approx(before.summary()["tpot_mean_s"])
    assert (after.meta["travel_s"], after.meta["wake_s"]) == (0.25, 0.5)


@pytest.mark.parametrize("load", [0.3, 0.6, 1.5])
def test_a_load_is_the_part_of_the_time_that_engines_need(load: float) -> None:
    trace = generate("independent", count=400, rate_per_s=1.0, prompt_mean=300, output_mean=30)
    deployment = _deployment()
    scaled = at_load(trace, load, deployment, policy_set(), STEPS)
    at_once = Trace.build(
        "at once",
        {
            "arrival_s": 0.0,
            "prompt_tokens": trace.requests["prompt_tokens"],
            "output_tokens": trace.requests["output_tokens"],
        },
    )
    needed_s = Simulator(deployment, step_model=STEPS).serve(at_once, policy_set())
    assert needed_s.summary()["makespan_s"] / scaled.span_s == pytest.approx(load, rel=0.01)


def test_a_load_of_chats_counts_no_pauses() -> None:
    trace = generate("chat", sessions=20, session_rate_per_s=1.0, think_mean_s=30.0)
    scaled = at_load(trace, 0.5, _deployment(), policy_set(), STEPS)
    at_once = replace(trace, requests=trace.requests.assign(think_s=0.0))
    assert scaled.requests["arrival_s"].equals(
        at_load(at_once, 0.5, _deployment(), policy_set(), STEPS).requests["arrival_s"]
    )
    assert scaled.requests["think_s"].equals(trace.requests["think_s"])
    with pytest.raises(ValueError, match="load=0: must be above 0"):
        at_load(trace, 0, _deployment(), policy_set(), STEPS)


def test_bad_input_is_refused_before_anything_starts() -> None:
    with pytest.raises(ValueError, match="repeats=0: must be 1 or more"):
        validate(repeats=0)
    with pytest.raises(ConfigError, match=r"did you mean 'engine\.max_num_seqs'"):
        validate(["engine.max_num_seq=4"])


@pytest.mark.vllm
@pytest.mark.slow
def test_a_whole_validation_of_the_tiny_model(tmp_path: Path) -> None:
    """Decisions must be equal; times only roughly, because tests share their machine."""
    pytest.importorskip("vllm", reason="needs vLLM: make validate builds an environment with it")
    said: list[str] = []
    found = validate(quick=True, out=tmp_path / "run", say=said.append)
    both = found.comparison
    live = both.live[0].requests
    assert (live["state"] == "finished").all()
    assert both.cached_equal >= 0.9 * len(live)
    assert both.parity is not None
    assert both.parity.rows > 200
    assert both.parity.equal == both.parity.rows, both.parity.first
    assert found.fit is not None
    assert 0 < found.overheads.travel_s < 0.1
    for name, error in both.mean_errors.items():
        assert error is not None, name
        assert -0.8 < error < 4, name
    document = json.loads((tmp_path / "run" / "comparison.json").read_text())
    assert document["parity"]["equal"] == both.parity.equal
    assert (tmp_path / "run" / "comparison.png").stat().st_size > 10_000
    again = Result.load(tmp_path / "run" / "live-1")
    assert again.requests["id"].tolist() == live["id"].tolist()
    assert Result.load(tmp_path / "run" / "simulated").meta["calibrated"]
    assert sum("calibration" in line for line in said) == 2
