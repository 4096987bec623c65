"""Our side of parity: a workload on the simulator's engines, with every decision recorded."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

from policies.api import EngineView, PrefixMatch, RequestView, ReusePolicy, Tier
from policies.registry import create
from sim.ahead import AheadEngine
from sim.batch import Prefills
from sim.clock import ARRIVAL, Clock, Timer
from sim.engine import FastEngine
from sim.latency import UNLIMITED_STEPS, AffineStepModel, Batch, DecodeRun
from sim.request import Request
from sim.stepwise import Step, StepEngine
from validate.decisions import Decision
from validate.workloads import (
    STEP_CONSTANTS_PS,
    STEP_PS,
    Workload,
    abort_ps,
    arrival_ps,
    block_chains,
)


class Metronome(AffineStepModel):
    """Every step takes equally long; what policies are told of prefill times is affine."""

    def step_ps(self, batch: Batch) -> int:
        """``STEP_PS``."""
        return STEP_PS

    def decode_run(self, decodes: int, context_tokens: int) -> DecodeRun:
        """Of equal steps."""
        return DecodeRun(STEP_PS, 0, UNLIMITED_STEPS)

    def prefill_ps(self, tokens: int, context: int = 0) -> int:
        """By the constants."""
        return super().step_ps(Batch(((tokens, context),), 0, 0, 0))


class Skipping(ReusePolicy):
    """A reuse policy that uses nothing for requests with ``skip_reading``."""

    def __init__(self, policy: ReusePolicy, skipping: frozenset[str]) -> None:
        self._policy = policy
        self._skipping = skipping

    def use(self, request: RequestView, match: PrefixMatch, engine: EngineView, now: float) -> int:
        if request.id in self._skipping:
            return 0
        return self._policy.use(request, match, engine, now)

    def retain(self, request: RequestView, engine: EngineView, now: float) -> Any:
        return self._policy.retain(request, engine, now)


class Ends:
    """How requests ended; a ``Sink``."""

    def __init__(self) -> None:
        self.finished_at: dict[str, tuple[int, int]] = {}
        """Time in picoseconds and output tokens."""
        self.dropped: list[str] = []
        """Who was aborted or rejected, in order; whoever reads it clears it."""

    def finished(self, request: Request, engine: int, now_ps: int) -> None:
        self.finished_at[request.id] = (now_ps, request.output_tokens)

    def rejected(self, request: Request, engine: int, now_ps: int, reason: str) -> None:
        self.dropped.append(request.id)

    def ran(self, packed: bytes) -> None:
        """Steps are recorded by the engine."""


class RecordingStepEngine(StepEngine):
    """The reference engine, writing the rows that ``Recorder`` writes for vLLM."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.rows: list[Decision] = []
        self._entered: list[str] = []

    @property
    def ends(self) -> Ends:
        """How requests ended."""
        assert isinstance(self.sink, Ends)
        return self.sink

    def add(self, request: Request) -> None:
        """A request arrives."""
        self._entered.append(request.id)
        super().add(request)

    def stepped(self, step: Step) -> None:
        """Write the row of a step that is not empty."""
        if not step.scheduled and not step.preempted:
            return
        names = self.blocks.names
        self.rows.append(
            Decision(
                step=len(self.rows),
                entered=self._entered,
                aborted=self.ends.dropped,
                scheduled={request.id: tokens for request, tokens in step.scheduled.items()},
                new=[request.id for request in step.new],
                resumed=[request.id for request in step.resumed],
                preempted=[request.id for request in step.preempted],
                hits={request.id: tokens for request, tokens in step.hits.items()},
                blocks={request.id: blocks for request, blocks in step.blocks.items() if blocks},
                evicted=[[names[block.hash], block.id] for block in step.evicted],
                free=self.free_blocks(Tier.HBM),
                waiting=[request.id for _, _, request in sorted(self._queue)],
                running=[request.id for request in self._running],
            )
        )
        self._entered, self.ends.dropped = [], []


@dataclass(slots=True)
class Milestones:
    """What the fast engine decides, as far as it looks: each with its time in picoseconds."""

    admitted: list[tuple[int, str, int]] = field(default_factory=list)
    """When, who, and cached tokens used."""
    preempted: list[tuple[int, str]] = field(default_factory=list)
    finished: dict[str, tuple[int, int]] = field(default_factory=dict)
    """When, and output tokens."""
    evicted: list[int] = field(default_factory=list)
    """Block ids in order; the fast engine does not care when."""


class Noting(FastEngine):
    """The fast engine, noting its decisions."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.pool.log = []
        self.noted = Milestones()

    def _admit(self, left: int, threshold: int, prefills: Prefills) -> int:
        ran, before = len(self._running), len(prefills)
        left = super()._admit(left, threshold, prefills)
        for request, (_, hit) in zip(list(self._running)[ran:], prefills[before:], strict=True):
            self.noted.admitted.append((self.env._now, request.id, hit))
        return left

    def _preempt(
        self, victim: Request, planned: int, prefills: Prefills, beneficiary: Request
    ) -> None:
        self.noted.preempted.append((self.env._now, victim.id))
        super()._preempt(victim, planned, prefills, beneficiary)

    def milestones(self) -> Milestones:
        """Everything noted, after the run."""
        assert isinstance(self.sink, Ends)
        self.pool.settle()
        self.noted.finished = self.sink.finished_at
        self.noted.evicted = [
            ident
            for event, start, blocks in self.pool.log or ()
            if event == "evict"
            for ident in range(start + blocks - 1, start - 1, -1)
        ]
        return self.noted


class NotingAhead(Noting, AheadEngine):
    """The same with asynchronous scheduling."""


def simulate(workload: Workload) -> RecordingStepEngine:
    """Play a workload on the reference engine; ``rows`` and ``ends`` of the result tell all."""
    engine = RecordingStepEngine(*_arguments(workload), eviction=_eviction(workload))
    _play(engine, workload)
    return engine


def simulate_fast(workload: Workload) -> Milestones:
    """Play a workload on the fast engine."""
    kind = NotingAhead if workload.limits.async_scheduling else Noting
    engine = kind(*_arguments(workload), eviction=_eviction(workload))
    _play(engine, workload)
    return engine.milestones()


def _arguments(workload: Workload) -> tuple[Any, ...]:
    policies = workload.policies
    skipping = frozenset(entry.id for entry in workload.entries if entry.skip_reading)
    reuse = _create("reuse", policies.get("reuse", "always"))
    return (
        Clock(),
        0,
        workload.limits,
        workload.blocks,
        workload.max_model_len,
        Metronome(*STEP_CONSTANTS_PS),
        _create(
            "admission", policies.get("admission", "priority" if workload.priority else "fcfs")
        ),
        Skipping(reuse, skipping) if skipping else reuse,
        Ends(),
    )


def _eviction(workload: Workload) -> Any:
    return _create("eviction", workload.policies.get("eviction", "lru"))


def _create(kind: str, spec: Any) -> Any:
    if isinstance(spec, str):
        return create(f"{kind}/{spec}")
    parameters = dict(spec)
    return create(f"{kind}/{parameters.pop('name')}", **parameters)


def _play(engine: RecordingStepEngine | Noting, workload: Workload) -> None:
    """Let requests enter and leave at their times, and run until nothing happens any more."""
    chains = block_chains(workload)

    def at(when_ps: int, call: Any) -> None:
        engine.env.arm(when_ps, ARRIVAL, Timer(lambda timer: call()))

    for index, entry in enumerate(workload.entries):
        chain, answer = chains[entry.id]
        request = Request(
            index,
            arrival_ps(entry, index),
            len(entry.prompt),
            entry.output_tokens,
            chain,
            answer=answer,
            name=entry.id,
            slo=entry.slo,
            priority=entry.priority,
            session=entry.session,
            tenant=entry.tenant,
            model=entry.model,
            kind=entry.kind,
        )
        at(arrival_ps(entry), partial(engine.add, request))
        if entry.abort_step is not None:
            at(abort_ps(entry), partial(engine.abort, request))
    engine.env.run_out()
    stuck = engine.stuck()
    if stuck is not None:
        raise RuntimeError(f"{workload.name}: {stuck}")
    engine.audit()
