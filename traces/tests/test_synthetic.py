"""Synthetic traces have the statistics they were asked for, and come from their seed alone."""

from __future__ import annotations

import gzip
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from traces import Trace, TraceError, generate, read, write
from traces.arrivals import arrivals
from traces.make_demo import DEMO_PATH, demo_chat
from traces.slo import assign_slo
from traces.synthetic import generators

CHAT = {"sessions": 300, "session_rate_per_s": 2.0}
CLASSES = [
    {"name": "fast", "share": 3, "ttft_s": 0.5, "tpot_s": 0.05},
    {"name": "slow", "share": 1, "priority": 5},
]


# ------------------------------------------------------------------------------ arrivals


@pytest.mark.parametrize(
    ("kind", "options", "cv"),
    [
        ("poisson", {}, 1.0),
        ("gamma", {"cv": 3.0}, 3.0),
        ("gamma", {"shape": 4.0}, 0.5),
        ("weibull", {"cv": 2.0}, 2.0),
        ("weibull", {"cv": 0.5}, 0.5),
        ("weibull", {"shape": 1.0}, 1.0),
    ],
)
def test_arrivals_have_the_rate_and_the_variation_asked_for(
    kind: Any, options: dict[str, float], cv: float
) -> None:
    gaps_s = np.diff(arrivals(kind, rate_per_s=5.0, count=100_000, seed=1, **options))
    assert gaps_s.mean() == pytest.approx(0.2, rel=0.05)
    assert gaps_s.std() / gaps_s.mean() == pytest.approx(cv, rel=0.05)


@given(st.integers(0, 2**40))
def test_arrivals_rise_and_depend_on_the_seed_only(seed: int) -> None:
    first = arrivals(rate_per_s=5.0, count=50, seed=seed)
    assert np.all(np.diff(first) >= 0)
    assert np.array_equal(first, arrivals(rate_per_s=5.0, count=50, seed=seed))
    assert not np.array_equal(first, arrivals(rate_per_s=5.0, count=50, seed=seed + 1))


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("poison", {}, r"no kind of arrivals 'poison'; did you mean 'poisson'\?"),
        ("poisson", {"cv": 2.0}, "use gamma or weibull"),
        ("gamma", {}, "take exactly one of cv and shape"),
        ("gamma", {"cv": 1.0, "shape": 1.0}, "take exactly one of cv and shape"),
        ("weibull", {"cv": -1.0}, "cv must be a positive number"),
        ("weibull", {"cv": 1e12}, "no Weibull shape .* has cv="),
        ("poisson", {"rate_per_s": 0.0}, "rate_per_s must be a positive number"),
        ("poisson", {"count": 0}, "count must be at least 1, not 0"),
        ("poisson", {"seed": -1}, "seed must be at least 0, not -1"),
    ],
)
def test_bad_arrivals_are_refused(kind: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(TraceError, match=message):
        arrivals(kind, **{"rate_per_s": 1.0, "count": 5, **options})


# ------------------------------------------------------------------------------ generate


def test_generators_are_called_by_name_with_their_parameters() -> None:
    assert list(generators()) == ["chat", "independent"]
    trace = generate("independent", count=3, rate_per_s=1.0, name="mine")
    assert (len(trace), trace.name) == (3, "mine")


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("chats", {}, r"no generator 'chats'; did you mean 'chat'\?"),
        ("chat", {**CHAT, "think_s": 1}, "no parameter of generator 'chat' 'think_s'"),
        ("chat", {**CHAT, "user_maen": 1}, r"'user_maen'; did you mean 'user_mean'\?"),
        ("chat", {"sessions": 1}, "generator 'chat' needs a value for 'session_rate_per_s'"),
        ("chat", {**CHAT, "turns_mean": 0.5}, "turns_mean must be at least 1, not 0.5"),
        ("chat", {**CHAT, "prompt_max": 3072}, "prompt_max must be at least 3073, not 3072"),
        ("chat", {**CHAT, "block_tokens": 0}, "block_tokens must be at least 1"),
        ("independent", {"count": 1, "rate_per_s": 1.0, "prompt_mean": 0}, "prompt_mean must be"),
        ("independent", {"count": 1, "rate_per_s": 1.0, "block_tokens": -1}, "block_tokens must"),
    ],
)
def test_a_bad_call_is_refused(name: str, params: dict[str, Any], message: str) -> None:
    with pytest.raises(TraceError, match=message):
        generate(name, **params)


# ------------------------------------------------------------------------------ independent


def test_independent_requests_have_lognormal_lengths_and_share_nothing() -> None:
    trace = generate(
        "independent",
        count=50_000,
        rate_per_s=10.0,
        prompt_mean=800.0,
        prompt_cv=0.5,
        output_mean=100.0,
        output_cv=2.0,
        block_tokens=16,
    )
    prompt, output = trace.requests["prompt_tokens"], trace.requests["output_tokens"]
    assert prompt.mean() == pytest.approx(800, rel=0.02)
    assert prompt.std() / prompt.mean() == pytest.approx(0.5, rel=0.05)
    assert prompt.map(np.log).skew() == pytest.approx(0, abs=0.1)
    assert output.mean() == pytest.approx(100, rel=0.05)
    assert np.array_equal(trace.chains.lengths, prompt // 16)
    assert len(np.unique(trace.chains.start)) == len(trace.chains.start)
    assert trace.synthetic == "arrivals, lengths"


def test_lengths_are_cut_at_their_maxima_and_constant_without_variation() -> None:
    trace = generate(
        "independent", count=1000, rate_per_s=1.0, prompt_mean=50.0, prompt_cv=0.0, output_max=9
    )
    assert set(trace.requests["prompt_tokens"]) == {50}
    assert trace.requests["output_tokens"].max() == 9


def test_a_change_of_lengths_leaves_arrivals_alone() -> None:
    one = generate("independent", count=100, rate_per_s=1.0)
    two = generate("independent", count=100, rate_per_s=1.0, output_mean=999.0)
    assert one.requests["arrival_s"].equals(two.requests["arrival_s"])
    assert one.requests["prompt_tokens"].equals(two.requests["prompt_tokens"])


# ------------------------------------------------------------------------------ chat


def turns(trace: Trace) -> list[tuple[int, int]]:
    """Rows of each turn and of the turn after it."""
    keys = zip(trace.requests["session"].tolist(), trace.requests["turn"].tolist(), strict=True)
    rows = {key: row for row, key in enumerate(keys)}
    return [(row, rows[s, t + 1]) for (s, t), row in rows.items() if (s, t + 1) in rows]


def test_a_prompt_holds_the_previous_prompt_its_output_and_new_text() -> None:
    trace = generate("chat", **CHAT)
    prompt, output = trace.requests["prompt_tokens"], trace.requests["output_tokens"]
    pairs = turns(trace)
    assert len(pairs) > 500
    for now, later in pairs:
        assert prompt[later] > prompt[now] + output[now]


def test_a_chain_starts_with_the_whole_chain_of_the_turn_before() -> None:
    trace = generate("chat", **CHAT)
    assert np.array_equal(trace.chains.lengths, trace.requests["prompt_tokens"] // 16)
    for now, later in turns(trace):
        before, after = trace.chains.blocks(now), trace.chains.blocks(later)
        assert np.array_equal(after[: len(before)], before)


def test_sessions_share_system_prompts_and_nothing_else() -> None:
    trace = generate("chat", **CHAT, system_prompts=5, system_min=320, system_max=640)
    first = np.flatnonzero(trace.requests["turn"] == 0)
    heads: dict[int, list[set[int]]] = {}
    for row in first:
        ids = trace.chains.blocks(int(row)).tolist()
        heads.setdefault(ids[0], []).append(set(ids))
    assert len(heads) == 5
    assert sorted(len(set.intersection(*chains)) for chains in heads.values())[::4] == [20, 40]
    for one, chains in heads.items():
        for two, others in heads.items():
            assert one == two or all(a.isdisjoint(b) for a in chains for b in others)


def test_popularity_of_system_prompts_follows_zipf() -> None:
    trace = generate(
        "chat",
        sessions=20_000,
        session_rate_per_s=1.0,
        turns_mean=1.0,
        system_prompts=4,
        system_zipf=1.0,
    )
    head = trace.chains.start[trace.chains.offset[:-1]]
    share = np.sort(np.unique(head, return_counts=True)[1])[::-1] / len(trace)
    assert share == pytest.approx(np.array([12, 6, 4, 3]) / 25, abs=0.015)


def test_a_turn_arrives_a_pause_after_its_predecessor_would_end() -> None:
    trace = generate("chat", **CHAT, token_s=0.5)
    arrival_s, think_s = trace.requests["arrival_s"], trace.requests["think_s"]
    for now, later in turns(trace):
        due_s = arrival_s[now] + 0.5 * trace.requests["output_tokens"][now] + think_s[later]
        assert arrival_s[later] == pytest.approx(due_s, abs=1e-5)
    assert think_s[trace.requests["turn"] == 0].eq(0).all()
    assert think_s[trace.requests["turn"] > 0].mean() == pytest.approx(15, rel=0.1)


def test_sessions_end_before_the_longest_prompt() -> None:
    trace = generate("chat", **CHAT, prompt_max=4000)
    assert trace.requests["prompt_tokens"].max() <= 4000
    assert trace.requests["session"].nunique() == 300


# ------------------------------------------------------------------------------ SLO classes


def test_classes_are_drawn_by_share_with_one_per_session() -> None:
    trace = generate("chat", **{**CHAT, "sessions": 4000}, turns_mean=1.5, classes=CLASSES)
    sessions = trace.requests.groupby("session")
    assert (sessions["slo_class"].nunique() == 1).all()
    assert (sessions["slo_class"].first() == "fast").mean() == pytest.approx(0.75, abs=0.02)
    assert trace.synthetic.endswith(", SLO classes")


def test_classes_set_targets_and_priority() -> None:
    trace = generate("independent", count=100, rate_per_s=1.0, classes=CLASSES)
    columns = ["slo_class", "slo_ttft_s", "slo_tpot_s", "slo_e2e_s", "priority"]
    rows = {tuple(row) for row in trace.requests[columns].to_numpy().tolist()}
    assert rows == {("fast", 0.5, 0.05, np.inf, 0), ("slow", np.inf, np.inf, np.inf, 5)}


def test_classes_for_a_recorded_trace_mark_it_as_synthetic_once() -> None:
    columns = {"arrival_s": [0.0], "prompt_tokens": [1], "output_tokens": [1]}
    trace = assign_slo(assign_slo(Trace.build("x", columns), CLASSES), CLASSES)
    assert trace.synthetic == "SLO classes"


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ([], "at least one SLO class"),
        ([{"name": "a", "ttft": 1}], r"no key of an SLO class 'ttft'; did you mean 'ttft_s'\?"),
        ([{"share": 1}], "SLO classes need names that differ, not ''"),
        ([{"name": "a"}, {"name": "a"}], "need names that differ, not 'a'"),
        ([{"name": "a", "share": 0}], "SLO class 'a': share=0 must be above 0"),
        ([{"name": "a", "ttft_s": -1}], "SLO class 'a': ttft_s=-1 must be above 0"),
        ([{"name": "a", "priority": 0.5}], "SLO class 'a': priority must be a whole number"),
    ],
)
def test_bad_classes_are_refused(classes: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(TraceError, match=message):
        assign_slo(generate("independent", count=2, rate_per_s=1.0), classes)


# ------------------------------------------------------------------------------ demo


def test_the_bundled_demo_is_what_its_program_makes(tmp_path: Any) -> None:
    write(demo_chat(), tmp_path / "demo.jsonl.gz")
    made = gzip.decompress((tmp_path / "demo.jsonl.gz").read_bytes())
    assert made == gzip.decompress(DEMO_PATH.read_bytes())
    assert DEMO_PATH.stat().st_size < 400_000


def test_the_bundled_demo_holds_what_it_promises() -> None:
    trace = read(DEMO_PATH)
    assert 2200 <= len(trace) <= 2600
    assert 290 < trace.span_s < 300
    assert trace.block_tokens == 16
    assert 2300 < trace.prompt_tokens / len(trace) < 2800
    assert 160 < trace.output_tokens / len(trace) < 200
    assert "SLO classes" in trace.synthetic
    targets = trace.requests[["slo_class", "slo_ttft_s", "slo_tpot_s"]].drop_duplicates()
    assert sorted(map(tuple, targets.to_numpy().tolist())) == [
        ("batch", 20.0, 0.5),
        ("interactive", 0.5, 0.05),
        ("standard", 2.0, 0.1),
    ]
    mean = trace.requests.groupby("turn")["prompt_tokens"].mean()
    assert mean[4] > mean[2] > mean[0]


@pytest.mark.slow
def test_a_million_requests_have_a_million_rows() -> None:
    assert len(generate("independent", count=1_000_000, rate_per_s=100.0)) == 1_000_000
