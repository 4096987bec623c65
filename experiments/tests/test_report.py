"""The table says what the summary says, marks what is best, and hides nothing that matters."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
from rich.console import Console

from experiments import report
from experiments.composing import compose
from experiments.runs import simulate
from sim.result import Result


def text_of(shown: Any) -> str:
    console = Console(file=io.StringIO(), width=200)
    console.print(shown)
    file = console.file
    assert isinstance(file, io.StringIO)
    return file.getvalue()


def cells(text: str, label: str) -> list[str]:
    (line,) = (line for line in text.splitlines() if line.startswith(f"│ {label}"))
    return [cell.strip() for cell in line.split("│")[2:-1]]


def test_cells_are_the_numbers_of_the_summary(results: dict[str, Result]) -> None:
    text = text_of(report.page(results))
    shown = [cell.removesuffix(" *") for cell in cells(text, "TTFT p99 (ms)")]
    assert shown == [f"{1e3 * r.summary()['ttft_p99_s']:,.1f}" for r in results.values()]


@pytest.mark.parametrize(
    ("label", "key", "best"),
    [("TTFT p50", "ttft_p50_s", min), ("prefix hit rate", "prefix_hit_rate", max)],
)
def test_the_best_of_a_row_is_marked(
    label: str, key: str, best: Any, results: dict[str, Result]
) -> None:
    values = [result.summary()[key] for result in results.values()]
    marked = [cell.endswith(" *") for cell in cells(text_of(report.page(results)), label)]
    assert marked == [value == best(values) for value in values]


def test_equal_values_are_not_marked(results: dict[str, Result]) -> None:
    text = text_of(report.page(results))
    assert cells(text, "requests finished") == ["150", "150"]


def test_rejections_are_shown_with_their_reason() -> None:
    result = simulate(compose(["trace.limit=150", "engine.num_gpu_blocks=150"]))
    rejected = result.summary()["rejected"]
    assert 0 < rejected < 150
    assert cells(text_of(report.page({"a": result})), "requests rejected") == [str(rejected)]
    (line,) = (line for line in report.notes(result) if "rejected" in line)
    assert f"rejected {rejected} of 150" in line
    assert sum(report.document(result)["rejected_reasons"].values()) == rejected


def test_an_uncalibrated_chip_is_called_so_everywhere() -> None:
    result = simulate(compose(["trace.limit=20", "chip=ascend_910b"]))
    text = text_of(report.page({"a": result}))
    assert "uncalibrated" in text.splitlines()[0]
    assert "chip ascend_910b is uncalibrated" in text
    assert report.document(result)["uncalibrated"] is True


def test_a_synthetic_trace_is_called_so(results: dict[str, Result]) -> None:
    assert "trace demo_chat is synthetic: " in text_of(report.page(results))
    for result in results.values():
        assert report.document(result)["synthetic"]


def test_without_targets_there_is_no_share_of_requests_within_them() -> None:
    result = simulate(compose(["trace=synthetic", "trace.count=10"]))
    text = text_of(report.page({"a": result}))
    assert cells(text, "within SLO") == ["-"]
    assert "sets no latency targets" in text


def test_the_document_is_plain_json(results: dict[str, Result]) -> None:
    for result in results.values():
        text = json.dumps(report.document(result, "folder"), allow_nan=False)
        assert json.loads(text)["requests"] == 150


def test_differences_name_the_keys_that_differ_and_no_other() -> None:
    configs = {"a": {"x": 1, "y": {"z": 2}}, "b": {"x": 1, "y": {"z": 3, "w": [1]}}}
    assert report.differences(configs) == {
        "y.z": {"a": 2, "b": 3},
        "y.w": {"a": None, "b": [1]},
    }
