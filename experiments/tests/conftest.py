"""Fixtures of these tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from experiments.composing import compose
from experiments.runs import simulate
from sim.result import Result

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder with the public traces."""
    folder = Path(os.environ.get("SERVELAB_DATA", ROOT.parent / "shared"))
    if not (folder / "traces").is_dir():
        pytest.skip(f"no public traces in {folder}; set SERVELAB_DATA")
    return folder


@pytest.fixture(scope="session")
def results() -> dict[str, Result]:
    """Two small runs that differ in their routing, on little memory."""
    small = ["trace.limit=150", "trace.rate_scale=4", "engines=2", "engine.num_gpu_blocks=900"]
    return {
        name: simulate(compose([*small, f"policies/routing={name}"]))
        for name in ("round_robin", "prefix_affinity")
    }
