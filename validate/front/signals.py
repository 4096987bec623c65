"""What the front knows of each engine: polled, and therefore old, or from its own books."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from policies.api import RequestView
from validate.front.http_requests import HttpRequest
from validate.front.prefix_index import PrefixIndex

__all__ = ["Instance", "Sample", "exposition", "parse_metrics"]

GAUGES = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
"""Names in vLLM 0.32 (``v1/metrics/loggers.py``); the usage is a fraction, whatever its name."""

LINE = re.compile(rf"^({'|'.join(map(re.escape, GAUGES))})(?:{{[^}}]*}})?\s+(\S+)", re.MULTILINE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """An engine's state as its ``/metrics`` told it."""

    running: int
    waiting: int
    kv_usage: float
    """Fraction, 0 to 1."""


def parse_metrics(text: str) -> Sample:
    """The sample in Prometheus text; data-parallel ranks are added up, their usage averaged.

    Raises:
        ValueError: a gauge is missing.
    """
    found: dict[str, list[float]] = {name: [] for name in GAUGES}
    for name, value in LINE.findall(text):
        found[name].append(float(value))
    for name, values in found.items():
        if not values:
            raise ValueError(f"/metrics has no {name}; is this a vLLM server with log stats?")
    running, waiting, usage = found.values()
    return Sample(
        running=round(sum(running)), waiting=round(sum(waiting)), kv_usage=sum(usage) / len(usage)
    )


class Instance:
    """One engine behind the front; an ``InstanceView``.

    From the last successful poll, and as old as ``signal_age_s`` says: ``running``, ``kv_usage``
    and the polled part of ``waiting``. From the front's own books, and exact as far as this front
    is concerned: ``inflight_tokens``, and the requests sent since that poll, which ``waiting``
    includes until they end or the next poll. (In the simulator stale signals hold nothing that
    was sent since.) ``matched_tokens`` follows the engine's KV events, milliseconds old, and is 0
    where it publishes none. ``chip`` is empty: vLLM does not tell.
    """

    role = "both"
    chip = ""

    def __init__(self, ident: int, url: str, clock: Callable[[], float]) -> None:
        self.id = ident
        self.url = url
        self.model = ""
        self.running = 0
        self.kv_usage = 0.0
        self.inflight_tokens = 0
        self.index = PrefixIndex()
        self.up = False
        """Whether the last poll succeeded and no connection was refused since."""
        self.requests = 0
        """Sent there so far."""
        self.followed = False
        """Whether ``index`` is kept up to date from KV events."""
        self.wanted = False
        """Whether a policy asked what is cached."""
        self._clock = clock
        self._asked_s = -float("inf")
        self._polled_waiting = 0
        self._since = 0
        self._open: dict[HttpRequest, float] = {}

    @property
    def waiting(self) -> int:
        return self._polled_waiting + self._since

    @property
    def inflight(self) -> int:
        """Requests that the front sent there and that have not ended; exact."""
        return len(self._open)

    @property
    def signal_age_s(self) -> float:
        """Seconds since the last successful poll was sent; ``inf`` before the first."""
        return self._clock() - self._asked_s

    def matched_tokens(self, request: RequestView) -> int:
        """By content; as in vLLM at least the prompt's last token is never counted."""
        assert isinstance(request, HttpRequest)
        self.wanted = True
        block_tokens = self.index.block_tokens
        if not block_tokens or not len(self.index):
            return 0
        limit = max(len(request.tokens) - 1, 0) // block_tokens
        return self.index.matched_blocks(request.digests(block_tokens)[:limit]) * block_tokens

    def polled(self, sample: Sample, asked_s: float) -> bool:
        """Take in a sample asked for at ``asked_s``; whether the queue lengths changed."""
        before = (self.waiting, self.running)
        self._asked_s = asked_s
        self.running, self.kv_usage = sample.running, sample.kv_usage
        self._polled_waiting = sample.waiting
        self._since = sum(sent_s > asked_s for sent_s in self._open.values())
        return before != (self.waiting, self.running)

    def sent(self, request: HttpRequest) -> None:
        """The front sends it a request."""
        self._open[request] = self._clock()
        self._since += 1
        self.requests += 1
        self.inflight_tokens += request.prompt_tokens

    def ended(self, request: HttpRequest) -> bool:
        """Its request ended, well or not; whether the queue lengths changed."""
        sent_s = self._open.pop(request)
        self.inflight_tokens -= request.prompt_tokens
        if sent_s <= self._asked_s:
            return False
        self._since -= 1
        return True


def exposition(instances: Iterable[Instance], placing_s: Iterable[float]) -> str:
    """Prometheus text about the front itself."""
    every = list(instances)
    gauges: dict[str, tuple[str, str, Callable[[Instance], float]]] = {
        "requests_total": ("counter", "Requests sent to the engine.", lambda i: i.requests),
        "inflight_requests": ("gauge", "Sent there, not ended.", lambda i: i.inflight),
        "inflight_tokens": ("gauge", "Their prompt tokens.", lambda i: i.inflight_tokens),
        "signal_age_seconds": ("gauge", "Since the last poll.", lambda i: i.signal_age_s),
        "engine_up": ("gauge", "1: gets requests.", lambda i: i.up),
        "indexed_blocks": ("gauge", "KV blocks in the prefix index.", lambda i: len(i.index)),
    }
    lines = []
    for name, (kind, text, read) in gauges.items():
        full = f"servelab_front_{name}"
        lines += [f"# HELP {full} {text}", f"# TYPE {full} {kind}"]
        for instance in every:
            value = f"{float(read(instance)):g}".replace("inf", "+Inf")
            lines.append(f'{full}{{engine="{instance.id}",url="{instance.url}"}} {value}')
    full = "servelab_front_placing_seconds"
    times = sorted(placing_s)
    lines += [f"# HELP {full} From a request's last byte to its sending.", f"# TYPE {full} summary"]
    for share in (0.5, 0.99):
        if times:
            time_s = times[min(int(share * len(times)), len(times) - 1)]
            lines.append(f'{full}{{quantile="{share}"}} {time_s:.6f}')
    lines.append(f"{full}_count {len(times)}")
    return "\n".join(lines) + "\n"
