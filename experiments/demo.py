"""The demo: eviction against routing on the bundled trace, in one table and two figures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from experiments.runs import compose, run
from sim.result import Result

__all__ = ["ABOUT", "NAMES", "OVERRIDES", "Demo", "demo"]

# 3,000 blocks (48,000 tokens, 6 of the 54 GiB of KV cache that an A100-80G has left beside the
# weights, as on a GPU that is shared) and twice the recorded arrivals: with all of the memory the
# two eviction policies have the same p99 to the digit, and nothing is ever preempted.
OVERRIDES = (
    "trace=demo",
    "trace.rate_scale=2",
    "chip=a100_80g",
    "model=llama3_8b",
    "engines=4",
    "engine.num_gpu_blocks=3000",
)
ABOUT = (
    "four A100-80G with Llama-3.1-8B; arrivals twice as fast as in the trace and KV cache "
    "limited to 3,000 blocks per GPU, so that policies have something to decide; SLO (TTFT, time "
    "per token): interactive 0.5 s, 50 ms; standard 2 s, 100 ms; batch 20 s, 500 ms; one trace "
    "and one seed, so small differences may be chance"
)
EVICTIONS = ("lru", "slo_aware")
ROUTINGS = ("round_robin", "prefix_affinity")
NAMES = tuple(f"{eviction}-{routing}" for eviction, routing in product(EVICTIONS, ROUTINGS))
"""Of the runs and of their folders."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Demo:
    """What the demo made."""

    results: dict[str, Result]
    folders: list[Path]
    figures: list[Path]


def demo(
    out: str | Path = "outputs/demo",
    *,
    limit: int | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Demo:
    """Four runs, their folders and two figures under ``out``.

    Args:
        out: folder; runs of an earlier demo in it are replaced.
        limit: only so many requests of the trace.
        progress: called with (run, requests done, requests).
    """
    # matplotlib takes longer to import than a run takes.
    from experiments import plots  # noqa: PLC0415

    root = Path(out)
    results: dict[str, Result] = {}
    folders: list[Path] = []
    for name, (eviction, routing) in zip(NAMES, product(EVICTIONS, ROUTINGS), strict=True):
        choices = [f"policies/eviction={eviction}", f"policies/routing={routing}"]
        cut = [] if limit is None else [f"trace.limit={limit}"]
        config = compose([*OVERRIDES, *choices, *cut])

        def update(done: int, total: int, name: str = name) -> None:
            if progress is not None:
                progress(name, done, total)

        folder = run(config, root / name, progress=update)
        folders.append(folder)
        results[name] = Result.load(folder)
    figures: list[Path] = []
    for file, axes in (
        ("ttft.png", plots.latency_cdf(results, "ttft")),
        ("tradeoff.png", plots.tradeoff(results)),
    ):
        figures.append(plots.save(axes, root / file))
    return Demo(results=results, folders=folders, figures=figures)
