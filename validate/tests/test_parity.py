"""The simulator decides what vLLM's real scheduler decides: every field of every step."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="needs vLLM: make validate builds an environment with it")

import traces
from policies import registry
from policies.admission.priority import Priority
from sim.blocks import Block, Blocks
from sim.request import Request
from sim.scheduler import EngineLimits
from sim.stepwise import StepEngine
from validate import parity, simulated
from validate.decisions import FIELDS, first_difference
from validate.parity import Mode, ParityError, compare
from validate.workloads import Entry, Workload, random_workload

with warnings.catch_warnings():  # of torch's own modules, while they are imported
    warnings.simplefilter("ignore", DeprecationWarning)
    warnings.simplefilter("ignore", FutureWarning)
    from validate.vllm_plugin.bare import BareEngine, engine_config

pytestmark = pytest.mark.vllm

POLICIES = Path(__file__).with_name("stubborn_policies.py")


def check(workloads: list[Workload], mode: Mode = "steps") -> Counter[str]:
    """Compare them; how often each feature occurred, and in how many workloads."""
    seen: Counter[str] = Counter()
    for workload in workloads:
        comparison = compare(workload, mode)
        assert comparison.difference is None, f"{workload.name}: {comparison.difference}"
        seen += comparison.seen
        seen += Counter(f"with {key}" for key, count in comparison.seen.items() if count)
    return seen


def test_every_step_of_the_synchronous_scheduler_is_equal() -> None:
    seen = check([random_workload(seed) for seed in range(500)])
    assert seen["steps"] > 80_000
    assert {key for key in FEATURES if seen[f"with {key}"] < 25} == set()


FEATURES = (
    "preemptions", "several preempted in a step", "evictions", "aborted while running",
    "aborted while waiting", "hits", "hits on generated blocks", "hits with a salt",
    "readings skipped",
)  # fmt: skip


def test_every_step_of_the_asynchronous_scheduler_is_equal() -> None:
    seen = check([random_workload(seed, asynchronous=True) for seed in range(1000, 1200)])
    assert {key for key in FEATURES if seen[f"with {key}"] < 8} == set()


def test_every_step_with_policies_is_equal() -> None:
    workloads = [
        random_workload(seed, policies=True, asynchronous=seed % 4 == 0)
        for seed in range(2000, 2200)
    ]
    seen = check(workloads)
    assert {key for key in FEATURES if seen[f"with {key}"] < 8} == set()


def test_the_fast_engine_decides_the_same_at_the_same_steps() -> None:
    seen = check([random_workload(seed) for seed in range(250)], "fast")
    assert {key for key in FEATURES if seen[f"with {key}"] < 12} == set()


def test_the_fast_engine_with_asynchronous_scheduling_decides_the_same_at_the_same_steps() -> None:
    workloads = [random_workload(seed, asynchronous=True) for seed in range(3000, 3150)]
    seen = check(workloads, "fast")
    assert {key for key in FEATURES if seen[f"with {key}"] < 6} == set()


def test_the_fast_engine_with_policies_decides_the_same_at_the_same_steps() -> None:
    check([random_workload(seed, policies=True) for seed in range(2000, 2060)], "fast")


@pytest.fixture(scope="module")
def _stubborn() -> Iterator[None]:
    """The policies of ``stubborn_policies.py``, which no other test shall see."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "_registered", dict(registry._registered))
        registry.load_module(POLICIES)
        yield


@pytest.mark.usefixtures("_stubborn")
@pytest.mark.parametrize("asynchronous", [False, True])
def test_policies_that_hold_reject_and_keep_half_are_equal(asynchronous: bool) -> None:
    policies = {"admission": "stubborn", "eviction": "shallow_first", "reuse": "half"}
    dropped = 0
    for seed in range(3000, 3040):
        workload = replace(
            random_workload(seed, asynchronous=asynchronous), priority=False, policies=policies
        )
        comparison = compare(workload)
        assert comparison.difference is None, f"{workload.name}: {comparison.difference}"
        clients = {entry.id for entry in workload.entries if entry.abort_step is not None}
        dropped += sum(
            ident not in clients for row in comparison.theirs for ident in row["aborted"]
        )
    assert dropped > 20


@pytest.mark.parametrize("asynchronous", [False, True])
def test_the_plug_in_without_and_with_stock_policies_is_stock(asynchronous: bool) -> None:
    stock = {"admission": "fcfs", "eviction": "lru", "reuse": "always"}
    evictions = 0
    for seed in range(60):
        plain = random_workload(seed, asynchronous=asynchronous)
        workload = replace(plain, policies={} if plain.priority else stock)
        expected = BareEngine(plain).run()
        assert first_difference(BareEngine(workload, plugged=True).run(), expected) is None
        evictions += sum(len(row["evicted"]) for row in expected)
    assert evictions > 500


def test_a_run_can_be_repeated() -> None:
    workload = random_workload(7)
    assert BareEngine(workload).run() == BareEngine(workload).run()


# --------------------------------------------------------------------------- the comparison


def _deep_hits(patch: pytest.MonkeyPatch) -> None:
    match = Blocks.match
    patch.setattr(Blocks, "match", lambda self, r, total: match(self, r, total + 1))


def _young_copies(patch: pytest.MonkeyPatch) -> None:
    def match(self: Blocks, request: Request, total: int) -> list[Block]:
        return [self.known[block.hash][-1] for block in stock(self, request, total)]

    stock = Blocks.match
    patch.setattr(Blocks, "match", match)


def _blank_order(patch: pytest.MonkeyPatch) -> None:
    def release(self: Blocks, request: Request, now_s: float) -> None:
        stock(self, request, now_s)
        self.blank.rotate(1)

    stock = Blocks.release
    patch.setattr(Blocks, "release", release)


def _lazy_hashes(patch: pytest.MonkeyPatch) -> None:
    store = Blocks.store
    patch.setattr(Blocks, "store", lambda self, r, tokens: store(self, r, tokens - 1))


def _no_exemption(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(StepEngine, "_threshold", lambda self: self.limits.long_prefill_token_threshold)


def _other_limits(**changes: Any) -> Callable[[pytest.MonkeyPatch], None]:
    def apply(patch: pytest.MonkeyPatch) -> None:
        def arguments(workload: Workload) -> tuple[Any, ...]:
            return stock(replace(workload, limits=replace(workload.limits, **changes)))

        stock = simulated._arguments
        patch.setattr(simulated, "_arguments", arguments)

    return apply


def _other_entries(**changes: Any) -> Callable[[pytest.MonkeyPatch], None]:
    def apply(patch: pytest.MonkeyPatch) -> None:
        def simulate(workload: Workload) -> simulated.RecordingStepEngine:
            entries = tuple(replace(entry, **changes) for entry in workload.entries)
            return stock(replace(workload, entries=entries))

        stock = simulated.simulate
        patch.setattr(parity, "simulate", simulate)

    return apply


MISTAKES: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "the last token is hit": _deep_hits,
    "the youngest copy is hit": _young_copies,
    "free blocks in another order": _blank_order,
    "a block is hashed a token late": _lazy_hashes,
    "a lone request is cut by the threshold": _no_exemption,
    "priorities preempt the last": lambda patch: patch.setattr(Priority, "preempts", "last"),
    "aborts are not heard": lambda patch: patch.setattr(StepEngine, "abort", lambda *_: None),
    "no watermark": _other_limits(watermark=0.0),
    "no reservation": _other_limits(scheduler_reserve_full_isl=False),
    "no adaptive threshold": _other_limits(long_prefill_token_threshold_adaptive=False),
    "salts are ignored": _other_entries(salt=""),
    "skip_reading is ignored": _other_entries(skip_reading=False),
}
"""Ways to get a rule of vLLM wrong."""


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_wrong_rule_is_noticed(monkeypatch: pytest.MonkeyPatch, mistake: str) -> None:
    MISTAKES[mistake](monkeypatch)
    differences = (compare(random_workload(seed)).difference for seed in range(200))
    assert next((d for d in differences if d is not None), None) is not None


def test_a_wrong_rule_of_the_fast_engine_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    _no_exemption(monkeypatch)
    monkeypatch.setattr(simulated.Noting, "_threshold", lambda self: 1)
    differences = (compare(random_workload(seed), "fast").difference for seed in range(50))
    assert next((d for d in differences if d is not None), None) is not None


def test_rows_by_hand() -> None:
    """One request of 20 tokens, one that shares its first block, blocks of 16."""
    prompt = tuple(range(100, 120))
    entries = (
        Entry(id="a", at_step=0, prompt=prompt, output_tokens=2),
        Entry(id="b", at_step=1, prompt=prompt[:17], output_tokens=1),
        Entry(id="c", at_step=9, prompt=prompt[:9], output_tokens=9, abort_step=9),
        Entry(id="d", at_step=12, prompt=tuple(range(70)), output_tokens=1),
    )
    limits = EngineLimits(num_gpu_blocks=6, max_model_len=80)
    rows = BareEngine(Workload(name="hand", limits=limits, entries=entries)).run()
    assert [[row[key] for key in FIELDS] for row in rows] == [  # type: ignore[literal-required]
        [0, ["a"], [], {"a": 20}, ["a"], [], [], {"a": 0}, {"a": [1, 2]}, [], 3, [], ["a"]],
        [1, ["b"], [], {"a": 1, "b": 1}, ["b"], [], [], {"b": 16}, {"b": [1, 3]}, [], 2, [],
         ["a", "b"]],
        [2, ["c"], [], {"c": 9}, ["c"], [], [], {"c": 0}, {"c": [3]}, [], 4, [], ["c"]],
        [3, ["d"], ["c"], {"d": 70}, ["d"], [], [], {"d": 0}, {"d": [3, 2, 4, 5, 1]},
         [["a:0", 1]], 0, [], ["d"]],
    ]  # fmt: skip
    assert [row.get("began_s") for row in rows] == [0.0, 0.02, 0.18, 0.24]
    assert [row.get("ended_s") for row in rows] == [0.02, 0.04, 0.2, 0.26]


def test_options_reach_vllm() -> None:
    for seed in range(20):
        limits = random_workload(seed, asynchronous=seed % 2 == 0).limits
        config = engine_config(limits, priority=seed % 2 == 0)
        scheduler, cache = config.scheduler_config, config.cache_config
        for key in (
            "max_num_batched_tokens", "max_num_seqs", "enable_chunked_prefill",
            "long_prefill_token_threshold", "long_prefill_token_threshold_adaptive",
            "watermark", "scheduler_reserve_full_isl", "async_scheduling",
        ):  # fmt: skip
            assert getattr(scheduler, key) == getattr(limits, key), key
        assert scheduler.policy == ("priority" if seed % 2 == 0 else "fcfs")
        assert scheduler.max_num_scheduled_tokens in (None, limits.max_num_batched_tokens)
        assert config.model_config.max_model_len == limits.max_model_len
        assert cache.block_size == limits.block_tokens
        assert cache.num_gpu_blocks == limits.num_gpu_blocks
        assert cache.enable_prefix_caching == limits.enable_prefix_caching


# --------------------------------------------------------------------------- the command


def test_the_command_ends_with_what_it_counted(capsys: pytest.CaptureFixture[str]) -> None:
    assert parity.parity(range(3)) == 0
    out, progress = capsys.readouterr()
    steps = sum(len(BareEngine(random_workload(seed)).run()) for seed in range(3))
    assert out == f"3 workloads, {steps} steps, 0 differences\n"
    assert "evictions" in progress


def test_the_command_stops_at_a_difference_and_says_how_to_repeat_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    MISTAKES["free blocks in another order"](monkeypatch)
    assert parity.parity(range(4, 60)) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].endswith(" 1 differences")
    again = next(line for line in lines if line.startswith("again: servelab parity --seeds "))
    first, last = again.rpartition(" ")[2].split(":")
    assert compare(random_workload(int(first))).difference is not None
    assert int(last) == int(first) + 1
    assert any("ServeLab" in line and "vLLM" in line for line in lines)


def test_a_trace_can_be_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = traces.generate(
        "independent", count=40, rate_per_s=20.0, prompt_mean=200.0, output_mean=40.0, seed=3
    )
    path = tmp_path / "trace.jsonl"
    traces.write(trace, path)
    assert parity.parity(workload=path, step_s=0.05) == 0
    assert parity.parity(workload=path, asynchronous=True) == 0
    assert parity.parity(workload=path, mode="fast") == 0
    assert capsys.readouterr().out.startswith("1 workloads, ")
    tight = ["engine.block_tokens=32", "engine.max_num_seqs=2"]
    with pytest.MonkeyPatch.context() as patch:
        MISTAKES["free blocks in another order"](patch)
        assert parity.parity(workload=path, options=tight) == 1
    lines = capsys.readouterr().out.splitlines()
    assert f"again: servelab parity --workload {path} --step-s 0.02 {' '.join(tight)}" in lines
    assert any("block_tokens=32" in line and "max_num_seqs=2" in line for line in lines)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"seeds": range(2), "workload": Path("x")}, "exclude each other"),
        ({"workload": Path("x"), "policies": True}, "--policies .* leave it out with --workload"),
        ({"workload": Path("x"), "jobs": 2}, "--jobs .* leave it out with --workload"),
        ({"options": ["engine.block_tokens=32"]}, "engine.block_tokens=32 needs --workload"),
        ({"workload": Path("x"), "options": ["tp=2"]}, "tp=2 is not of the form engine.KEY=VALUE"),
    ],
)
def test_what_does_not_go_together_is_refused(arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(ParityError, match=says):
        parity.parity(**arguments)


def test_a_difference_of_the_fast_engine_is_repeated_with_fast(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _no_exemption(monkeypatch)
    monkeypatch.setattr(simulated.Noting, "_threshold", lambda self: 1)
    assert parity.parity(range(50), mode="fast") == 1
    again = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("again: "))
    assert again.endswith(" --fast")


def test_without_vllm_the_recipe_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parity, "has_vllm", lambda: False)
    with pytest.raises(ParityError, match="make validate"):
        parity.parity(range(2))


@pytest.mark.slow
def test_processes_share_the_seeds(capsys: pytest.CaptureFixture[str]) -> None:
    assert parity.parity(range(100), jobs=2) == 0
    assert capsys.readouterr().out.startswith("100 workloads, ")
