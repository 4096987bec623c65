"""What is old and what is exact in the front's view of an engine."""

from __future__ import annotations

from math import inf

import pytest

from validate.front.http_requests import HttpRequest
from validate.front.signals import Instance, Sample, parse_metrics


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def request(tokens: int) -> HttpRequest:
    return HttpRequest(id="r", arrival_s=0.0, prompt_tokens=tokens, max_tokens=1)


def test_a_poll_shows_what_was_sent_before_it_was_asked() -> None:
    clock = Clock()
    engine = Instance(0, "http://a", clock)
    assert engine.signal_age_s == inf
    first, second = request(5), request(7)
    clock.now_s = 1.0
    engine.sent(first)
    clock.now_s = 3.0
    engine.sent(second)
    assert (engine.waiting, engine.inflight, engine.inflight_tokens) == (2, 2, 12)

    clock.now_s = 4.0  # asked at 2, answered at 4
    assert engine.polled(Sample(running=1, waiting=0, kv_usage=0.5), asked_s=2.0)
    assert engine.signal_age_s == 2.0
    assert (engine.running, engine.waiting) == (1, 1), "only the second came after the question"

    assert not engine.ended(first), "the poll has counted it: seen with the next one"
    assert (engine.running, engine.waiting, engine.inflight_tokens) == (1, 1, 7)
    assert engine.ended(second)
    assert (engine.running, engine.waiting, engine.inflight_tokens) == (1, 0, 0)
    assert engine.polled(Sample(running=0, waiting=0, kv_usage=0.0), asked_s=4.0)
    assert not engine.polled(Sample(running=0, waiting=0, kv_usage=0.1), asked_s=5.0)


def test_ranks_are_added_up() -> None:
    text = "".join(
        f'vllm:num_requests_running{{engine="{rank}"}} {rank + 1}.0\n'
        f'vllm:num_requests_waiting{{engine="{rank}"}} 2.0\n'
        f'vllm:kv_cache_usage_perc{{engine="{rank}"}} 0.{rank}\n'
        for rank in range(2)
    )
    assert parse_metrics(text) == Sample(running=3, waiting=4, kv_usage=0.05)


def test_a_missing_gauge_is_named() -> None:
    with pytest.raises(ValueError, match="no vllm:num_requests_waiting"):
        parse_metrics("vllm:num_requests_running 1.0\nvllm:kv_cache_usage_perc 0\n")
