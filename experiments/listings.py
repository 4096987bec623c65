"""Commands of ``servelab`` that show what there is: traces, chips, models and policies."""

# ruff: noqa: PLC0415 - as in experiments.cli

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from experiments.options import AsJson, BlockTokens, Format, Limit, Modules, TimeUnit

__all__ = ["chips", "models", "policies", "print_json", "traces_app"]

traces_app = typer.Typer(no_args_is_help=True, help="Look at traces.", rich_markup_mode="markdown")


@traces_app.command("stats")
def trace_stats(
    trace: Annotated[str, typer.Argument(metavar="PATH|NAME", help="A trace file or a name.")],
    *,
    block_tokens: BlockTokens = None,
    time_unit: TimeUnit = None,
    format: Format = None,
    limit: Limit = None,
    as_json: AsJson = False,
) -> None:
    """Describe a trace: lengths, burstiness, and what an infinite prefix cache would save.

    Example: `servelab traces stats trace.jsonl.gz --json`
    """
    from rich.table import Table

    from experiments.composing import compose, override, trace_overrides
    from experiments.console import note, say_all, stdout
    from experiments.runs import trace_of
    from traces import stats

    values = {
        "trace.block_tokens": block_tokens,
        "trace.time_unit": time_unit,
        "trace.format": format,
        "trace.limit": limit,
    }
    changes = [override(key, value) for key, value in values.items() if value is not None]
    found = trace_of(compose([*trace_overrides(trace), *changes]))
    described = stats(found)
    say_all(note, found.notes)
    if as_json:
        print_json({**described, "notes": list(found.notes)})
        return
    shown = Table("", found.name, show_header=True)
    for key, value in described.items():
        if isinstance(value, dict):
            text = ", ".join(f"{name}: {_number(item)}" for name, item in value.items())
        else:
            text = _number(value)
        if key != "name" and text:
            shown.add_row(key, text)
    stdout().print(shown)


@traces_app.command("formats")
def trace_formats(as_json: AsJson = False) -> None:
    """List the trace formats that are read."""
    from traces.reader import formats

    _print_rows([{"format": f.name, "about": f.about} for f in formats().values()], as_json)


def chips(as_json: AsJson = False) -> None:
    """List the chips, how far their data is to be trusted, and which are calibrated."""
    from sim.hardware import chips as names
    from sim.hardware import load_chip

    rows = [
        {
            "chip": chip.name,
            "title": chip.title,
            "vendor": chip.vendor,
            "memory_gb": chip.memory_bytes / 1e9,
            "memory_gb_per_s": chip.memory_bytes_per_s / 1e9,
            "bf16_tflops": chip.bf16_flops / 1e12,
            "usd_per_h": chip.price_usd_per_h,
            "trust": chip.trust,
            "calibration": "calibrated" if chip.calibrated else "uncalibrated",
        }
        | ({"calibrated_by": chip.calibration, "warnings": list(chip.warnings)} if as_json else {})
        for chip in map(load_chip, names())
    ]
    _print_rows(rows, as_json)


def models(as_json: AsJson = False) -> None:
    """List the models."""
    from sim.model import load_model
    from sim.model import models as names

    rows = [
        {
            "model": model.name,
            "title": model.title,
            "billion_params": model.params / 1e9,
            "billion_active": model.active_params / 1e9,
            "weight_gb": model.weight_bytes / 1e9,
            "kv_bytes_per_token": model.kv_bytes_per_token(),
            "context_tokens": model.max_context_tokens,
        }
        for model in map(load_model, names())
    ]
    _print_rows(rows, as_json)


def policies(policy_module: Modules = None, as_json: AsJson = False) -> None:
    """List the policies with their parameters.

    Example: `servelab policies --policy-module my_policy.py`
    """
    from policies.registry import catalog, load_module

    for module in policy_module or ():
        load_module(module)
    rows: list[dict[str, Any]] = []
    for entry in catalog().values():
        parameters = {
            p.name: "the run's" if p.name == "seed" else p.default for p in entry.parameters
        }
        plain = {
            name: value if isinstance(value, bool | int | float | str) else repr(value)
            for name, value in parameters.items()
        }
        rows.append(
            {
                "policy": entry.key,
                "parameters": plain if as_json else _assigned(plain),
                "about": entry.summary,
            }
            | ({"needs_oracle": entry.needs_oracle, "source": entry.source} if as_json else {})
        )
    _print_rows(rows, as_json)


def _assigned(values: dict[str, Any]) -> str:
    return "\n".join(f"{name}={value}" for name, value in values.items())


def _print_rows(rows: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        print_json(rows)
        return
    from rich.table import Table
    from rich.text import Text

    from experiments.console import stdout

    shown = Table()
    for key in rows[0]:
        numeric = all(isinstance(row[key], int | float | None) for row in rows)
        shown.add_column(key, justify="right" if numeric else "left")
    for row in rows:
        shown.add_row(*(Text(_number(value)) for value in row.values()))
    stdout().print(shown)


def _number(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))
