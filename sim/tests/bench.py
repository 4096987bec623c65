"""A bench for hand-worked tables: a few requests on one small engine, times in picoseconds.

Blocks hold 4 tokens. By default a step takes 100 ps, 1 ps more per prompt token and 10 ps more per
decoding request, so schedules can be added up in the head.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, NamedTuple

import pandas as pd

from policies.api import PolicySet
from policies.registry import policy_set
from sim.backend import Deployment
from sim.latency import AffineStepModel
from sim.result import Result
from sim.simulator import Simulator
from traces import Chains, Trace

Mode = Literal["fast", "stepwise"]
MODES: tuple[Mode, Mode] = ("fast", "stepwise")
PS_PER_S = 10**12
STEPS = (100, 1, 10, 0, 0)


class Job(NamedTuple):
    """A request; ``chain`` is (first id, ids) per run, for traces in which prompts share blocks."""

    arrival_ps: int
    prompt: int
    output: int
    priority: int = 0
    chain: tuple[tuple[int, int], ...] = ()
    session: str = ""
    turn: int = 0
    think_ps: int = 0


class Step(NamedTuple):
    """One engine step as it ran."""

    start_ps: int
    duration_ps: int
    decodes: int
    prefill_tokens: int


@dataclass(frozen=True)
class Outcome:
    """What became of the jobs, in their order."""

    result: Result

    @property
    def times(self) -> list[tuple[int, int, int]]:
        """(first admission, first token, finish) of each job, -1 where it never happened."""
        columns = [self.column_ps(name) for name in ("admitted_s", "first_token_s", "finish_s")]
        return list(zip(*columns, strict=True))

    @property
    def arrivals(self) -> list[int]:
        """When each job reached the cluster."""
        return self.column_ps("arrival_s")

    def column_ps(self, name: str) -> list[int]:
        values = (self.result.requests[name] * PS_PER_S).round().fillna(-1)
        return [int(value) for value in values]

    def column(self, name: str) -> list[Any]:
        return self.result.requests[name].tolist()

    @property
    def steps(self) -> list[Step]:
        """Every step of all engines in order, runs taken apart."""
        steps = []
        for row in self.result.runs.itertuples():
            start = _ps(row.start_s)
            for i in range(int(row.steps)):  # type: ignore[arg-type]
                duration = _ps(row.first_s) + i * _ps(row.slope_s)
                steps.append(Step(start, duration, row.decodes, row.prefill_tokens))  # type: ignore[arg-type]
                start += duration
        return steps


def _ps(seconds: Any) -> int:
    return round(float(seconds) * PS_PER_S)


@cache
def _profiles() -> Deployment:
    return Deployment.of("a100_80g", "llama3_8b")


def deployment(*, engines: int = 1, blocks: int = 100, **limits: Any) -> Deployment:
    """Small engines with so many usable blocks of 4 tokens."""
    limits = {"max_num_batched_tokens": 16, "max_num_seqs": 16, "block_tokens": 4} | limits
    known = _profiles()
    return Deployment(
        chip=known.chip,
        model=known.model,
        engines=engines,
        limits=type(known.limits)(num_gpu_blocks=blocks + 1, **limits),
    )


def trace(jobs: tuple[Job, ...], block_tokens: int = 4) -> Trace:
    """The jobs, which must be in order of arrival."""
    table = pd.DataFrame(jobs)
    chains = None
    if any(job.chain for job in jobs):
        lists = [[i for start, n in job.chain for i in range(start, start + n)] for job in jobs]
        chains = Chains.from_lists(lists)
    return Trace.build(
        "by hand",
        {
            "arrival_s": table["arrival_ps"] / PS_PER_S,
            "prompt_tokens": table["prompt"],
            "output_tokens": table["output"],
            "priority": table["priority"],
            "session": table["session"],
            "turn": table["turn"],
            "think_s": table["think_ps"] / PS_PER_S,
        },
        chains,
        block_tokens=block_tokens if chains is not None else 0,
    )


def serve(
    *jobs: Job,
    mode: Mode = "fast",
    steps: tuple[int, int, int, int, int] = STEPS,
    policies: PolicySet | Mapping[str, Any] | None = None,
    signal_age_s: float = 0.0,
    seed: int = 0,
    **limits: Any,
) -> Outcome:
    """Serve the jobs; ``limits`` are those of ``deployment``."""
    if not isinstance(policies, PolicySet):
        policies = policy_set(**(policies or {}))
    simulator = Simulator(
        deployment(**limits),
        mode=mode,
        step_model=AffineStepModel(*steps),
        signal_age_s=signal_age_s,
    )
    return Outcome(simulator.serve(trace(jobs), policies, seed=seed))
