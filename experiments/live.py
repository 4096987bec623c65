"""Commands of ``servelab`` around a real vLLM: validate, parity and front."""

# ruff: noqa: PLC0415 - what takes long to import is imported by the command that needs it

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from experiments.listings import print_json
from experiments.options import AsJson, Modules

__all__ = ["front", "parity", "validate"]


def validate(
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Hydra overrides, as for a simulation.")
    ] = None,
    *,
    model: Annotated[
        str | None,
        typer.Option(
            help="The live model: folder or Hugging Face name; default: a tiny random one. "
            "An override model=NAME only changes the simulated profile."
        ),
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Live runs: they show the noise.")] = 2,
    calibrate: Annotated[
        bool, typer.Option(help="Step times measured on this engine, not the chip's profile.")
    ] = True,
    load: Annotated[
        float | None, typer.Option(help="Rescale arrivals to this part of the capacity.")
    ] = None,
    quick: Annotated[bool, typer.Option(help="A short trace, one live run.")] = False,
    strict: Annotated[
        bool,
        typer.Option(
            help="Exit with 1 unless mean TTFT, TPOT and E2E are all within 15 % and "
            "no decision that was compared differs."
        ),
    ] = False,
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="Where to write both runs and the figure.")
    ] = Path("outputs/validate"),
    as_json: AsJson = False,
) -> None:
    """Run one configuration on the simulator and on a live vLLM, side by side.

    For example:

    - `servelab validate --quick`
    - `servelab validate policies/eviction=slo_aware policies/admission=priority`
    - `servelab validate trace=mine.jsonl --model Qwen/Qwen3-0.6B engine.block_tokens=16`
    """
    from experiments.console import note, stderr, stdout, warn
    from validate.live_validation import validate as run

    result = run(
        overrides or (),
        model=model,
        repeats=repeats,
        calibrate=calibrate,
        load=load,
        quick=quick,
        out=out,
        say=note,
        warn=warn,
    )
    if as_json:
        print_json(result.document())
    else:
        stdout().print(result.page())
    for path in (*result.folders, *result.files):
        stderr().print(f"wrote {path}", markup=False)
    if strict and not result.comparison.agrees:
        raise typer.Exit(1)


def parity(
    options: Annotated[
        list[str] | None,
        typer.Argument(metavar="engine.KEY=VALUE", help="The engine's options for --workload."),
    ] = None,
    *,
    seeds: Annotated[
        str | None, typer.Option(metavar="A:B", help="Random workloads A to B-1.")
    ] = None,
    workload: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Step through a trace instead.")
    ] = None,
    step_s: Annotated[
        float, typer.Option(help="How long a step of a trace takes (s): who arrives in which.")
    ] = 0.02,
    asynchronous: Annotated[bool, typer.Option(help="vLLM's asynchronous scheduler.")] = False,
    policies: Annotated[bool, typer.Option(help="Random policies plugged in.")] = False,
    fast: Annotated[bool, typer.Option(help="Check the fast engine instead.")] = False,
    jobs: Annotated[int, typer.Option(min=1, help="Processes.")] = 1,
) -> None:
    """Step vLLM's real scheduler and ours through the same workloads, until they differ.

    For example:

    - `servelab parity --seeds 0:500`
    - `servelab parity --workload trace.jsonl --step-s 0.05 engine.num_gpu_blocks=600`
    """
    from validate.parity import parity as run

    raise typer.Exit(
        run(
            None if seeds is None else _range(seeds),
            workload,
            options=options or (),
            step_s=step_s,
            asynchronous=asynchronous,
            policies=policies,
            mode="fast" if fast else "steps",
            jobs=jobs,
        )
    )


def _range(text: str) -> range:
    first, colon, last = text.partition(":")
    if not (colon and first.isdigit() and last.isdigit() and int(first) < int(last)):
        raise typer.BadParameter(f"{text!r} is not A:B with A < B, for example 0:500")
    return range(int(first), int(last))


def front(
    engine: Annotated[
        list[str], typer.Option(metavar="URL", help="A vLLM server; once per engine.")
    ],
    *,
    routing: Annotated[str | None, typer.Option(help="See servelab policies routing.")] = None,
    pd: Annotated[str, typer.Option(help="See servelab policies pd.")] = "colocated",
    option: Annotated[
        list[str] | None,
        typer.Option("--routing-option", metavar="KEY=VALUE", help="A parameter of the router."),
    ] = None,
    policy_module: Modules = None,
    kv_events: Annotated[
        list[str] | None,
        typer.Option(metavar="ENDPOINT", help="KV events of each engine, in the same order."),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 8000,
    signal_s: Annotated[float, typer.Option(help="Seconds between two polls.")] = 0.25,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
) -> None:
    """One HTTP server before several vLLM engines, which a routing policy fills.

    Example: `servelab front --engine http://127.0.0.1:8001 --engine http://127.0.0.1:8002
    --routing prefix_affinity`
    """
    from validate.front.front import front as serve
    from validate.front.front import policy_spec

    if option and routing is None:
        raise typer.BadParameter("--routing-option needs --routing")
    serve(
        engine,
        routing=None if routing is None else policy_spec(routing, option or ()),
        pd=pd,
        policy_modules=[str(module) for module in policy_module or ()],
        kv_events=kv_events or (),
        host=host,
        port=port,
        signal_s=signal_s,
        seed=seed,
    )
