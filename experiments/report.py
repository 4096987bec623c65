"""The table of one run or of several side by side, and the same as plain data for ``--json``.

Numbers are those of ``Result.summary``; here they only get units, an order and a mark for the
best of each row.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import inf
from typing import Any, Literal

from rich.console import Group
from rich.table import Table
from rich.text import Text

from sim.result import Result

__all__ = ["ROWS", "Row", "differences", "document", "name", "notes", "page", "warnings"]

BEST = " *"
"""Marks the best value of a row; it survives a pipe, which colours do not."""


@dataclass(frozen=True, slots=True)
class Row:
    """A figure of the summary as it is shown."""

    label: str
    key: str
    """Of the summary."""
    scale: float = 1.0
    digits: int = 0
    better: Literal["less", "more"] = "less"
    only_if_any: bool = False
    """Left out where it is 0 for every run."""


ROWS = (
    Row("requests finished", "finished", better="more"),
    Row("requests rejected", "rejected", only_if_any=True),
    Row("TTFT p50 (ms)", "ttft_p50_s", 1e3, 1),
    Row("TTFT p99 (ms)", "ttft_p99_s", 1e3, 1),
    Row("TPOT p50 (ms)", "tpot_p50_s", 1e3, 2),
    Row("TPOT p99 (ms)", "tpot_p99_s", 1e3, 2),
    Row("E2E p50 (s)", "e2e_p50_s", 1.0, 2),
    Row("E2E p99 (s)", "e2e_p99_s", 1.0, 2),
    Row("goodput (requests/s)", "goodput_per_s", 1.0, 3, "more"),
    Row("within SLO (%)", "slo_attainment", 100.0, 2, "more"),
    Row("throughput (requests/s)", "throughput_per_s", 1.0, 3, "more"),
    Row("output tokens/s", "output_tokens_per_s", 1.0, 1, "more"),
    Row("prefix hit rate (%)", "prefix_hit_rate", 100.0, 2, "more"),
    Row("preemptions", "preemptions"),
    Row("evictions (blocks)", "evictions"),
    Row("$ per million tokens", "usd_per_million_tokens", 1.0, 4),
)


def page(
    results: Mapping[str, Result], configs: Mapping[str, Mapping[str, Any]] | None = None
) -> Group:
    """A title, the runs as columns and the figures as rows, and footnotes.

    With configs, the keys that differ come first.
    """
    summaries = [
        # Without targets every request meets them, which is not worth a figure.
        result.summary() | ({} if _has_targets(result) else {"slo_attainment": None})
        for result in results.values()
    ]
    shown = Table(show_header=bool(results))
    shown.add_column("")
    for label, result in results.items():
        mark = "" if _calibrated(result) else "\nuncalibrated"
        shown.add_column(Text(f"{label}{mark}"), justify="right", overflow="fold")
    for key, values in differences(configs or {}).items():
        texts = ("-" if values[label] is None else str(values[label]) for label in results)
        shown.add_row(Text(key), *map(Text, texts), style="cyan")
    shown.add_section()
    for row in ROWS:
        numbers = [summary[row.key] for summary in summaries]
        if any(numbers) or not row.only_if_any:
            shown.add_row(row.label, *_cells(row, numbers))
    title = Text(_title(results), style="bold")
    return Group(title, shown, *(Text(line, style="dim") for line in _footnotes(results)))


def name(result: Result) -> str:
    """A run by its policies, for tables of one."""
    policies = result.meta["policies"]
    names = (str(policies[kind]).rpartition("/")[2] for kind in ("eviction", "routing"))
    return ", ".join(names)


def document(result: Result, run: str | None = None) -> dict[str, Any]:
    """A run as plain data: its figures, where they come from, and what to know about them.

    Args:
        result: the run.
        run: the folder it was saved to.
    """
    return {
        **result.summary(),
        **result.meta,
        "uncalibrated": not _calibrated(result),
        "notes": notes(result),
        "rejected_reasons": _reasons(result),
        "run": run,
    }


def differences(configs: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The keys of configurations that are not equal everywhere, with each one's value.

    A key that a configuration does not have counts as None.
    """
    flat = {name: dict(_leaves(config)) for name, config in configs.items()}
    keys = dict.fromkeys(key for leaves in flat.values() for key in leaves)
    found = {key: {name: leaves.get(key) for name, leaves in flat.items()} for key in keys}
    return {
        key: values
        for key, values in found.items()
        if any(value != next(iter(values.values())) for value in values.values())
    }


def notes(result: Result) -> list[str]:
    """What a reader of the figures should know."""
    meta = result.meta
    lines = [f"trace {meta['trace']}: {text}" for text in meta.get("trace_notes", ())]
    details = _rejections(result)
    for cause, count in _reasons(result).items():
        example = next(detail for detail in details if _cause(detail) == cause)
        first = "" if example == cause else f", the first: {example.partition(': ')[2]}"
        lines.append(f"rejected {count} of {len(result.requests)} requests: {cause}{first}")
    return lines


def warnings(result: Result) -> list[str]:
    """What a reader of the figures must know: data not to be trusted, runs that went wrong."""
    simulated = result.meta.get("backend") == "sim"
    about = f"chip {result.meta['chip']}: " if simulated else ""
    return [about + text for text in result.meta.get("warnings", ())]


def _title(results: Mapping[str, Result]) -> str:
    metas = [result.meta for result in results.values()]
    where = _common(
        [f"{meta['engines']} x {meta['chip']}" for meta in metas], "several deployments"
    )
    trace = _common([str(meta["trace"]) for meta in metas], "several traces")
    model = _common([str(meta["model"]) for meta in metas], "several models")
    calibrated = all(map(_calibrated, results.values()))
    return f"{trace} on {where}, {model}" + ("" if calibrated else " (uncalibrated)")


def _footnotes(results: Mapping[str, Result]) -> list[str]:
    lines = [f"{BEST.strip()} best of the row"] if len(results) > 1 else []
    for result in results.values():
        meta = result.meta
        if synthetic := meta.get("synthetic"):
            lines.append(f"trace {meta['trace']} is synthetic: {synthetic}")
        if not _has_targets(result):
            lines.append(
                f"trace {meta['trace']} sets no latency targets: every finished request is good"
            )
        if not _calibrated(result):
            lines.append(f"chip {meta['chip']} is {_uncalibrated(result)}")
        lines += [f"warning: {line}" for line in warnings(result)]
    return list(dict.fromkeys(lines))


def _has_targets(result: Result) -> bool:
    targets = result.requests[["slo_ttft_s", "slo_tpot_s", "slo_e2e_s"]].to_numpy(dtype=float)
    return bool((targets < inf).any())


def _uncalibrated(result: Result) -> str:
    said = str(result.meta.get("calibration", ""))
    return said if said.startswith("uncalibrated") else f"uncalibrated: {said}".rstrip(": ")


def _calibrated(result: Result) -> bool:
    return bool(result.meta.get("calibrated", False))


def _reasons(result: Result) -> dict[str, int]:
    """How many requests were rejected for each cause."""
    return dict(Counter(map(_cause, _rejections(result))).most_common())


def _rejections(result: Result) -> list[str]:
    """The reason of each rejected request: ``cause`` or ``cause: details``."""
    rejected = result.requests.loc[result.requests["state"] == "rejected", "reason"]
    return [str(reason) for reason in rejected]


def _cause(reason: str) -> str:
    return reason.partition(": ")[0]


def _common(values: list[str], otherwise: str) -> str:
    return values[0] if len(set(values)) == 1 else otherwise


def _cells(row: Row, numbers: list[Any]) -> list[Text]:
    known = [number for number in numbers if number is not None]
    # Compared as shown: who sees equal numbers must not see one of them marked.
    texts = [
        "-" if n is None else f"{round(n * row.scale, row.digits) + 0:,.{row.digits}f}"
        for n in numbers
    ]
    if len(set(texts)) == 1:
        return [Text(text) for text in texts]
    best = min(known) if row.better == "less" else max(known)
    winner = texts[numbers.index(best)]
    return [
        Text(f"{text}{BEST}", style="bold green")
        if text == winner
        else Text(f"{text}{' ' * len(BEST)}")
        for text in texts
    ]


def _leaves(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
