"""The demo writes what it says, and its picture is worth looking at."""

from __future__ import annotations

from pathlib import Path

from experiments.demo import NAMES, demo
from sim.result import Result


def test_the_demo_writes_four_runs_and_two_figures(tmp_path: Path) -> None:
    labels: list[str] = []
    made = demo(tmp_path, limit=60, progress=lambda name, done, total: labels.append(name))
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        [*NAMES, "ttft.png", "tradeoff.png"]
    )
    assert list(dict.fromkeys(labels)) == list(made.results) == list(NAMES)
    for folder in made.folders:
        assert Result.load(folder).summary()["requests"] == 60


def test_the_demo_makes_the_policies_differ(tmp_path: Path) -> None:
    made = demo(tmp_path)
    figures = {name: result.summary() for name, result in made.results.items()}
    plain, best = figures["lru-round_robin"], figures["slo_aware-prefix_affinity"]
    assert best["prefix_hit_rate"] > plain["prefix_hit_rate"] + 0.05
    assert best["ttft_p99_s"] < 0.8 * plain["ttft_p99_s"]
    assert best["slo_attainment"] > plain["slo_attainment"]
    assert all(summary["evictions"] > 1000 for summary in figures.values())
    assert sum(summary["preemptions"] for summary in figures.values()) > 0
