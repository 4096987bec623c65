"""One trace, simulated and on live engines: what ``servelab validate`` does.

The engines serve calibration traffic, the trace, calibration traffic again, and so on. The
simulator gets the step times fitted to the calibration traffic, never those of the trace; that
the engines became slower or faster in between shows as drift.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from rich.console import Group
from rich.text import Text

from experiments import runs
from experiments.composing import compose, resolved
from policies.api import PolicySet
from policies.registry import load_module
from sim.backend import Deployment
from sim.latency import PS_PER_S, StepModel
from sim.metrics import queue_s
from sim.result import Result
from sim.simulator import Simulator
from traces import Trace
from validate import comparison, comparison_figure
from validate.calibrate import (
    MeasuredStep,
    StepFit,
    drift,
    fit_steps,
    measured_steps,
)
from validate.calibration_traffic import calibration_trace
from validate.comparison import Comparison, Parity
from validate.live_parity import decision_parity, unchecked
from validate.live_result import length_warnings, uninterrupted
from validate.vllm_backend import VllmBackend

__all__ = [
    "DEFAULTS",
    "Overheads",
    "Validation",
    "at_load",
    "calibrated",
    "delayed",
    "overheads",
    "validate",
]

ENGINE = (
    "engine.block_tokens=32",
    "engine.num_gpu_blocks=300",
    "engine.max_num_seqs=16",
    "engine.max_num_batched_tokens=512",
    "engine.max_model_len=2048",
)
TRACE = (
    "trace=chat",
    "trace.sessions=200",
    "trace.session_rate_per_s=1",
    "trace.think_mean_s=1",
    "trace.system_min=64",
    "trace.system_max=512",
    "trace.user_mean=60",
    "trace.output_mean=40",
    "trace.output_max=160",
    "trace.prompt_max=1500",
    "trace.block_tokens=32",
)
DEFAULTS = (*ENGINE, *TRACE)
"""What is validated unless told otherwise: sized for the tiny model on two cores."""
QUICK = ("trace.limit=200",)

LOAD = 0.6
"""Of the default trace, in parts of what the engine can serve."""

Say = Callable[[str], None]


# --------------------------------------------------------------------------- what is compared


class Overheads(NamedTuple):
    """What a live request costs beyond engine steps."""

    travel_s: float = 0.0
    """From handing it over until an idle engine schedules it: it is checked, packed and sent to
    the engine's process."""
    wake_s: float = 0.0
    """By how much the first steps of an engine that was idle are longer than those of a busy one
    (on a CPU about 1.5 ms, whatever they compute)."""


def overheads(results: Sequence[Result], steps: StepModel, budget_tokens: int) -> Overheads:
    """The overheads of requests that found their engine idle, in the mean of the middle 80 %.

    Args:
        results: of live runs on one engine, best of calibration traffic.
        steps: what their steps should take.
        budget_tokens: most tokens of a step.
    """
    travels: list[float] = []
    wakes: list[float] = []
    for result in results:
        table = result.requests[_finds_idle(result.requests)]
        travels += queue_s(table).tolist()
        for prompt, cached, took_s in zip(
            table["prompt_tokens"],
            table["cached_tokens"],
            table["first_token_s"] - table["admitted_s"],
            strict=True,
        ):
            should_ps = sum(
                steps.prefill_ps(min(budget_tokens, prompt - done), done)
                for done in range(cached, prompt, budget_tokens)
            )
            wakes.append(took_s - should_ps / PS_PER_S)
    return Overheads(_middle(travels), max(_middle(wakes), 0.0))


def delayed(result: Result, overhead: Overheads) -> Result:
    """A simulated run as clients of a live engine would see it."""
    idle = _finds_idle(result.requests).to_numpy()
    woken_s = overhead.travel_s + np.where(idle, overhead.wake_s, 0.0)
    later = {
        "admitted_s": result.requests["admitted_s"] + overhead.travel_s,
        "first_token_s": result.requests["first_token_s"] + woken_s,
        "finish_s": result.requests["finish_s"] + woken_s,
    }
    meta = dict(result.meta) | overhead._asdict()
    return replace(result, requests=result.requests.assign(**later), meta=meta)


def _finds_idle(requests: pd.DataFrame) -> pd.Series[bool]:
    """Which requests came to an engine that had finished all others; in the order given."""
    found = pd.Series(False, index=requests.index)
    for _, table in requests[requests["state"] == "finished"].groupby("engine"):
        ordered = table.sort_values("arrival_s", kind="stable")
        busy_until_s = ordered["finish_s"].cummax().shift(1, fill_value=-np.inf)
        found[ordered.index] = ordered["arrival_s"] > busy_until_s
    return found


def _middle(values: Sequence[float]) -> float:
    """Mean without the lowest and the highest tenth; 0 of nothing."""
    cut = len(values) // 10
    kept = sorted(values)[cut : len(values) - cut]
    return float(np.mean(kept)) if kept else 0.0


def at_load(
    trace: Trace, load: float, deployment: Deployment, policies: PolicySet, steps: StepModel
) -> Trace:
    """The trace at a rate that keeps the engines busy for this part of the time.

    What they can do is how long they take for all requests at once, as the simulator has it.

    Raises:
        ValueError: the load is not positive.
    """
    if not load > 0:
        raise ValueError(f"load={load}: must be above 0")
    if not trace.span_s > 0:
        return trace
    at_once = replace(
        trace,
        requests=trace.requests.assign(arrival_s=0.0, session="", turn=0, think_s=0.0),
    )
    simulator = Simulator(deployment, step_model=steps, record_runs=False)
    needed_s = simulator.serve(at_once, policies).summary()["makespan_s"]
    return trace.scaled(round(load * trace.span_s / needed_s, 4))


# --------------------------------------------------------------------------- the whole


@dataclass(frozen=True)
class Validation:
    """Both sides of a configuration, and how the simulator came by its step times."""

    comparison: Comparison
    fit: StepFit | None
    """``None`` if the simulator used the chip's and the model's profiles."""
    overheads: Overheads
    drifts: tuple[float, ...]
    """By how much the engine was slower after each live run than before it."""
    folders: tuple[Path, ...] = ()
    files: tuple[Path, ...] = ()

    def page(self) -> Group:
        """What was measured, then both sides."""
        lines = ["step times are those of the chip's and the model's profiles"]
        if self.fit is not None:
            drifts = ", ".join(f"{100 * drift:+.1f} %" for drift in self.drifts)
            travel_s, wake_s = self.overheads
            lines = [
                *self.fit.lines(),
                f"a request reaches the engine in {1e3 * travel_s:.2f} ms, which takes "
                f"{1e3 * wake_s:.2f} ms more for the first token if it was idle; "
                f"drift of its speed during each live run: {drifts}",
            ]
        return Group(
            *(Text(line, style="dim") for line in lines),
            self.comparison.page(),
            *(Text(f"warning: {line}", style="yellow") for line in self.warnings()),
        )

    def warnings(self) -> list[str]:
        """What makes the figures less worth than they look."""
        lines = [line for run in self.comparison.live for line in run.meta.get("warnings", ())]
        if any(abs(drift) > comparison.BAND for drift in self.drifts):
            lines.append(
                "the engine's speed changed by more than the error that is looked for: "
                "something else uses this machine; repeat when it is quiet"
            )
        if self.fit is not None and self.fit.held_out_mape > 2 * comparison.BAND:
            lines.append(
                f"single steps are {100 * self.fit.held_out_mape:.0f} % off the fitted step times: "
                f"they do not follow the work alone"
            )
        return list(dict.fromkeys(lines))

    def document(self) -> dict[str, Any]:
        """Everything as plain data."""
        return self.comparison.document() | {
            "step_times": None if self.fit is None else self.fit.document(),
            "overheads": self.overheads._asdict(),
            "drifts": list(self.drifts),
            "warnings": self.warnings(),
            "runs": [str(folder) for folder in self.folders],
        }


def validate(
    overrides: Sequence[str] = (),
    *,
    model: str | None = None,
    repeats: int = 2,
    calibrate: bool = True,
    load: float | None = None,
    out: str | Path | None = None,
    quick: bool = False,
    say: Say = lambda line: None,
    warn: Say = lambda line: None,
) -> Validation:
    """Serve a configuration's trace live and simulated, and compare.

    Args:
        overrides: Hydra overrides as for a simulation; ``trace=...`` among them replaces the
            default trace, ``trace.limit=...`` and the like change it. Memory that they leave open
            is the live engine's on both sides.
        model: folder or Hugging Face name of the live model; ``None``: tiny, random weights.
        repeats: live runs.
        calibrate: simulate with step times measured on these engines; else with the profiles of
            the chip and the model.
        load: part of the engines' capacity to which arrivals are rescaled; ``None``: ``LOAD`` for
            the default trace, no change for one that was asked for.
        out: folder for both runs, ``comparison.json`` and ``comparison.png``; ``None``: no files.
        quick: a shorter default trace and one live run.
        say: told what happens next.
        warn: told beforehand what may not be meant so.

    Raises:
        KeyboardInterrupt: the user ended a live run.
        LiveError: vLLM is missing or does not start.
        CalibrationError: the engine's step times cannot be fitted.
        ValueError: bad input of any other kind, as for a simulation.
    """
    repeats = 1 if quick else repeats
    if repeats < 1:
        raise ValueError(f"repeats={repeats}: must be 1 or more")
    keys = [text.lstrip("+").partition("=")[0] for text in overrides]
    own = "trace" in keys
    defaults = ENGINE if own else (*DEFAULTS, *(QUICK if quick else ()))
    values = resolved(compose([*defaults, *overrides]))
    for module in values["policy_modules"]:
        load_module(module)
    deployment, policies = runs.deployment_of(values), runs.policies_of(values["policies"])
    trace, seed = runs.read_trace(values), values["seed"]
    if load is None and not own:
        load = LOAD
    parts: list[list[MeasuredStep]] = []
    traffic: list[Result] = []
    live: list[Result] = []
    parity: Parity | None = None
    why_not = ""
    for line in length_warnings(trace, deployment.limits.max_model_len):
        warn(line)
    if "model" in keys and model is None and values["live"]["model"] is None:
        warn(
            "model=... is only the simulator's profile; the live model is the tiny one with random "
            "weights unless --model names another"
        )
    say("starting the engine")
    live_values = {**values["live"], "model": model or values["live"]["model"]}
    changes = {"backend": "vllm", "live": live_values, "record_decisions": False}
    backend = runs.backend_of({**values, **changes})
    assert isinstance(backend, VllmBackend)
    with backend:
        for repeat in range(repeats + 1):
            if calibrate:
                say(f"calibration {repeat + 1} of {repeats + 1}")
                steps, result = calibrated(backend, policies, repeat)
                parts.append(steps)
                traffic.append(result)
                deployment = _with_memory_of(result, deployment)
            if repeat == repeats:
                break
            if repeat == 0 and load is not None:
                model_now = fit_steps(parts[0]).model if calibrate else deployment.step_model()
                trace = at_load(trace, load, deployment, policies, model_now)
            say(
                f"live run {repeat + 1} of {repeats}: {len(trace)} requests "
                f"in about {trace.span_s:.0f} s"
            )
            served = uninterrupted(backend.serve(trace, policies, seed=seed))
            deployment = _with_memory_of(served, deployment)
            if repeat == 0:
                why_not = unchecked(deployment, policies, served)
                parity = (
                    None
                    if why_not
                    else decision_parity(
                        backend.decisions[0], trace, deployment, policies, seed=seed
                    )
                )
            live.append(served)
    fit = fit_steps([step for part in parts for step in part]) if calibrate else None
    overhead = Overheads()
    if fit is not None:
        overhead = overheads(traffic, fit.model, deployment.limits.max_num_batched_tokens)
    simulator = Simulator(
        _as_measured(deployment, fit, backend),
        mode=values["mode"],
        step_model=None if fit is None else fit.model,
    )
    simulated = delayed(simulator.serve(trace, policies, seed=seed), overhead)
    whole = Validation(
        comparison=Comparison(simulated, live, parity, why_not),
        fit=fit,
        overheads=overhead,
        drifts=() if fit is None else tuple(drift(fit, *half) for half in pairwise(parts)),
    )
    return whole if out is None else _saved(whole, Path(out), values)


def calibrated(
    backend: VllmBackend, policies: PolicySet, seed: int
) -> tuple[list[MeasuredStep], Result]:
    """Steps of calibration traffic on running engines, and its result."""
    limits = backend.deployment.limits
    trace = calibration_trace(limits, seed, most_running=min(limits.max_num_seqs, 16))
    result = uninterrupted(backend.serve(trace, policies, seed=seed))
    rows = trace.requests
    lengths = dict(zip(rows["id"], rows["prompt_tokens"].tolist(), strict=True))
    steps = [step for log in backend.decisions for step in measured_steps(log, lengths)]
    return steps, result


def _with_memory_of(live: Result, deployment: Deployment) -> Deployment:
    """The deployment with the KV cache and the context that its live engines have."""
    limits = replace(
        deployment.limits,
        num_gpu_blocks=live.meta["kv_blocks"] + 1,
        max_model_len=live.meta["max_model_len"],
    )
    return replace(deployment, limits=limits)


def _as_measured(deployment: Deployment, fit: StepFit | None, backend: VllmBackend) -> Deployment:
    """The deployment under the name of what was measured instead of the profiles'."""
    if fit is None:
        return deployment
    said = f"step times fitted to {fit.steps} steps of the live engine"
    chip = replace(
        deployment.chip,
        name="live engine",
        calibrated=True,
        calibration=said,
        warnings=(),
        price_usd_per_h=None,
    )
    return replace(
        deployment, chip=chip, model=replace(deployment.model, name=Path(backend.model).name)
    )


def _saved(result: Validation, root: Path, values: Mapping[str, Any]) -> Validation:
    sides = {"simulated": result.comparison.simulated}
    sides |= {f"live-{i}": run for i, run in enumerate(result.comparison.live, 1)}
    folders = tuple(side.save(root / name, config=values) for name, side in sides.items())
    whole = replace(result, folders=folders)
    text = json.dumps(whole.document(), indent=2, allow_nan=False)
    (root / "comparison.json").write_text(text + "\n", encoding="utf-8")
    picture = comparison_figure.save(
        comparison_figure.figure(result.comparison), root / "comparison.png"
    )
    return replace(whole, files=(root / "comparison.json", picture))
