"""Mooncake files: fields, units, block sizes, sessions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from traces import Trace, TraceError, read


def row(timestamp: Any = 0, prompt: Any = 600, output: Any = 5, **more: Any) -> dict[str, Any]:
    values = {"timestamp": timestamp, "input_length": prompt, "output_length": output, **more}
    return {key: value for key, value in values.items() if value is not None}


def load(folder: Path, *rows: dict[str, Any], **options: Any) -> Trace:
    path = folder / "t.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return read(path, format="mooncake", **options)


def arrivals(trace: Trace) -> list[float]:
    return [float(t) for t in trace.requests["arrival_s"]]


def test_fields_and_chains_are_read(tmp_path: Path) -> None:
    trace = load(tmp_path, row(0, 600, 5, hash_ids=[0, 1]), row(3001, 1100, 7, hash_ids=[0, 2, 3]))
    assert arrivals(trace) == [0.0, 3.001]
    assert trace.requests["prompt_tokens"].tolist() == [600, 1100]
    assert trace.requests["output_tokens"].tolist() == [5, 7]
    assert [trace.chains.blocks(i).tolist() for i in range(2)] == [[0, 1], [0, 2, 3]]
    assert trace.synthetic == ""


# ------------------------------------------------------------------------------ units


def test_whole_numbers_are_milliseconds_and_the_notes_say_so(tmp_path: Path) -> None:
    assert load(tmp_path, row(1500)).notes[0] == (
        "timestamps read as ms (whole numbers: Mooncake's unit)"
    )


def test_strings_of_nanoseconds_are_rebased_exactly(tmp_path: Path) -> None:
    trace = load(tmp_path, row("1753694362340138614"), row("1753694362340138714"))
    assert arrivals(trace) == [0.0, 1e-7]
    assert "clock rebased: the first arrival was at 1753694362340138614 ns" in trace.notes


def test_numbers_with_fractions_need_a_unit(tmp_path: Path) -> None:
    with pytest.raises(
        TraceError, match=r"timestamps such as 5.999 could be ms .* or s .*; pass time_unit"
    ):
        load(tmp_path, row(3.0), row(5.999))
    assert arrivals(load(tmp_path, row(3.0), row(5.999), time_unit="s")) == [3.0, 5.999]
    assert arrivals(load(tmp_path, row(3.0), row(5.5), time_unit="ms")) == [0.003, 0.0055]


def test_numbers_with_a_decimal_point_need_a_unit_even_when_whole(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="pass time_unit"):
        load(tmp_path, row(3.0), row(6.0))


def test_numbers_with_fractions_are_milliseconds_in_files_with_sessions(tmp_path: Path) -> None:
    trace = load(tmp_path, row(500.5, session_id="a"))
    assert arrivals(trace) == [0.5005]
    assert trace.notes[0] == "timestamps read as ms (rows with session_id: AIPerf's unit)"


@pytest.mark.parametrize("unit", ["s", "ms", "us"])
def test_a_unit_that_the_data_contradict_is_refused(tmp_path: Path, unit: str) -> None:
    with pytest.raises(TraceError, match=f"cannot be in {unit}: it would be after the year 2286"):
        load(tmp_path, row("1753694362340138614"), time_unit=unit)


def test_fractions_of_nanoseconds_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="with fractions cannot be in ns"):
        load(tmp_path, row(0.5), time_unit="ns")


@pytest.mark.parametrize(
    ("timestamp", "message"),
    [
        (1753694362, "could be s since 1970 or ms; pass time_unit"),
        (1753694362340138, "too large for ms; us or ns"),
        ("1500", "string timestamps such as 1500 have no known unit"),
    ],
)
def test_clocks_that_do_not_settle_the_unit_ask_for_it(
    tmp_path: Path, timestamp: object, message: str
) -> None:
    with pytest.raises(TraceError, match=message):
        load(tmp_path, row(timestamp))


def test_milliseconds_since_1970_are_rebased(tmp_path: Path) -> None:
    assert arrivals(load(tmp_path, row(1753694362340), row(1753694362840))) == [0.0, 0.5]


@pytest.mark.parametrize("unit", ["s", "ms", "us", "ns"])
def test_a_given_unit_is_used(tmp_path: Path, unit: str) -> None:
    per_s = {"s": 1, "ms": 1000, "us": 10**6, "ns": 10**9}[unit]
    assert arrivals(load(tmp_path, row(2 * per_s), time_unit=unit)) == [2.0]


# ------------------------------------------------------------------------------ sessions


def test_a_later_turn_arrives_its_delay_after_its_predecessor(tmp_path: Path) -> None:
    trace = load(
        tmp_path,
        row(3000, session_id="a"),
        row(None, session_id="a", delay=1500),
        row(3100, session_id="b"),
        row(None, session_id="a", delay=250.5),
    )
    assert trace.requests["session"].tolist() == ["a", "b", "a", "a"]
    assert arrivals(trace) == [3.0, 3.1, 4.5, 4.7505]
    assert trace.requests["turn"].tolist() == [0, 0, 1, 2]
    assert trace.requests["think_s"].tolist() == [0.0, 0.0, 1.5, 0.2505]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([row(None, session_id="a", delay=5), row(1, session_id="a")], ":1: the first turn of"),
        ([row(1, session_id="a", delay=5)], ":1: 'timestamp' and 'delay' exclude each other"),
        ([row(1), row(None, delay=5)], ":2: 'delay' needs a 'session_id'"),
        (
            [row(1, session_id="a"), row(None, session_id="a", delay=-5)],
            ":2: delay=-5 must be 0 or",
        ),
        ([row(1, session_id="a"), row(None, session_id="a", delay="5")], ":2: delay='5' must be a"),
        ([row(9, session_id="a"), row(2, session_id="a")], ":2: turn 1 of session 'a' arrives at"),
        ([row(1, session_id=1.5)], ":1: session_id=1.5 must be text"),
    ],
)
def test_a_broken_session_is_refused(
    tmp_path: Path, rows: list[dict[str, Any]], message: str
) -> None:
    with pytest.raises(TraceError, match=message):
        load(tmp_path, *rows)


# ------------------------------------------------------------------------------ block sizes


@pytest.mark.parametrize("size", [16, 32, 64, 128, 256, 1024])
def test_the_only_block_size_that_fits_is_inferred(tmp_path: Path, size: int) -> None:
    ids = list(range(10_000 // size))
    trace = load(tmp_path, row(prompt=10_000, hash_ids=ids))
    assert trace.block_tokens == size
    assert trace.notes[-1].startswith(f"block size {size} tokens (the only known size")


def test_512_wins_where_every_row_has_its_ceiling(tmp_path: Path) -> None:
    assert load(tmp_path, row(prompt=10, hash_ids=[0])).block_tokens == 512


def test_an_ambiguous_block_size_must_be_given(tmp_path: Path) -> None:
    ambiguous = row(prompt=600, hash_ids=[0])
    with pytest.raises(TraceError, match="block size could be 512, 1024; pass block_tokens"):
        load(tmp_path, ambiguous)
    assert load(tmp_path, ambiguous, block_tokens=512).block_tokens == 512


def test_a_file_that_no_block_size_fits_names_the_row(tmp_path: Path) -> None:
    with pytest.raises(
        TraceError, match=r":2: 9 hash_ids for input_length=600; .* 512 fits most, but needs 1 to 2"
    ):
        load(
            tmp_path,
            row(prompt=1100, hash_ids=[0, 1, 2]),
            row(prompt=600, hash_ids=list(range(10, 19))),
            row(prompt=5000, hash_ids=list(range(20, 30))),
        )


def test_a_given_block_size_that_the_rows_contradict_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        TraceError, match=r":1: 2 block ids for 600 .* of 16 tokens need 37 or 38; .*256, 512 would"
    ):
        load(tmp_path, row(hash_ids=[0, 1]), block_tokens=16)


def test_other_block_sizes_work_when_given(tmp_path: Path) -> None:
    assert load(tmp_path, row(prompt=96, hash_ids=[5, 9]), block_tokens=48).block_tokens == 48


def test_rows_without_block_ids_make_a_trace_without(tmp_path: Path) -> None:
    assert load(tmp_path, row()).block_tokens == 0
    assert load(tmp_path, row(hash_ids=[])).block_tokens == 0
    with pytest.raises(TraceError, match="has no block ids, so block_tokens=512 means nothing"):
        load(tmp_path, row(), block_tokens=512)


def test_some_rows_without_block_ids_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match=":2: 'hash_ids' is missing; other rows have it"):
        load(tmp_path, row(hash_ids=[0, 1]), row())


def test_ids_that_are_not_chained_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match=r"block id 7 follows block 0 in .*:1 but block 1 in .*:2"):
        load(tmp_path, row(hash_ids=[0, 7]), row(hash_ids=[1, 7]))


# ------------------------------------------------------------------------------ bad rows


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (row(prompt=0), ":2: input_length=0 must be a whole number of 1 to"),
        (row(output=0), ":2: output_length=0 must be a whole number of 1 to"),
        (row(prompt=1.5), ":2: input_length=1.5 must be a whole number"),
        (row(prompt=True), ":2: input_length=True must be a whole number"),
        (row(prompt="600"), ":2: input_length='600' must be a whole number"),
        (row(prompt=2**70), ":2: input_length=11805.* must be a whole number of 1 to"),
        (row(output=None), ":2: key 'output_length' is missing"),
        (row(output=None, output_lenght=5), "is missing; did you mean 'output_lenght'"),
        (row(None), ":2: key 'timestamp' is missing"),
        (row(-1), ":2: timestamp=-1 must be a finite number of 0 or more"),
        (row([1]), r":2: timestamp=\[1\] must be a number"),
        (row("soon"), ":2: timestamp='soon' must be a number"),
        (row("12"), ":2: timestamp='12' must be a number as in other rows"),
        (row(10**400), "is too large for ms"),
        (row(hash_ids=[0, -1]), r":2: hash_ids=\[0, -1\] must be a list of block ids"),
        (row(hash_ids=["a"]), r":2: hash_ids=\['a'\] must be a list of whole numbers"),
        (row(hash_ids="ab"), ":2: hash_ids='ab' must be a list of whole numbers"),
        (row(prompt=None, text_input="hi"), ":2: 'text_input' gives a prompt as text"),
        (row(prompt=None, messages=[]), ":2: 'messages' gives a prompt as text"),
        (row(hash_runs=[0, 2]), ":2: key 'hash_runs' belongs to the run-length form of WEKA"),
        (row(chat_id=3), ":2: key 'chat_id' belongs to Qwen-Bailian"),
    ],
)
def test_a_bad_row_is_refused_with_file_line_key_and_value(
    tmp_path: Path, bad: dict[str, Any], message: str
) -> None:
    with pytest.raises(TraceError, match=rf"t\.jsonl.*{message.removeprefix(':2')}") as caught:
        load(tmp_path, row(), bad)
    if message.startswith(":2"):
        assert "t.jsonl:2: " in str(caught.value)


@pytest.mark.parametrize("line", ["[1, 2]", "{", '{"timestamp": NaN}', "3", "nonsense"])
def test_a_line_that_is_no_object_is_refused(tmp_path: Path, line: str) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(json.dumps(row()) + "\n" + line + "\n")
    with pytest.raises(TraceError, match=r"t.jsonl:2: (not JSON|a line must hold a JSON object)"):
        read(path)


def test_rows_out_of_order_are_sorted_with_a_note(tmp_path: Path) -> None:
    trace = load(tmp_path, row(5000), row(1000))
    assert arrivals(trace) == [1.0, 5.0]
    assert trace.requests["id"].tolist() == ["1", "0"]
    assert "rows are not in the order of arrival: sorted" in trace.notes


def test_a_long_file_of_ids_is_coded_without_loss(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    ids = rng.permutation(5000).tolist()
    trace = load(tmp_path, row(prompt=512 * 5000, hash_ids=ids))
    assert trace.chains.blocks(0).tolist() == ids
