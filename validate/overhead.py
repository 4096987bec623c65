"""What the plug-in costs: scheduler time per step, stock vLLM against policies plugged in.

    python -m validate.overhead

The real scheduler runs without a model on a workload with tight memory (many evictions per
step), so the share is larger than in an engine, where a step also takes milliseconds of model
time. Variants take turns, and each is compared with the stock run of its round.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Mapping
from statistics import median
from typing import Annotated, Any

import numpy as np
import typer

from policies.registry import catalog
from sim.scheduler import EngineLimits
from validate.workloads import Entry, Workload

__all__ = ["ALLOWED_RATIO", "evictions", "measure", "report", "variants", "workload"]

LIMITS = EngineLimits(
    block_tokens=16,
    max_num_batched_tokens=512,
    max_num_seqs=64,
    max_model_len=4096,
    num_gpu_blocks=400,
)

ALLOWED_RATIO = 1.10
"""Most that ``eviction lru`` may take per step, in parts of stock vLLM's time (median of the
rounds). It decides exactly what vLLM decides, so all of the difference is the plug-in's."""


def workload(requests: int, policies: Mapping[str, Any], seed: int = 0) -> Workload:
    """Prompts that share one of eight documents, in memory that holds about a dozen of them."""
    rng = np.random.default_rng(seed)

    def tokens(low: int, high: int) -> tuple[int, ...]:
        return tuple(int(t) for t in rng.integers(2, 10_000, rng.integers(low, high)))

    documents = [tokens(64, 512) for _ in range(8)]
    entries = []
    at = 0.0
    for index in range(requests):
        at += rng.exponential(8.0)
        document = documents[min(int(rng.exponential(1.7)), 7)]
        entries.append(
            Entry(
                id=f"r{index:05}",
                at_step=int(at),
                prompt=document + tokens(16, 700),
                output_tokens=int(rng.integers(8, 200)),
            )
        )
    return Workload(name="overhead", limits=LIMITS, policies=policies, entries=tuple(entries))


def variants() -> dict[str, dict[str, Any]]:
    """What is compared with stock vLLM, by name."""
    found: dict[str, dict[str, Any]] = {"eviction lru": {"eviction": "lru"}}
    found["lru, fcfs, always"] = {"eviction": "lru", "admission": "fcfs", "reuse": "always"}
    for entry in catalog().values():
        if entry.kind == "eviction" and entry.name != "lru" and not entry.needs_oracle:
            found[f"eviction {entry.name}"] = {"eviction": entry.name}
    return found


def measure(policies: Mapping[str, Any], requests: int) -> tuple[float, int]:
    """Scheduler time of one run: microseconds of processor time per step, and its steps.

    Counted are ``add_request``, ``schedule`` and ``update_from_output``, garbage collection not.
    The plug-in measures step times, as in an engine that was given none.
    """
    from validate.vllm_plugin.bare import BareEngine  # noqa: PLC0415 - needs vLLM
    from validate.vllm_plugin.views import StepTimes  # noqa: PLC0415 - as above

    engine = BareEngine(workload(requests, policies), record=False)
    scheduler = engine.scheduler
    if policies:
        scheduler._engine.measured = StepTimes()
    spent_ns = steps = 0

    def timed(method: Any, *, step: bool = False) -> Any:
        def call(*args: Any) -> Any:
            nonlocal spent_ns, steps
            steps += step
            began_ns = time.thread_time_ns()
            answer = method(*args)
            spent_ns += time.thread_time_ns() - began_ns
            return answer

        return call

    scheduler.schedule = timed(scheduler.schedule, step=True)
    scheduler.update_from_output = timed(scheduler.update_from_output)
    scheduler.add_request = timed(scheduler.add_request)
    gc.collect()
    gc.disable()
    try:
        engine.run()
    finally:
        gc.enable()
    return spent_ns / 1e3 / steps, steps


def evictions(requests: int) -> int:
    """How many cached blocks stock vLLM gives up in one run."""
    from validate.vllm_plugin.bare import BareEngine  # noqa: PLC0415 - needs vLLM

    return sum(len(row["evicted"]) for row in BareEngine(workload(requests, {})).run())


def report(requests: int, repeats: int) -> tuple[list[str], bool]:
    """Measure all variants in turn, and say what they cost, a line for each.

    Returns:
        The lines, and whether ``eviction lru`` keeps within ``ALLOWED_RATIO``.
    """
    chosen: dict[str, dict[str, Any]] = {"stock vLLM": {}} | variants()
    times: dict[str, list[float]] = {name: [] for name in chosen}
    steps: dict[str, int] = {}
    for _ in range(repeats):
        for name, policies in chosen.items():
            each_us, steps[name] = measure(policies, requests)
            times[name].append(each_us)
    stock = times["stock vLLM"]
    count = steps["stock vLLM"]
    lines = [
        f"{requests} requests, {count} steps, {evictions(requests) / count:.1f} evictions per "
        f"step; {repeats} rounds; processor time of the scheduler",
        f"{'':20} {'fastest':>16} {'median':>14}   ratio to stock (median, and its range)",
    ]
    medians: dict[str, float] = {}
    for name, found in times.items():
        ratios = [each / of for each, of in zip(found, stock, strict=True)]
        medians[name] = median(ratios)
        lines.append(
            f"{name:20} {min(found):8.1f} us/step {median(found):6.1f} us/step   "
            f"{medians[name]:.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
        )
    lru = medians["eviction lru"]
    kept = lru <= ALLOWED_RATIO
    lines.append(
        f"eviction lru takes {lru:.3f} of stock vLLM's time; "
        f"{'at most' if kept else 'that is too much: at most'} {ALLOWED_RATIO:.2f} is allowed"
    )
    return lines, kept


def main(
    requests: Annotated[int, typer.Option(help="Requests per run.", min=1)] = 200,
    repeats: Annotated[int, typer.Option(help="Runs of each variant.", min=1)] = 5,
) -> None:
    """Measure what the plug-in costs per scheduler step; needs vLLM, but no model.

    The exit code is 1 if eviction lru takes more than 1.10 of stock vLLM's time.
    """
    try:
        import validate.vllm_plugin  # noqa: F401, PLC0415 - says what is missing
    except ValueError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from error
    lines, kept = report(requests, repeats)
    typer.echo("\n".join(lines))
    raise typer.Exit(0 if kept else 1)


if __name__ == "__main__":
    typer.run(main)
