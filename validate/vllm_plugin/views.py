"""Requests, blocks and the engine as policies see them, over vLLM's own objects.

The values are those that ``sim.stepwise`` computes, so a policy cannot tell the two apart.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from functools import lru_cache
from math import inf, isnan
from typing import Any

from policies.api import Slo, Tier
from sim.latency import PS_PER_S, StepModel

__all__ = ["BlockView", "EngineView", "RequestView", "StepTimes", "policy_name"]


def policy_name(policy: object) -> str:
    """What to call a policy in a message: its registered name, else its class."""
    kind = policy.__class__  # not type(): a recorder stands in for the policy it wraps
    return str(getattr(kind, "policy_name", kind.__qualname__))


class RequestView:
    """A ``policies.api.RequestView`` of a vLLM request, and what the adapter keeps beside it.

    Facts that vLLM has no field for come from ``SamplingParams.extra_args`` (over HTTP:
    ``vllm_xargs``): ``slo_class, slo_ttft_s, slo_tpot_s, slo_e2e_s, session, tenant, kind, model,
    client_max_tokens``. A client's value of the wrong type counts as not given: it must not be
    able to stop the engine.
    """

    __slots__ = (
        "_hashing",
        "_max_tokens",
        "admitted_s",
        "arrival_s",
        "id",
        "kind",
        "model",
        "order",
        "priority",
        "rank",
        "request",
        "retained_blocks",
        "session",
        "slo",
        "tenant",
    )

    def __init__(
        self, request: Any, *, rank: int, epoch_s: float, model: str, hashing: tuple[int, int]
    ) -> None:
        params = request.sampling_params
        extra: Mapping[str, Any] = (params.extra_args if params is not None else None) or {}
        self.request = request
        self.id: str = request.request_id
        self.rank = rank
        """Place in the order in which requests entered the engine."""
        self.order: float = 0.0
        """The admission policy's answer, asked when the request joins the queue."""
        self.arrival_s: float = request.arrival_time - epoch_s
        self.priority: int = request.priority
        self.session = str(extra.get("session") or request.session_id or "")
        self.tenant = str(extra.get("tenant") or "")
        self.kind = str(extra.get("kind") or "")
        self.model = str(extra.get("model") or model)
        self.slo = _slo(
            str(extra.get("slo_class") or "none"),
            _seconds(extra.get("slo_ttft_s")),
            _seconds(extra.get("slo_tpot_s")),
            _seconds(extra.get("slo_e2e_s")),
        )
        limit = extra.get("client_max_tokens")
        self._max_tokens = limit if isinstance(limit, int) else None
        self._hashing = hashing
        self.admitted_s = -1.0
        """When it was admitted for the first time; negative before."""
        self.retained_blocks: int | None = None
        """How many leading blocks the reuse policy keeps in the cache; ``None``: all."""

    def __repr__(self) -> str:
        return f"<request {self.id}>"

    @property
    def prompt_tokens(self) -> int:
        return int(self.request.num_prompt_tokens)

    @property
    def max_tokens(self) -> int:
        return int(self.request.max_tokens if self._max_tokens is None else self._max_tokens)

    @property
    def computed_tokens(self) -> int:
        return int(self.request.num_computed_tokens)

    @property
    def output_tokens(self) -> int:
        return int(self.request.num_output_tokens)

    @property
    def preemptions(self) -> int:
        return int(self.request.num_preemptions)

    @property
    def block_hashes(self) -> Sequence[Hashable]:
        step, block = self._hashing
        full = self.request.num_prompt_tokens // block
        hashes: Sequence[Hashable] = self.request.block_hashes[step - 1 : full * step : step]
        return hashes


class BlockView:
    """One cached block: a physical block and the content that was stored in it."""

    __slots__ = (
        "_engine",
        "block",
        "depth",
        "hash",
        "hits",
        "idle",
        "slo",
        "stored_s",
        "used_s",
    )
    blocks = 1

    def __init__(
        self, engine: EngineView, block: Any, ident: Hashable, depth: int, request: RequestView
    ) -> None:
        self._engine = engine
        self.block = block
        self.hash = ident
        self.depth = depth
        self.hits = 0
        self.idle = False
        """Nobody uses it: it is one of those that the eviction policy orders."""
        self.stored_s = self.used_s = request.admitted_s
        self.slo = request.slo

    def __repr__(self) -> str:
        return f"<block {self.block.block_id}, depth {self.depth}>"

    @property
    def recompute_s(self) -> float:
        tokens = self._engine.block_tokens
        return self._engine.prefill_s(tokens, self.depth * tokens)


class StepTimes:
    """Step times measured while the engine runs, for engines that were given none.

    A step without prompt tokens tells what a step costs at least, one with prompt tokens what
    they cost beyond that; both are means that forget slowly. Context is not told apart. Until a
    prompt has been measured, ``GUESS_S`` per token stands in.
    """

    GUESS_S = 1e-4
    KEEP = 0.98

    __slots__ = ("_base_s", "_last_s", "_spent_s", "_tokens")

    def __init__(self) -> None:
        self._base_s = 0.0
        self._spent_s = 0.0
        self._tokens = 0.0
        self._last_s = 0.0

    def ran(self, began_s: float, ended_s: float, prompt_tokens: int) -> None:
        """A step ran. Steps that overlap (async scheduling) count from the end of the last."""
        took_s = ended_s - max(began_s, self._last_s)
        self._last_s = ended_s
        if not prompt_tokens:
            keep = self.KEEP if self._base_s else 0.0
            self._base_s = keep * self._base_s + (1 - keep) * took_s
        else:
            self._spent_s = self.KEEP * self._spent_s + max(took_s - self._base_s, 0.0)
            self._tokens = self.KEEP * self._tokens + prompt_tokens

    def prefill_s(self, tokens: int) -> float:
        """Time of a step that computes only this many prompt tokens."""
        if not self._tokens:
            return self._base_s + tokens * self.GUESS_S
        return self._base_s + tokens * self._spent_s / self._tokens


class EngineView:
    """A ``policies.api.EngineView`` of a vLLM scheduler, with the counters that answers hang on."""

    __slots__ = (
        "_pool",
        "_scheduler",
        "_steps",
        "block_tokens",
        "changes",
        "id",
        "measured",
        "now_s",
        "planning",
        "steps_done",
    )

    def __init__(self, scheduler: Any, ident: int, steps: StepModel | None) -> None:
        self._scheduler = scheduler
        self._pool = scheduler.kv_cache_manager.block_pool
        self._steps = steps
        self.measured = StepTimes() if steps is None else None
        """Who must be told how long steps took; ``None`` where step times were given."""
        self.id = ident
        self.block_tokens: int = scheduler.block_size
        self.now_s = 0.0
        """Seconds since the run began; stands still while the scheduler works."""
        self.changes = 0
        """Counts arrivals, finishes and preemptions: while it stands, answers stay valid."""
        self.steps_done = 0
        self.planning = False
        """``schedule`` is running: only then is a policy asked whether a request may run."""

    @property
    def waiting(self) -> int:
        return len(self._scheduler.waiting) + len(self._scheduler.kv_holding_waiting)

    @property
    def running(self) -> int:
        return len(self._scheduler.running)

    @property
    def seats(self) -> int:
        """How many more requests may run (vLLM's ``max_num_active_seqs``)."""
        scheduler = self._scheduler
        taken: int = len(scheduler.running) + scheduler.num_waiting_for_streaming_input
        return int(scheduler.max_num_active_reqs) - taken

    def free_blocks(self, tier: Tier = Tier.HBM) -> int:
        return int(self._pool.free_block_queue.num_free_blocks) if tier is Tier.HBM else 0

    def total_blocks(self, tier: Tier = Tier.HBM) -> int:
        return int(self._pool.num_gpu_blocks) - 1 if tier is Tier.HBM else 0

    def prefill_s(self, tokens: int, context: int = 0) -> float:
        if self._steps is not None:
            return self._steps.prefill_ps(tokens, context) / PS_PER_S
        assert self.measured is not None
        return self.measured.prefill_s(tokens)


@lru_cache(maxsize=1024)
def _slo(name: str, ttft_s: float, tpot_s: float, e2e_s: float) -> Slo:
    return Slo(name=name, ttft_s=ttft_s, tpot_s=tpot_s, e2e_s=e2e_s)


def _seconds(value: object) -> float:
    if value is None:
        return inf
    try:
        seconds = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return inf
    return inf if isnan(seconds) else seconds
