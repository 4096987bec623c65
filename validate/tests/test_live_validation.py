"""What a validation does around the two runs, and one whole validation of the tiny model."""

from __future__ import annotations

import json
from dataclasses import replace
from math import inf, isnan, nan
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from experiments.cli import app
from experiments.composing import ConfigError
from policies.api import PolicySet
from policies.registry import policy_set
from sim.backend import Deployment
from sim.latency import AffineStepModel
from sim.result import Result
from sim.simulator import Simulator
from traces import Trace, generate
from validate import live_validation
from validate.live_parity import unchecked
from validate.live_validation import (
    Overheads,
    Validation,
    at_load,
    delayed,
    overheads,
    validate,
)
from validate.vllm_backend import VllmBackend

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


class Fake:
    """Takes the place of live engines, which have another memory than the profiles say."""

    kv_blocks, max_model_len = 77, 1984

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.served: list[Trace] = []
        self.cancels = False
        monkeypatch.setattr(VllmBackend, "serve", self.serve)

    def serve(self, trace: Trace, policies: PolicySet, *, seed: int = 0) -> Result:
        self.served.append(trace)
        deployment = _deployment()
        result = Simulator(deployment).serve(trace, policies, seed=seed)
        if self.cancels:
            result = replace(result, requests=result.requests.assign(state="cancelled"))
        meta = {"kv_blocks": self.kv_blocks, "max_model_len": self.max_model_len, "incomplete": ""}
        return replace(result, meta={**result.meta, **meta})


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    return Fake(monkeypatch)


def _validate(*overrides: str, model: str | None = "some/model", **options: Any) -> Validation:
    return validate(
        ["engines=2", *overrides], model=model, repeats=1, calibrate=False, **options
    )  # several engines: decisions are not compared, which would take vLLM


def test_the_simulator_gets_the_memory_of_the_live_engine(fake: Fake) -> None:
    found = _validate(
        "trace.limit=20", "engine.num_gpu_blocks=null", "engine.max_model_len=null"
    ).comparison
    meta = found.simulated.meta
    assert (meta["kv_blocks"], meta["max_model_len"]) == (fake.kv_blocks, fake.max_model_len)
    assert "several engines" in found.unchecked
    assert found.parity is None


def test_only_a_trace_of_ones_own_replaces_the_default_one(fake: Fake) -> None:
    _validate("trace.limit=20", "trace.sessions=9")
    _validate("trace=synthetic", "trace.count=30")
    changed, own = fake.served
    assert len(changed) == 20
    assert changed.requests["prompt_tokens"].max() <= 1500  # as in the default trace
    assert changed.requests["session"].iloc[0]
    assert len(own) == 30
    assert not own.requests["session"].iloc[0]


def test_an_interruption_ends_everything(fake: Fake) -> None:
    fake.cancels = True
    with pytest.raises(KeyboardInterrupt):
        validate(["engines=2", "trace.limit=20"], model="some/model", repeats=3, calibrate=False)
    assert len(fake.served) == 1


def test_what_may_not_be_meant_so_is_told_beforehand(
    fake: Fake, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    warned: list[str] = []
    _validate("trace.limit=20", warn=warned.append)
    _validate("trace.limit=20", "model=llama3_8b", warn=warned.append)
    assert warned == []
    _validate(
        "trace.limit=20", "model=llama3_8b", "engine.max_model_len=300",
        model=None, warn=warned.append,
    )  # fmt: skip
    assert any("do not fit max_model_len=300" in line for line in warned)
    assert "the live model is the tiny one" in warned[-1]


def test_decisions_are_not_compared_where_policies_need_the_clock(fake: Fake) -> None:
    live = fake.serve(generate("independent", count=3, rate_per_s=1.0), policy_set())
    one = _deployment()
    assert unchecked(one, policy_set(), live) == ""
    bucket = {"name": "token_bucket", "rate_tokens_per_s": 9e3, "burst_tokens": 2000}
    assert "token_bucket" in unchecked(one, policy_set(admission=bucket), live)
    half = replace(live, meta={**live.meta, "incomplete": "engine 0 died"})
    assert unchecked(one, policy_set(), half) == "the live run is incomplete"


@pytest.mark.parametrize(("agrees", "options", "code"), [
    (True, ["--strict"], 0), (False, ["--strict"], 1), (False, [], 0),
])  # fmt: skip
def test_strict_is_an_exit_code(
    monkeypatch: pytest.MonkeyPatch, agrees: bool, options: list[str], code: int
) -> None:
    found = SimpleNamespace(
        comparison=SimpleNamespace(agrees=agrees), page=lambda: "page", folders=(), files=()
    )
    monkeypatch.setattr(live_validation, "validate", lambda *args, **options: found)
    assert CliRunner().invoke(app, ["validate", *options]).exit_code == code


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
