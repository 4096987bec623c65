"""``servelab parity``: vLLM's real scheduler and ours step through the same workloads.

Every field of every step must be equal, and so must when requests finish. The scheduler runs
without a model (``validate.vllm_plugin.bare``), because no decision depends on one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal, TypeAlias

from rich.console import Console

import traces
from sim.request import PS_PER_S
from sim.scheduler import EngineLimits
from validate.decisions import Decision, Difference, first_difference, show
from validate.environment import has_vllm
from validate.simulated import simulate, simulate_fast
from validate.workloads import Workload, block_chains, random_workload, workload_of

Mode: TypeAlias = Literal["steps", "fast"]

BATCH = 50
"""Workloads that a process compares before it reports."""


class ParityError(ValueError):
    """Parity cannot be checked as asked."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """One workload on both sides."""

    workload: Workload
    ours: list[Decision]
    """Empty where the fast engine was compared: it makes no rows."""
    theirs: list[Decision]
    difference: Difference | None
    """``None``: they decided the same."""
    seen: Counter[str] = field(default_factory=Counter)
    """How often each feature occurred, by vLLM's account; see ``features``."""


def compare(workload: Workload, mode: Mode = "steps", *, plugged: bool = False) -> Comparison:
    """Step both sides through a workload; needs vLLM.

    Args:
        workload: with policies, vLLM runs them in the plug-in's scheduler.
        mode: ``steps`` compares every field of every step of the reference engine, ``fast`` what
            the fast engine decides and when: admissions with hit tokens, preemptions, finishes,
            and the order of evicted blocks.
        plugged: use the plug-in's scheduler although no policy is given.
    """
    from validate.vllm_plugin.bare import BareEngine  # noqa: PLC0415 - imports vLLM

    oracle = BareEngine(workload, plugged=plugged)
    theirs = oracle.run()
    ours: list[Decision] = []
    if mode == "fast":
        difference = _fast_difference(workload, theirs, oracle.finished)
    else:
        engine = simulate(workload)
        ours = engine.rows
        difference = first_difference(ours, theirs) or _first_finish(
            engine.ends.finished_at, oracle.finished, len(theirs)
        )
    return Comparison(workload, ours, theirs, difference, features(workload, theirs))


def _first_finish(
    ours: dict[str, tuple[int, int]], theirs: dict[str, tuple[int, int]], step: int
) -> Difference | None:
    for ident in sorted({*ours, *theirs}):
        if ours.get(ident) != theirs.get(ident):
            return Difference(step, f"finish of {ident}", ours.get(ident), theirs.get(ident))
    return None


def _contents(workload: Workload) -> dict[str, list[int]]:
    """The ids of each request's blocks, one by one."""
    return {
        ident: [
            i for chain in chains for start, count in chain for i in range(start, start + count)
        ]
        for ident, chains in block_chains(workload).items()
    }


def _fast_difference(
    workload: Workload, rows: list[Decision], finished: dict[str, tuple[int, int]]
) -> Difference | None:
    noted = simulate_fast(workload)
    contents = _contents(workload)

    def content(name: str) -> int:
        ident, _, index = name.rpartition(":")
        return contents[ident][int(index)]

    times = [(round(row.get("began_s", 0.0) * PS_PER_S), row) for row in rows]
    expected: dict[str, list[Any]] = {
        "admitted": [(at, i, hit) for at, row in times for i, hit in row["hits"].items()],
        "preempted": [(at, ident) for at, row in times for ident in row["preempted"]],
        "evicted": [content(name) for row in rows for name, _ in row["evicted"]],
    }
    for key, theirs in expected.items():
        ours = getattr(noted, key)
        for place, (x, y) in enumerate(zip(ours, theirs, strict=False)):
            if x != y:
                return Difference(place, f"{key}, by place", x, y)
        if len(ours) != len(theirs):
            return Difference(
                min(len(ours), len(theirs)), f"number of {key}", len(ours), len(theirs)
            )
    return _first_finish(noted.finished, finished, len(rows))


def features(workload: Workload, rows: list[Decision]) -> Counter[str]:
    """How often what makes parity hard occurred, as vLLM's rows tell."""
    entries = {entry.id: entry for entry in workload.entries}
    size = workload.limits.block_tokens
    contents = _contents(workload)
    answers = {
        content
        for ident, blocks in contents.items()
        for content in blocks[len(entries[ident].prompt) // size :]
    }
    seen: Counter[str] = Counter(steps=len(rows), requests=len(entries))
    running: set[str] = set()
    for row in rows:
        seen["preemptions"] += len(row["preempted"])
        seen["several preempted in a step"] += len(row["preempted"]) > 1
        seen["evictions"] += len(row["evicted"])
        seen["aborted while running"] += sum(ident in running for ident in row["aborted"])
        seen["aborted while waiting"] += sum(ident not in running for ident in row["aborted"])
        for ident, tokens in row["hits"].items():
            used = contents[ident][: tokens // size]
            seen["hits"] += tokens > 0
            seen["hits on generated blocks"] += not answers.isdisjoint(used)
            seen["hits with a salt"] += bool(used and entries[ident].salt)
            seen["readings skipped"] += entries[ident].skip_reading
        running = set(row["running"])
    return seen


# --------------------------------------------------------------------------- command line


def parity(
    seeds: range | None = None,
    workload: Path | None = None,
    *,
    options: Sequence[str] = (),
    step_s: float = 0.02,
    asynchronous: bool = False,
    policies: bool = False,
    mode: Mode = "steps",
    jobs: int = 1,
) -> int:
    """Compare workloads, say how it goes, and stop at the first difference.

    Args:
        seeds: of random workloads; with ``None`` and no ``workload``, 0 to 499.
        workload: a trace file to step through instead.
        options: the engine's for the trace, as Hydra overrides ``engine.KEY=VALUE``.
        step_s: how long a step takes when the trace's arrival times become steps.
        asynchronous: compare the asynchronous scheduler.
        policies: random policies on both sides, in vLLM through the plug-in; not for a trace.
        mode: as for ``compare``.
        jobs: processes, for seeds; each imports vLLM first, which takes several seconds.

    Returns:
        The exit code: 1 if there is a difference, which is printed side by side.

    Raises:
        ParityError: vLLM is missing, or the arguments do not fit together.
        ValueError: the trace or an option is wrong.
    """
    if not has_vllm():
        raise ParityError("parity needs vLLM: `make validate` builds an environment with it")
    if seeds is not None and workload is not None:
        raise ParityError("--seeds and --workload exclude each other")
    if workload is not None and (policies or jobs > 1):
        which = "--policies draws them" if policies else "--jobs shares seeds"
        raise ParityError(f"{which} for random workloads; leave it out with --workload")
    if workload is None and options:
        raise ParityError(f"{options[0]} needs --workload: random workloads draw their engine")
    progress = Console(stderr=True)
    total: Counter[str] = Counter()
    count = 0
    bad: Comparison | None = None
    again = " ".join([f"--workload {workload} --step-s {step_s}", *options])
    if workload is not None:
        limits = _limits(options)
        comparison = compare(_from_trace(workload, limits, step_s, asynchronous), mode)
        count, total = 1, comparison.seen
        bad = comparison if comparison.difference is not None else None
    else:
        check = partial(_check, asynchronous=asynchronous, policies=policies, mode=mode)
        for batch in _batches(check, range(500) if seeds is None else seeds, jobs):
            count += batch.workloads
            total += batch.seen
            progress.print(f"{count} workloads, {total['steps']} steps", highlight=False)
            if batch.bad_seed is not None:
                again = f"--seeds {batch.bad_seed}:{batch.bad_seed + 1}"
                again += " --policies" * policies
                random = random_workload(
                    batch.bad_seed, asynchronous=asynchronous, policies=policies
                )
                bad = compare(random, mode)
                break
    seen = ", ".join(f"{number} {key}" for key, number in sorted(total.items()) if key != "steps")
    progress.print(f"among them: {seen}", highlight=False)
    if bad is not None and bad.difference is not None:
        _report(bad, bad.difference)
        again += " --asynchronous" * asynchronous + " --fast" * (mode == "fast")
        print(f"again: servelab parity {again}")
    print(f"{count} workloads, {total['steps']} steps, {int(bad is not None)} differences")
    return int(bad is not None)


@dataclass(frozen=True, slots=True)
class _Batch:
    """Workloads that one process has compared."""

    workloads: int
    seen: Counter[str]
    bad_seed: int | None
    """The first seed with a difference, with which the batch ended."""


def _check(seeds: range, *, asynchronous: bool, policies: bool, mode: Mode) -> _Batch:
    seen: Counter[str] = Counter()
    for count, seed in enumerate(seeds, 1):
        workload = random_workload(seed, asynchronous=asynchronous, policies=policies)
        comparison = compare(workload, mode)
        seen += comparison.seen
        if comparison.difference is not None:
            return _Batch(count, seen, seed)
    return _Batch(len(seeds), seen, None)


def _batches(check: Callable[[range], _Batch], seeds: range, jobs: int) -> Iterator[_Batch]:
    """The seeds in batches, in order."""
    ranges = [seeds[i : i + BATCH] for i in range(0, len(seeds), BATCH)]
    if jobs < 2:
        yield from map(check, ranges)
        return
    # vLLM starts threads when it is imported, so processes cannot be forked from this one.
    with ProcessPoolExecutor(jobs, get_context("spawn")) as pool:
        try:
            yield from pool.map(check, ranges)
        finally:
            pool.shutdown(cancel_futures=True)


def _limits(options: Sequence[str]) -> EngineLimits:
    from experiments.composing import compose, resolved  # noqa: PLC0415 - Hydra takes long

    for option in options:
        if not option.startswith("engine."):
            raise ParityError(f"{option} is not of the form engine.KEY=VALUE")
    return EngineLimits(**resolved(compose(options))["engine"])


def _from_trace(path: Path, limits: EngineLimits, step_s: float, asynchronous: bool) -> Workload:
    """The trace of a file; memory for four of its longest requests unless the limits say."""
    trace = traces.read(path)
    rows = trace.requests
    longest = limits.max_model_len or int((rows["prompt_tokens"] + rows["output_tokens"]).max())
    blocks = limits.num_gpu_blocks or 1 - 4 * (-longest // limits.block_tokens)
    limits = replace(
        limits,
        max_model_len=longest,
        num_gpu_blocks=blocks,
        async_scheduling=asynchronous or limits.async_scheduling,
    )
    return workload_of(trace, limits, step_s=step_s)


def _report(comparison: Comparison, difference: Difference) -> None:
    """Both states where they part, and what the engine's options are."""
    workload = comparison.workload
    print(f"{workload.name}: {difference}")
    print(f"{workload.limits}, priority={workload.priority}, policies={dict(workload.policies)}")
    if comparison.ours:
        show(difference, comparison.ours, comparison.theirs)
