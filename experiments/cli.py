"""The command ``servelab``: replay traces, compare runs, look at traces, chips, models, policies.

Options become the Hydra overrides that ``python -m experiments.run`` takes. What takes long to
import is imported by the command that needs it.
"""

# ruff: noqa: PLC0415

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, cast

import typer
from typer.core import TyperGroup

from experiments import listings, live
from experiments.listings import print_json
from experiments.options import AsJson, BlockTokens, Format, Limit, Modules, Quiet, TimeUnit

__all__ = ["app", "main"]


UsageError = cast("type[Exception]", typer.BadParameter.__mro__[1])
"""What a wrong option or command raises; Typer shows it as a box of several lines."""


class _Commands(TyperGroup):
    """Commands whose bad input ends in one line and exit code 2."""

    def main(self, *args: Any, **options: Any) -> Any:
        if not options.pop("standalone_mode", True):
            return super().main(*args, **options | {"standalone_mode": False})
        try:
            code = super().main(*args, **options | {"standalone_mode": False})
        except UsageError as error:
            code = 2
            usage: Any = error
            if type(error).__name__ == "NoArgsIsHelpError":
                typer.echo(usage.ctx.get_help())
            else:
                message = " ".join(usage.format_message().split())
                path = "servelab" if usage.ctx is None else usage.ctx.command_path
                typer.echo(f"error: {message} (see {path} --help)", err=True)
        sys.exit(code if isinstance(code, int) else 0)

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


class Mode(StrEnum):
    """How the simulator advances."""

    fast = "fast"
    stepwise = "stepwise"


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
    from experiments.composing import compose, override, overrides_of, trace_overrides
    from experiments.console import bar, note, say_all, stderr, stdout, warn
    from experiments.runs import resolved, simulate
    from sim.result import check_target

    changes: list[str] = []
    if policy_module:
        changes.append(override("policy_modules", [str(module) for module in policy_module]))
    more = list(overrides or ())
    if trace is not None and "=" in trace and not Path(trace).exists():
        more.insert(0, trace)
    elif trace is not None:
        changes += trace_overrides(trace)
    elif config is None:
        raise typer.BadParameter("name a trace, or a run with --config", param_hint="PATH|NAME")
    ends_s = (start_s or 0.0, float("inf") if end_s is None else end_s)
    between = None if start_s is None and end_s is None else ends_s
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
    target = out or made.out
    if target is not None:
        check_target(Path(target))
    with bar(show=not no_progress) as update:
        result = simulate(made, progress=lambda done, total: update("replay", done, total))
    folder = None if target is None else result.save(target, config=plain)
    say_all(warn, report.warnings(result))
    say_all(note, report.notes(result))
    if as_json:
        print_json(report.document(result, None if folder is None else str(folder)))
    else:
        stdout().print(report.page({report.name(result): result}))
    if folder is not None:
        stderr().print(f"wrote {folder}", markup=False)


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
        print_json(
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


for _command in (
    live.validate, live.parity, live.front, listings.chips, listings.models, listings.policies,
):  # fmt: skip
    app.command()(_command)
app.add_typer(listings.traces_app, name="traces")


if __name__ == "__main__":
    main()
