"""The native format loses nothing and notices damage."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from traces import Chains, Trace, TraceError, generate, read, write

times = st.floats(0, 1e12, allow_nan=False)
targets = st.floats(0, exclude_min=True, allow_nan=False)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=5)


@st.composite
def traces(draw: st.DrawFn) -> Trace:
    rows = draw(st.integers(1, 6))

    def column(values: st.SearchStrategy[Any]) -> list[Any]:
        return draw(st.lists(values, min_size=rows, max_size=rows))

    session = draw(st.sampled_from(["", "s"]))
    size = draw(st.sampled_from([0, 16]))
    prompt = np.array(column(st.integers(1, 100)))
    start = draw(st.integers(0, 50))
    chains = Chains.from_lists([list(range(start, start + p // 16)) for p in prompt])
    return Trace.build(
        draw(texts),
        {
            "id": draw(st.lists(texts, min_size=rows, max_size=rows, unique=True)),
            "arrival_s": sorted(column(times)),
            "prompt_tokens": prompt,
            "output_tokens": column(st.integers(1, 2**62)),
            "session": session,
            "turn": np.arange(rows) if session else 0,
            "think_s": column(times),
            "model": column(texts),
            "tenant": column(texts),
            "priority": column(st.integers(-(2**63), 2**63 - 1)),
            "slo_class": column(texts),
            "slo_ttft_s": column(targets),
            "slo_tpot_s": column(targets),
            "slo_e2e_s": column(targets),
        },
        chains if size else None,
        block_tokens=size,
        synthetic=draw(texts),
        notes=tuple(draw(st.lists(texts, max_size=2))),
    )


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], deadline=None
)
@given(trace=traces(), ending=st.sampled_from([".jsonl", ".jsonl.gz"]))
def test_what_is_written_is_read_back_exactly(tmp_path: Path, trace: Trace, ending: str) -> None:
    path = tmp_path / f"t{ending}"
    write(trace, path)
    assert read(path) == trace


def sample() -> Trace:
    return generate("chat", sessions=5, session_rate_per_s=1.0)


def test_the_same_trace_gives_the_same_bytes_under_any_name(tmp_path: Path) -> None:
    write(sample(), tmp_path / "a.jsonl.gz")
    write(sample(), tmp_path / "b.jsonl.gz")
    assert (tmp_path / "a.jsonl.gz").read_bytes() == (tmp_path / "b.jsonl.gz").read_bytes()


def test_defaults_are_left_out(tmp_path: Path) -> None:
    columns = {"arrival_s": [0.5], "prompt_tokens": [3], "output_tokens": [4]}
    write(Trace.build("x", columns), tmp_path / "x.jsonl")
    assert (tmp_path / "x.jsonl").read_text().splitlines()[1] == (
        '{"arrival_s":0.5,"prompt_tokens":3,"output_tokens":4}'
    )


def test_limit_reads_the_first_requests(tmp_path: Path) -> None:
    write(sample(), tmp_path / "x.jsonl")
    assert read(tmp_path / "x.jsonl", limit=3) == sample().head(3)
    assert read(tmp_path / "x.jsonl", limit=10_000) == sample()


def test_writing_leaves_no_other_file_and_replaces_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text("old")
    write(sample(), path)
    assert [p.name for p in tmp_path.iterdir()] == ["x.jsonl"]
    assert read(path) == sample()


def test_a_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text("old")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write(sample(), path)
    assert [p.read_text() for p in tmp_path.iterdir()] == ["old"]


@pytest.mark.parametrize(
    ("name", "message"),
    [("x.csv", "ends in .jsonl or .jsonl.gz"), ("no/x.jsonl", "there is no folder")],
)
def test_a_path_that_cannot_be_written_is_refused(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(TraceError, match=message):
        write(sample(), tmp_path / name)


HEADER = {
    "format": "servelab-trace",
    "version": 1,
    "name": "x",
    "block_tokens": 16,
    "synthetic": "",
    "notes": [],
    "time_unit": "s",
    "requests": 1,
}
ROW = {"arrival_s": 0.5, "prompt_tokens": 32, "output_tokens": 4, "runs": [7, 2]}


def load(folder: Path, header: dict[str, Any], *rows: dict[str, Any], **options: Any) -> Trace:
    path = folder / "x.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in (header, *rows)))
    return read(path, **options)


def test_a_file_written_by_hand_is_read(tmp_path: Path) -> None:
    trace = load(tmp_path, HEADER, ROW)
    assert trace.chains.blocks(0).tolist() == [7, 8]
    assert trace.requests["id"].tolist() == ["0"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "x.jsonl:1: version 2 of 'servelab-trace' is not known"),
        ({"block_tokens": "16"}, "x.jsonl:1: block_tokens='16' must be a int"),
        ({"time_unit": "ms"}, "x.jsonl:1: time_unit='ms' must be 's'"),
        ({"nmae": "x"}, r"x.jsonl:1: no key 'nmae'; did you mean 'name'\?"),
        ({"notes": [3]}, "x.jsonl:1: notes=3 must be text"),
        ({"requests": 2}, "cut short or edited: its header promises 2 requests, it holds 1"),
    ],
)
def test_a_bad_header_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(TraceError, match=message):
        load(tmp_path, {**HEADER, **change}, ROW)


def test_a_header_without_a_key_is_refused(tmp_path: Path) -> None:
    header = {key: value for key, value in HEADER.items() if key != "requests"}
    with pytest.raises(TraceError, match="key 'requests' is missing"):
        load(tmp_path, header, ROW)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arrivals": 1}, r"x.jsonl:2: no key 'arrivals'; did you mean 'arrival_s'\?"),
        ({"arrival_s": "0"}, "x.jsonl:2: arrival_s='0' must be a number"),
        ({"arrival_s": 10**400}, r"x.jsonl:2: arrival_s=1000.* must be a number below 2\^1000"),
        ({"arrival_s": 1e999}, "x.jsonl:2: not JSON: Infinity is not a JSON number"),
        ({"arrival_s": -1}, "x.jsonl:2: arrival_s=-1.0 must be at least 0"),
        ({"prompt_tokens": None}, "x.jsonl:2: prompt_tokens=None must be a whole number"),
        ({"session": 5}, "x.jsonl:2: session=5 must be text"),
        ({"id": 5}, "x.jsonl:2: id=5 must be text"),
        ({"runs": [7]}, r"x.jsonl:2: runs=\[7\] must be a list \[start, count"),
        ({"runs": [7, 0]}, r"x.jsonl:2: runs=\[7, 0\] must be starts of at least 0 and counts"),
        ({"runs": [2**63 - 2, 2]}, "x.jsonl:2: runs=.* must be runs of block ids up to"),
        ({"runs": [7, 5]}, "x.jsonl:2: 5 block ids for 32 prompt tokens"),
        ({"runs": "x"}, "x.jsonl:2: runs='x' must be a list"),
    ],
)
def test_a_bad_row_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(TraceError, match=message):
        load(tmp_path, HEADER, {**ROW, **change})


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"block_tokens": 32}, "block_tokens=32, but the file says 16"),
        ({"time_unit": "ms"}, "time_unit=ms, but the file says s"),
    ],
)
def test_an_option_that_contradicts_the_header_is_refused(
    tmp_path: Path, option: dict[str, Any], message: str
) -> None:
    with pytest.raises(TraceError, match=message):
        load(tmp_path, HEADER, ROW, **option)


def test_a_file_cut_in_the_middle_is_noticed(tmp_path: Path) -> None:
    write(sample(), tmp_path / "x.jsonl.gz")
    text = gzip.decompress((tmp_path / "x.jsonl.gz").read_bytes()).decode()
    (tmp_path / "y.jsonl").write_text("".join(text.splitlines(keepends=True)[:-1]))
    with pytest.raises(TraceError, match="cut short"):
        read(tmp_path / "y.jsonl")
