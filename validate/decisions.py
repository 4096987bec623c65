"""What a scheduler decided, one row per step, and where two of them part. No vLLM needed.

Both sides write the same rows: ``validate.vllm_plugin.recorder`` for any vLLM scheduler and
``validate.parity`` for the simulator's engines. In a file each row is one line of JSON.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from os import SEEK_END
from pathlib import Path
from typing import Any, NotRequired, TypedDict, cast

from rich.console import Console
from rich.table import Table

from policies.parameters import nearest


class Decision(TypedDict):
    """One step that scheduled tokens or preempted somebody; its state is that after scheduling."""

    step: int
    """Counts the rows from 0."""
    entered: list[str]
    """Requests that joined the queue since the row before, in order."""
    aborted: list[str]
    """Those that left since the row before without finishing, by client or by policy."""
    scheduled: dict[str, int]
    """Tokens of each request, in scheduling order."""
    new: list[str]
    """Admitted for the first time."""
    resumed: list[str]
    """Admitted again after a preemption."""
    preempted: list[str]
    hits: dict[str, int]
    """Cached tokens that the admitted ones use."""
    blocks: dict[str, list[int]]
    """Numbers of the blocks that requests got in this step; of the admitted ones, all."""
    evicted: list[list[Any]]
    """Blocks that lost their content, in order: name and number. A name is the request that first
    stored this content and the block's index in it, ``"r3:0"``."""
    free: int
    """Blocks that nobody uses."""
    waiting: list[str]
    """The queue in order."""
    running: list[str]
    """The batch in order of admission."""
    began_s: NotRequired[float]
    """When scheduling began, on the scheduler's clock."""
    ended_s: NotRequired[float]
    """When the model's output had been taken in."""


OPTIONAL = ("began_s", "ended_s")
"""Times, which are never compared."""

FIELDS = tuple(key for key in Decision.__annotations__ if key not in OPTIONAL)

_KINDS: dict[str, type | tuple[type, ...]] = {
    "step": int,
    "scheduled": dict,
    "hits": dict,
    "blocks": dict,
    "free": int,
    "began_s": (int, float),
    "ended_s": (int, float),
}
"""JSON types of the fields that are not lists."""


class DecisionLog:
    """A file of decision rows; calling it appends one.

    What a file already has stays, except for a last line that was never finished because its
    engine died. Every run counts its rows from 0, so that is where another run begins.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_file():
            _drop_torn_line(path)
        self._file = path.open("a", buffering=1, encoding="utf-8")

    def __call__(self, row: Decision) -> None:
        self._file.write(json.dumps(row, separators=(",", ":")) + "\n")

    def close(self) -> None:
        """Nothing can be written after this."""
        self._file.close()


def _drop_torn_line(path: Path) -> None:
    with path.open("r+b") as file:
        end = file.seek(0, SEEK_END)
        kept = end
        while kept:
            start = max(kept - 65536, 0)
            file.seek(start)
            newline = file.read(kept - start).rfind(b"\n")
            kept = start + newline + 1
            if newline >= 0:
                break
        if kept < end:
            file.truncate(kept)


def write(path: Path, rows: Iterable[Decision]) -> None:
    """Write rows to a file, replacing it."""
    path.unlink(missing_ok=True)
    log = DecisionLog(path)
    try:
        for row in rows:
            log(row)
    finally:
        log.close()


def read(path: Path) -> list[Decision]:
    """The rows of a file.

    Raises:
        ValueError: a line is not a decision row; the message names file, line and field.
        OSError: the file cannot be read.
    """
    rows: list[Decision] = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            where = f"{path}:{number}"
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{where}: not JSON: {error}") from None
            rows.append(_checked(row, where))
    return rows


def _checked(row: object, where: str) -> Decision:
    if not isinstance(row, dict):
        raise ValueError(f"{where}: a decision row is an object, not {type(row).__name__}")
    for key in FIELDS:
        if key not in row:
            raise ValueError(f"{where}: the field {key!r} is missing")
    for key, value in row.items():
        if key not in FIELDS and key not in OPTIONAL:
            raise ValueError(f"{where}: {nearest('field', key, [*FIELDS, *OPTIONAL])}")
        if not isinstance(value, _KINDS.get(key, list)) or isinstance(value, bool):
            raise ValueError(f"{where}: {key}={value!r} has the wrong type")
    return cast(Decision, row)


# --------------------------------------------------------------------------- comparing


@dataclass(frozen=True, slots=True)
class Difference:
    """Where two logs part."""

    step: int
    """Index of the row."""
    field: str
    """The first field that differs; ``"row"`` if only one log has this row."""
    ours: Any
    theirs: Any

    def __str__(self) -> str:
        return f"step {self.step}: {self.field}: {self.ours!r} != {self.theirs!r}"


def first_difference(
    ours: Sequence[Decision], theirs: Sequence[Decision], fields: Sequence[str] = FIELDS
) -> Difference | None:
    """The first row and field in which two logs differ; ``None`` if they are equal.

    Fields are compared in the given order, and so are the requests within ``scheduled``.
    """
    for step, (a, b) in enumerate(zip(ours, theirs, strict=False)):
        if a == b and list(a["scheduled"]) == list(b["scheduled"]):
            continue
        for key in fields:
            x, y = a.get(key), b.get(key)
            if x != y or (key == "scheduled" and list(a["scheduled"]) != list(b["scheduled"])):
                return Difference(step, key, x, y)
    if len(ours) != len(theirs):
        step = min(len(ours), len(theirs))
        rows = [dict(log[step]) if step < len(log) else None for log in (ours, theirs)]
        return Difference(step, "row", *rows)
    return None


def show(
    difference: Difference,
    ours: Sequence[Decision],
    theirs: Sequence[Decision],
    *,
    names: tuple[str, str] = ("ServeLab", "vLLM"),
    before: int = 3,
    console: Console | None = None,
) -> None:
    """Print both states side by side where they part, and the rows before.

    Args:
        difference: what ``first_difference`` found.
        ours: the log on the left.
        theirs: the log on the right.
        names: what to call them.
        before: how many equal rows to print first.
        console: where to print; standard output by default.
    """
    console = console or Console()
    step = difference.step
    for row in ours[max(step - before, 0) : step]:
        console.print(f"[dim]step {row['step']}: {_short(row)}[/dim]", highlight=False)
    table = Table(title=f"step {step}: {difference.field} differs", title_justify="left")
    table.add_column("field")
    for name in names:
        table.add_column(name, overflow="fold", ratio=1)
    left, right = (log[step] if step < len(log) else None for log in (ours, theirs))
    for key in FIELDS:
        x, y = (row.get(key) if row is not None else None for row in (left, right))
        same = x == y and (key != "scheduled" or _text(x) == _text(y))
        style = "" if same else "bold red"
        table.add_row(key, *(_text(x) if r else "no row" for x, r in ((x, left), (y, right))),
                      style=style)  # fmt: skip
    console.print(table)


def _text(value: object) -> str:
    return json.dumps(value, separators=(", ", ":"))


def _short(row: Decision) -> str:
    """The fields of a row that are not empty, in one line."""
    parts = {key: row.get(key) for key in FIELDS[1:]}
    return "  ".join(f"{k}={_text(v)}" for k, v in parts.items() if v or k == "free")
