"""The command ``servelab``: replay traces, compare runs, look at traces, chips, models, policies.

Options become the Hydra overrides that ``python -m experiments.run`` takes. What takes long to
import is imported by the command that needs it.
"""

# ruff: noqa: PLC0415

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

__all__ = ["app", "main"]


class _Commands(TyperGroup):
    """Commands whose bad input ends in one line and exit code 2."""

    def invoke(self, ctx: Any) -> Any:
        from experiments.console import reporting

        with reporting():
            return super().invoke(ctx)


app = typer.Typer(
    name="servelab",
    cls=_Commands,
    help="Simulate LLM serving: which policies, on which chips, for which requests.",
    epilog="Start with `servelab demo`. Results go to stdout, everything else to stderr.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)
traces_app = typer.Typer(no_args_is_help=True, help="Look at traces.", rich_markup_mode="markdown")
app.add_typer(traces_app, name="traces")


class Mode(StrEnum):
    """How the simulator advances."""

    fast = "fast"
    stepwise = "stepwise"


AsJson = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else on stdout.")]
Quiet = Annotated[bool, typer.Option("--no-progress", help="No progress bar.")]
Modules = Annotated[
    list[Path] | None,
    typer.Option("--policy-module", metavar="FILE", help="File (or module) with own policies."),
]
Format = Annotated[str | None, typer.Option(help="Trace format; default: told by the first line.")]
BlockTokens = Annotated[
    int | None,
    typer.Option(help="Tokens per block id of the trace, where the file leaves it open."),
]
TimeUnit = Annotated[str | None, typer.Option(help="Unit of the trace's times: s, ms, us or ns.")]
Limit = Annotated[int | None, typer.Option(help="Only so many requests, from the start.")]


def main() -> None:
    """Entry point of the command ``servelab``."""
    app()


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import PackageNotFoundError, version

        try:
            typer.echo(f"servelab {version('servelab')}")
        except PackageNotFoundError:
            typer.echo("servelab, not installed")
        raise typer.Exit


@app.callback()
def _servelab(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Nothing to do before a command."""


# --------------------------------------------------------------------------- running


@app.command()
def replay(
    trace: Annotated[
        str | None,
        typer.Argument(
            metavar="[PATH|NAME]", help="A trace file, or demo, mooncake, azure_conv, chat, ..."
        ),
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Any Hydra override: engine.max_num_seqs=64")
    ] = None,
    *,
    chip: Annotated[str | None, typer.Option(help="Name (servelab chips) or YAML file.")] = None,
    model: Annotated[str | None, typer.Option(help="Name (servelab models) or YAML file.")] = None,
    engines: Annotated[int | None, typer.Option(help="Equal engines behind one router.")] = None,
    tp: Annotated[int | None, typer.Option(help="Chips per engine (tensor parallel).")] = None,
    admission: Annotated[str | None, typer.Option(help="See servelab policies.")] = None,
    eviction: Annotated[str | None, typer.Option(help="See servelab policies.")] = None,
    reuse: Annotated[str | None, typer.Option(help="See servelab policies.")] = None,
    routing: Annotated[str | None, typer.Option(help="See servelab policies.")] = None,
    policy_module: Modules = None,
    block_tokens: BlockTokens = None,
    time_unit: TimeUnit = None,
    format: Format = None,
    limit: Limit = None,
    rate_scale: Annotated[
        float | None, typer.Option(help="Arrivals so many times as fast.")
    ] = None,
    dequantise: Annotated[
        float | None,
        typer.Option(metavar="SECONDS", help="Spread arrivals recorded on ticks of this length."),
    ] = None,
    start_s: Annotated[
        float | None, typer.Option("--from", metavar="SECONDS", help="First arrival to replay.")
    ] = None,
    end_s: Annotated[
        float | None, typer.Option("--to", metavar="SECONDS", help="Replay arrivals before this.")
    ] = None,
    signal_age: Annotated[
        float | None, typer.Option(metavar="SECONDS", help="Age of the state that routers see.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of everything random.")] = None,
    mode: Annotated[Mode | None, typer.Option(help="Equal results; stepwise is slow.")] = None,
    config: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="A run's config.yaml (or folder): repeat that run."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Save the run folder here.")
    ] = None,
    as_json: AsJson = False,
    no_progress: Quiet = False,
) -> None:
    """Replay a trace on simulated engines and print what it was like.

    For example:

    - `servelab replay demo --engines 4 --routing prefix_affinity`
    - `servelab replay trace.jsonl.gz --chip h100 --model llama3_8b --out run`
    - `servelab replay mooncake --to 600 --eviction slo_aware policies.eviction.grace_s=3`
    - `servelab replay --config run/config.yaml --out again`
    """
    from experiments import report
    from experiments.composing import compose, override, overrides_of
    from experiments.console import bar, note, say_all, stderr, stdout, warn
    from experiments.runs import resolved, simulate

    changes: list[str] = []
    if policy_module:
        changes.append(override("policy_modules", [str(module) for module in policy_module]))
    more = list(overrides or ())
    if trace is not None and "=" in trace and not Path(trace).exists():
        more.insert(0, trace)
    elif trace is not None:
        changes += _trace_overrides(trace)
    elif config is None:
        raise typer.BadParameter("name a trace, or a run with --config", param_hint="PATH|NAME")
    between = None if start_s is None and end_s is None else [start_s or 0.0, end_s or float("inf")]
    values = {
        "chip": chip,
        "model": model,
        "policies/admission": admission,
        "policies/eviction": eviction,
        "policies/reuse": reuse,
        "policies/routing": routing,
        "engines": engines,
        "tp": tp,
        "trace.block_tokens": block_tokens,
        "trace.time_unit": time_unit,
        "trace.format": format,
        "trace.limit": limit,
        "trace.rate_scale": rate_scale,
        "trace.dequantise_s": dequantise,
        "trace.between": between,
        "signal_age_s": signal_age,
        "seed": seed,
        "mode": None if mode is None else mode.value,
    }
    changes += [override(key, value) for key, value in values.items() if value is not None]
    changes += more
    made = compose(changes if config is None else overrides_of(config, changes))
    plain = resolved(made)
    with bar(show=not no_progress) as update:
        result = simulate(made, progress=lambda done, total: update("replay", done, total))
    target = out or made.out
    folder = None if target is None else result.save(target, config=plain)
    say_all(warn, report.warnings(result))
    say_all(note, report.notes(result))
    if as_json:
        _print_json(report.document(result, None if folder is None else str(folder)))
    else:
        stdout().print(report.page({report.name(result): result}))
    if folder is not None:
        stderr().print(f"wrote {folder}", markup=False)


def _trace_overrides(trace: str) -> list[str]:
    """What chooses a trace by name or by path."""
    from experiments.composing import ConfigError, override
    from experiments.configs import options
    from policies.parameters import nearest

    names = [name for name in options("trace") if name != "file"]
    if trace in names:
        return [f"trace={trace}"]
    if "/" not in trace and "." not in trace and not Path(trace).exists():
        raise ConfigError(f"no file {trace!r} here, and {nearest('trace', trace, names)}")
    return ["trace=file", override("trace.path", trace)]


@app.command()
def demo(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where to write.")] = Path(
        "outputs/demo"
    ),
    limit: Limit = None,
    no_progress: Quiet = False,
) -> None:
    """Eviction against routing on the bundled trace: four runs, a table and two figures."""
    from experiments import demo as demos
    from experiments import report
    from experiments.console import bar, note, say_all, stderr, stdout

    with bar(len(demos.NAMES), show=not no_progress) as update:
        made = demos.demo(out, limit=limit, progress=update)
    say_all(note, [line for result in made.results.values() for line in report.notes(result)])
    stdout().print(report.page(made.results))
    stdout().print(demos.ABOUT, style="dim")
    for path in (*made.folders, *made.figures):
        stderr().print(f"wrote {path}", markup=False)


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN RUN...", help="Run folders.")],
    as_json: AsJson = False,
) -> None:
    """Put runs side by side: what differs in their configurations, and what came of it.

    Example: `servelab compare outputs/demo/lru-round_robin outputs/demo/slo_aware-prefix_affinity`
    """
    from experiments import report
    from experiments.console import say_all, stdout, warn
    from sim.result import Result

    names = _short_names(runs)
    results = {name: Result.load(folder) for name, folder in names.items()}
    configs = {name: _config_of(folder) for name, folder in names.items()}
    say_all(warn, [line for result in results.values() for line in report.warnings(result)])
    if as_json:
        _print_json(
            {
                "runs": {
                    name: report.document(result, str(names[name]))
                    for name, result in results.items()
                },
                "differences": report.differences(configs),
            }
        )
    else:
        stdout().print(report.page(results, configs))


def _short_names(runs: list[Path]) -> dict[str, Path]:
    """Folder names, with as much of the path as tells them apart."""
    paths = list(dict.fromkeys(run.resolve() for run in runs))
    depth = 1
    while len({path.parts[-depth:] for path in paths}) < len(paths):
        depth += 1
    return {str(Path(*path.parts[-depth:])): path for path in paths}


def _config_of(folder: Path) -> dict[str, Any]:
    import yaml

    text = (folder / "config.yaml").read_text(encoding="utf-8")
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{folder / 'config.yaml'}: not YAML: {error}") from None
    return data if isinstance(data, dict) else {}


# --------------------------------------------------------------------------- looking


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

    from experiments.composing import compose, override
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
    found = trace_of(compose([*_trace_overrides(trace), *changes]))
    described = stats(found)
    say_all(note, found.notes)
    if as_json:
        _print_json({**described, "notes": list(found.notes)})
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


@app.command()
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


@app.command()
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


@app.command()
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
        _print_json(rows)
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


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))


if __name__ == "__main__":
    main()
