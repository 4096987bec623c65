"""Finding the format of a file, and every way in which a file can be no trace."""

from __future__ import annotations

import gzip
import sys
from pathlib import Path

import pytest

import traces.reader
from traces import TraceError, detect, read
from traces.reader import Sample, formats, reader

ROW = '{"timestamp": 0, "input_length": 600, "output_length": 5, "hash_ids": [0, 1]}\n'
AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,374,44\n"


def file(folder: Path, text: str | bytes, name: str = "trace.jsonl") -> Path:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_the_catalogue_lists_all_formats() -> None:
    assert list(formats()) == ["azure", "mooncake", "native"]


def test_detection_names_format_and_reason(tmp_path: Path) -> None:
    assert detect(file(tmp_path, ROW)) == (
        "mooncake",
        "JSON lines with 'timestamp' and 'input_length'",
    )
    assert detect(file(tmp_path, AZURE)).format == "azure"
    assert detect(file(tmp_path, '{"format": "servelab-trace"}')).format == "native"


def test_gzip_is_recognised_by_its_bytes_and_not_by_its_name(tmp_path: Path) -> None:
    plain = read(file(tmp_path, ROW, "t.jsonl"))
    assert read(file(tmp_path, gzip.compress(ROW.encode()), "t.jsonl")) == plain
    assert read(file(tmp_path, ROW, "t.jsonl.gz")) == plain


def test_a_byte_order_mark_and_blank_lines_are_skipped(tmp_path: Path) -> None:
    assert len(read(file(tmp_path, b"\xef\xbb\xbf\n\n" + ROW.encode() + b"\r\n"))) == 1


def test_the_name_of_a_trace_is_the_file_name_without_endings(tmp_path: Path) -> None:
    assert read(file(tmp_path, ROW, "llama-3.1-8b.jsonl.gz")).name == "llama-3.1-8b"
    assert read(file(tmp_path, ROW, "v1.2")).name == "v1.2"


def test_limit_reads_only_the_start(tmp_path: Path) -> None:
    assert len(read(file(tmp_path, ROW * 3 + "garbage"), limit=2)) == 2
    assert len(read(file(tmp_path, AZURE + "garbage\n"), limit=1)) == 1


def test_a_missing_file_names_its_neighbour(tmp_path: Path) -> None:
    file(tmp_path, ROW, "conversation_trace.jsonl")
    with pytest.raises(
        TraceError,
        match=r"conversation_trce.jsonl does not exist; did you mean 'conversation_trace.jsonl'\?",
    ):
        read(tmp_path / "conversation_trce.jsonl")


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match=r"there is no folder .*nowhere"):
        read(tmp_path / "nowhere" / "t.jsonl")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "t.jsonl is empty"),
        (gzip.compress(b"", mtime=0), "t.jsonl is empty"),
        (b"\n  \n", "t.jsonl holds only blank lines"),
        (b"\x89PNG\r\n\x1a\n\x00\x00", "t.jsonl:1: not text: byte 0x89 is not UTF-8"),
        (b"ab\0cd", "t.jsonl:1: not text: it holds zero bytes"),
        (gzip.compress(ROW.encode(), mtime=0)[:-9], "t.jsonl is a broken gzip file"),
        (b"\x1f\x8bnot gzip at all", "t.jsonl is a broken gzip file"),
        (b"a,b,c\n1,2,3\n", "no known format: its first line has 'a,b,c'.* azure .* mooncake"),
        (
            b'{"chat_id": 1, "timestamp": 0.5, "input_length": 4}',
            "its first line has the keys chat",
        ),
        (b'{"timestamp": 0,\n', "t.jsonl:1: not JSON"),
        (b"[" * 10, "no known format"),
        (b'{"a":' * 100_000, "t.jsonl:1: (not JSON|JSON nested too deeply)"),
    ],
)
def test_a_file_that_is_no_trace_says_why(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(TraceError, match=message):
        read(file(tmp_path, content, "t.jsonl"))


def test_unreadable_content_still_lists_the_formats(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match=r"Known formats: azure .*; mooncake .*; native "):
        detect(file(tmp_path, b"\xff\xfe\x00"))


def test_a_gzip_that_breaks_off_later_is_refused(tmp_path: Path) -> None:
    data = gzip.compress("".join(ROW.replace("600", str(600 + i)) for i in range(999)).encode())
    with pytest.raises(TraceError, match="broken gzip file"):
        read(file(tmp_path, data[: len(data) // 2]))


def test_a_folder_is_no_trace(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="is a folder; a trace is one file"):
        read(tmp_path)


def test_an_unknown_format_name_is_corrected(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match=r"no trace format 'moncake'; did you mean 'mooncake'\?"):
        read(file(tmp_path, ROW), format="moncake")


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("time_unit", "sec", "time_unit must be one of s, ms, us, ns, not sec"),
        ("block_tokens", 0, "block_tokens must be at least 1, not 0"),
        ("limit", 0, "limit must be at least 1, not 0"),
    ],
)
def test_a_bad_option_is_refused(tmp_path: Path, option: str, value: object, message: str) -> None:
    with pytest.raises(TraceError, match=message):
        read(file(tmp_path, ROW), **{option: value})  # type: ignore[arg-type]


NEW_FORMAT = """
from traces.reader import reader
from traces.schema import Trace

@reader("toy", about="toy", sniff=lambda sample: "toy" if sample.text == "toy" else "")
def read_toy(source, options):
    return Trace.build("toy", {"arrival_s": [0.0], "prompt_tokens": [1], "output_tokens": [1]})
"""


def test_a_new_format_needs_one_new_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    formats()
    (tmp_path / "toy_format.py").write_text(NEW_FORMAT)
    monkeypatch.setattr(traces, "__path__", [*traces.__path__, str(tmp_path)])
    monkeypatch.setattr(traces.reader, "_FORMATS", dict(traces.reader._FORMATS))
    traces.reader._discover.cache_clear()
    try:
        assert read(file(tmp_path, "toy\n")).name == "toy"
    finally:
        sys.modules.pop("traces.toy_format", None)


def test_two_formats_cannot_share_a_name() -> None:
    def sniff(_: Sample) -> str:
        return ""

    with pytest.raises(TraceError, match=r"format 'azure' is registered by traces\.azure"):
        reader("azure", about="x", sniff=sniff)(lambda _source, _options: read("x"))
