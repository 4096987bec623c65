"""Short traces on a small engine on which policies differ."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import log
from typing import Any

import numpy as np

from sim.scheduler import EngineLimits
from traces import Chains, Trace, generate
from traces.arrivals import arrivals, stream

__all__ = ["LIMITS", "WORKLOADS"]

LIMITS = EngineLimits(
    block_tokens=32,
    num_gpu_blocks=100,
    max_num_seqs=8,
    max_num_batched_tokens=512,
    max_model_len=1024,
)
"""Little memory and few seats, so that short runs have something to decide."""

CLASSES = (
    {"name": "interactive", "share": 1.0, "ttft_s": 0.1, "priority": 0},
    {"name": "batch", "share": 2.0, "ttft_s": 5.0, "priority": 1},
)


def _chat(requests: int, seed: int) -> Trace:
    """Chats whose turns find what the turns before left, if it is still there."""
    trace = generate(
        "chat",
        sessions=max(requests // 5, 2),
        session_rate_per_s=1.0,
        turns_mean=5.0,
        think_mean_s=0.6,
        token_s=0.004,
        system_prompts=6,
        system_min=64,
        system_max=160,
        user_mean=60.0,
        output_mean=16.0,
        output_max=48,
        prompt_max=900,
        block_tokens=32,
        classes=CLASSES,
        seed=seed,
    )
    return trace.head(requests)


def _scan(requests: int, seed: int) -> Trace:
    """A few hot prefixes that are urgent, among long prompts that nobody will ask again."""
    rng = stream(seed, "scan")
    hot = rng.random(requests) < 0.45
    prompt = np.where(hot, 8 * 32 + rng.integers(8, 40, requests), rng.integers(64, 640, requests))
    prefix = np.where(hot, rng.integers(0, 5, requests), -1)
    arrival_s = arrivals(rate_per_s=1.0, count=requests, seed=seed)
    output = rng.integers(4, 24, requests)
    return _shared("scan", arrival_s, prompt, output, prefix, np.full(5, 8), urgent=hot)


def _bursts(requests: int, seed: int) -> Trace:
    """Requests that come in bursts, with templates of all popularities and very unequal prompts."""
    rng = stream(seed, "bursts")
    popularity = 1.0 / np.arange(1, 21) ** 0.8
    prefix = rng.choice(20, requests, p=popularity / popularity.sum())
    blocks = rng.integers(2, 8, 20)
    own = np.exp(rng.uniform(log(8), log(500), requests)).astype(np.int64)
    arrival_s = arrivals("gamma", rate_per_s=1.0, count=requests, cv=4.0, seed=seed)
    prompt = 32 * blocks[prefix] + own
    output = rng.integers(4, 32, requests)
    return _shared("bursts", arrival_s, prompt, output, prefix, blocks, urgent=prefix < 5)


def _shared(
    name: str, arrival_s: Any, prompt: Any, output: Any, prefix: Any, blocks: Any, *, urgent: Any
) -> Trace:
    """Requests that begin with the blocks of a prefix (-1: none) and go on with their own."""
    ends = np.cumsum(blocks)
    unused = int(ends[-1])
    chains = []
    for tokens, which in zip(prompt.tolist(), prefix.tolist(), strict=True):
        begin = [] if which < 0 else list(range(int(ends[which] - blocks[which]), int(ends[which])))
        more = tokens // 32 - len(begin)
        chains.append(begin + list(range(unused, unused + more)))
        unused += more
    columns = {
        "arrival_s": arrival_s,
        "prompt_tokens": prompt,
        "output_tokens": output,
        "priority": np.where(urgent, 0, 1),
        "slo_class": np.where(urgent, "interactive", "batch"),
        "slo_ttft_s": np.where(urgent, 0.1, 5.0),
    }
    known = Chains.from_lists(chains)
    return Trace.build(name, columns, known, block_tokens=32, synthetic="everything")


WORKLOADS: Mapping[str, tuple[Callable[[int, int], Trace], float]] = {
    "chat": (_chat, 0.9),
    "scan": (_scan, 0.9),
    "bursts": (_bursts, 0.6),
}
"""Traces of (requests, seed), and the load at which they are served: 1 is what the engine can."""
