"""The simulated backend: replays a trace on engines under policies, on SimPy's clock."""

from __future__ import annotations

import gc
import json
import traceback
from collections.abc import Callable
from math import nan
from struct import Struct
from typing import Any, Literal

import pandas as pd

from policies.api import (
    AdmissionPolicy,
    EvictionPolicy,
    PDPolicy,
    PolicyError,
    PolicySet,
    ReusePolicy,
    Router,
)
from policies.factories import build
from policies.recorder import Decision, recorded
from sim.ahead import AheadEngine
from sim.arrivals import requests_of, turns_of
from sim.backend import Deployment
from sim.clock import ARRIVAL, Clock, Timer
from sim.cluster import AnyEngine, Cluster
from sim.engine import FastEngine
from sim.latency import StepModel
from sim.oracle import TraceOracle
from sim.request import PS_PER_S, Request
from sim.result import Result
from sim.scheduler import _name
from sim.stepwise import StepEngine
from sim.tables import Columns, labels
from traces.schema import Trace

CHECK = 1_024
"""Requests between two reports of progress."""
_pack = Struct("9d").pack
POLICIES = (AdmissionPolicy, EvictionPolicy, PDPolicy, ReusePolicy, Router)


class Simulator:
    """Serves traces on a deployment.

    Args:
        deployment: the engines.
        signal_age_s: how old the state may be that routers see; 0 is exact.
        mode: ``fast`` simulates changes, ``stepwise`` every engine step, with equal results.
        step_model: what a step costs; ``None`` takes the deployment's.
        record_runs: keep the table of step runs (timelines and inter-token latencies).
        record_decisions: keep a table of every call of a policy and its answer (slow).
    """

    def __init__(
        self,
        deployment: Deployment,
        *,
        signal_age_s: float = 0.0,
        mode: Literal["fast", "stepwise"] = "fast",
        step_model: StepModel | None = None,
        record_runs: bool = True,
        record_decisions: bool = False,
    ) -> None:
        if mode not in ("fast", "stepwise"):
            raise ValueError(f"mode={mode!r}: must be 'fast' or 'stepwise'")
        if not 0 <= signal_age_s < float("inf"):
            raise ValueError(f"signal_age_s={signal_age_s}: must be 0 or more")
        self.deployment = deployment
        self.signal_age_s = signal_age_s
        self.mode = mode
        self.step_model = step_model
        self.record_runs = record_runs
        self.record_decisions = record_decisions

    def serve(
        self,
        trace: Trace,
        policies: PolicySet,
        *,
        seed: int = 0,
        progress: Callable[[int, int], None] | None = None,
    ) -> Result:
        """Replay the trace to the end.

        Args:
            trace: what arrives; later turns of a session wait for their predecessor.
            policies: factories; each engine gets its own objects.
            seed: of everything random; the same seed gives the same result to the bit.
            progress: called now and then with (requests done, requests).

        Raises:
            ProfileError: the model does not fit the chips.
            PolicyError: a policy broke its contract.
        """
        run: _Run | None = None
        try:
            run = _Run(self, trace, policies, seed, progress)
            run.play()
        except PolicyError:
            raise
        except Exception as error:
            if (blame := _blame(error)) is not None:
                raise PolicyError(blame) from error
            raise
        return run.result()


class _Run:
    """One replay: the arrivals, the engines and the tables that fill up."""

    def __init__(
        self,
        simulator: Simulator,
        trace: Trace,
        policies: PolicySet,
        seed: int,
        progress: Callable[[int, int], None] | None,
    ) -> None:
        self.simulator = simulator
        self.trace = trace
        self.seed = seed
        self.progress = progress
        self.decisions: list[Decision] = []
        if simulator.record_decisions:
            policies = PolicySet(
                admission=recorded(policies.admission, self.decisions),
                eviction=recorded(policies.eviction, self.decisions),
                reuse=recorded(policies.reuse, self.decisions),
                pd=recorded(policies.pd, self.decisions),
            )
        self.policies = policies
        deployment = simulator.deployment
        self.blocks = deployment.kv_blocks()
        self.max_model_len = deployment.max_model_len()
        self.steps = simulator.step_model or deployment.step_model()
        self.env = Clock()
        self.oracle: TraceOracle | None = None
        tokens = deployment.limits.block_tokens
        self.chains = (
            trace.recoded(tokens, full_blocks_only=True)
            if trace.block_tokens and deployment.limits.enable_prefix_caching
            else None
        )
        count = len(trace)
        self.count = count
        self.done = 0
        self.ended = Columns(
            ("row", "int64"), ("arrival_s", "float64"), ("admitted_s", "float64"),
            ("first_token_s", "float64"), ("finish_s", "float64"), ("output_tokens", "int64"),
            ("cached_tokens", "int64"), ("preemptions", "int32"), ("engine", "int32"),
        )  # fmt: skip
        self.log = Columns(
            ("engine", "int32"), ("start_s", "float64"), ("first_s", "float64"),
            ("slope_s", "float64"), ("steps", "int64"), ("decodes", "int32"),
            ("prefill_tokens", "int32"), ("waiting", "int32"), ("free_blocks", "int64"),
        )  # fmt: skip
        self.ran = self.log.append if simulator.record_runs else _ignore
        self.reasons: dict[int, str] = {}
        self.engines = [self._engine(i) for i in range(deployment.engines)]
        self.pd = _build(policies.pd, seed, "pd", "place")
        self.cluster = Cluster(self.env, self.engines, self.pd, simulator.signal_age_s)
        turns = turns_of(trace)
        self.has_turns = turns is not None
        if turns is not None:
            self.previous, self.following = turns
            self.think_s: list[float] = trace.requests["think_s"].tolist()
        self.waiting_turns: dict[int, Request] = {}
        """Turns whose time has come but whose predecessor is not done, by its row."""
        self.ended_ps: dict[int, int] = {}
        """When predecessors ended whose successor's time has not come."""
        model = deployment.model.name
        self._arrivals = requests_of(trace, self.chains, model, self.oracle)
        self._arrival = Timer(self._arrive)
        self.events = 0

    def _engine(self, ident: int) -> AnyEngine:
        simulator, policies = self.simulator, self.policies
        deployment = simulator.deployment
        eviction = _build(policies.eviction, self.seed, f"eviction/{ident}", "victims")
        if eviction.needs_oracle:
            if self.oracle is None:
                self.oracle = TraceOracle(self.trace, self.chains)
            eviction.attach_oracle(self.oracle)
        fast = AheadEngine if deployment.limits.async_scheduling else FastEngine
        kind = fast if simulator.mode == "fast" else StepEngine
        return kind(
            self.env,
            ident,
            deployment.limits,
            self.blocks,
            self.max_model_len,
            self.steps,
            _build(policies.admission, self.seed, f"admission/{ident}", "admit"),
            _build(policies.reuse, self.seed, f"reuse/{ident}", "use"),
            self,
            model=deployment.model.name,
            chip=deployment.chip.name,
            eviction=eviction,
        )

    # ------------------------------------------------------------------ arrivals

    def play(self) -> None:
        """Run the clock until everything has happened."""
        # Nothing here forms reference cycles, so collecting garbage only costs time.
        collecting = gc.isenabled()
        gc.disable()
        try:
            self._arm_next()
            self.env.run_out()
        finally:
            if collecting:
                gc.enable()
        if self.progress is not None:
            self.progress(self.done, self.count)
        for engine in self.engines:
            if (why := engine.stuck()) is not None:
                raise PolicyError(why)
            engine.audit()
        if self.done != self.count:  # invariant I1
            raise AssertionError(f"{self.count} requests arrived, but {self.done} ended")

    def _arm_next(self) -> None:
        request = next(self._arrivals, None)
        if request is not None:
            self._arrival.payload = request
            self.events += 1
            self.env.arm(request.arrival_ps - self.env._now, ARRIVAL, self._arrival)

    def _arrive(self, timer: Timer) -> None:
        request: Request = timer.payload
        row = request.index
        before = int(self.previous[row]) if self.has_turns else -1
        if before < 0:
            self.cluster.submit(request)
        elif before in self.ended_ps:
            self._release(request, self.ended_ps.pop(before))
        else:
            self.waiting_turns[before] = request
        self._arm_next()

    def _release(self, request: Request, ended_ps: int) -> None:
        """The predecessor is done: the turn comes after the think time, if not later anyway."""
        think_ps = round(self.think_s[request.index] * PS_PER_S)
        now = self.env._now
        # The client sees the answer one tick (1 ps) after it is complete.
        when = max(request.arrival_ps, ended_ps + think_ps, ended_ps + 1)
        if when <= now:
            self._submit(request)
        else:
            self.events += 1
            self.env.arm(when - now, ARRIVAL, Timer(self._arrive_late, request))

    def _arrive_late(self, timer: Timer) -> None:
        self._submit(timer.payload)

    def _submit(self, request: Request) -> None:
        now = self.env._now
        request.arrival_ps = now
        request.arrival_s = now / PS_PER_S
        self.cluster.submit(request)

    # ------------------------------------------------------------------ what engines tell

    def finished(self, request: Request, engine: int, now_ps: int) -> None:
        self._ended(request, engine, now_ps, now_ps)

    def rejected(self, request: Request, engine: int, now_ps: int, reason: str) -> None:
        self.reasons[request.index] = reason
        self._ended(request, engine, now_ps, nan)

    def _ended(self, request: Request, engine: int, now_ps: int, finish_ps: float) -> None:
        row = request.index
        self.ended.append(
            _pack(
                row, request.arrival_ps, request.admitted_ps if request.admitted_ps >= 0 else nan,
                request.first_ps if request.first_ps >= 0 else nan, finish_ps,
                request.output_tokens, request.cached_tokens, request.preemptions, engine,
            )
        )  # fmt: skip
        self.done += 1
        if self.progress is not None and not self.done % CHECK:
            self.progress(self.done, self.count)
        if self.has_turns and self.following[row] >= 0:
            turn = self.waiting_turns.pop(row, None)
            if turn is None:
                self.ended_ps[row] = now_ps
            else:
                self._release(turn, now_ps)

    # ------------------------------------------------------------------ result

    def result(self) -> Result:
        trace, deployment = self.trace, self.simulator.deployment
        table = trace.requests
        ended = self.ended.table().set_index("row").reindex(range(self.count))
        refused = self.reasons
        states = ["rejected" if row in refused else "finished" for row in range(self.count)]
        requests = pd.DataFrame(
            {
                "id": table["id"],
                "arrival_s": ended["arrival_s"],
                "recorded_s": table["arrival_s"],
                "admitted_s": ended["admitted_s"],
                "first_token_s": ended["first_token_s"],
                "finish_s": ended["finish_s"],
                "prompt_tokens": table["prompt_tokens"],
                "output_tokens": ended["output_tokens"],
                "cached_tokens": ended["cached_tokens"],
                "preemptions": ended["preemptions"],
                "engine": ended["engine"],
                "state": labels(states),
                "reason": labels([refused.get(row, "") for row in range(self.count)]),
                "session": table["session"],
                "turn": table["turn"],
                "tenant": table["tenant"],
                "slo_class": table["slo_class"],
                "slo_ttft_s": table["slo_ttft_s"],
                "slo_tpot_s": table["slo_tpot_s"],
                "slo_e2e_s": table["slo_e2e_s"],
            }
        )
        engines = pd.DataFrame(
            {
                "engine": [engine.id for engine in self.engines],
                "steps": [engine.steps_done for engine in self.engines],
                "preemptions": [engine.preempted for engine in self.engines],
                "evictions": [engine.evictions for engine in self.engines],
                "kv_blocks": [engine.total for engine in self.engines],
            }
        )
        chip = deployment.chip
        chips = deployment.chips_per_engine * deployment.engines
        price = chip.price_usd_per_h
        meta: dict[str, Any] = {
            "backend": "sim",
            "mode": self.simulator.mode,
            "trace": trace.name,
            "trace_notes": list(trace.notes),
            "synthetic": trace.synthetic,
            "chip": chip.name,
            "model": deployment.model.name,
            "engines": deployment.engines,
            "chips": chips,
            "block_tokens": deployment.limits.block_tokens,
            "kv_blocks": self.blocks,
            "max_model_len": self.max_model_len,
            "signal_age_s": self.simulator.signal_age_s,
            "seed": self.seed,
            "policies": {
                "admission": _name(self.engines[0].admission),
                "eviction": _name(self.engines[0].eviction),
                "reuse": _name(self.engines[0].reuse),
                "pd": _name(self.pd),
                "routing": _name(getattr(getattr(self.pd, "policy", self.pd), "router", self.pd)),
            },
            "calibrated": chip.calibrated,
            "calibration": chip.calibration,
            "warnings": list(chip.warnings),
            "price_usd_per_s": None if price is None else price * chips / 3600,
            "simpy_events": self.events + sum(engine.events for engine in self.engines),
        }
        decisions = pd.DataFrame(
            {
                "now_s": [now for now, *_ in self.decisions],
                "call": [call for _, call, *_ in self.decisions],
                "arguments": [json.dumps(arguments) for _, _, arguments, _ in self.decisions],
                "answer": [json.dumps(answer) for *_, answer in self.decisions],
            }
            if self.decisions
            else {}
        )
        return Result(
            decisions=decisions,
            requests=requests,
            runs=self.log.table(),
            engines=engines,
            meta=meta,
        )


def _ignore(packed: bytes) -> None:
    """Where step runs are not kept."""


def _blame(error: Exception) -> str | None:
    """Which policy raised the error, in which call and line; ``None`` if it was no policy."""
    blame = None
    frames = traceback.walk_tb(error.__traceback__)
    for frame, line in frames:
        owner = frame.f_locals.get("self")
        if isinstance(owner, POLICIES) and not isinstance(owner, type):
            code = frame.f_code
            blame = (
                f"{_name(owner)}.{code.co_name} raised {type(error).__name__}: {error} "
                f"({code.co_filename}:{line})"
            )
    return blame


def _build(factory: Callable[..., Any], seed: int, stream: str, method: str) -> Any:
    """A policy of its own, checked to be of its kind."""
    policy = build(factory, seed, stream)
    if not callable(getattr(policy, method, None)):
        raise PolicyError(f"{policy!r} is not a {stream.partition('/')[0]} policy: no {method}()")
    return policy
