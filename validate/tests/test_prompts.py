"""Prompts share exactly the full blocks that the trace shares."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from traces import Chains, Trace, TraceError, generate
from traces.chains import MAX_ID
from validate.prompts import PromptError, Prompts, ordinary

WORDS = range(3, 1024)


@st.composite
def traces(draw: st.DrawFn) -> Trace:
    """Traces whose chains are paths of a random tree (ids are chained), in blocks of 16 or 64."""
    block_tokens = draw(st.sampled_from([16, 64]))
    ids = iter(draw(st.lists(st.integers(0, MAX_ID // 8), min_size=40, max_size=40, unique=True)))
    paths: list[list[int]] = [[]]
    chains: list[list[int]] = []
    for _ in range(draw(st.integers(1, 10))):
        path = draw(st.sampled_from(paths))[: draw(st.integers(0, 6))]
        for _ in range(draw(st.integers(0, 3))):
            path = [*path, next(ids)]
            paths.append(path)
        chains.append(path)
    more = st.integers(1, block_tokens - 1)
    prompts = [len(chain) * block_tokens + draw(more) for chain in chains]
    return Trace.build(
        "random",
        {"arrival_s": 0.0, "prompt_tokens": prompts, "output_tokens": 1},
        Chains.from_lists(chains),
        block_tokens=block_tokens,
    )


@settings(max_examples=60, deadline=None)
@given(trace=traces(), size=st.sampled_from([16, 32, 64, 128]), seed=st.integers(0, 2**63))
def test_prompts_share_exactly_what_the_chains_share(trace: Trace, size: int, seed: int) -> None:
    prompts = Prompts(trace, size, WORDS, seed)
    chains = trace.recoded(size)
    blocks = []
    for row, prompt in enumerate(prompts):
        assert len(prompt) == trace.requests["prompt_tokens"][row]
        assert prompt.min() >= WORDS.start
        assert prompt.max() < WORDS.stop
        full = len(prompt) // size
        blocks.append([tuple(block) for block in prompt[: full * size].reshape(full, size)])
    for a in range(len(trace)):
        for b in range(a):
            shared = _common(chains.blocks(a).tolist(), chains.blocks(b).tolist())
            assert _common(blocks[a], blocks[b]) == shared
            # Not even elsewhere, beyond what the trace names alike.
            named = set(chains.blocks(a).tolist()) & set(chains.blocks(b).tolist())
            assert len(set(blocks[a]) & set(blocks[b])) == len(named)


def _common(a: list, b: list) -> int:  # type: ignore[type-arg]
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )


def test_the_seed_changes_only_what_the_trace_does_not_know() -> None:
    trace = generate("chat", sessions=5, session_rate_per_s=1.0, seed=0)
    one, two = Prompts(trace, 32, WORDS, 1), Prompts(trace, 32, WORDS, 2)
    lengths = trace.recoded(32).lengths * 32
    for row, known in enumerate(lengths.tolist()):
        assert np.array_equal(one[row], Prompts(trace, 32, WORDS, 1)[row])
        assert np.array_equal(one[row][:known], two[row][:known])
        if len(one[row]) > known + 8:
            assert not np.array_equal(one[row][known:], two[row][known:])


def test_a_trace_without_ids_shares_nothing() -> None:
    trace = Trace.build("plain", {"arrival_s": 0.0, "prompt_tokens": [40, 40], "output_tokens": 1})
    prompts = Prompts(trace, 16, WORDS)
    assert tuple(prompts[0][:16]) != tuple(prompts[1][:16])


def test_every_word_is_used() -> None:
    trace = Trace.build("long", {"arrival_s": 0.0, "prompt_tokens": 200_000, "output_tokens": [1]})
    counts = np.bincount(Prompts(trace, 16, WORDS)[0], minlength=WORDS.stop)[WORDS.start :]
    assert counts.min() > 100


def test_what_cannot_be_told_apart_is_refused() -> None:
    trace = Trace.build("x", {"arrival_s": 0.0, "prompt_tokens": 9, "output_tokens": [1]})
    with pytest.raises(PromptError, match="blocks of 4 tokens out of 1021"):
        Prompts(trace, 4, WORDS)
    with pytest.raises(PromptError, match="larger vocabulary"):
        Prompts(trace, 16, range(1))
    with pytest.raises(TraceError, match="block_tokens=24 does not fit"):
        Prompts(generate("chat", sessions=1, session_rate_per_s=1.0), 24, WORDS)


def test_ordinary_words_are_the_longest_range_without_special_ones() -> None:
    assert ordinary(1024, [0, 1, 2]) == range(3, 1024)
    assert ordinary(1000, [990, 998, 2000]) == range(990)
    assert ordinary(10, []) == range(10)
