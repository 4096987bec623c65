"""Fits find the constants that made the steps, and measured rows become the right batches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from policies.registry import policy_set
from sim.backend import Deployment
from sim.latency import PS_PER_S, AffineStepModel, Batch
from sim.scheduler import EngineLimits
from sim.simulator import Simulator
from validate.calibrate import (
    CONSTANTS,
    CalibrationError,
    MeasuredStep,
    drift,
    fit_steps,
    measured_steps,
)
from validate.calibration_traffic import calibration_trace

TRUE_S = (2.3e-3, 3.2e-5, 4.5e-5, 1.4e-7, 1.4e-8, 1.1e-3)
"""About what the tiny model takes on two cores."""
TRUE = AffineStepModel(*(round(value * PS_PER_S) for value in TRUE_S))


class _Spy(AffineStepModel):
    """Keeps every batch it is asked about."""

    def __init__(self) -> None:
        super().__init__(*TRUE._coefficients)
        self.batches: list[Batch] = []

    def step_ps(self, batch: Batch) -> int:
        self.batches.append(batch)
        return super().step_ps(batch)


def _batches(**limits: Any) -> list[Batch]:
    """What an engine computes when calibration traffic is replayed on it."""
    spy = _Spy()
    deployment = Deployment.of("a100_80g", "qwen3_0_6b", **{"num_gpu_blocks": 2000} | limits)
    simulator = Simulator(deployment, mode="stepwise", step_model=spy)
    result = simulator.serve(calibration_trace(deployment.limits, 0), policy_set())
    assert (result.requests["state"] == "finished").all()
    return spy.batches


@pytest.fixture(scope="module")
def batches() -> list[Batch]:
    return _batches()


def _measured(
    batches: list[Batch], noise: float = 0.0, disturbed: int = 0, seed: int = 0
) -> list[MeasuredStep]:
    rng = np.random.default_rng(seed)
    times = np.array([TRUE.step_ps(batch) for batch in batches]) / PS_PER_S
    times *= 1 + noise * rng.standard_normal(len(times)).clip(-3, 3)
    if disturbed:
        times[rng.choice(len(times), disturbed, replace=False)] += 0.2
    named = enumerate(zip(batches, times.tolist(), strict=True))
    return [MeasuredStep(batch, duration_s, f"step {i}") for i, (batch, duration_s) in named]


# --------------------------------------------------------------------------- fitting


def test_exact_times_give_the_constants_back(batches: list[Batch]) -> None:
    fit = fit_steps(_measured(batches))
    for name, true_s in zip(CONSTANTS, TRUE_S, strict=True):
        assert fit.constants_s[name] == pytest.approx(true_s, rel=1e-3), name
    assert fit.r2 > 0.999999
    assert fit.held_out_mape < 1e-4
    assert not fit.outliers


def test_the_fitted_model_counts_in_whole_picoseconds(batches: list[Batch]) -> None:
    model = fit_steps(_measured(batches)).model
    batch = Batch(((300, 128),), 7, 2100, 400)
    assert model.step_ps(batch) == pytest.approx(TRUE.step_ps(batch), rel=1e-4)
    assert isinstance(model.step_ps(batch), int)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_noise_and_disturbed_steps_change_little(batches: list[Batch], seed: int) -> None:
    steps = _measured(batches, noise=0.1, disturbed=12, seed=seed)
    fit = fit_steps(steps)
    clean = np.array([TRUE.step_ps(batch) for batch in batches])
    predicted = np.array([fit.model.step_ps(batch) for batch in batches])
    # What disturbed steps took is spread over all of them, up to ten times what they should take.
    taken = np.minimum([step.duration_s * PS_PER_S for step in steps], 10 * clean)
    assert predicted.sum() == pytest.approx(taken.sum(), rel=0.015)
    shape = predicted / predicted.sum() * clean.sum() / clean
    assert np.mean(np.abs(shape - 1)) < 0.025
    long = {step.name for step, ps in zip(steps, clean, strict=True) if step.duration_s > 0.2}
    assert len(long) >= 12
    assert set(fit.outliers) <= long
    assert len(fit.outliers) >= 10  # 0.2 s more is not three times as long for the longest steps
    assert 0.05 < fit.held_out_mape < 0.18


def test_the_error_in_total_shows_what_a_wrong_shape_costs(batches: list[Batch]) -> None:
    """Times that no affine model describes have held-out errors to say so."""
    steps = [
        MeasuredStep(batch, 1e-3 * (1 + sum(n for n, _ in batch.prefills) / 50) ** 2)
        for batch in batches
    ]
    assert fit_steps(steps).held_out_mape > 0.1


def test_drift_is_the_change_in_time_for_the_same_work(batches: list[Batch]) -> None:
    steps = _measured(batches, noise=0.02)
    fit = fit_steps(steps)
    slower = [step._replace(duration_s=1.2 * step.duration_s) for step in steps]
    assert drift(fit, steps, slower) == pytest.approx(0.2, abs=1e-9)
    assert drift(fit, slower, steps) == pytest.approx(1 / 1.2 - 1, abs=1e-9)


def _one(batch: Batch, count: int = 30) -> list[MeasuredStep]:
    return [MeasuredStep(batch, 0.01 + i * 1e-5) for i in range(count)]


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        (_one(Batch(((8, 0),), 1, 9, 9), 19), "19 steps: a fit needs at least 20"),
        (_one(Batch(((8, 0),), 0, 0, 0)), "no step decoded"),
        (_one(Batch((), 2, 40, 20)), "no step computed a prompt"),
        (
            [*_one(Batch(((8, 0),), 1, 9, 9)), MeasuredStep(Batch((), 1, 9, 9), -1.0, "step 7")],
            r"step 7: duration_s=-1.0 must be above 0",
        ),
    ],
)
def test_what_no_model_can_be_fitted_to_is_refused(steps: list[MeasuredStep], message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        fit_steps(steps)


def test_a_machine_that_cannot_be_measured_on_is_named(batches: list[Batch]) -> None:
    steps = _measured(batches)
    wild = [step._replace(duration_s=1e-3 * 100 ** (i % 3)) for i, step in enumerate(steps)]
    with pytest.raises(CalibrationError, match="the machine is too busy to measure on"):
        fit_steps(wild)


def test_a_fit_says_what_it_found(batches: list[Batch]) -> None:
    fit = fit_steps(_measured(batches, noise=0.05, disturbed=5))
    formula, errors = fit.lines()
    assert f"{1e3 * fit.constants_s['c0_s']:.3f} ms" in formula
    assert f"{fit.steps} steps" in errors
    assert f"{len(fit.outliers)} more disturbed" in errors
    assert fit.document()["constants_s"]["cp_s"] == fit.constants_s["cp_s"]


# --------------------------------------------------------------------------- rows


def _row(step: int, began_s: float, ended_s: float, **what: Any) -> dict[str, Any]:
    empty: dict[str, Any] = {
        "scheduled": {}, "new": [], "resumed": [], "preempted": [], "hits": {},
        "running": [], "waiting": [],
    }  # fmt: skip
    return empty | {"step": step, "began_s": began_s, "ended_s": ended_s} | what


ROWS = [
    _row(0, 0.0, 0.010, scheduled={"a": 64}, new=["a"], hits={"a": 32}, running=["a"]),
    _row(1, 0.011, 0.025, scheduled={"a": 4, "b": 20}, new=["b"], running=["a", "b"]),
    _row(2, 0.026, 0.029, scheduled={"a": 1, "b": 1}, running=["a", "b"]),
    # b lost its blocks; later it computes its prompt and the two tokens it has once more.
    _row(3, 0.031, 0.034, scheduled={"a": 1}, preempted=["b"], running=["a"], waiting=["b"]),
    _row(4, 0.035, 0.040, scheduled={"b": 22}, resumed=["b"], hits={"b": 0}, running=["b"]),
    _row(5, 5.0, 5.004, scheduled={"c": 8}, new=["c"], hits={"c": 0}, running=["c"]),
]
PROMPTS = {"a": 100, "b": 20, "c": 8}


def test_rows_become_batches() -> None:
    batches = [step.batch for step in measured_steps(ROWS, PROMPTS)]
    assert batches == [
        Batch(((64, 32),), 0, 0, 0),
        Batch(((4, 96), (20, 0)), 0, 0, 0),
        Batch((), 2, 101 + 21, 101),
        Batch((), 1, 102, 102),
        Batch(((22, 0),), 0, 0, 0),
        Batch(((8, 0),), 0, 0, 0),
    ]


def test_a_busy_step_lasts_until_the_next_and_others_get_the_usual_gap() -> None:
    durations = [step.duration_s for step in measured_steps(ROWS, PROMPTS)]
    usual = 0.001  # of the gaps 1, 1, 2 and 1 ms; the engine slept before c came
    assert durations == pytest.approx([0.011, 0.015, 0.005, 0.004, 0.005 + usual, 0.004 + usual])


def test_rows_without_times_are_refused() -> None:
    bare = [{key: value for key, value in ROWS[0].items() if key != "ended_s"}]
    with pytest.raises(CalibrationError, match="step 0: no times; rows of a live engine have"):
        measured_steps(bare, PROMPTS)


@pytest.mark.parametrize(
    ("rows", "prompts", "message"),
    [
        (ROWS, {"a": 100}, "step 1: request 'b' was scheduled, but its prompt length"),
        (ROWS[2:], PROMPTS, "step 2: request 'a' was scheduled, but its admission"),
    ],
)
def test_rows_that_do_not_begin_at_the_beginning_are_refused(
    rows: list[Mapping[str, Any]], prompts: dict[str, int], message: str
) -> None:
    with pytest.raises(CalibrationError, match=message):
        measured_steps(rows, prompts)


# --------------------------------------------------------------------------- traffic


def test_calibration_traffic_covers_what_an_engine_computes(batches: list[Batch]) -> None:
    decodes = {batch.decodes for batch in batches}
    assert decodes >= set(range(13))
    alone = [batch.prefills[0] for batch in batches if not batch.decodes]
    assert min(new for new, _ in alone) <= 16
    assert max(new for new, _ in alone) >= 900
    assert any(old >= 200 for batch in batches for _, old in batch.prefills)
    assert sum(bool(batch.prefills and batch.decodes) for batch in batches) > 50


def test_calibration_traffic_fits_the_engine_and_its_seed() -> None:
    limits = EngineLimits(max_model_len=256, max_num_seqs=4, block_tokens=32)
    trace = calibration_trace(limits, 3)
    table = trace.requests
    assert (table["prompt_tokens"] + table["output_tokens"]).max() <= 256
    assert table["session"].nunique() == 4
    assert trace == calibration_trace(limits, 3)
    assert trace != calibration_trace(limits, 4)
    with pytest.raises(CalibrationError, match="max_model_len=100"):
        calibration_trace(EngineLimits(max_model_len=100), 0)


def test_tight_memory_does_not_spoil_the_traffic() -> None:
    fit = fit_steps(_measured(_batches(num_gpu_blocks=160)))
    assert fit.constants_s["cp_s"] == pytest.approx(TRUE_S[1], rel=1e-3)
