"""Closed forms that a run must obey, and ``python -m validate.theory``: theory beside simulation.

Queueing formulae hold exactly in the limit of long runs, bounds hold in every run.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from policies.registry import policy_set
from sim.backend import Deployment
from sim.hardware import Chip, load_chip
from sim.latency import AffineStepModel, Batch
from sim.metrics import queue_s, ttft_s
from sim.model import ModelSpec, load_model
from sim.result import Result
from sim.simulator import Simulator
from traces import Trace, generate
from traces.stats import ideal_hits

__all__ = [
    "Check",
    "checks",
    "infinite_cache_hits",
    "md1_wait_s",
    "mg1_wait_s",
    "mm1_wait_s",
    "queue",
    "step_floor_s",
    "ttft_floor_s",
]

TOLERANCE = 0.02
"""How far a simulated mean wait may be from theory."""
SERVICE_S = 1.0
PS_PER_S = 10**12


# --------------------------------------------------------------------------- queues


def mg1_wait_s(rate_per_s: float, mean_s: float, mean_square_s2: float) -> float:
    """Mean wait before service: Poisson arrivals, any service times, one server.

    Source: F. Pollaczek, Mathematische Zeitschrift 32 (1930); A. Khinchine, Matematicheskii
    Sbornik 39 (1932); L. Kleinrock, "Queueing Systems" vol. 1 (1975), section 5.6

    Args:
        rate_per_s: of arrivals.
        mean_s: E[S], the mean service time.
        mean_square_s2: E[S^2], its second moment.

    Raises:
        ValueError: the server cannot keep up.
    """
    load = rate_per_s * mean_s
    if not 0 <= load < 1:
        raise ValueError(f"load {load:g}: a queue has a mean wait at loads from 0 to below 1")
    if mean_square_s2 < mean_s**2:
        raise ValueError(f"E[S^2]={mean_square_s2:g} is less than E[S]^2={mean_s**2:g}")
    return rate_per_s * mean_square_s2 / (2 * (1 - load))


def md1_wait_s(load: float, service_s: float) -> float:
    """Mean wait with constant service: ``load * service_s / (2 * (1 - load))``."""
    return mg1_wait_s(load / service_s, service_s, service_s**2)


def mm1_wait_s(load: float, mean_service_s: float) -> float:
    """Mean wait with exponential service: ``load * mean_service_s / (1 - load)``."""
    return mg1_wait_s(load / mean_service_s, mean_service_s, 2 * mean_service_s**2)


# --------------------------------------------------------------------------- bounds


def step_floor_s(chip: Chip, model: ModelSpec, batch: Batch, *, tp: int = 1, ep: int = 1) -> float:
    """No step can be shorter: operations over peak, or bytes that must be read over bandwidth.

    At least one token's weights are read, and the KV of all contexts. Pipeline stages work one
    after the other, so they do not help.

    Source: S. Williams, A. Waterman, D. Patterson, "Roofline: an insightful visual performance
    model for multicore architectures", CACM 52(4), 2009
    """
    tokens = batch.decodes + sum(new for new, _ in batch.prefills)
    sequences = batch.decodes + len(batch.prefills)
    pairs = batch.decode_context_tokens
    pairs += sum(new * old + new * (new + 1) // 2 for new, old in batch.prefills)
    flops = model.matmul_flops(tokens, sequences) + model.attention_flops(pairs)
    context = batch.decode_context_tokens + sum(old for _, old in batch.prefills)
    read = _weight_bytes_of_a_token(model) + context * model.kv_bytes_per_token()
    devices = max(tp, ep)
    return max(flops / _peak_flops(chip, model), read / chip.memory_bytes_per_s) / devices


def ttft_floor_s(
    chip: Chip,
    model: ModelSpec,
    prompt_tokens: int,
    cached_tokens: int = 0,
    *,
    tp: int = 1,
    ep: int = 1,
) -> float:
    """No first token can come earlier: the floor of one step with the whole prompt."""
    batch = Batch(((prompt_tokens - cached_tokens, cached_tokens),), 0, 0, 0)
    return step_floor_s(chip, model, batch, tp=tp, ep=ep)


def infinite_cache_hits(trace: Trace, block_tokens: int) -> int:
    """No prefix cache finds more blocks, of any size, under any policy and in any order.

    Each distinct block must be computed once; the rest are hits. Belady's policy reaches this with
    enough memory (L. A. Belady, IBM Systems Journal 5(2), 1966).
    """
    return int(ideal_hits(trace.recoded(block_tokens)).sum())


def _weight_bytes_of_a_token(model: ModelSpec) -> float:
    """Bytes of the matrices that one token passes, the LM head included."""
    hidden = model.hidden_size
    ffn = model.dense_layers * model.ffn_size + model.moe_layers * model.shared_ffn_size
    read = (model.layers * model.attention_params() + 3 * hidden * ffn) * model.linear_bytes
    if model.moe is not None:
        share = model.moe.active_experts / model.moe.experts
        read += model.moe_layers * model.expert_params * share * model.expert_bytes
    return read + 2.0 * hidden * model.vocabulary


def _peak_flops(chip: Chip, model: ModelSpec) -> float:
    """The fastest unit that could multiply weights of this type."""
    faster = {"fp8": chip.fp8_flops, "mxfp4": chip.fp4_flops or chip.fp8_flops}
    return max(chip.bf16_flops, faster.get(model.weight_dtype) or 0.0)


# --------------------------------------------------------------------------- simulation


def queue(
    load: float,
    requests: int,
    *,
    service: Literal["constant", "geometric"] = "constant",
    engines: int = 1,
    mean_steps: float = 10.0,
    seed: int = 0,
) -> Result:
    """A single-server queue played by the whole simulator.

    Each engine runs one request at a time in steps of constant length, so a request is served for
    as many steps as it generates tokens: one, or a geometric number. Arrivals are a Poisson
    process, given how many there are: independent uniform instants, sorted. Several engines share
    them at random, which leaves each a Poisson process of its own.

    Args:
        load: of each engine.
        requests: how many arrive.
        service: distribution of service times, whose mean is ``SERVICE_S``.
        engines: how many.
        mean_steps: mean number of steps of geometric service.
        seed: of arrivals, service times and routing.
    """
    rng = np.random.default_rng([seed, requests, engines])
    arrival_s = np.sort(rng.uniform(0.0, requests * SERVICE_S / (load * engines), requests))
    if service == "geometric":
        steps = rng.geometric(1 / mean_steps, requests)
        step_s = SERVICE_S / mean_steps
    else:
        steps = np.ones(requests, dtype=np.int64)
        step_s = SERVICE_S
    trace = Trace.build(
        f"{service} service",
        {"arrival_s": arrival_s, "prompt_tokens": 1, "output_tokens": steps},
        synthetic="everything",
    )
    deployment = Deployment.of(
        "a100_80g", "llama3_8b", engines=engines, max_num_seqs=1, num_gpu_blocks=1000
    )
    simulator = Simulator(
        deployment,
        step_model=AffineStepModel(round(step_s * PS_PER_S), 0, 0, 0, 0),
        record_runs=False,
    )
    return simulator.serve(trace, policy_set(routing="random"), seed=seed)


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One line of the table."""

    law: str
    case: str
    theory: float
    simulated: float
    holds: bool


def checks(requests: int = 400_000, seed: int = 0) -> Iterator[Check]:
    """Every law against a simulation; queues get ``requests`` requests each."""
    for load in (0.3, 0.6, 0.8):
        theory = md1_wait_s(load, SERVICE_S)
        yield _wait("M/D/1 mean wait (s)", f"load {load}", theory, queue(load, requests, seed=seed))
    load, steps = 0.6, 10.0
    # A geometric number of steps N with mean m has E[N^2] = (2 - 1/m) m^2.
    theory = mg1_wait_s(load / SERVICE_S, SERVICE_S, (2 - 1 / steps) * SERVICE_S**2)
    result = queue(load, requests, service="geometric", mean_steps=steps, seed=seed)
    yield _wait("M/Geo/1 mean wait (s)", f"load {load}, {steps:g} steps", theory, result)
    theory = md1_wait_s(load, SERVICE_S)
    result = queue(load, requests, engines=4, seed=seed)
    yield _wait("4 x M/D/1 mean wait (s)", f"load {load}, random routing", theory, result)
    for chip, model in (("a100_80g", "llama3_8b"), ("h100", "qwen3_30b_a3b")):
        yield _first_token(chip, model, seed)
    yield _hits(seed)


def _wait(law: str, case: str, theory: float, result: Result) -> Check:
    simulated = float(queue_s(result.requests).mean())
    holds = abs(simulated / theory - 1) <= TOLERANCE
    return Check(law=law, case=case, theory=theory, simulated=simulated, holds=holds)


def _chat(seed: int) -> Trace:
    return generate("chat", sessions=200, session_rate_per_s=0.5, prompt_max=16_000, seed=seed)


def _first_token(chip: str, model: str, seed: int) -> Check:
    """The request whose first token comes closest to its floor."""
    result = Simulator(Deployment.of(chip, model, engines=2)).serve(_chat(seed), policy_set())
    table = result.requests
    floors = np.array(
        [
            ttft_floor_s(load_chip(chip), load_model(model), prompt, cached)
            for prompt, cached in zip(table["prompt_tokens"], table["cached_tokens"], strict=True)
        ]
    )
    simulated = ttft_s(table)
    closest = int(np.argmin(simulated / floors))
    return Check(
        law="TTFT >= roofline (s)",
        case=f"{model} on {chip}",
        theory=float(floors[closest]),
        simulated=float(simulated[closest]),
        holds=bool(np.all(simulated >= floors)),
    )


def _hits(seed: int) -> Check:
    """Two engines that share a trace find less than one infinite cache would."""
    trace, tokens = _chat(seed), 16
    deployment = Deployment.of("a100_80g", "llama3_8b", engines=2, block_tokens=tokens)
    result = Simulator(deployment).serve(trace, policy_set(routing="prefix_affinity"))
    hits = int(result.requests["cached_tokens"].sum()) // tokens
    bound = infinite_cache_hits(trace, tokens)
    return Check(
        law="hit blocks <= infinite cache",
        case="chat on 2 engines",
        theory=bound,
        simulated=hits,
        holds=hits <= bound,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; 1 if a law does not hold."""
    parser = argparse.ArgumentParser(prog="python -m validate.theory", description=__doc__)
    parser.add_argument("--requests", type=int, default=400_000, help="in each queue")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    broken = 0
    print(f"{'law':<30} {'case':<26} {'theory':>12} {'simulated':>12} {'ratio':>8}")
    for check in checks(options.requests, options.seed):
        broken += not check.holds
        print(
            f"{check.law:<30} {check.case:<26} {check.theory:>12.6g} {check.simulated:>12.6g} "
            f"{check.simulated / check.theory:>8.4f} {'' if check.holds else '  BROKEN'}",
            flush=True,
        )
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
