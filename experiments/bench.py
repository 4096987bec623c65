"""How fast the simulator is: ``python -m experiments.bench [--json] [--case NAME] [--quick]``.

Each case runs in a process of its own. Seconds depend on the machine, so compare the ratio to the
step-by-step engine, which runs the first requests of the same case side by side.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from policies.registry import policy_set
from sim import Deployment, Simulator
from traces import Trace, generate, read

DATA = Path(os.environ.get("SERVELAB_DATA", "../shared"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One workload on one deployment."""

    name: str
    about: str
    trace: Callable[[int | None], Trace]
    """Makes the trace, cut to a number of requests if one is given."""
    deployment: Deployment
    routing: str = "least_loaded"
    needs: Path | None = None
    """A file of the public data."""
    compared: int = 1_500
    """Requests that the step-by-step engine simulates, too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """What a case costs."""

    case: str
    requests: int
    requests_per_cpu_s: float
    ratio_to_stepwise: float
    """How many times faster than the step-by-step engine, on the first requests."""
    events_per_request: float
    """SimPy events, arrivals included."""
    steps_per_request: float
    cpu_s: float
    wall_s: float
    rss_bytes: int


def _cut(trace: Trace, count: int | None) -> Trace:
    return trace if count is None else trace.head(count)


def _generated(count: int | None) -> Trace:
    return generate(
        "independent",
        count=1_000_000 if count is None else count,
        rate_per_s=170.0,
        prompt_mean=1000.0,
        output_mean=200.0,
        seed=0,
    )


_AZURE = DATA / "traces/azure/AzureLLMInferenceTrace_conv.csv.gz"
_MOONCAKE = DATA / "traces/mooncake/conversation_trace.jsonl.gz"


def cases() -> dict[str, Case]:
    """All cases by name."""
    a100 = Deployment.of("a100_80g", "llama3_8b", engines=16)
    found = (
        Case(
            name="azure",
            about="Azure conv at 8x rate, 16 engines",
            trace=lambda count: _cut(read(_AZURE).scaled(8), count),
            deployment=a100,
            needs=_AZURE,
        ),
        Case(
            name="mooncake",
            about="Mooncake conversation, 16 engines, 512-token blocks",
            trace=lambda count: _cut(read(_MOONCAKE), count),
            deployment=Deployment.of("a100_80g", "llama3_8b", engines=16, block_tokens=512),
            needs=_MOONCAKE,
        ),
        Case(
            name="mooncake_16",
            about="the same with vLLM's 16-token blocks",
            trace=lambda count: _cut(read(_MOONCAKE), count),
            deployment=a100,
            needs=_MOONCAKE,
            compared=400,
        ),
        Case(
            name="mooncake_prefix",
            about="the same behind a router that asks every cache",
            trace=lambda count: _cut(read(_MOONCAKE), count),
            deployment=a100,
            routing="prefix_affinity",
            needs=_MOONCAKE,
            compared=400,
        ),
        Case(
            name="generated",
            about="generated requests on 16 engines",
            trace=lambda count: generate(
                "independent",
                count=20_000 if count is None else count,
                rate_per_s=42.0,
                prompt_mean=1000.0,
                output_mean=200.0,
                seed=0,
            ),
            deployment=a100,
        ),
        Case(
            name="million",
            about="a million generated requests on 64 engines",
            trace=_generated,
            deployment=Deployment.of("a100_80g", "llama3_8b", engines=64),
        ),
    )
    return {case.name: case for case in found}


def measure(case: Case, *, limit: int | None = None, repeats: int = 5) -> Score:
    """Run a case; the best of ``repeats`` for its speed."""
    trace = case.trace(limit)
    policies = policy_set(routing=case.routing)
    simulator = Simulator(case.deployment)
    cpu_s = wall_s = float("inf")
    events = steps = 0.0
    for _ in range(1 if len(trace) > 100_000 else repeats):
        wall, cpu = time.perf_counter(), time.process_time()
        result = simulator.serve(trace, policies)
        cpu_s = min(cpu_s, time.process_time() - cpu)
        wall_s = min(wall_s, time.perf_counter() - wall)
        events = result.meta["simpy_events"] / len(trace)
        steps = float(result.engines["steps"].sum()) / len(trace)
    rss_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    some = trace.head(min(case.compared, len(trace)))
    stepwise = Simulator(case.deployment, mode="stepwise")
    times = {"fast": float("inf"), "stepwise": float("inf")}
    for name, engine in (("fast", simulator), ("stepwise", stepwise), ("fast", simulator)):
        cpu = time.process_time()
        engine.serve(some, policies)
        times[name] = min(times[name], time.process_time() - cpu)
    return Score(
        case=case.name,
        requests=len(trace),
        requests_per_cpu_s=len(trace) / cpu_s,
        ratio_to_stepwise=times["stepwise"] / times["fast"],
        events_per_request=events,
        steps_per_request=steps,
        cpu_s=cpu_s,
        wall_s=wall_s,
        rss_bytes=rss_bytes,
    )


def _apart(name: str, limit: int | None) -> Score:
    """Measure a case in a fresh process, so that its memory is its own."""
    command = [sys.executable, "-m", "experiments.bench", "--case", name, "--json"]
    command += [] if limit is None else ["--limit", str(limit)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return Score(**json.loads(done.stdout)[0])


def main(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")] = False,
    case: Annotated[str | None, typer.Option(help="Only this case, in this process.")] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first requests of each.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="As --limit 3000.")] = False,
) -> None:
    """Measure requests per CPU-second, events per request and memory, case by case."""
    limit = 3_000 if quick and limit is None else limit
    known = cases()
    errors = Console(stderr=True, soft_wrap=True, highlight=False)
    if case is not None and case not in known:
        errors.print(f"error: no case {case!r}; known are {', '.join(known)}", markup=False)
        raise typer.Exit(2)
    scores: list[Score] = []
    for name in [case] if case is not None else list(known):
        needs = known[name].needs
        if needs is not None and not needs.exists():
            errors.print(f"{name}: skipped, {needs} is not there (set SERVELAB_DATA)")
            continue
        scores.append(measure(known[name], limit=limit) if case else _apart(name, limit))
    if as_json:
        print(json.dumps([asdict(score) for score in scores], indent=2))
        return
    table = Table(title="requests simulated on one core", caption="ratio: to the stepwise engine")
    for heading in ("case", "requests", "per CPU-second", "ratio", "events", "steps", "RSS"):
        table.add_column(heading, justify="left" if heading == "case" else "right")
    for score in scores:
        table.add_row(
            f"{score.case}: {known[score.case].about}",
            f"{score.requests:,}",
            f"{score.requests_per_cpu_s:,.0f}",
            f"{score.ratio_to_stepwise:.1f}x",
            f"{score.events_per_request:.2f}",
            f"{score.steps_per_request:.1f}",
            f"{score.rss_bytes / 1e6:,.0f} MB",
        )
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
