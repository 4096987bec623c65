"""The formulae by hand, and simulations against them."""

from __future__ import annotations

import numpy as np
import pytest

from policies.registry import policy_set
from sim.backend import Deployment
from sim.hardware import load_chip
from sim.latency import Batch
from sim.metrics import queue_s, ttft_s
from sim.model import load_model
from sim.simulator import Simulator
from traces import Chains, Trace, generate
from validate.theory import (
    SERVICE_S,
    TOLERANCE,
    checks,
    infinite_cache_hits,
    main,
    md1_wait_s,
    mg1_wait_s,
    mm1_wait_s,
    queue,
    step_floor_s,
    ttft_floor_s,
)

PS_PER_S = 10**12


# --------------------------------------------------------------------------- formulae


def test_waits_by_hand() -> None:
    assert md1_wait_s(0.5, 2.0) == pytest.approx(1.0)
    assert md1_wait_s(0.8, 1.0) == pytest.approx(2.0)
    assert mm1_wait_s(0.8, 1.0) == pytest.approx(4.0)  # exponential service doubles it
    # Half the requests take 1 s, half 3 s: E[S] = 2, E[S^2] = 5; 0.25 * 5 / (2 * 0.5).
    assert mg1_wait_s(0.25, 2.0, 5.0) == pytest.approx(1.25)
    assert md1_wait_s(0.0, 1.0) == 0.0


def test_a_queue_that_cannot_keep_up_has_no_mean_wait() -> None:
    with pytest.raises(ValueError, match="load 1: a queue has a mean wait at loads"):
        md1_wait_s(1.0, 3.0)
    with pytest.raises(ValueError, match=r"E\[S\^2\]=3 is less than E\[S\]\^2=4"):
        mg1_wait_s(0.1, 2.0, 3.0)


def test_the_floor_of_a_decode_step_by_hand() -> None:
    # Llama 3.1 8B: 32 layers of 218.1 M matrix weights and a head of 525.3 M, two bytes each:
    # 15.0 GB; 1000 tokens of KV at 131,072 bytes: 0.13 GB; 2.04 TB/s.
    floor_s = step_floor_s(load_chip("a100_80g"), load_model("llama3_8b"), Batch((), 1, 1000, 1000))
    layer = 4096 * (32 + 2 * 8 + 32) * 128 + 3 * 4096 * 14336
    read = 2 * (32 * layer + 4096 * 128256) + 1000 * 131072
    assert floor_s == read / load_chip("a100_80g").memory_bytes_per_s
    assert 0.0070 < floor_s < 0.0080


def test_the_floor_of_a_long_prompt_by_hand() -> None:
    # 2 * 6.98e9 * 2048 + head + attention 4 * 32 * 32 * 128 * 2048 * 2049 / 2, over 312e12.
    layer = 4096 * (32 + 2 * 8 + 32) * 128 + 3 * 4096 * 14336
    flops = 2 * 32 * layer * 2048 + 2 * 4096 * 128256
    flops += 4 * 32 * 32 * 128 * (2048 * 2049 // 2)
    floor_s = ttft_floor_s(load_chip("a100_80g"), load_model("llama3_8b"), 2048)
    assert floor_s == pytest.approx(flops / 312e12, rel=1e-12)


def test_more_devices_and_a_cached_prefix_lower_the_floor() -> None:
    chip, model = load_chip("h100"), load_model("llama3_70b")
    alone = ttft_floor_s(chip, model, 4000)
    assert ttft_floor_s(chip, model, 4000, tp=4) == alone / 4
    assert ttft_floor_s(chip, model, 4000, 3000) < 0.3 * alone


def test_an_infinite_cache_computes_each_distinct_block_once() -> None:
    trace = Trace.build(
        "four",
        {"arrival_s": [0.0, 1.0, 2.0, 3.0], "prompt_tokens": [64, 48, 64, 16], "output_tokens": 1},
        Chains.from_lists([[1, 2, 3, 4], [1, 2, 9], [1, 2, 3, 7], [5]]),
        block_tokens=16,
    )
    assert infinite_cache_hits(trace, 16) == 0 + 2 + 3 + 0
    assert infinite_cache_hits(trace, 32) == 0 + 1 + 1 + 0  # only the pair 1, 2 comes again


# --------------------------------------------------------------------------- simulations


@pytest.mark.parametrize("load", [0.3, 0.6, 0.8])
def test_the_mean_wait_of_m_d_1_is_within_two_percent(load: float) -> None:
    requests = queue(load, 100_000).requests
    assert queue_s(requests).mean() == pytest.approx(md1_wait_s(load, SERVICE_S), rel=TOLERANCE)


def test_every_single_wait_follows_lindleys_recursion() -> None:
    """D. V. Lindley, Proc. Cambridge Phil. Soc. 48 (1952): W' = max(0, W + S - gap)."""
    result = queue(0.9, 5000, service="geometric", mean_steps=4.0)
    requests = result.requests
    arrival_ps = (requests["arrival_s"] * PS_PER_S).round().astype("int64").tolist()
    service_ps = (requests["output_tokens"] * PS_PER_S // 4).tolist()
    expected, ready = [], 0
    for arrival, service in zip(arrival_ps, service_ps, strict=True):
        start = max(arrival, ready)
        ready = start + service
        expected.append(ready / PS_PER_S)
    # Times of some thousand seconds are kept as floats: to a picosecond and a bit.
    np.testing.assert_allclose(requests["finish_s"], expected, rtol=1e-15, atol=2e-12)


def test_first_token_is_wait_and_one_step() -> None:
    requests = queue(0.6, 2000).requests
    np.testing.assert_allclose(ttft_s(requests), queue_s(requests) + SERVICE_S, atol=1e-9)


def test_random_routing_splits_a_poisson_process_into_poisson_processes() -> None:
    requests = queue(0.6, 100_000, engines=4).requests
    assert queue_s(requests).mean() == pytest.approx(md1_wait_s(0.6, SERVICE_S), rel=TOLERANCE)
    assert requests["engine"].value_counts().min() > 24_000


@pytest.mark.parametrize(
    ("chip", "model", "tp"),
    [
        ("a100_80g", "llama3_8b", 1),
        ("h100", "qwen3_30b_a3b", 2),
        ("h100", "gpt_oss_120b", 2),
        ("ascend_910b", "qwen3_14b", 2),
    ],
)
def test_no_first_token_beats_the_roofline(chip: str, model: str, tp: int) -> None:
    trace = generate("chat", sessions=60, session_rate_per_s=1.0, prompt_max=8000, seed=1)
    deployment = Deployment.of(chip, model, tp=tp, engines=2)
    table = Simulator(deployment).serve(trace, policy_set(routing="least_loaded")).requests
    floors = [
        ttft_floor_s(deployment.chip, deployment.model, prompt, cached, tp=tp)
        for prompt, cached in zip(table["prompt_tokens"], table["cached_tokens"], strict=True)
    ]
    assert table["cached_tokens"].max() > 0
    assert np.all(ttft_s(table) >= floors)


def test_the_table_holds_every_law_and_the_command_says_so(
    capsys: pytest.CaptureFixture[str],
) -> None:
    every = list(checks(requests=200))
    assert {check.law.split()[0] for check in every} == {"M/D/1", "M/Geo/1", "4", "TTFT", "hit"}
    assert all(check.holds for check in every if check.law.startswith(("TTFT", "hit")))
    # 200 requests are too few for a mean: the command must notice.
    assert main(["--requests", "200"]) == 1
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1 + len(every)
    assert printed.count("BROKEN") == sum(not check.holds for check in every) > 0
