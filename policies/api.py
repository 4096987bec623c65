"""What a policy sees and what it may answer. Read this first.

A policy gets read-only *views* of requests, KV blocks, engines and clusters, and answers with
*decision values*. It never touches an object of the simulator or of vLLM, so the same policy
object runs in both. Views are structural: anything with these attributes is a view.

Five rules hold for every policy:

1. It reads only what its views show. In particular no view holds the true output length.
2. It answers; the backend acts.
3. An answer stays valid until something changes on the engine (a request arrives, finishes or is
   preempted) or until the time the answer names. A policy that must be asked again every n steps
   says so with ``horizon_steps = n`` and pays for it in speed.
4. It reads no clock and no global random generator: ``now`` (seconds since the run began) is an
   argument, and a random policy has a field ``seed: int``.
5. All state is in the object. Each engine (or cluster) gets an object of its own.

Only the standard library is used here, so policies load anywhere.
"""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from typing import ClassVar, Literal, NamedTuple, Protocol, TypeAlias

__all__ = [
    "ADMIT",
    "Admission",
    "AdmissionPolicy",
    "Admit",
    "BlockView",
    "ClusterView",
    "Defer",
    "EngineView",
    "EvictionPolicy",
    "InstanceView",
    "Oracle",
    "PDPolicy",
    "Placement",
    "PolicyError",
    "PolicySet",
    "PrefixMatch",
    "Reject",
    "RequestView",
    "ReusePolicy",
    "Router",
    "Slo",
    "Tier",
]


class PolicyError(RuntimeError):
    """A policy broke its contract. The message names the policy and the call."""


class Tier(enum.Enum):
    """Where KV blocks are kept."""

    HBM = "hbm"


@dataclass(frozen=True, slots=True, kw_only=True)
class Slo:
    """Latency targets of a request, in seconds; ``inf`` where there is none."""

    name: str = "none"
    ttft_s: float = inf
    tpot_s: float = inf
    e2e_s: float = inf


# --------------------------------------------------------------------------- views


class RequestView(Protocol):
    """A request as a policy may see it."""

    @property
    def id(self) -> str: ...
    @property
    def arrival_s(self) -> float: ...
    @property
    def prompt_tokens(self) -> int: ...
    @property
    def max_tokens(self) -> int:
        """The most tokens the client lets the request generate (not what it will generate)."""
        ...

    @property
    def computed_tokens(self) -> int:
        """Tokens whose KV exists: 0 before the first admission and after a preemption."""
        ...

    @property
    def output_tokens(self) -> int:
        """Tokens generated so far."""
        ...

    @property
    def preemptions(self) -> int: ...
    @property
    def priority(self) -> int:
        """Lower runs earlier, as in vLLM."""
        ...

    @property
    def slo(self) -> Slo: ...
    @property
    def session(self) -> str:
        """The chat this request is a turn of, or an empty string."""
        ...

    @property
    def tenant(self) -> str: ...
    @property
    def model(self) -> str: ...
    @property
    def kind(self) -> str: ...
    @property
    def block_hashes(self) -> Sequence[Hashable]:
        """Chained hashes of the prompt's full KV blocks, in the engine's block size."""
        ...


class BlockView(Protocol):
    """KV blocks that were stored, used and released together: one in vLLM, one or more here.

    All blocks behind one view share these values. When only some of them are evicted, the deep
    end of the chain goes first; policies need not arrange that.
    """

    @property
    def hash(self) -> Hashable:
        """Chained hash of the first block."""
        ...

    @property
    def depth(self) -> int:
        """Blocks before the first one in its chain."""
        ...

    @property
    def blocks(self) -> int:
        """How many consecutive blocks this view stands for."""
        ...

    @property
    def hits(self) -> int:
        """How often a request found it in the cache."""
        ...

    @property
    def stored_s(self) -> float:
        """When the request that computed it was admitted."""
        ...

    @property
    def used_s(self) -> float:
        """When the last request that held it released it."""
        ...

    @property
    def slo(self) -> Slo:
        """The tightest (by TTFT) SLO of all requests that used it."""
        ...

    @property
    def recompute_s(self) -> float:
        """How long computing it again would take, on an otherwise idle engine."""
        ...


class EngineView(Protocol):
    """One engine as its own policies see it."""

    @property
    def id(self) -> int: ...
    @property
    def waiting(self) -> int: ...
    @property
    def running(self) -> int: ...
    @property
    def block_tokens(self) -> int: ...
    def free_blocks(self, tier: Tier = Tier.HBM) -> int:
        """Blocks that a request could get, cached ones without a user included."""
        ...

    def total_blocks(self, tier: Tier = Tier.HBM) -> int: ...
    def prefill_s(self, tokens: int, context: int = 0) -> float:
        """Time of a step that only computes ``tokens`` of a prompt after ``context`` tokens."""
        ...


class InstanceView(Protocol):
    """One engine as a router sees it; everything may be ``signal_age_s`` old."""

    @property
    def id(self) -> int: ...
    @property
    def role(self) -> str: ...
    @property
    def model(self) -> str: ...
    @property
    def chip(self) -> str: ...
    @property
    def waiting(self) -> int: ...
    @property
    def running(self) -> int: ...
    @property
    def kv_usage(self) -> float:
        """Fraction of KV blocks in use by requests, 0 to 1."""
        ...

    @property
    def inflight_tokens(self) -> int:
        """Prompt tokens of the requests that were sent there and have not finished."""
        ...

    @property
    def signal_age_s(self) -> float: ...
    def matched_tokens(self, request: RequestView) -> int:
        """Tokens of the request's prompt that this instance has cached."""
        ...


class ClusterView(Protocol):
    """All instances behind one front door."""

    @property
    def instances(self) -> Sequence[InstanceView]: ...


class Oracle(Protocol):
    """Knows the future of a replayed trace. Only the simulator has one."""

    def next_use_s(self, block: BlockView) -> float:
        """When the next request that contains the block arrives; ``inf`` if none does."""
        ...


# --------------------------------------------------------------------------- decisions


class Admit(NamedTuple):
    """Let the request run."""


class Defer(NamedTuple):
    """Keep the request waiting until something changes or ``until_s`` is reached."""

    until_s: float = inf
    reason: str = ""


class Reject(NamedTuple):
    """Refuse the request for good; the client sees the reason."""

    reason: str


Admission: TypeAlias = Admit | Defer | Reject
ADMIT = Admit()


class PrefixMatch(NamedTuple):
    """The cached prefix of a request: consecutive runs of (tier, tokens)."""

    runs: tuple[tuple[Tier, int], ...]

    @property
    def tokens(self) -> int:
        return sum(tokens for _, tokens in self.runs)


class Placement(NamedTuple):
    """Where a request computes its prompt and where it decodes."""

    prefill: InstanceView
    decode: InstanceView


# --------------------------------------------------------------------------- policies


class AdmissionPolicy:
    """Which waiting request is next, and whether it may run now. One object per engine."""

    horizon_steps: ClassVar[int | None] = None
    """Steps after which an answer must be asked again; ``None``: when something changes."""

    preempts: ClassVar[Literal["last", "order"]] = "last"
    """Who is preempted when blocks run out: the last admitted, or the largest ``order``."""

    def order(self, request: RequestView, now: float) -> float:
        """Sort key of the queue, asked when a request joins it; ties go by arrival."""
        return 0.0

    def admit(self, request: RequestView, engine: EngineView, now: float) -> Admission:
        """May the head of the queue run?

        Asked again for the same request after every change, so nothing may be used up twice.
        """
        return ADMIT


class EvictionPolicy(ABC):
    """In which order cached blocks that nobody uses are given up. One object per tier and engine.

    The backend owns residency; the policy owns order. ``victims`` may depend on time only
    through the times of ``add`` and ``remove``: asking for 2 and then 3 blocks names the same
    blocks as asking for 5.
    """

    needs_oracle: ClassVar[bool] = False
    """The policy reads the future through ``attach_oracle``; vLLM refuses it by name."""

    single_blocks: ClassVar[bool] = False
    """Views must stand for exactly one block (slower); needed when the order depends on depth."""

    in_order: ClassVar[bool] = False
    """Victims always come in the order of ``add``: the backend may ask for many at once."""

    def attach_oracle(self, oracle: Oracle) -> None:
        """Called once before the run when ``needs_oracle`` is set."""

    @abstractmethod
    def add(self, block: BlockView, now: float) -> None:
        """The last user of the block released it: it may be evicted from now on."""

    @abstractmethod
    def remove(self, block: BlockView, now: float) -> None:
        """The block was hit again or has been evicted: forget it."""

    @abstractmethod
    def victims(self, count: int, now: float) -> Sequence[BlockView]:
        """The next blocks to evict, first victim first, together at least ``count`` blocks.

        The backend calls ``remove`` for those it evicts whole. Do not drop them here.
        """


class ReusePolicy:
    """How much of a cached prefix is used, and how much of a prompt is kept. One per engine."""

    def use(self, request: RequestView, match: PrefixMatch, engine: EngineView, now: float) -> int:
        """Tokens of the match to use (rounded down to blocks); must have no side effect."""
        return match.tokens

    def retain(
        self, request: RequestView, engine: EngineView, now: float
    ) -> Mapping[Tier, int] | None:
        """Leading tokens of the request to keep in the cache, per tier; ``None`` keeps all.

        Asked once, when the request is admitted for the first time.
        """
        return None


class Router(ABC):
    """Picks an instance. A building block of PD policies."""

    @abstractmethod
    def route(
        self, request: RequestView, instances: Sequence[InstanceView], now: float
    ) -> InstanceView:
        """One of ``instances``."""

    def changed(self, instance: InstanceView) -> None:
        """Queue lengths of the instance (as the router sees them) changed.

        Routers that keep an index override this, so that ``route`` need not look at everyone.
        """


class PDPolicy(ABC):
    """Where a request prefills and decodes. One object per cluster."""

    @abstractmethod
    def place(self, request: RequestView, cluster: ClusterView, now: float) -> Placement:
        """The instances for both phases; the same one twice where they are not split."""

    def changed(self, instance: InstanceView) -> None:
        """As ``Router.changed``."""

    @property
    def listens(self) -> bool:
        """Whether ``changed`` does anything; telling everybody of everything takes time."""
        return type(self).changed is not PDPolicy.changed


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicySet:
    """The policies of one run, as factories: each engine calls its own, a cluster calls ``pd``.

    A factory is a policy class, a ``functools.partial`` of one, or anything callable; where it
    takes a parameter ``seed`` that is not set yet, the backend passes one derived from the run's.
    """

    eviction: Callable[..., EvictionPolicy]
    pd: Callable[..., PDPolicy]
    admission: Callable[..., AdmissionPolicy] = AdmissionPolicy
    reuse: Callable[..., ReusePolicy] = ReusePolicy
