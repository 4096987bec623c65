"""Engines behind one front door, and what the front door can see of them."""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import TypeAlias

from policies.api import InstanceView, PDPolicy, PolicyError, RequestView
from sim.clock import SIGNAL, Clock, Timer
from sim.engine import FastEngine
from sim.request import PS_PER_S, Request
from sim.scheduler import _name
from sim.stepwise import StepEngine

AnyEngine: TypeAlias = FastEngine | StepEngine


class Snapshot:
    """An engine as it was when signals were last collected; an ``InstanceView``."""

    role = "both"

    def __init__(self, engine: AnyEngine, age_ps: int) -> None:
        self._engine = engine
        self._age_ps = age_ps
        self._cached: Container[int] = ()
        self.id = engine.id
        self.model = engine.model
        self.chip = engine.chip
        self.waiting = 0
        self.running = 0
        self.kv_usage = 0.0
        self.inflight_tokens = 0
        self._taken_ps = 0

    @property
    def signal_age_s(self) -> float:
        # While the cluster sleeps nothing is collected because nothing changes.
        return min(self._engine.env._now - self._taken_ps, self._age_ps) / PS_PER_S

    def matched_tokens(self, request: RequestView) -> int:
        assert isinstance(request, Request)
        limit = (request.prompt_tokens - 1) // self._engine.block_tokens
        matched = 0
        for ident in request.block_hashes[:limit]:
            if ident not in self._cached:
                break
            matched += 1
        return matched * self._engine.block_tokens

    def refresh(self) -> bool:
        """Collect the engine's state as of now; whether the queue lengths changed."""
        engine = self._engine
        before = (self.waiting, self.running)
        self.waiting, self.running = engine.waiting, engine.running
        self.kv_usage = engine.kv_usage
        self.inflight_tokens = engine.inflight_tokens
        self._taken_ps = engine.env._now
        self._cached = engine.published()
        return before != (self.waiting, self.running)


class Cluster:
    """Places requests with one ``PDPolicy``; a ``ClusterView``."""

    def __init__(
        self,
        env: Clock,
        engines: Sequence[AnyEngine],
        pd: PDPolicy,
        signal_age_s: float = 0.0,
    ) -> None:
        self.env = env
        self.engines = engines
        self.pd = pd
        self._age_ps = round(signal_age_s * PS_PER_S)
        self._ticking = False
        self._views: Sequence[InstanceView] = engines
        indexed = getattr(pd, "listens", False)
        self._indexed = indexed
        if self._age_ps:
            for engine in engines:
                engine.publish()
            self._snapshots = [Snapshot(engine, self._age_ps) for engine in engines]
            self._views = self._snapshots
        elif indexed:
            for engine in engines:
                engine.changed = pd.changed
        self._engine_of = {
            id(view): engine for view, engine in zip(self._views, engines, strict=True)
        }
        if indexed:
            for view in self._views:
                pd.changed(view)

    @property
    def instances(self) -> Sequence[InstanceView]:
        return self._views

    def submit(self, request: Request) -> None:
        """Place a request that arrives now."""
        placement = self.pd.place(request, self, self.env._now / PS_PER_S)
        try:
            engine = self._engine_of[id(placement.prefill)]
        except (AttributeError, KeyError):
            raise PolicyError(
                f"{self._who()}.place({request.id}) answered {placement!r}; "
                f"a Placement of instances of the cluster was expected"
            ) from None
        if placement.decode is not placement.prefill:
            raise PolicyError(
                f"{self._who()}.place({request.id}) split prefill and decode over instances "
                f"{engine.id} and {getattr(placement.decode, 'id', None)}; "
                f"this deployment is colocated"
            )
        if self._age_ps and not self._ticking:
            self._ticking = True
            self._arm()
        engine.add(request)

    def _who(self) -> str:
        """The placement policy, with its router if it has one, for messages."""
        router = getattr(self.pd, "router", None)
        return _name(self.pd) if router is None else f"{_name(router)} in {_name(self.pd)}"

    # ------------------------------------------------------------------ stale signals

    def _arm(self) -> None:
        """Collect signals at the next multiple of the age, before arrivals of that instant."""
        delay = self._age_ps - self.env._now % self._age_ps
        self.env.arm(delay, SIGNAL, Timer(self._tick))

    def _tick(self, timer: Timer) -> None:
        for snapshot in self._snapshots:
            if snapshot.refresh() and self._indexed:
                self.pd.changed(snapshot)
        # An idle cluster does not change, so its last snapshot stays right until an arrival.
        self._ticking = any(engine.waiting or engine.running for engine in self.engines)
        if self._ticking:
            self._arm()
