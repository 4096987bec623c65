"""Decision rows: files, comparison, and what is printed at the first difference."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from validate.decisions import (
    FIELDS,
    Decision,
    DecisionLog,
    first_difference,
    read,
    show,
    write,
)


def row(step: int = 0, /, **changes: Any) -> Decision:
    made = Decision(
        step=step,
        entered=["a", "b"],
        aborted=[],
        scheduled={"a": 16, "b": 3},
        new=["a", "b"],
        resumed=[],
        preempted=[],
        hits={"a": 0, "b": 0},
        blocks={"a": [1], "b": [2]},
        evicted=[["z:0", 2]],
        free=7,
        waiting=["c"],
        running=["a", "b"],
    )
    made.update(changes)  # type: ignore[typeddict-item]
    return made


def test_a_file_gives_back_what_was_written(tmp_path: Path) -> None:
    rows = [row(), row(1, began_s=0.5, ended_s=0.75)]
    path = tmp_path / "new folder" / "rows.jsonl"
    write(path, rows)
    assert read(path) == rows
    assert list(json.loads(path.read_text().splitlines()[0])) == list(FIELDS)


@pytest.mark.parametrize("torn", ["", '{"step":2,"ent', '{"step":2,"entered":["' + "x" * 200_000])
def test_a_log_goes_on_after_what_its_file_has(tmp_path: Path, torn: str) -> None:
    path = tmp_path / "rows.jsonl"
    write(path, [row(9)])
    write(path, [row(), row(1)])
    with path.open("a") as file:
        file.write(torn)
    log = DecisionLog(path)
    log(row(free=1))
    log.close()
    assert read(path) == [row(), row(1), row(free=1)]


def test_a_file_with_nothing_but_a_torn_line_begins_anew(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"step":0,"ent')
    log = DecisionLog(path)
    log(row())
    log.close()
    assert read(path) == [row()]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON"),
        ("[1]", "an object, not list"),
        (json.dumps({**row(), "fre": 1}), "fre"),
        (json.dumps({k: v for k, v in row().items() if k != "free"}), "'free' is missing"),
        (json.dumps(row(free="7")), "free='7' has the wrong type"),
        (json.dumps(row(free=True)), "free=True has the wrong type"),
        (json.dumps(row(waiting={})), "waiting={} has the wrong type"),
    ],
)
def test_a_bad_line_is_named_with_its_file(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row()) + "\n" + line + "\n")
    with pytest.raises(ValueError, match=r"rows\.jsonl:2: ") as caught:
        read(path)
    assert message in str(caught.value)


def test_equal_logs_have_no_difference_and_times_do_not_count() -> None:
    assert first_difference([], []) is None
    assert first_difference([row(began_s=1.0)], [row(began_s=2.0, ended_s=3.0)]) is None


@pytest.mark.parametrize("field", FIELDS)
def test_every_field_counts(field: str) -> None:
    other: dict[str, Any] = {field: "something else"}
    found = first_difference([row(), row(1)], [row(), row(1, **other)])
    assert found is not None
    assert (found.step, found.field, found.theirs) == (1, field, "something else")


def test_the_order_of_scheduling_counts() -> None:
    found = first_difference([row()], [row(scheduled={"b": 3, "a": 16})])
    assert found is not None
    assert found.field == "scheduled"


def test_the_first_of_several_differences_is_found() -> None:
    found = first_difference([row(), row(1, free=1)], [row(free=6, running=[]), row(1)])
    assert found is not None
    assert str(found) == "step 0: free: 7 != 6"


def test_a_log_that_ends_early_differs() -> None:
    found = first_difference([row()], [row(), row(1)])
    assert found is not None
    assert (found.step, found.field, found.ours) == (1, "row", None)


def test_both_states_are_printed_side_by_side() -> None:
    ours = [row(), row(1), row(2, free=11)]
    theirs = [row(), row(1), row(2, free=22)]
    found = first_difference(ours, theirs)
    assert found is not None
    out = io.StringIO()
    show(found, ours, theirs, before=1, console=Console(file=out, width=120))
    text = out.getvalue()
    line = next(line for line in text.splitlines() if "free" in line and "22" in line)
    assert "11" in line
    assert "ServeLab" in text
    assert "vLLM" in text
    assert "step 2: free differs" in text
    assert "step 1: " in text
    assert "step 0: " not in text
    assert all(field in text for field in FIELDS)


def test_a_missing_row_is_printed_as_such() -> None:
    ours = [row()]
    found = first_difference(ours, [])
    assert found is not None
    out = io.StringIO()
    show(found, ours, [], console=Console(file=out, width=120))
    assert "no row" in out.getvalue()
