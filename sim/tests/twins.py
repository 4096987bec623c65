"""Random cases for the differential test: the fast engine against the reference engine.

``python -m sim.tests.twins FIRST COUNT`` compares any number of them.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any, TypeAlias

from simpy.events import Timeout

from policies.api import PDPolicy, Slo
from policies.registry import create, policy_set
from sim.ahead import AheadEngine
from sim.clock import Clock
from sim.cluster import Cluster
from sim.engine import FastEngine
from sim.hardware import load_chip
from sim.latency import AffineStepModel, ParametricStepModel, StepModel
from sim.model import load_model
from sim.request import Request
from sim.scheduler import RUN, EngineLimits
from sim.stepwise import StepEngine

PS = 1_000_000_000_000
SLOS = (
    Slo(),
    Slo(name="interactive", ttft_s=0.5, tpot_s=0.05),
    Slo(name="standard", ttft_s=2.0, tpot_s=0.1),
    Slo(name="batch", ttft_s=20.0, tpot_s=0.5),
)
PROFILES = (
    ("a100_80g", "llama3_8b"),
    ("l40s", "qwen3_4b"),
    ("h100", "gpt_oss_120b"),  # windows: decode runs with knots
    ("h200", "qwen3_30b_a3b"),  # experts
)
"""Chips and models whose step times some cases use."""

Kind: TypeAlias = type[FastEngine] | type[StepEngine]


@cache
def step_model(chip: str, model: str) -> ParametricStepModel:
    """The step times of a profile, made once: they remember nothing but themselves."""
    return ParametricStepModel(load_chip(chip), load_model(model))


@dataclass
class Case:
    """One random workload on one random deployment; everything follows from the seed."""

    seed: int
    engines: int
    limits: EngineLimits
    blocks: int
    max_model_len: int
    steps: StepModel
    admission: dict[str, Any]
    eviction: str
    reuse: dict[str, Any]
    routing: str
    signal_age_s: float
    requests: list[dict[str, Any]] = field(default_factory=list)
    aborts_ps: dict[int, int] = field(default_factory=dict)
    """When the clients of some requests go away."""


def random_case(seed: int) -> Case:
    """A case: mostly small and crowded, because that is where rules meet."""
    rng = random.Random(seed)
    tokens = rng.choice([4, 16, 16, 16, 64])
    longest_prompt = rng.choice([50, 300, 1500, 6000])
    longest_output = rng.choice([3, 50, 400])
    longest = (longest_prompt + longest_output) // tokens + 2
    blocks = longest + rng.randint(0, longest * rng.choice([0, 1, 3, 20]))
    seats = rng.choice([2, 4, 16, 64, 256])
    budget = max(rng.choice([64, 256, 512, 2048]), seats)
    threshold = rng.choice([0] * 6 + [16, 100])
    chunked = rng.random() < 0.9
    limits = EngineLimits(
        block_tokens=tokens,
        max_num_batched_tokens=budget if chunked else max(budget, longest_prompt + longest_output),
        max_num_seqs=seats,
        num_gpu_blocks=blocks + 1,
        enable_prefix_caching=rng.random() < 0.8,
        enable_chunked_prefill=chunked,
        long_prefill_token_threshold=threshold,
        long_prefill_token_threshold_adaptive=rng.random() < 0.5,
        watermark=rng.choice([0.0, 0.0, 0.0, 0.05, 0.2]),
        scheduler_reserve_full_isl=rng.random() < 0.85,
    )
    tie = rng.random() < 0.1  # coarse times, so that arrivals fall on step boundaries
    steps = (
        rng.randint(1, 10**10),
        rng.randint(1, 10**8),
        rng.randint(0, 10**8),
        rng.randint(0, 10**5),
        rng.randint(0, 1000),
    )
    if tie:
        steps = (10**9, 0, 0, 0, 0)
    more = random.Random(f"more/{seed}")  # came later: the draws above stay what they were
    capacity = blocks * tokens
    case = Case(
        seed=seed,
        engines=rng.choice([1, 1, 2, 3]),
        limits=limits,
        blocks=blocks,
        max_model_len=(
            more.randint(longest_prompt // 2 + 2, longest_prompt + 2)
            if more.random() < 0.2
            else capacity
        ),
        steps=(
            step_model(*more.choice(PROFILES))
            if more.random() < 0.25 and not tie
            else AffineStepModel(*steps, 0 if tie else more.randint(0, 10**9))
        ),
        admission=rng.choice(
            [
                {"name": "fcfs"},
                {"name": "fcfs"},
                {"name": "priority"},
                {"name": "shortest_prompt"},
                {
                    "name": "token_bucket",
                    "rate_tokens_per_s": rng.choice([300.0, 3000.0]),
                    "burst_tokens": 1000,
                },
            ]
        ),
        eviction=rng.choice(["lru", "lru", "lfu", "fifo", "slo_aware"]),
        reuse=rng.choice(
            [{"name": "always"}] * 3
            + [{"name": "never"}, {"name": "cap", "max_tokens": rng.choice([10, 64, 500])}]
        ),
        routing=rng.choice(["round_robin", "least_loaded", "prefix_affinity", "power_of_two"]),
        signal_age_s=rng.choice([0.0, 0.0, 0.0, 0.05]),
    )
    span = rng.choice([0.001, 0.1, 1, 20])
    documents = [
        (10_000 * i, rng.randint(1, max(1, longest_prompt // tokens))) for i in range(1, 7)
    ]
    fresh = 1_000_000
    for index in range(rng.randint(3, rng.choice([20, 80]))):
        prompt = rng.randint(1, longest_prompt)
        chain: list[tuple[int, int]] = []
        if rng.random() < 0.7:
            start, length = rng.choice(documents)
            shared = rng.randint(1, length)
            prompt = min(
                shared * tokens + rng.choice([0, 0, 1, rng.randint(0, 200)]), longest_prompt
            )
            full = prompt // tokens
            shared = min(shared, full)
            if shared:
                chain.append((start, shared))
            if full > shared and rng.random() < 0.7:
                chain.append((fresh, full - shared))
                fresh += full - shared
        arrival = rng.randint(0, int(span * PS))
        if tie:
            arrival -= arrival % 10**9
        case.requests.append(
            {
                "index": index,
                "arrival_ps": arrival,
                "prompt_tokens": prompt,
                "output_tokens": rng.randint(1, longest_output),
                "chain": chain,
                "priority": rng.choice([0, 0, 1, 5]),
                "slo": rng.choice(SLOS),
            }
        )
    if more.random() < 0.3:
        for row in case.requests:
            if more.random() < 0.2:
                delay = int(more.expovariate(1.0) * case.steps.prefill_ps(longest_prompt, 0) * 9)
                delay -= delay % 10**9 if tie else 0
                case.aborts_ps[row["index"]] = row["arrival_ps"] + delay
    if more.random() < 0.3:
        for row in case.requests:  # an answer that goes on with a document others ask about
            prompt, blocks = row["prompt_tokens"], sum(count for _, count in row["chain"])
            if len(row["chain"]) == 1 and blocks == prompt // tokens:
                answer = (prompt + row["output_tokens"]) // tokens - blocks
                row["answer"] = [(row["chain"][0][0] + blocks, answer)] if answer else []
    if more.random() < 0.3:
        case.limits = replace(limits, async_scheduling=True)
    case.requests.sort(key=lambda request: request["arrival_ps"])
    return case


class Log:
    """Remembers how requests ended."""

    def __init__(self) -> None:
        self.rows: dict[int, tuple[Any, ...]] = {}
        self.busy_ps = 0
        self.decoded = 0

    def finished(self, request: Request, engine: int, now_ps: int) -> None:
        self.rows[request.index] = (
            engine, request.admitted_ps, request.first_ps, now_ps, request.output_tokens,
            request.cached_tokens, request.preemptions,
        )  # fmt: skip

    def rejected(self, request: Request, engine: int, now_ps: int, reason: str) -> None:
        self.rows[request.index] = (engine, now_ps, reason)

    def ran(self, packed: bytes) -> None:
        for _, _, *numbers in RUN.iter_unpack(packed):
            first_ps, slope_ps, steps, decodes = (int(number) for number in numbers[:4])
            self.busy_ps += first_ps * steps + slope_ps * (steps * (steps - 1) // 2)
            self.decoded += decodes * steps


class Stage:
    """A case on one kind of engine, ready to play."""

    def __init__(self, case: Case, kind: Kind, log: Log | None = None) -> None:
        self.case = case
        self.env = Clock()
        self.log = log or Log()
        self.arrived = 0
        self.engines = [self._engine(kind, i) for i in range(case.engines)]
        pd: PDPolicy = policy_set(routing=case.routing).pd()
        self.cluster = Cluster(self.env, self.engines, pd, case.signal_age_s)
        for row in case.requests:
            self.at(row["arrival_ps"], partial(self._arrive, row))

    def at(self, delay_ps: int, call: Callable[[], None]) -> None:
        """Do something after a delay, before the step ends of that instant."""
        timeout = Timeout(self.env, delay_ps)
        timeout.callbacks.append(lambda event: call())

    def _engine(self, kind: Kind, ident: int) -> FastEngine | StepEngine:
        case = self.case
        if kind is FastEngine and case.limits.async_scheduling:
            kind = AheadEngine
        engine = kind(
            self.env, ident, case.limits, case.blocks, case.max_model_len, case.steps,
            _create("admission", **case.admission), _create("reuse", **case.reuse),
            self.log, eviction=create(f"eviction/{case.eviction}"),
        )  # fmt: skip
        if isinstance(engine, FastEngine):
            engine.pool.log = []
        return engine

    def _arrive(self, row: dict[str, Any]) -> None:
        self.arrived += 1
        request = Request(**row)
        self.cluster.submit(request)
        if (abort_ps := self.case.aborts_ps.get(request.index)) is not None:
            self.at(abort_ps - self.env._now, partial(self._abort, request))

    def _abort(self, request: Request) -> None:
        for engine in self.engines:  # those that do not have it do nothing
            engine.abort(request)

    def play(self, looks_ps: Sequence[int] = ()) -> dict[str, Any]:
        """Run the case, checking conservation (I1) and blocks (I2) at the given times.

        Returns everything in which two kinds of engines must agree.
        """
        for look_ps in looks_ps:
            self.at(look_ps, self.audit)
        self.env.run_out()
        for engine in self.engines:
            assert engine.stuck() is None, engine.stuck()
        self.audit()
        return self.outcome()

    def audit(self) -> None:
        """Invariants I1 and I2 as things stand."""
        present = sum(engine.waiting + engine.running for engine in self.engines)
        assert self.arrived == len(self.log.rows) + present
        for engine in self.engines:
            engine.audit()

    def outcome(self) -> dict[str, Any]:
        engines = self.engines
        return {
            "requests": self.log.rows,
            "steps": [engine.steps_done for engine in engines],
            "busy": (self.log.busy_ps, self.log.decoded),
            "preemptions": [engine.preempted for engine in engines],
            "evictions": [engine.evictions for engine in engines],
            # Snapshots for routers consume the log.
            "victims": [_victims(e) for e in engines] if self.case.signal_age_s == 0 else None,
            "free": [engine.free_blocks() for engine in engines],
            "cached": [
                engine.cached() if isinstance(engine, StepEngine) else engine.pool.cached()
                for engine in engines
            ],
        }


def play(case: Case, kind: Kind, looks_ps: Sequence[int] = ()) -> dict[str, Any]:
    """Run a case on one kind of engine; see ``Stage.play``."""
    return Stage(case, kind).play(looks_ps)


def _create(kind: str, *, name: str | type, **parameters: Any) -> Any:
    """A policy by its registered name or by its class."""
    return name(**parameters) if isinstance(name, type) else create(f"{kind}/{name}", **parameters)


def _victims(engine: FastEngine | StepEngine) -> list[int]:
    """Ids of evicted blocks in order."""
    if isinstance(engine, StepEngine):
        return [block.hash for block in engine.blocks.evicted]
    assert engine.pool.log is not None
    return [
        ident
        for event, start, blocks in engine.pool.log
        if event == "evict"
        for ident in range(start + blocks - 1, start - 1, -1)
    ]


def compare(seed: int) -> dict[str, Any]:
    """Play a case on both engines and fail on the first difference."""
    case = random_case(seed)
    slow, fast = play(case, StepEngine), play(case, FastEngine)
    for key in slow:
        if slow[key] != fast[key]:
            where = ""
            if isinstance(slow[key], dict):
                where = str(
                    next(
                        (k, slow[key][k], fast[key].get(k))
                        for k in slow[key]
                        if slow[key][k] != fast[key].get(k)
                    )
                )
            elif isinstance(slow[key], list):
                where = f"{slow[key]} != {fast[key]}"[:300]
            raise AssertionError(f"seed {seed}: {key} differ: {where}")
    return slow


if __name__ == "__main__":
    first, count = int(sys.argv[1]), int(sys.argv[2])
    preemptions = evictions = steps = 0
    for seed in range(first, first + count):
        outcome = compare(seed)
        preemptions += sum(outcome["preemptions"])
        evictions += sum(outcome["evictions"])
        steps += sum(outcome["steps"])
    print(f"{count} cases equal: {steps} steps, {preemptions} preemptions, {evictions} evictions")
