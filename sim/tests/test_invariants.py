"""The invariants listed in ``sim/__init__.py`` on random cases (I5 is in ``test_twins``)."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from policies.registry import catalog, policy_set
from sim.backend import Deployment
from sim.engine import FastEngine
from sim.latency import AffineStepModel
from sim.metrics import ttft_s
from sim.scheduler import RUN
from sim.simulator import Simulator
from sim.stepwise import StepEngine
from sim.tests.bench import Job, serve
from sim.tests.twins import Case, Kind, Log, Stage, play, random_case
from traces import Trace, generate
from validate.theory import infinite_cache_hits, ttft_floor_s

KINDS: tuple[Kind, Kind] = (FastEngine, StepEngine)

# --------------------------------------------------------------------------- I1, I2, I3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("first", range(5000, 5040, 10))
def test_nothing_is_lost_at_any_time_and_looking_changes_nothing(first: int, kind: Kind) -> None:
    for seed in range(first, first + 10):
        case = random_case(seed)
        rng = random.Random(seed)
        start, end = (case.requests[i]["arrival_ps"] for i in (0, -1))
        looks = [rng.randint(start, 2 * end + 1) for _ in range(40)]
        assert play(case, kind, looks) == play(case, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_an_audit_notices_a_block_that_is_lost_and_one_that_is_there_twice(kind: Kind) -> None:
    case = next(c for c in map(random_case, range(100)) if c.limits.enable_prefix_caching)
    for lost in (1, -1):
        stage = Stage(case, kind)
        stage.play()
        engine = stage.engines[0]
        if isinstance(engine, FastEngine):
            engine.pool.free -= lost
        else:
            spare = engine.blocks.blank.pop()
            engine.blocks.blank.extend([spare] * (1 - lost))
        with pytest.raises(AssertionError):
            stage.audit()


class Timeline(Log):
    """Also keeps every run of steps."""

    def __init__(self) -> None:
        super().__init__()
        self.runs: list[tuple[int, ...]] = []
        """(engine, start, duration of the first step, slope, steps)."""

    def ran(self, packed: bytes) -> None:
        super().ran(packed)
        for record in RUN.iter_unpack(packed):
            self.runs.append(tuple(int(number) for number in record[:5]))


def _timeline(case: Case, kind: Kind) -> Timeline:
    timeline = Timeline()
    Stage(case, kind, timeline).play()
    return timeline


def _spans(timeline: Timeline, engine: int) -> list[tuple[int, int]]:
    """(start, end) of each run of steps of an engine, in the order they were reported."""
    return [
        (start, start + steps * first + slope * (steps * (steps - 1) // 2))
        for ident, start, first, slope, steps in timeline.runs
        if ident == engine
    ]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(6000, 6060))
def test_the_clock_never_goes_back_and_an_engine_does_one_thing_at_a_time(
    seed: int, kind: Kind
) -> None:
    case = random_case(seed)
    timeline = _timeline(case, kind)
    for engine in range(case.engines):
        now = 0
        for start, end in _spans(timeline, engine):
            assert now <= start < end
            now = end
    for index, (_, admitted, first, finish, *_) in _finished(timeline).items():
        arrival = next(r["arrival_ps"] for r in case.requests if r["index"] == index)
        assert arrival <= admitted < first <= finish


def _finished(log: Log) -> dict[int, tuple[Any, ...]]:
    return {index: row for index, row in log.rows.items() if len(row) > 3}


# --------------------------------------------------------------------------- I4

SAVE = """
import sys
from policies.registry import policy_set
from sim import Deployment, Simulator
from traces import generate
trace = generate("chat", sessions=30, session_rate_per_s=4.0, seed=1)
policies = policy_set(admission="shortest_prompt", eviction="slo_aware", routing="power_of_two")
deployment = Deployment.of("a100_80g", "llama3_8b", engines=3, num_gpu_blocks=1200)
result = Simulator(deployment, signal_age_s=0.5).serve(trace, policies, seed=5)
result.save(sys.argv[1], config={"seed": 5})
"""


def test_the_same_seed_gives_the_same_bytes_in_every_process(tmp_path: Path) -> None:
    folders = []
    for hash_seed in ("0", "1"):  # a set that is iterated over would show
        folder = tmp_path / hash_seed
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        subprocess.run(
            [sys.executable, "-c", SAVE, str(folder)],
            check=True,
            env=environment,
            cwd=Path(__file__).parents[2],
        )
        folders.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert folders[0] == folders[1]
    assert set(folders[0]) >= {"requests.parquet", "runs.parquet", "summary.json", "meta.json"}


# --------------------------------------------------------------------------- I7


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("first", range(8000, 8060, 15))
def test_an_engine_works_exactly_while_it_has_a_request(first: int, kind: Kind) -> None:
    """Except under policies that defer: time with work == time with a request, to the tick."""
    for seed in range(first, first + 15):
        case = random_case(seed)
        if case.admission["name"] == "token_bucket":
            continue
        if case.aborts_ps and case.limits.async_scheduling:
            continue  # a step that was planned executes, with or without its requests
        timeline = _timeline(case, kind)
        arrivals = {request["index"]: request["arrival_ps"] for request in case.requests}
        for engine in range(case.engines):
            present = [
                (arrivals[index], row[1] if row[-1] == "aborted" else row[3])
                for index, row in timeline.rows.items()
                if row[0] == engine and (row[-1] == "aborted" or len(row) > 3)
            ]
            assert _union(_spans(timeline, engine)) == _union(present)


def _union(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The spans merged where they touch."""
    merged: list[tuple[int, int]] = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((start, end))
    return merged


# --------------------------------------------------------------------------- I8


@pytest.mark.parametrize("chip", ["a100_80g", "h100", "rtx4090"])
def test_no_first_token_beats_the_roofline(chip: str) -> None:
    trace = generate("chat", sessions=40, session_rate_per_s=2.0, prompt_max=4000, seed=4)
    deployment = Deployment.of(chip, "llama3_8b", max_num_batched_tokens=8192)
    result = Simulator(deployment).serve(trace, policy_set())
    requests = result.requests
    floors_s = [
        ttft_floor_s(deployment.chip, deployment.model, prompt, cached)
        for prompt, cached in zip(requests["prompt_tokens"], requests["cached_tokens"], strict=True)
    ]
    assert np.all(ttft_s(requests) > floors_s)


def spread(trace: Trace) -> Trace:
    """The same requests so far apart that none overlap, one token each, without sessions."""
    columns = {
        "arrival_s": np.arange(len(trace), dtype=np.float64),
        "prompt_tokens": trace.requests["prompt_tokens"],
        "output_tokens": 1,
    }
    return Trace.build(trace.name, columns, trace.chains, block_tokens=trace.block_tokens)


@pytest.mark.parametrize("seed", range(6))
def test_no_policy_finds_more_than_belady_or_an_infinite_cache(seed: int) -> None:
    trace = spread(
        generate(
            "chat", sessions=40, session_rate_per_s=0.5, prompt_max=1500, user_mean=60.0,
            output_mean=60.0, system_min=64, system_max=600, seed=seed,
        )
    )  # fmt: skip
    deployment = Deployment.of("a100_80g", "llama3_8b", num_gpu_blocks=160, max_model_len=1600)
    simulator = Simulator(deployment, step_model=AffineStepModel(10**9, 0, 0, 0, 0))
    hits = {
        entry.name: int(
            simulator.serve(trace, policy_set(eviction=entry.name)).requests["cached_tokens"].sum()
        )
        // 16
        for entry in catalog().values()
        if entry.kind == "eviction"
    }
    assert max(hits.values()) == hits["belady"] <= infinite_cache_hits(trace, 16)
    assert min(hits.values()) < 0.9 * hits["belady"]  # the cache is small enough to tell


# --------------------------------------------------------------------------- I9


def azure_like(requests: int, output_factor: int) -> Trace:
    """Prompt and output lengths of a chat service, at a load of about half of 16 engines."""
    return generate(
        "independent",
        count=requests,
        rate_per_s=40.0 / output_factor,
        prompt_mean=1150.0,
        prompt_cv=1.1,
        prompt_max=4000,
        output_mean=210.0 * output_factor,
        output_cv=0.8,
        output_max=1500 * output_factor,
        seed=9,
    )


def test_events_per_request_are_few_and_do_not_grow_with_the_output() -> None:
    deployment = Deployment.of("a100_80g", "llama3_8b", engines=16)
    per_request, tokens = [], []
    for factor in (1, 10):
        trace = azure_like(4000, factor)
        policies = policy_set(routing="least_loaded")
        result = Simulator(deployment).serve(trace, policies)
        assert (result.requests["state"] == "finished").all()
        per_request.append(result.meta["simpy_events"] / len(trace))
        tokens.append(result.summary()["output_tokens_per_s"])
    assert tokens[1] == pytest.approx(tokens[0], rel=0.15)  # the same load
    assert max(per_request) <= 6
    assert per_request[1] <= 1.1 * per_request[0]


def test_a_lone_request_takes_as_many_events_whatever_it_generates() -> None:
    events = [
        serve(Job(0, 4, output), blocks=1000).result.meta["simpy_events"]
        for output in (2, 20, 200, 2000)
    ]
    assert len(set(events)) == 1
