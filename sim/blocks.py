"""The reference KV cache: one object per cached block, physical block ids, vLLM's rules literally.

``sim.stepwise`` uses it; ``sim.cache`` must keep and evict the same blocks in the same order. Rule
numbers are those listed in ``docs/engine.md``.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import TypeAlias

from policies.api import EvictionPolicy, PolicyError, Slo
from sim.request import PS_PER_S, Request


class Block:
    """One KV block with a hash; a ``BlockView``."""

    __slots__ = (
        "_blocks",
        "depth",
        "hash",
        "hits",
        "id",
        "next_use_s",
        "refs",
        "slo",
        "stored_s",
        "used_s",
    )
    blocks = 1

    def __init__(self, blocks: Blocks, ident: int, depth: int, request: Request) -> None:
        self._blocks = blocks
        self.id = ident
        """Where it is: the number of the physical block."""
        self.hash = _content(request, depth)
        self.depth = depth
        self.refs = 1
        self.hits = 0
        self.stored_s = self.used_s = request.admitted_ps / PS_PER_S
        self.slo: Slo = request.slo
        self.next_use_s = _future_s(request, depth)

    @property
    def recompute_s(self) -> float:
        tokens = self._blocks.block_tokens
        return self._blocks.prefill_s(tokens, self.depth * tokens)


Held: TypeAlias = "Block | int"
"""A block that a request holds: without a hash, only its physical number."""


class Blocks:
    """All KV blocks of one engine."""

    def __init__(
        self,
        total: int,
        block_tokens: int,
        eviction: EvictionPolicy,
        *,
        policy_name: str,
        prefill_s: Callable[[int, int], float],
    ) -> None:
        self.block_tokens = block_tokens
        self.eviction = eviction
        self.policy_name = policy_name
        self.prefill_s = prefill_s
        self.held: dict[Request, list[Held]] = {}
        """Blocks of each running request in order."""
        self.known: dict[int, list[Block]] = {}
        """Cached blocks by hash, oldest first (vLLM keeps identical blocks apart)."""
        self.blank = deque(range(1, total + 1))
        """Free blocks without a hash, next one first; number 0 is vLLM's null block (rule 1)."""
        self.idle: set[Block] = set()
        """Cached blocks that nobody uses: what the eviction policy orders."""
        self.evicted: list[Block] = []
        """In the order of their eviction."""
        self.names: dict[int, str] = {}
        """Who stored a content first: "request:index" by hash, for comparing with vLLM."""

    @property
    def free(self) -> int:
        return len(self.blank) + len(self.idle)

    def match(self, request: Request, total: int) -> list[Block]:
        """Rule 12, for a request of ``total`` tokens."""
        hits: list[Block] = []
        for depth in range((total - 1) // self.block_tokens):
            copies = self.known.get(_content(request, depth))
            if not copies:
                break
            hits.append(copies[0])
        return hits

    def claim(self, request: Request, hits: list[Block], now_s: float) -> None:
        """Give a matched prefix to a request that is admitted (rule 14)."""
        for block in hits:
            if block.refs == 0:
                self.idle.remove(block)
                self.eviction.remove(block, now_s)
            block.refs += 1
            block.hits += 1
            if request.slo.ttft_s < block.slo.ttft_s:
                block.slo = request.slo
            block.next_use_s = _future_s(request, block.depth)
        self.held[request] = list(hits)
        request.stored = len(hits)

    def take(self, request: Request, count: int, now_s: float) -> None:
        """Give free blocks to a request, evicting cached ones if need be (rule 14)."""
        held = self.held[request]
        for _ in range(count):
            held.append(self.blank.popleft() if self.blank else self._evict(now_s))

    def store(self, request: Request, tokens: int) -> None:
        """Hash the request's full blocks up to so many tokens (rule 15)."""
        held = self.held[request]
        upto = min(tokens // self.block_tokens, request.retain_blocks)
        for depth in range(request.stored, upto):
            place = held[depth]
            assert isinstance(place, int)
            block = Block(self, place, depth, request)
            held[depth] = block
            self.known.setdefault(block.hash, []).append(block)
            self.names.setdefault(block.hash, f"{request.id}:{depth}")
            request.stored = depth + 1

    def release(self, request: Request, now_s: float) -> None:
        """Take everything from a request (rule 16)."""
        loose: list[int] = []
        for block in reversed(self.held.pop(request)):
            if isinstance(block, int):
                loose.append(block)
                continue
            block.refs -= 1
            if block.refs == 0:
                block.used_s = now_s
                self.idle.add(block)
                self.eviction.add(block, now_s)
        self.blank.extendleft(reversed(loose))
        request.stored = 0

    def _evict(self, now_s: float) -> int:
        victims = self.eviction.victims(1, now_s)
        block = victims[0] if isinstance(victims, Sequence) and victims else None
        if block not in self.idle:
            raise PolicyError(
                f"{self.policy_name}.victims(1, now={now_s}) answered {victims!r}; "
                f"a sequence of blocks that nobody uses was expected"
            )
        assert isinstance(block, Block)
        self.idle.remove(block)
        self.eviction.remove(block, now_s)
        self.known[block.hash].remove(block)
        if not self.known[block.hash]:
            del self.known[block.hash]
        self.evicted.append(block)
        return block.id

    def audit(self, total: int) -> None:
        """Check invariant I2."""
        cached = [block for copies in self.known.values() for block in copies]
        assert {b for b in cached if not b.refs} == self.idle
        places = [block.id for block in cached] + list(self.blank)
        places += [b for held in self.held.values() for b in held if isinstance(b, int)]
        assert sorted(places) == list(range(1, total + 1))
        users: dict[Block, int] = {}
        for held in self.held.values():
            for block in held:
                if not isinstance(block, int):
                    users[block] = users.get(block, 0) + 1
        assert all(users.get(block, 0) == block.refs for block in cached)


def _future_s(request: Request, depth: int) -> float:
    future = request.future_s
    return float(future[depth]) if future is not None and depth < len(future) else float("inf")


def _content(request: Request, depth: int) -> int:
    """The id of the content of the request's block at an index."""
    for first, start, count in request.runs:
        if depth < first + count:
            return start + depth - first
    raise AssertionError("the last run is endless")
