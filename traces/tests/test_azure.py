"""Azure's CSV files."""

from __future__ import annotations

from pathlib import Path

import pytest

from traces import Trace, TraceError, read

HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens"
FIRST = "2023-11-16 18:15:46.6805900,374,44"


def load(folder: Path, *lines: str, end: str = "\r\n") -> Trace:
    path = folder / "t.csv"
    path.write_bytes(end.join(lines).encode())
    return read(path)


def test_rows_are_read_with_times_exact_to_100_ns(tmp_path: Path) -> None:
    trace = load(tmp_path, HEADER, FIRST, "2023-11-16 18:15:50.9951691,396,109")
    assert trace.requests["arrival_s"].tolist() == [0.0, 4.3145791]
    assert trace.requests["prompt_tokens"].tolist() == [374, 396]
    assert trace.requests["output_tokens"].tolist() == [44, 109]
    assert trace.block_tokens == 0
    assert trace.notes == ("times are seconds after 2023-11-16T18:15:46.680590000",)


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_the_last_line_may_lack_its_end(tmp_path: Path, end: str) -> None:
    assert load(tmp_path, HEADER, FIRST, end=end) == load(tmp_path, HEADER, FIRST, "", end=end)


def test_columns_are_found_by_name_and_images_marked(tmp_path: Path) -> None:
    trace = load(
        tmp_path,
        "TIMESTAMP,NumImages,ContextTokens,GeneratedTokens",
        "2025-01-01 00:00:00.5,0,10,1",
        "2025-01-01 00:00:01+00:00,2,20,2",
    )
    assert trace.requests["kind"].tolist() == ["", "image"]
    assert trace.requests["arrival_s"].tolist() == [0.0, 0.5]


def test_rows_out_of_order_are_sorted_with_a_note(tmp_path: Path) -> None:
    trace = load(tmp_path, HEADER, FIRST, "2023-11-16 18:15:45.6805900,1,1")
    assert trace.requests["arrival_s"].tolist() == [0.0, 1.0]
    assert trace.notes[-1] == "rows are not in the order of arrival: sorted"


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([HEADER], "t.csv holds no requests"),
        ([HEADER, FIRST, "2023-11-16 18:15:47,0,4"], "t.csv:3: ContextTokens='0' must be a whole"),
        ([HEADER, FIRST, "2023-11-16 18:15:47,4,"], "t.csv:3: GeneratedTokens='' must be a whole"),
        ([HEADER, FIRST, "2023-11-16 18:15:47,4,-1"], "t.csv:3: GeneratedTokens='-1' must be"),
        ([HEADER, FIRST, "2023-11-16 18:15:47,4,1.5"], "t.csv:3: GeneratedTokens='1.5' must be"),
        ([HEADER, FIRST, "2023-11-16,4,1"], "t.csv:3: TIMESTAMP='2023-11-16' must be a UTC date"),
        ([HEADER, FIRST, "2023-13-16 18:15:47,4,1"], "t.csv:3: TIMESTAMP='2023-13-16 18:15:47'"),
        ([HEADER, FIRST, "3.5,4,1"], "t.csv:3: TIMESTAMP='3.5' must be a UTC date"),
        ([HEADER, FIRST, "1,2"], "t.csv:3: 2 cells where the header has 3"),
        ([HEADER, FIRST, "1,2,3,4"], "t.csv:3: 4 cells where the header has 3"),
        (
            ["TIMESTAMP,ContextTokens,GeneratedToken", FIRST],
            r"t.csv:1: column 'GeneratedTokens' is missing; did you mean 'GeneratedToken'\?",
        ),
    ],
)
def test_bad_rows_are_refused_with_file_and_line(
    tmp_path: Path, lines: list[str], message: str
) -> None:
    with pytest.raises(TraceError, match=message):
        load(tmp_path, *lines)


@pytest.mark.parametrize("option", [{"block_tokens": 16}, {"time_unit": "s"}])
def test_options_that_mean_nothing_are_refused(tmp_path: Path, option: dict[str, object]) -> None:
    load(tmp_path, HEADER, FIRST)
    with pytest.raises(TraceError, match=f"{next(iter(option))} means nothing"):
        read(tmp_path / "t.csv", **option)  # type: ignore[arg-type]
