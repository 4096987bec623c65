"""Workloads that vLLM's scheduler and ours can both step through: real tokens, entry by step.

Times are steps, so that which step a request enters does not depend on how fast anything runs.
Token sequences are real because vLLM hashes them; ``block_chains`` gives our side block ids that
two requests share exactly where their chained hashes agree. vLLM is not needed here.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias
from zlib import crc32

from policies.api import Slo
from policies.registry import catalog
from sim.request import PS_PER_S
from sim.scheduler import EngineLimits
from traces.schema import Trace
from validate.prompts import Prompts

STEP_PS = PS_PER_S // 50
"""How long each step takes on the clocks of both sides; policies see seconds."""

STEP_CONSTANTS_PS = (4_000_000_000, 30_000_000, 50_000_000, 100_000, 10_000, 1_000_000_000)
"""Constants of the ``AffineStepModel`` that says what ``EngineView.prefill_s`` answers."""

SLOS = (
    Slo(),
    Slo(name="interactive", ttft_s=0.5, tpot_s=0.05),
    Slo(name="standard", ttft_s=2.0, tpot_s=0.1),
    Slo(name="batch", ttft_s=20.0, tpot_s=0.5),
)

Chain: TypeAlias = list[tuple[int, int]]
"""Block ids as runs: (first id, number of consecutive ids)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A request and the step at which it enters."""

    id: str
    at_step: int
    prompt: tuple[int, ...]
    """Token ids."""
    output_tokens: int
    abort_step: int | None = None
    """The client goes away in the middle of this step, whatever has become of the request."""
    salt: str = ""
    """vLLM's ``cache_salt``: requests with different ones share nothing."""
    skip_reading: bool = False
    """vLLM's ``skip_reading_prefix_cache``: it stores blocks but hits none."""
    priority: int = 0
    slo: Slo = field(default_factory=Slo)
    session: str = ""
    tenant: str = ""
    model: str = ""
    kind: str = ""

    @property
    def answer(self) -> tuple[int, ...]:
        """The tokens it will generate: a function of its id and their positions."""
        first = len(self.prompt)
        return tuple(output_token(self.id, first + i) for i in range(self.output_tokens))


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Requests for one engine with its options."""

    name: str
    limits: EngineLimits
    """``num_gpu_blocks`` and ``max_model_len`` are numbers."""
    priority: bool = False
    """Schedule with vLLM's ``--scheduling-policy priority`` instead of ``fcfs``."""
    policies: Mapping[str, Any] = field(default_factory=dict)
    """``admission``, ``eviction`` and ``reuse`` as in ``additional_config["servelab"]``."""
    entries: tuple[Entry, ...]
    """In the order in which they enter."""

    def __post_init__(self) -> None:
        limits = self.limits
        blocks, longest = limits.num_gpu_blocks, limits.max_model_len
        if blocks is None or longest is None:
            raise ValueError(f"{self.name}: num_gpu_blocks and max_model_len must be numbers")
        if longest > (blocks - 1) * limits.block_tokens:
            raise ValueError(
                f"{self.name}: max_model_len={longest} does not fit in num_gpu_blocks={blocks} "
                f"blocks of {limits.block_tokens} tokens, of which one is never used"
            )
        if not limits.enable_chunked_prefill and limits.max_num_batched_tokens < longest:
            raise ValueError(
                f"{self.name}: without enable_chunked_prefill, max_num_batched_tokens="
                f"{limits.max_num_batched_tokens} must be at least max_model_len={longest}"
            )
        if limits.long_prefill_token_threshold > longest:
            raise ValueError(
                f"{self.name}: long_prefill_token_threshold={limits.long_prefill_token_threshold} "
                f"must be at most max_model_len={longest}"
            )
        long = [entry.id for entry in self.entries if len(entry.prompt) >= longest]
        if long:
            raise ValueError(
                f"{self.name}: {len(long)} prompts have max_model_len={longest} tokens or more, "
                f"which leaves no room for an output token: {', '.join(long[:5])}"
            )

    @property
    def blocks(self) -> int:
        """Usable KV blocks."""
        assert self.limits.num_gpu_blocks is not None
        return self.limits.num_gpu_blocks - 1

    @property
    def max_model_len(self) -> int:
        """Most tokens of prompt and output together."""
        assert self.limits.max_model_len is not None
        return self.limits.max_model_len


def output_token(ident: str, position: int) -> int:
    """The token that a request generates at a position of its sequence."""
    return 2 + crc32(f"{ident}/{position}".encode()) % 1000


def arrival_ps(entry: Entry, index: int = 0) -> int:
    """When the request enters; with its index in the workload, the time that is unique to it."""
    return entry.at_step * STEP_PS + index * 1000


def abort_ps(entry: Entry) -> int:
    """When its client goes away: in the middle of a step."""
    assert entry.abort_step is not None
    return entry.abort_step * STEP_PS + STEP_PS // 2


def block_chains(workload: Workload) -> dict[str, tuple[Chain, Chain]]:
    """Block ids of every request's full blocks: those of the prompt, and those that follow.

    An id stands for a block's tokens, everything before them and the salt, as in vLLM's chained
    hashes (``v1/core/kv_cache_utils.py``): a block that begins in the prompt and ends in the
    answer belongs to the second chain.
    """
    size = workload.limits.block_tokens
    idents: dict[tuple[int, str, tuple[int, ...]], int] = {}
    chains: dict[str, tuple[Chain, Chain]] = {}
    for entry in workload.entries:
        tokens = entry.prompt + entry.answer
        parent = -1
        chain: tuple[Chain, Chain] = ([], [])
        for first in range(0, len(tokens) - size + 1, size):
            key = (parent, entry.salt if parent < 0 else "", tokens[first : first + size])
            parent = idents.setdefault(key, len(idents))
            runs = chain[first + size > len(entry.prompt)]
            if runs and runs[-1][0] + runs[-1][1] == parent:
                runs[-1] = (runs[-1][0], runs[-1][1] + 1)
            else:
                runs.append((parent, 1))
        chains[entry.id] = chain
    return chains


# --------------------------------------------------------------------------- from a trace


def workload_of(trace: Trace, limits: EngineLimits, *, step_s: float) -> Workload:
    """A trace's requests, each entering at the step in which it would arrive.

    Args:
        trace: prompts share what its block ids share.
        limits: the engine's options; ``num_gpu_blocks`` and ``max_model_len`` must be numbers.
        step_s: how long a step takes, for translating arrival times.

    Raises:
        ValueError: ``step_s`` is not positive, a prompt does not fit in ``max_model_len``, or the
            trace's block size does not fit the engine's.
    """
    if not step_s > 0:
        raise ValueError(f"step_s={step_s}: must be more than 0")
    prompts = Prompts(trace, limits.block_tokens, range(2, 100_000))
    entries = []
    for index, row in enumerate(trace.requests.to_dict("records")):
        entries.append(
            Entry(
                id=str(row["id"]),
                at_step=-int(-float(row["arrival_s"]) // step_s),
                prompt=tuple(prompts[index].tolist()),
                output_tokens=int(row["output_tokens"]),
                priority=int(row["priority"]),
                slo=Slo(
                    name=str(row["slo_class"]) or "none",
                    ttft_s=float(row["slo_ttft_s"]),
                    tpot_s=float(row["slo_tpot_s"]),
                    e2e_s=float(row["slo_e2e_s"]),
                ),
                session=str(row["session"]),
                tenant=str(row["tenant"]),
                model=str(row["model"]),
                kind=str(row["kind"]),
            )
        )
    return Workload(name=trace.name, limits=limits, entries=tuple(entries))


# --------------------------------------------------------------------------- random ones


def random_workload(seed: int, *, asynchronous: bool = False, policies: bool = False) -> Workload:
    """A workload that follows from its seed: small and crowded, because there rules meet.

    Args:
        seed: any whole number.
        asynchronous: for the asynchronous scheduler; everything else stays the same.
        policies: draw policies of every registered kind that vLLM can run.
    """
    rng = random.Random(f"parity {seed}")
    size = rng.choice([16, 16, 32, 64])
    longest_prompt = rng.choice([1, 3, 8, 20]) * size + rng.randint(0, size)
    longest_output = rng.choice([3, 20, 3 * size, 3 * size])
    capacity = -(-(longest_prompt + longest_output) // size) + rng.randint(0, 1)
    blocks = capacity + rng.randint(0, capacity * rng.choice([0, 1, 1, 2, 2, 10]))
    longest = longest_prompt + rng.randint(1, longest_output + 1)
    seats = rng.choice([1, 3, 8, 64])
    storm = rng.random() < 0.25  # chunks of long prompts take the blocks of many short requests
    if storm:
        blocks, seats = capacity + rng.randint(0, capacity // 4), 64
    longest = min(longest, blocks * size)
    budget = max(rng.choice([size, 3 * size, 8 * size, 512]) + rng.randint(0, size), seats)
    chunked = rng.random() < 0.85
    limits = EngineLimits(
        block_tokens=size,
        max_num_batched_tokens=budget if chunked else max(budget, longest),
        max_num_seqs=seats,
        max_model_len=longest,
        num_gpu_blocks=blocks + 1,
        enable_prefix_caching=rng.random() < 0.85,
        enable_chunked_prefill=chunked,
        long_prefill_token_threshold=min(rng.choice([0, 0, 0, rng.randint(1, 2 * size)]), longest),
        long_prefill_token_threshold_adaptive=rng.random() < 0.5,
        watermark=0.0 if storm else rng.choice([0.0, 0.0, 0.0, 0.05, 0.2]),
        scheduler_reserve_full_isl=not storm and rng.random() < 0.6,
        async_scheduling=asynchronous,
    )
    priority = rng.random() < 0.35
    entries = tuple(_random_entries(rng, size, longest_prompt, longest_output))
    drawn = _random_policies(random.Random(f"policies {seed}")) if policies else {}
    return Workload(
        name=f"seed {seed}",
        limits=limits,
        priority=priority and not policies,
        policies=drawn,
        entries=entries,
    )


def _random_entries(
    rng: random.Random, size: int, longest_prompt: int, longest_output: int
) -> Iterator[Entry]:
    """Requests with shared prefixes and earlier answers, in bursts or spread out."""

    def fresh(tokens: int) -> tuple[int, ...]:
        return tuple(rng.randrange(2, 10_000) for _ in range(tokens))

    documents = [fresh(rng.randint(1, longest_prompt)) for _ in range(rng.randint(1, 4))]
    salts = rng.choice([("",), ("",), ("", "a"), ("", "a", "b")])
    skipping = rng.choice([0.0, 0.0, 0.3])
    aborting = rng.choice([0.0, 0.0, 0.15, 0.5])
    patience = rng.choice([3, 15, 60])
    gap = rng.choice([0.1, 1.0, 4.0, 10.0])
    continuing = rng.choice([0.0, 0.3, 0.6])
    earlier: list[Entry] = []
    at_step = rng.choice([0, 0, 7])
    for index in range(rng.randint(5, rng.choice([10, 20, 40]))):
        if rng.random() < 0.6:  # the others come in the same instant
            at_step += int(rng.expovariate(1 / gap))
        session = ""
        salt = rng.choice(salts)
        kind = rng.random()
        if earlier and kind < continuing:
            before = rng.choice(earlier)
            salt, session = before.salt, before.session or before.id
            prompt = before.prompt + before.answer + fresh(rng.randint(0, size))
            if len(prompt) > longest_prompt:  # a regenerated answer: as far as it fits
                prompt = prompt[: rng.randint(1, longest_prompt)]
        elif kind < 0.8:
            document = rng.choice(documents)
            prompt = document[: rng.choice([len(document), rng.randint(1, len(document))])]
            prompt += fresh(rng.choice([0, 1, rng.randint(0, 2 * size)]))
        else:
            prompt = fresh(rng.randint(1, longest_prompt))
        entry = Entry(
            id=f"r{index:02}",
            at_step=at_step,
            prompt=prompt[:longest_prompt],
            output_tokens=rng.randint(1, longest_output),
            abort_step=at_step + rng.randint(0, patience) if rng.random() < aborting else None,
            salt=salt,
            skip_reading=rng.random() < skipping,
            priority=rng.choice([0, 0, 1, 5]),
            slo=rng.choice(SLOS),
            session=session,
            tenant=rng.choice(["", "a", "b"]),
            kind=rng.choice(["", "chat"]),
        )
        earlier.append(entry)
        yield entry


def _random_policies(rng: random.Random) -> dict[str, Any]:
    """One policy of each kind with random parameters."""
    draws: dict[str, dict[str, Any]] = {
        "admission/token_bucket": {
            "rate_tokens_per_s": rng.choice([300.0, 3000.0]),
            "burst_tokens": rng.choice([50, 1000]),
        },
        "eviction/slo_aware": {"grace_s": rng.choice([0.0, 0.1, 1.0, 10.0])},
        "reuse/cap": {"max_tokens": rng.choice([10, 32, 100, 500])},
    }
    chosen = {}
    for kind in ("admission", "eviction", "reuse"):
        names = [
            entry.key
            for entry in catalog().values()
            if entry.key.startswith(f"{kind}/") and not getattr(entry.cls, "needs_oracle", False)
        ]
        name = rng.choice(names)
        chosen[kind] = {"name": name.partition("/")[2], **draws.get(name, {})}
    return chosen
