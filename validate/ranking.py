"""Does the simulator rank policies as a live engine does? ``python -m validate.ranking``.

Every pair of policies differs in one of them and is served the same traces, live several times
and once simulated with step times that were fitted to the same engine in the same session. What
the live runs of one and the same policy differ by is the noise; wherever a difference between
two policies is larger than that, the simulated difference must have the same sign.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite, log, nan
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.table import Table

from experiments.console import reporting, stderr, stdout
from policies.api import PolicySet
from policies.registry import policy_set
from sim.backend import Deployment
from sim.hardware import load_chip
from sim.metrics import ttft_s
from sim.model import load_model
from sim.result import Result
from sim.simulator import Simulator
from traces import Trace
from validate.calibrate import fit_steps
from validate.live_result import uninterrupted
from validate.live_validation import at_load, calibrated, delayed, overheads
from validate.ranking_workloads import LIMITS, WORKLOADS
from validate.vllm_backend import VllmBackend

__all__ = ["ARMS", "METRICS", "PAIRS", "Effect", "effects", "main", "rank"]

ARMS: Mapping[str, Mapping[str, Any]] = {
    "default": {},
    "eviction=fifo": {"eviction": "fifo"},
    "eviction=lfu": {"eviction": "lfu"},
    "eviction=slo_aware": {"eviction": {"name": "slo_aware", "grace_s": 0.3}},
    "admission=shortest_prompt": {"admission": "shortest_prompt"},
    "admission=priority": {"admission": "priority"},
    "reuse=never": {"reuse": "never"},
    "reuse=cap": {"reuse": {"name": "cap", "max_tokens": 64}},
    "admission=token_bucket": {
        "admission": {"name": "token_bucket", "rate_tokens_per_s": 9e3, "burst_tokens": 2000}
    },
}
"""Policies by name; what is not named is the default (``fcfs``, ``lru``, ``always``)."""


class Pair(NamedTuple):
    """Two arms and the metric in which they should differ."""

    first: str
    second: str
    metric: str


PAIRS = (
    Pair("default", "eviction=fifo", "hit rate"),
    Pair("default", "eviction=lfu", "hit rate"),
    Pair("default", "eviction=slo_aware", "interactive TTFT"),
    Pair("eviction=fifo", "eviction=lfu", "mean TTFT"),
    Pair("default", "admission=shortest_prompt", "mean TTFT"),
    Pair("default", "admission=priority", "interactive TTFT"),
    Pair("default", "reuse=never", "mean TTFT"),
    Pair("default", "reuse=cap", "mean TTFT"),
    Pair("default", "admission=token_bucket", "mean TTFT"),
)
QUICK = PAIRS[:7]
"""The pairs of ``--quick``, without the last two arms."""

SPREAD = 2.0
"""Standard errors that a difference must exceed to count as real."""


# --------------------------------------------------------------------------- metrics


@dataclass(frozen=True, slots=True)
class Metric:
    """What two runs are compared by."""

    of: Callable[[Result], float]
    relative: bool
    """Differences are ratios of the values, else plain differences."""


def _mean_ttft_s(result: Result, slo_class: str = "") -> float:
    requests = result.requests
    counted = requests["state"] == "finished"
    if slo_class:
        counted &= requests["slo_class"] == slo_class
    return float(np.mean(ttft_s(requests[counted]))) if counted.any() else nan


METRICS: Mapping[str, Metric] = {
    "mean TTFT": Metric(_mean_ttft_s, relative=True),
    "interactive TTFT": Metric(lambda result: _mean_ttft_s(result, "interactive"), relative=True),
    "hit rate": Metric(lambda result: result.summary()["prefix_hit_rate"], relative=False),
}


class Effect(NamedTuple):
    """What the second policy of a pair changes, simulated and live."""

    workload: str
    pair: Pair
    simulated: float
    """Of times the relative change, of the hit rate the difference."""
    live: float
    noise: float
    """How large a live difference may be by chance."""

    @property
    def visible(self) -> bool:
        """Whether the live difference is more than noise."""
        return abs(self.live) > self.noise

    @property
    def holds(self) -> bool:
        """Whether the simulator has the same sign, where that can be told."""
        return not self.visible or self.simulated * self.live > 0

    @property
    def verdict(self) -> str:
        if not self.visible:
            return "within noise"
        return "same sign" if self.holds else "OPPOSITE"


Values = Mapping[tuple[str, str], Sequence[float]]
"""By workload and arm: one value per run."""


def effects(
    metric: str, pairs: Sequence[Pair], simulated: Values, live: Values
) -> Iterator[Effect]:
    """The effect of each pair of this metric on each workload.

    The spread of repeated live runs is pooled over all arms of a workload, because two or three
    runs of a single arm would often agree by chance.

    Args:
        metric: of ``METRICS``.
        pairs: those of other metrics are passed over.
        simulated: the metric of each simulated run.
        live: the metric of each live run.
    """
    relative = METRICS[metric].relative

    def level(values: Sequence[float]) -> float:
        return float(np.mean([log(value) for value in values] if relative else values))

    def change(values: Values, workload: str, pair: Pair) -> float:
        step = level(values[workload, pair.second]) - level(values[workload, pair.first])
        return float(np.expm1(step)) if relative else step

    for workload in dict.fromkeys(workload for workload, _ in live):
        groups = [np.array(runs) for (name, _), runs in live.items() if name == workload]
        if relative:
            groups = [np.log(group) for group in groups]
        freedom = sum(len(group) - 1 for group in groups)
        squares = sum(float(((group - group.mean()) ** 2).sum()) for group in groups)
        deviation = (squares / freedom) ** 0.5 if freedom else nan
        for pair in pairs:
            if pair.metric != metric:
                continue
            counts = [len(live[workload, arm]) for arm in (pair.first, pair.second)]
            noise = SPREAD * deviation * sum(1 / count for count in counts) ** 0.5
            yield Effect(
                workload,
                pair,
                simulated=change(simulated, workload, pair),
                live=change(live, workload, pair),
                noise=float(np.expm1(noise)) if relative else noise,
            )


# --------------------------------------------------------------------------- running

Serve = Callable[[Trace, PolicySet], Result]
"""A backend that serves a trace under policies."""


def rank(
    traces: Mapping[str, Trace],
    pairs: Sequence[Pair],
    simulate: Serve,
    serve: Serve,
    *,
    repeats: int = 2,
    say: Callable[[str], None] = lambda line: None,
) -> list[Effect]:
    """Serve every trace under every arm of the pairs and compare.

    Repetitions go round all arms before an arm comes again, so that an engine that becomes slower
    shows as noise and not as an effect.

    Args:
        traces: by workload.
        pairs: what to compare.
        simulate: the simulator.
        serve: the live engine.
        repeats: live runs of each arm; 2 or more, or there is no noise to compare with.
        say: told what runs next.

    Raises:
        ValueError: too few repeats.
    """
    if repeats < 2:
        raise ValueError(f"repeats={repeats}: noise needs at least 2 live runs of each policy")
    arms = list(dict.fromkeys(arm for pair in pairs for arm in (pair.first, pair.second)))
    sets = {arm: policy_set(**ARMS[arm]) for arm in arms}
    simulated: dict[str, dict[tuple[str, str], list[float]]] = {name: {} for name in METRICS}
    live: dict[str, dict[tuple[str, str], list[float]]] = {name: {} for name in METRICS}

    def note(table: dict[str, dict[tuple[str, str], list[float]]], key: Any, run: Result) -> None:
        for name, metric in METRICS.items():
            table[name].setdefault(key, []).append(metric.of(run))

    for workload, trace in traces.items():
        for arm in arms:
            note(simulated, (workload, arm), simulate(trace, sets[arm]))
    for repeat in range(repeats):
        for workload, trace in traces.items():
            for arm in arms:
                say(f"live {repeat + 1}/{repeats}: {workload}, {arm}")
                note(live, (workload, arm), uninterrupted(serve(trace, sets[arm])))
    found = [
        effect
        for metric in METRICS
        for effect in effects(metric, pairs, simulated[metric], live[metric])
    ]
    order = {pair: i for i, pair in enumerate(pairs)}
    return sorted(
        found, key=lambda effect: (list(traces).index(effect.workload), order[effect.pair])
    )


# --------------------------------------------------------------------------- showing


def table(found: Sequence[Effect]) -> Table:
    """One row per workload and pair."""
    shown = Table("workload", "from", "to", "metric")
    for title in ("simulated", "live", "noise"):
        shown.add_column(title, justify="right")
    shown.add_column("")
    styles = {"within noise": "dim", "same sign": "green", "OPPOSITE": "bold red"}
    workload = ""
    for effect in found:
        if effect.workload != workload:
            shown.add_section()
            workload = effect.workload
        numbers = [_percent(effect.simulated), _percent(effect.live), _percent(effect.noise)[1:]]
        unit = "" if METRICS[effect.pair.metric].relative else " points"
        shown.add_row(
            effect.workload,
            *effect.pair,
            *(f"{number}{unit}" for number in numbers),
            f"[{styles[effect.verdict]}]{effect.verdict}[/]",
        )
    return shown


def _percent(value: float) -> str:
    return f"{100 * value:+.1f} %" if isfinite(value) else " -"


def summary(found: Sequence[Effect]) -> str:
    """How many effects there are, and how many the simulator has right, in one line."""
    visible = [effect for effect in found if effect.visible]
    right = sum(effect.holds for effect in visible)
    return (
        f"{len(found)} comparisons, {len(visible)} with a live difference beyond the noise: "
        f"the simulator has the sign of {right}, the opposite of {len(visible) - right}"
    )


def write(found: Sequence[Effect], folder: Path, about: Mapping[str, Any]) -> list[Path]:
    """``ranking.json`` and ``ranking.csv`` in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {"workload": effect.workload, **effect.pair._asdict(), "simulated": effect.simulated,
         "live": effect.live, "noise": effect.noise, "verdict": effect.verdict}
        for effect in found
    ]  # fmt: skip
    document = dict(about) | {"summary": summary(found), "effects": rows}
    paths = [folder / "ranking.json", folder / "ranking.csv"]
    paths[0].write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    with paths[1].open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return paths


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; 1 if the simulator has a sign wrong."""
    parser = argparse.ArgumentParser(prog="python -m validate.ranking", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer pairs and shorter runs")
    parser.add_argument("--repeats", type=int, default=2, help="live runs of each policy")
    parser.add_argument("--requests", type=int, help="in each run; 400, or 120 with --quick")
    parser.add_argument("--seed", type=int, default=0, help="of the traces")
    parser.add_argument("--out", type=Path, default=Path("outputs/ranking"), help="folder")
    options = parser.parse_args(argv)
    with reporting():
        return _rank_all(options)


def _rank_all(options: argparse.Namespace) -> int:
    pairs = QUICK if options.quick else PAIRS
    requests = options.requests or (120 if options.quick else 400)
    say = stderr().print
    deployment = Deployment(
        chip=load_chip("a100_80g"), model=load_model("qwen3_0_6b"), limits=LIMITS
    )  # neither counts: times are measured, and memory is given in blocks
    default = policy_set()
    with VllmBackend(deployment, record_runs=False) as backend:
        say("calibrating")
        parts = [calibrated(backend, default, seed) for seed in range(2)]
        fit = fit_steps([step for steps, _ in parts for step in steps])
        traffic = [result for _, result in parts]
        overhead = overheads(traffic, fit.model, LIMITS.max_num_batched_tokens)
        for line in fit.lines():
            say(line)
        traces = {
            name: at_load(make(requests, options.seed), load, deployment, default, fit.model)
            for name, (make, load) in WORKLOADS.items()
        }
        simulator = Simulator(deployment, step_model=fit.model, record_runs=False)
        found = rank(
            traces,
            pairs,
            lambda trace, policies: delayed(simulator.serve(trace, policies), overhead),
            backend.serve,
            repeats=options.repeats,
            say=say,
        )
    stdout().print(table(found))
    print(summary(found))
    about = {"requests": requests, "repeats": options.repeats, "step_times": fit.document()}
    for path in write(found, options.out, about):
        say(f"wrote {path}")
    return int(any(not effect.holds for effect in found))


if __name__ == "__main__":
    sys.exit(main())
