"""The decision log: what a policy was asked and what it answered, as plain values.

Logs of the same policy in two backends can be compared line by line, or written as JSON.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import Any, Literal, TypeAlias

from policies.api import (
    Admission,
    BlockView,
    ClusterView,
    EngineView,
    InstanceView,
    Oracle,
    Placement,
    PrefixMatch,
    RequestView,
    Tier,
)

__all__ = ["Decision", "Recorder", "recorded"]

Decision: TypeAlias = tuple[float | None, str, tuple[Any, ...], Any]
"""(now, call, ids of the arguments, answer); ``now`` is ``None`` for calls without a time.

A request, engine or instance is its ``id``, a block ``(hash, blocks)``, an admission its name in
lower case and its values (``("defer", 3.5, "rate limit")``), a tier its value.
"""


class Recorder:
    """Stands in for any policy and writes down every call before it returns the answer."""

    def __init__(self, policy: Any, log: list[Decision] | None = None) -> None:
        self.policy = policy
        self.log: list[Decision] = [] if log is None else log
        """What happened so far; give several recorders one list for one common log."""

    @property  # type: ignore[misc]
    def __class__(self) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The policy's own class, so that ``isinstance`` holds for the recorder too."""
        return type(self.policy)

    # ------------------------------------------------------------------ declarations

    @property
    def horizon_steps(self) -> int | None:
        return self.policy.horizon_steps  # type: ignore[no-any-return]

    @property
    def preempts(self) -> Literal["last", "order"]:
        return self.policy.preempts  # type: ignore[no-any-return]

    @property
    def needs_oracle(self) -> bool:
        return self.policy.needs_oracle  # type: ignore[no-any-return]

    @property
    def single_blocks(self) -> bool:
        return self.policy.single_blocks  # type: ignore[no-any-return]

    @property
    def listens(self) -> bool:
        return self.policy.listens  # type: ignore[no-any-return]

    @property
    def in_order(self) -> bool:
        return self.policy.in_order  # type: ignore[no-any-return]

    # ------------------------------------------------------------------ admission

    def order(self, request: RequestView, now: float) -> float:
        answer: float = self.policy.order(request, now)
        self.log.append((now, "order", (request.id,), answer))
        return answer

    def admit(self, request: RequestView, engine: EngineView, now: float) -> Admission:
        answer: Admission = self.policy.admit(request, engine, now)
        plain = (type(answer).__name__.lower(), *answer) if isinstance(answer, tuple) else answer
        self.log.append((now, "admit", (request.id, engine.id), plain))
        return answer

    # ------------------------------------------------------------------ eviction

    def attach_oracle(self, oracle: Oracle) -> None:
        self.policy.attach_oracle(oracle)

    def add(self, block: BlockView, now: float) -> None:
        self.log.append((now, "add", (block.hash, block.blocks), None))
        self.policy.add(block, now)

    def remove(self, block: BlockView, now: float) -> None:
        self.log.append((now, "remove", (block.hash, block.blocks), None))
        self.policy.remove(block, now)

    def victims(self, count: int, now: float) -> Sequence[BlockView]:
        answer: Sequence[BlockView] = self.policy.victims(count, now)
        self.log.append((now, "victims", (count,), tuple((b.hash, b.blocks) for b in answer)))
        return answer

    # ------------------------------------------------------------------ reuse

    def use(self, request: RequestView, match: PrefixMatch, engine: EngineView, now: float) -> int:
        answer: int = self.policy.use(request, match, engine, now)
        runs = tuple((tier.value, tokens) for tier, tokens in match.runs)
        self.log.append((now, "use", (request.id, runs, engine.id), answer))
        return answer

    def retain(
        self, request: RequestView, engine: EngineView, now: float
    ) -> Mapping[Tier, int] | None:
        answer: Mapping[Tier, int] | None = self.policy.retain(request, engine, now)
        plain = None if answer is None else tuple((t.value, n) for t, n in answer.items())
        self.log.append((now, "retain", (request.id, engine.id), plain))
        return answer

    # ------------------------------------------------------------------ placement

    def route(
        self, request: RequestView, instances: Sequence[InstanceView], now: float
    ) -> InstanceView:
        answer: InstanceView = self.policy.route(request, instances, now)
        ids = tuple(instance.id for instance in instances)
        self.log.append((now, "route", (request.id, ids), answer.id))
        return answer

    def place(self, request: RequestView, cluster: ClusterView, now: float) -> Placement:
        answer: Placement = self.policy.place(request, cluster, now)
        ids = (answer.prefill.id, answer.decode.id)
        self.log.append((now, "place", (request.id,), ids))
        return answer

    def changed(self, instance: InstanceView) -> None:
        self.log.append((None, "changed", (instance.id, instance.waiting, instance.running), None))
        self.policy.changed(instance)


def recorded(factory: Callable[..., Any], log: list[Decision]) -> Callable[..., Any]:
    """The factory, with every policy it makes behind a ``Recorder`` that writes to ``log``."""

    @wraps(factory, updated=())
    def make(**options: object) -> Recorder:
        return Recorder(factory(**options), log)

    # Backends look here for a seed that is set already, as a partial has it.
    make.__dict__["keywords"] = getattr(factory, "keywords", {})
    return make
