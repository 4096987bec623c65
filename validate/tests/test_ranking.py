"""Signs, noise and verdicts on made-up numbers, and the workloads on the simulator."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from policies.api import PolicySet
from policies.registry import policy_set
from sim.backend import Deployment
from sim.latency import AffineStepModel
from sim.result import Result
from sim.simulator import Simulator
from traces import Trace
from validate import ranking
from validate.live_validation import at_load
from validate.ranking import ARMS, METRICS, PAIRS, QUICK, Effect, Pair, effects, rank
from validate.ranking_workloads import LIMITS, WORKLOADS

TTFT = Pair("a", "b", "mean TTFT")
HITS = Pair("a", "b", "hit rate")
STEPS = AffineStepModel(2_600_000_000, 32_000_000, 100_000_000, 140_000, 14_000)
"""About what the tiny model takes on one core."""


def _one(
    pair: Pair, simulated: tuple[float, float], live: tuple[Sequence[float], Sequence[float]]
) -> Effect:
    guess = {("w", "a"): [simulated[0]], ("w", "b"): [simulated[1]]}
    truth = {("w", "a"): live[0], ("w", "b"): live[1]}
    (effect,) = effects(pair.metric, [pair], guess, truth)
    return effect


# --------------------------------------------------------------------------- logic


def test_times_are_compared_by_ratio() -> None:
    effect = _one(TTFT, (0.10, 0.12), ([0.2, 0.2], [0.3, 0.3]))
    assert effect.simulated == pytest.approx(0.2)
    assert effect.live == pytest.approx(0.5)
    assert effect.noise == pytest.approx(0.0)
    assert effect.visible
    assert effect.holds
    assert effect.verdict == "same sign"


def test_hit_rates_are_compared_by_difference_and_may_be_zero() -> None:
    effect = _one(HITS, (0.3, 0.0), ([0.4, 0.4], [0.0, 0.0]))
    assert effect.simulated == pytest.approx(-0.3)
    assert effect.live == pytest.approx(-0.4)
    assert effect.holds


def test_the_noise_is_two_standard_errors_of_repeated_runs_by_hand() -> None:
    # Deviations of +-0.01 in one arm and none in the other: a pooled variance of 2e-4 / 2, so
    # the difference of two means of two has a standard error of 0.01.
    effect = _one(HITS, (0.3, 0.35), ([0.29, 0.31], [0.35, 0.35]))
    assert effect.noise == pytest.approx(0.02)
    assert effect.visible
    assert not _one(HITS, (0.3, 0.35), ([0.29, 0.31], [0.315, 0.315])).visible


def test_what_is_not_visible_cannot_be_wrong() -> None:
    effect = _one(HITS, (0.3, 0.2), ([0.29, 0.31], [0.31, 0.31]))
    assert effect.holds
    assert effect.verdict == "within noise"


@pytest.mark.parametrize("simulated", [(0.3, 0.29), (0.3, 0.3)])
def test_an_opposite_sign_and_no_difference_at_all_are_both_wrong(
    simulated: tuple[float, float],
) -> None:
    effect = _one(HITS, simulated, ([0.3, 0.3], [0.4, 0.4]))
    assert not effect.holds
    assert effect.verdict == "OPPOSITE"


def test_all_arms_of_a_workload_tell_its_noise() -> None:
    live = {("w", "a"): [0.3, 0.3], ("w", "b"): [0.4, 0.4], ("w", "c"): [0.1, 0.5]}
    guess = {key: [runs[0]] for key, runs in live.items()}
    (effect,) = effects("hit rate", [HITS], guess, live)
    assert effect.noise == pytest.approx(2 * (0.08 / 3) ** 0.5)
    assert not effect.visible


def test_pairs_of_other_metrics_are_passed_over() -> None:
    values = {("w", "a"): [0.3, 0.3], ("w", "b"): [0.4, 0.4]}
    assert [e.pair for e in effects("hit rate", [TTFT, HITS], values, values)] == [HITS]


# --------------------------------------------------------------------------- workloads


def _deployment() -> Deployment:
    return Deployment.of(
        "a100_80g",
        "qwen3_0_6b",
        block_tokens=32,
        num_gpu_blocks=LIMITS.num_gpu_blocks,
        max_num_seqs=LIMITS.max_num_seqs,
        max_num_batched_tokens=LIMITS.max_num_batched_tokens,
        max_model_len=LIMITS.max_model_len,
    )


def _traces(requests: int) -> dict[str, Trace]:
    return {
        name: at_load(make(requests, 0), load, _deployment(), policy_set(), STEPS)
        for name, (make, load) in WORKLOADS.items()
    }


def _simulate(trace: Trace, policies: PolicySet) -> Result:
    return Simulator(_deployment(), step_model=STEPS, record_runs=False).serve(trace, policies)


def test_the_simulator_agrees_with_itself_on_every_pair_and_sees_most_effects() -> None:
    """The workloads are of use only if the pairs differ on them."""
    traces = _traces(400)
    found = rank(traces, PAIRS, _simulate, _simulate)
    assert len(found) == len(PAIRS) * len(WORKLOADS) >= 18
    assert all(effect.holds and effect.noise == pytest.approx(0, abs=1e-9) for effect in found)
    assert sum(abs(effect.simulated) > 0.02 for effect in found) > 0.8 * len(found)
    assert {effect.pair for effect in found} == set(PAIRS)
    assert [effect.workload for effect in found] == sorted(
        (effect.workload for effect in found), key=list(traces).index
    )


def test_a_simulator_with_a_wrong_sign_is_found() -> None:
    traces = {"bursts": _traces(200)["bursts"]}
    pair = Pair("default", "reuse=never", "mean TTFT")

    def swapped(trace: Trace, policies: PolicySet) -> Result:
        other = "reuse=never" if _is_default(policies) else "default"
        return _simulate(trace, policy_set(**ARMS[other]))

    (effect,) = rank(traces, [pair], swapped, _simulate)
    assert not effect.holds
    assert "the opposite of 1" in ranking.summary([effect])


def _is_default(policies: PolicySet) -> bool:
    return getattr(policies.reuse(), "policy_name", "") == "reuse/always"


def test_one_run_of_each_policy_is_not_enough() -> None:
    with pytest.raises(ValueError, match="repeats=1: noise needs at least 2"):
        rank(_traces(20), PAIRS, _simulate, _simulate, repeats=1)


def test_runs_are_short_and_their_traces_follow_from_the_seed() -> None:
    for name, trace in _traces(400).items():
        assert len(trace) >= 300, name
        assert trace.span_s < 15, name
        make, _ = WORKLOADS[name]
        assert make(50, 1) == make(50, 1)
        assert make(50, 1) != make(50, 2)
        longest = trace.requests["prompt_tokens"] + trace.requests["output_tokens"]
        assert longest.max() < (LIMITS.max_model_len or 0)
        assert set(trace.requests["slo_class"]) == {"interactive", "batch"}


def test_pairs_name_arms_and_metrics_that_exist() -> None:
    for pair in PAIRS:
        assert {pair.first, pair.second} <= set(ARMS)
        assert pair.metric in METRICS
    assert len(QUICK) >= 6
    for arm in ARMS.values():
        policy_set(**arm)


# --------------------------------------------------------------------------- showing


def _found() -> list[Effect]:
    return [
        _one(TTFT, (0.10, 0.12), ([0.2, 0.2], [0.3, 0.3])),
        _one(HITS, (0.3, 0.29), ([0.3, 0.3], [0.4, 0.4])),
        _one(HITS, (0.3, 0.2), ([0.29, 0.31], [0.31, 0.31])),
    ]


def test_the_table_shows_both_effects_and_the_verdict() -> None:
    file = StringIO()
    Console(width=140, file=file).print(ranking.table(_found()))
    rows = [
        [cell.strip() for cell in line.split("│")[1:-1]] for line in file.getvalue().split("\n")
    ]
    assert ["w", "a", "b", "mean TTFT", "+20.0 %", "+50.0 %", "0.0 %", "same sign"] in rows
    assert [row[-1] for row in rows if row[:1] == ["w"]] == [
        "same sign",
        "OPPOSITE",
        "within noise",
    ]


def test_the_last_line_counts() -> None:
    assert ranking.summary(_found()) == (
        "3 comparisons, 2 with a live difference beyond the noise: the simulator has the sign of "
        "1, the opposite of 1"
    )


def test_files_hold_every_effect(tmp_path: Path) -> None:
    document, table = ranking.write(_found(), tmp_path / "new", {"requests": 7})
    data = json.loads(document.read_text())
    assert data["requests"] == 7
    assert [effect["verdict"] for effect in data["effects"]] == [e.verdict for e in _found()]
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert float(rows[0]["live"]) == pytest.approx(0.5)
    assert rows[1]["verdict"] == "OPPOSITE"
