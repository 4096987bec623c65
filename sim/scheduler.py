"""What both engines share: limits, the waiting queue, admission answers, and the router's view.

``Engine`` is an ``EngineView`` and an ``InstanceView`` as it stands; subclasses add the loop.
Rule numbers are those of vLLM's scheduler as listed in ``docs/engine.md``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from math import inf, isnan
from struct import Struct
from typing import Protocol

from policies.api import (
    ADMIT,
    Admission,
    AdmissionPolicy,
    Admit,
    Defer,
    PolicyError,
    PrefixMatch,
    Reject,
    RequestView,
    ReusePolicy,
    Tier,
)
from sim.clock import Clock
from sim.latency import StepModel
from sim.request import ENDLESS, PS_PER_S, Request


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLimits:
    """The scheduler options of one engine, by their vLLM names and with its defaults."""

    block_tokens: int = 16
    max_num_batched_tokens: int = 2048
    max_num_seqs: int = 256
    max_model_len: int | None = None
    """``None``: what the model allows or the KV cache holds, whichever is less."""
    num_gpu_blocks: int | None = None
    """KV blocks, vLLM's null block included; ``None``: what the memory leaves."""
    gpu_memory_utilization: float = 0.9
    enable_prefix_caching: bool = True
    enable_chunked_prefill: bool = True
    long_prefill_token_threshold: int = 0
    long_prefill_token_threshold_adaptive: bool = False
    watermark: float = 0.0
    scheduler_reserve_full_isl: bool = True
    async_scheduling: bool = False
    """Schedule a step while the one before it executes (vLLM's default on GPUs)."""

    def __post_init__(self) -> None:
        for key in ("block_tokens", "max_num_batched_tokens", "max_num_seqs"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key}={getattr(self, key)}: must be 1 or more")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens={self.max_num_batched_tokens} is less than "
                f"max_num_seqs={self.max_num_seqs}: a step could not serve every sequence"
            )
        if self.num_gpu_blocks is not None and self.num_gpu_blocks < 2:
            raise ValueError(f"num_gpu_blocks={self.num_gpu_blocks}: must be 2 or more")
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ValueError(
                f"gpu_memory_utilization={self.gpu_memory_utilization}: must be in (0, 1]"
            )
        if not 0 <= self.watermark < 1:
            raise ValueError(f"watermark={self.watermark}: must be in [0, 1)")
        if self.long_prefill_token_threshold < 0:
            raise ValueError("long_prefill_token_threshold: must be 0 (off) or more")


RUN = Struct("9d")
"""Engine steps in a row that are alike, step j taking ``first_ps + j * slope_ps``: engine,
start_ps, first_ps, slope_ps, steps, decodes, prefill_tokens, waiting, free_blocks. Packed at once,
because keeping the numbers as objects costs five times as much."""


class Sink(Protocol):
    """Who is told how requests end and what steps cost."""

    def finished(self, request: Request, engine: int, now_ps: int) -> None: ...
    def rejected(self, request: Request, engine: int, now_ps: int, reason: str) -> None: ...
    def ran(self, packed: bytes) -> None:
        """Takes one ``RUN`` or two."""
        ...


class Engine(ABC):
    """One vLLM instance, without its loop."""

    # Slots, because CPython shares the keys of an instance's dict for 30 attributes at most, and
    # every access to an object with more is slower (the whole engine by 1.7 times).
    __slots__ = (
        "_aborts",
        "_answer",
        "_arrivals",
        "_asked",
        "_asked_change",
        "_asked_step",
        "_budget",
        "_caching",
        "_most",
        "_plain_admission",
        "_plain_order",
        "_plain_retain",
        "_plain_use",
        "_queue",
        "_seats",
        "_watermark",
        "admission",
        "block_tokens",
        "changed",
        "changes",
        "chip",
        "env",
        "events",
        "id",
        "inflight_tokens",
        "limits",
        "max_model_len",
        "model",
        "preempted",
        "reuse",
        "sink",
        "steps",
        "steps_done",
        "total",
    )

    role = "both"
    signal_age_s = 0.0

    def __init__(
        self,
        env: Clock,
        ident: int,
        limits: EngineLimits,
        blocks: int,
        max_model_len: int,
        steps: StepModel,
        admission: AdmissionPolicy,
        reuse: ReusePolicy,
        sink: Sink,
        *,
        model: str = "",
        chip: str = "",
    ) -> None:
        self.env = env
        self.id = ident
        self.limits = limits
        self.block_tokens = limits.block_tokens
        self.total = blocks
        """Usable KV blocks (vLLM's null block excluded)."""
        self.max_model_len = max_model_len
        self.steps = steps
        self.admission = admission
        self.reuse = reuse
        self.sink = sink
        self.model = model
        self.chip = chip
        self.changed: Callable[[Engine], None] | None = None
        """Told when the number of requests changes, for routers that keep an index."""
        self.inflight_tokens = 0
        self.changes = 0
        """Counts arrivals, finishes and preemptions: while it stands, answers stay valid."""
        self.steps_done = 0
        self.events = 0
        self.preempted = 0
        self._budget = limits.max_num_batched_tokens
        self._most = limits.max_num_seqs
        self._caching = limits.enable_prefix_caching
        self._queue: list[tuple[float, int, Request]] = []
        self._aborts: list[Request] = []
        """Requests whose client went away during the step in progress."""
        self._arrivals = 0
        self._seats = 0
        self._watermark = int(limits.watermark * (blocks + 1))
        self._plain_admission = type(admission).admit is AdmissionPolicy.admit
        self._plain_order = type(admission).order is AdmissionPolicy.order
        self._plain_use = type(reuse).use is ReusePolicy.use
        self._plain_retain = type(reuse).retain is ReusePolicy.retain
        self._answer: Admission = ADMIT
        self._asked: Request | None = None
        self._asked_change = -1
        self._asked_step = 0

    # ------------------------------------------------------------------ views

    @property
    def waiting(self) -> int:
        return len(self._queue)

    @property
    @abstractmethod
    def running(self) -> int: ...

    @abstractmethod
    def free_blocks(self, tier: Tier = Tier.HBM) -> int: ...

    def total_blocks(self, tier: Tier = Tier.HBM) -> int:
        return self.total if tier is Tier.HBM else 0

    def prefill_s(self, tokens: int, context: int = 0) -> float:
        return self.steps.prefill_ps(tokens, context) / PS_PER_S

    @property
    def kv_usage(self) -> float:
        return 1.0 - self.free_blocks() / self.total

    @abstractmethod
    def matched_tokens(self, request: RequestView) -> int: ...

    # ------------------------------------------------------------------ queue

    def _enqueue(self, request: Request, now_ps: int) -> None:
        order = 0.0
        if not self._plain_order:
            order = self.admission.order(request, now_ps / PS_PER_S)
            if not isinstance(order, int | float) or isnan(order):
                raise PolicyError(
                    f"{_name(self.admission)}.order({request.id}) answered {order!r}; "
                    f"a number was expected"
                )
        request.order = order
        heappush(self._queue, (order, request.rank, request))

    def _accept(self, request: Request, now_ps: int) -> bool:
        """Take a new request into the queue, or reject it for good."""
        request.max_tokens = room = self.max_model_len - request.prompt_tokens
        if room < 1:
            reason = (
                f"prompt_too_long: {request.prompt_tokens} prompt tokens, "
                f"but at most {self.max_model_len - 1} fit"
            )
            self.sink.rejected(request, self.id, now_ps, reason)
            return False
        request._true_output_tokens = min(request._true_output_tokens, room)
        self._arrivals += 1
        request.rank = self._arrivals
        self.inflight_tokens += request.prompt_tokens
        self.changes += 1
        if self._plain_order:
            heappush(self._queue, (0.0, self._arrivals, request))
        else:
            self._enqueue(request, now_ps)
        if self.changed is not None:
            self.changed(self)
        return True

    def _left(self, request: Request) -> None:
        """The request is gone: finished or rejected."""
        self.inflight_tokens -= request.prompt_tokens
        self.changes += 1
        if self.changed is not None:
            self.changed(self)

    def _unqueue(self, request: Request) -> bool:
        """Take a waiting request out of the queue; whether it was there."""
        before = len(self._queue)
        self._queue = [entry for entry in self._queue if entry[2] is not request]
        heapify(self._queue)
        return len(self._queue) < before

    def _drop_aborted(self, now_ps: int) -> None:
        """Let go of the aborted requests that have not ended (rule 18)."""
        for request in self._aborts:
            if self._withdraw(request, now_ps) or self._unqueue(request):
                self._left(request)
                self.sink.rejected(request, self.id, now_ps, "aborted")
        self._aborts.clear()

    @abstractmethod
    def _withdraw(self, request: Request, now_ps: int) -> bool:
        """Take a running request out of the batch and free its blocks; whether it was there."""

    # ------------------------------------------------------------------ asking policies

    def _verdict(self, request: Request, now_ps: int) -> Admission:
        """The admission policy's answer for the head of the queue, asked when it may differ."""
        answer = self._answer
        if (
            self._asked is request
            and self._asked_change == self.changes
            and not (type(answer) is Defer and answer.until_s * PS_PER_S <= now_ps)
            and (
                self.admission.horizon_steps is None
                or self.steps_done < self._asked_step + self.admission.horizon_steps
            )
        ):
            return answer
        answer = self.admission.admit(request, self, now_ps / PS_PER_S)
        if not isinstance(answer, Admit | Defer | Reject):
            raise PolicyError(
                f"{_name(self.admission)}.admit({request.id}) answered {answer!r}; "
                f"Admit, Defer or Reject was expected"
            )
        if type(answer) is Defer and answer.until_s * PS_PER_S <= now_ps:
            raise PolicyError(
                f"{_name(self.admission)}.admit({request.id}, now={now_ps / PS_PER_S}) deferred "
                f"until {answer.until_s}, which has passed"
            )
        self._asked = request
        self._asked_change = self.changes
        self._asked_step = self.steps_done
        self._answer = answer
        return answer

    def _head(self, now_ps: int) -> Request | None:
        """The waiting request that may run now; rejects those the policy refuses."""
        queue = self._queue
        while queue:
            request = queue[0][2]
            if self._plain_admission:
                return request
            answer = self._verdict(request, now_ps)
            if type(answer) is Admit:
                return request
            if type(answer) is Defer:
                return None
            heappop(queue)
            assert isinstance(answer, Reject)
            self.sink.rejected(request, self.id, now_ps, answer.reason)
            self._left(request)
        return None

    def _deferred_until_ps(self) -> int | None:
        """When the head that the policy deferred must be asked again; ``None``: on a change."""
        answer = self._answer
        if (
            self._queue
            and type(answer) is Defer
            and self._asked is self._queue[0][2]
            and self._asked_change == self.changes
            and answer.until_s != inf
        ):
            return -int(-answer.until_s * PS_PER_S // 1)
        return None

    def _used_blocks(self, request: Request, hit: int, now_ps: int) -> int:
        """How many of ``hit`` cached blocks the reuse policy wants."""
        tokens = hit * self.block_tokens
        match = PrefixMatch(((Tier.HBM, tokens),))
        use = self.reuse.use(request, match, self, now_ps / PS_PER_S)
        if not isinstance(use, int) or not 0 <= use <= tokens:
            raise PolicyError(
                f"{_name(self.reuse)}.use({request.id}) answered {use!r}; "
                f"a whole number from 0 to {tokens} was expected"
            )
        return use // self.block_tokens

    def _retained_blocks(self, request: Request, now_ps: int) -> int:
        """How many leading blocks of the request the reuse policy keeps."""
        kept = self.reuse.retain(request, self, now_ps / PS_PER_S)
        if kept is None:
            return ENDLESS
        tokens = kept.get(Tier.HBM, 0) if isinstance(kept, Mapping) else None
        if not isinstance(tokens, int) or tokens < 0:
            raise PolicyError(
                f"{_name(self.reuse)}.retain({request.id}) answered {kept!r}; "
                f"None or a whole number of tokens, 0 or more, per tier was expected"
            )
        return tokens // self.block_tokens

    def _threshold(self) -> int:
        """The longest prompt chunk of this step, 0 for no limit (rule 5)."""
        limits = self.limits
        threshold = limits.long_prefill_token_threshold
        if threshold:
            present = self.running + len(self._queue)
            if present <= 1:
                return 0
            if limits.long_prefill_token_threshold_adaptive:
                return max(threshold, limits.max_num_batched_tokens // present)
        return threshold

    # ------------------------------------------------------------------ checking

    @abstractmethod
    def audit(self) -> None:
        """Check invariant I2 for this engine as it stands."""

    def stuck(self) -> str | None:
        """Why requests are still waiting although nothing will happen any more."""
        if not self._queue:
            return None
        request = self._queue[0][2]
        if type(self._answer) is Defer and self._asked is request:
            return (
                f"{_name(self.admission)}.admit deferred request {request.id} without a time "
                f"({self._answer.reason or 'no reason given'}), and nothing is left to change"
            )
        return f"request {request.id} waits although engine {self.id} is idle"


def _name(policy: object) -> str:
    """What to call a policy in a message: its registered name, else its class."""
    kind = policy.__class__  # not type(): a recorder stands in for the policy it wraps
    return str(getattr(kind, "policy_name", kind.__qualname__))
