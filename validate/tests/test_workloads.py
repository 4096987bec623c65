"""Workloads for parity: what random ones contain, and that block ids mean equal content."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import combinations

import pytest

from sim.scheduler import EngineLimits
from traces import Trace
from traces.schema import Chains
from validate.workloads import (
    Entry,
    Workload,
    block_chains,
    output_token,
    random_workload,
    workload_of,
)

LIMITS = EngineLimits(num_gpu_blocks=9, max_model_len=128)
SEEDS = range(500)


def content(workload: Workload) -> dict[str, list[int]]:
    return {
        ident: [
            i for chain in chains for start, count in chain for i in range(start, start + count)
        ]
        for ident, chains in block_chains(workload).items()
    }


def test_a_workload_follows_from_its_seed() -> None:
    assert random_workload(3) == random_workload(3)
    assert random_workload(3, policies=True) == random_workload(3, policies=True)
    assert random_workload(3) != random_workload(4)


def test_asynchronous_scheduling_changes_nothing_else() -> None:
    workload = random_workload(5, asynchronous=True)
    assert workload.limits.async_scheduling
    limits = replace(workload.limits, async_scheduling=False)
    assert replace(workload, limits=limits) == random_workload(5)


@pytest.mark.parametrize("seed", range(30))
def test_requests_share_block_ids_exactly_where_content_and_salt_agree(seed: int) -> None:
    workload = random_workload(seed)
    size = workload.limits.block_tokens
    ids = content(workload)
    for a, b in combinations(workload.entries, 2):
        x, y = a.prompt + a.answer, b.prompt + b.answer
        for k, (i, j) in enumerate(zip(ids[a.id], ids[b.id], strict=False)):
            end = (k + 1) * size
            assert (i == j) == (a.salt == b.salt and x[:end] == y[:end])
        assert set(ids[a.id]) & set(ids[b.id]) == {
            i for i, j in zip(ids[a.id], ids[b.id], strict=False) if i == j
        }


def test_a_block_that_ends_in_the_answer_belongs_to_the_answer() -> None:
    entry = Entry(id="a", at_step=0, prompt=tuple(range(40)), output_tokens=30)
    chains = block_chains(Workload(name="one", limits=LIMITS, entries=(entry,)))
    assert [sum(count for _, count in chain) for chain in chains["a"]] == [2, 2]


def test_answers_are_a_function_of_request_and_position() -> None:
    entry = Entry(id="a", at_step=0, prompt=(1, 2, 3), output_tokens=2)
    assert entry.answer == (output_token("a", 3), output_token("a", 4))
    assert output_token("a", 3) != output_token("b", 3)


def test_random_workloads_contain_everything_that_rules_are_about() -> None:
    seen: Counter[str] = Counter()
    for seed in SEEDS:
        workload = random_workload(seed)
        limits, entries = workload.limits, workload.entries
        answers = [e.prompt + e.answer for e in entries]
        seen.update(
            key
            for key, occurs in {
                "fcfs": not workload.priority,
                "priority": workload.priority,
                "blocks of 16": limits.block_tokens == 16,
                "blocks of 32": limits.block_tokens == 32,
                "blocks of 64": limits.block_tokens == 64,
                "no chunks": not limits.enable_chunked_prefill,
                "no prefix cache": not limits.enable_prefix_caching,
                "threshold": limits.long_prefill_token_threshold > 0,
                "adaptive": limits.long_prefill_token_threshold_adaptive
                and limits.long_prefill_token_threshold > 0,
                "watermark": limits.watermark > 0,
                "no reservation": not limits.scheduler_reserve_full_isl,
                "few seats": limits.max_num_seqs < len(entries),
                "salts": len({e.salt for e in entries}) > 1,
                "skipping": any(e.skip_reading for e in entries),
                "aborts": any(e.abort_step is not None for e in entries),
                "ties": len({e.at_step for e in entries}) < len(entries),
                "cut by max_model_len": any(
                    len(e.prompt) + e.output_tokens > workload.max_model_len for e in entries
                ),
                "turns": any(
                    e.session and any(e.prompt[: len(a)] == a for a in answers) for e in entries
                ),
            }.items()
            if occurs
        )
        assert 5 <= len(entries) <= 40
    rare = {key: count for key, count in seen.items() if count < len(SEEDS) / 20}
    assert len(seen) == 18
    assert not rare


def test_random_policies_are_all_that_vllm_can_run() -> None:
    chosen: dict[str, set[str]] = {}
    for seed in range(200):
        for kind, spec in random_workload(seed, policies=True).policies.items():
            chosen.setdefault(kind, set()).add(spec["name"])
    assert {"fcfs", "priority", "shortest_prompt", "token_bucket"} <= chosen["admission"]
    assert {"lru", "lfu", "fifo", "slo_aware"} <= chosen["eviction"]
    assert {"always", "never", "cap"} <= chosen["reuse"]
    assert "belady" not in chosen["eviction"]


def trace() -> Trace:
    return Trace.build(
        "small",
        {
            "arrival_s": [0.0, 0.05, 0.06],
            "prompt_tokens": [40, 33, 20],
            "output_tokens": [2, 3, 4],
            "priority": [0, 1, 2],
            "slo_class": ["", "fast", ""],
            "slo_ttft_s": [1.0, 0.5, 1.0],
        },
        Chains.from_lists([[7, 8], [7, 9], [5]]),
        block_tokens=16,
    )


def test_a_trace_becomes_a_workload() -> None:
    workload = workload_of(trace(), LIMITS, step_s=0.02)
    assert [entry.at_step for entry in workload.entries] == [0, 3, 3]
    assert [len(entry.prompt) for entry in workload.entries] == [40, 33, 20]
    assert [entry.output_tokens for entry in workload.entries] == [2, 3, 4]
    assert [entry.priority for entry in workload.entries] == [0, 1, 2]
    assert workload.entries[1].slo.name == "fast"
    first, second, third = content(workload).values()
    assert first[0] == second[0]
    assert len({*first, *second, *third}) == len(first) + len(second) + len(third) - 1


def test_a_step_must_take_time() -> None:
    with pytest.raises(ValueError, match="step_s=0: must be more than 0"):
        workload_of(trace(), LIMITS, step_s=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_gpu_blocks": None}, "must be numbers"),
        ({"max_model_len": 129}, "max_model_len=129 does not fit in num_gpu_blocks=9"),
        ({"max_model_len": 33}, "2 prompts have max_model_len=33 tokens or more.*: 0, 1"),
        (
            {"enable_chunked_prefill": False, "max_num_batched_tokens": 127, "max_num_seqs": 9},
            "max_num_batched_tokens=127 must be at least max_model_len=128",
        ),
        ({"long_prefill_token_threshold": 129}, "must be at most max_model_len=128"),
    ],
)
def test_what_vllm_would_refuse_is_refused(changes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        workload_of(trace(), replace(LIMITS, **changes), step_s=0.02)  # type: ignore[arg-type]
