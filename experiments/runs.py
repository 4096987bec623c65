"""Runs: a configuration in, a result or a run folder out.

``compose`` makes the configuration, ``simulate`` the result, ``run`` the folder, and ``rerun``
the same folder once more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from omegaconf import DictConfig

from experiments.composing import ConfigError, compose, overrides_of, resolved
from experiments.configs import PACKAGED
from experiments.console import say_all, warn
from policies.api import PolicySet
from policies.parameters import nearest
from policies.registry import UnknownPolicy, load_module, lookup, policy_set
from sim.backend import Deployment
from sim.hardware import load_chip
from sim.model import load_model
from sim.result import Result, check_target
from sim.scheduler import EngineLimits
from sim.simulator import Simulator
from traces import Trace, TraceError, generate, read
from traces.slo import assign_slo

if TYPE_CHECKING:
    from validate.vllm_backend import VllmBackend

__all__ = [
    "ConfigError",
    "backend_of",
    "compose",
    "deployment_of",
    "policies_of",
    "read_trace",
    "rerun",
    "resolved",
    "run",
    "simulate",
    "trace_of",
]

Progress = Callable[[int, int], None]
"""Called now and then with (requests done, requests)."""


def simulate(config: DictConfig, *, progress: Progress | None = None) -> Result:
    """Serve the configuration's trace on its engines under its policies.

    With ``backend=vllm`` the engines are real ones.

    Raises:
        ConfigError: the configuration makes no sense.
        LiveError: vLLM is missing or does not start.
        TraceError: the trace cannot be read or cut as asked.
        ProfileError: no such chip or model, or the model does not fit.
        PolicyError: a policy broke its contract.
    """
    return _simulate(resolved(config), progress)


def run(config: DictConfig, out: str | Path, *, progress: Progress | None = None) -> Path:
    """``simulate``, saved as a run folder with the resolved configuration; errors as there."""
    check_target(Path(out))
    values = resolved(config)
    result = _simulate(values, progress)
    folder = result.save(out, config=values)
    if (result.requests["state"] == "cancelled").any():
        raise KeyboardInterrupt  # what there was is saved; a sweep must not go on
    return folder


def rerun(
    folder: str | Path,
    out: str | Path,
    overrides: Sequence[str] = (),
    *,
    progress: Progress | None = None,
) -> Path:
    """Repeat the run of a folder (or of its ``config.yaml``), with changes if there are any."""
    return run(compose(overrides_of(folder, overrides)), out, progress=progress)


def trace_of(config: DictConfig) -> Trace:
    """The configuration's trace: read or generated, then cut, rescaled and given SLOs."""
    return read_trace(resolved(config))


def _simulate(values: Mapping[str, Any], progress: Progress | None) -> Result:
    for module in values["policy_modules"]:
        load_module(module)
    backend = backend_of(values)
    policies = policies_of(values["policies"])
    trace = read_trace(values)
    if values["backend"] == "vllm":
        from validate.live_result import length_warnings  # noqa: PLC0415 - only live runs need it

        say_all(warn, length_warnings(trace, values["engine"]["max_model_len"]))
    return backend.serve(trace, policies, seed=values["seed"], progress=progress)


def backend_of(values: Mapping[str, Any]) -> Simulator | VllmBackend:
    """What serves: the simulator or live engines, by resolved values."""
    deployment, live = deployment_of(values), values["live"]
    if values["backend"] == "vllm":
        from validate.vllm_backend import VllmBackend  # noqa: PLC0415 - only live runs need it

        options: dict[str, Any] = {}
        for part in live["options"]:
            if not isinstance(part, Mapping):
                raise ConfigError(
                    f"live.options: {part!r} is no mapping such as {{dtype: float16}}"
                )
            options |= part
        if values["record_decisions"]:
            raise ConfigError("record_decisions: policies of live engines run elsewhere; use sim")
        if values["signal_age_s"]:
            raise ConfigError("signal_age_s: signals of live engines have the age they have; use 0")
        return VllmBackend(
            deployment,
            model=live["model"],
            engine_options=options,
            timeout_s=live["timeout_s"],
            max_lateness_s=live["max_lateness_s"],
            record_runs=values["record_runs"],
        )
    if values["backend"] != "sim":
        raise ConfigError(nearest("backend", values["backend"], ("sim", "vllm")))
    deployment.max_model_len()  # fails before a long trace is read
    return Simulator(
        deployment,
        signal_age_s=values["signal_age_s"],
        mode=values["mode"],
        record_runs=values["record_runs"],
        record_decisions=values["record_decisions"],
    )


def deployment_of(values: Mapping[str, Any]) -> Deployment:
    """The engines of resolved values."""
    return Deployment(
        chip=load_chip(values["chip"]["name"]),
        model=load_model(values["model"]["name"]),
        engines=values["engines"],
        tp=values["tp"],
        pp=values["pp"],
        ep=values["ep"],
        limits=EngineLimits(**values["engine"]),
    )


def policies_of(nodes: Mapping[str, Mapping[str, Any]]) -> PolicySet:
    """The policies of the resolved node ``policies``."""
    specs = {
        kind: {key: value for key, value in node.items() if (key, value) != ("seed", None)}
        for kind, node in nodes.items()
    }
    try:
        routed = "routing" in lookup(f"pd/{specs['pd']['name']}").parts.values()
        if not routed and specs["routing"] == {"name": "round_robin"}:
            del specs["routing"]  # the default, for which the PD policy has no use
        return policy_set(**specs)
    except UnknownPolicy:
        raise
    except (TypeError, ValueError) as error:
        raise ConfigError(f"policies: {error}") from None


# --------------------------------------------------------------------------- traces


def read_trace(values: Mapping[str, Any]) -> Trace:
    """The trace of resolved values; as ``trace_of``."""
    node = dict(values["trace"])
    cut = {
        key: node.pop(key) for key in ("limit", "rate_scale", "dequantise_s", "between", "classes")
    }
    seed = values["seed"]
    limit, between = cut["limit"], cut["between"]
    if "generator" in node:
        name = node.pop("generator")
        trace = generate(name, **node | {"seed": seed if node["seed"] is None else node["seed"]})
    else:
        early = limit if between is None else None
        trace = _read(node, values["data"], early)
    if cut["dequantise_s"] is not None:
        trace = trace.dequantised(cut["dequantise_s"], seed=seed)
    if between is not None:
        if len(between) != 2:
            raise ConfigError(f"trace.between={between}: two times in seconds, [from, to]")
        trace = trace.between(*between)
    if limit is not None:
        trace = trace.head(limit)
    if cut["rate_scale"] != 1:
        trace = trace.scaled(cut["rate_scale"])
    if cut["classes"]:
        trace = assign_slo(trace, cut["classes"], seed=seed)
    return _with_targets(trace, values["slo"])


def _read(node: Mapping[str, Any], data: str, limit: int | None) -> Trace:
    name, path = node["name"], node["path"]
    options = {key: node[key] for key in ("format", "block_tokens", "time_unit")}
    if path.startswith(PACKAGED):
        package, _, inner = path.removeprefix(PACKAGED).partition("/")
        with resources.as_file(resources.files(package).joinpath(inner)) as file:
            return read(file, limit=limit, **options)
    if name != "file" and not Path(path).exists():
        raise TraceError(
            f"trace={name}: there is no {path}; set SERVELAB_DATA (or data=...) to the folder "
            f"that holds traces/, now {data}"
        )
    return read(path, limit=limit, **options)


def _with_targets(trace: Trace, targets: Mapping[str, float | None]) -> Trace:
    """The trace with latency targets where it sets none."""
    columns: dict[str, Any] = {}
    for name, target_s in targets.items():
        if target_s is None:
            continue
        if not target_s > 0:
            raise ConfigError(f"slo.{name}={target_s}: must be above 0")
        own = trace.requests[f"slo_{name}"].to_numpy()
        columns[f"slo_{name}"] = np.where(np.isinf(own), target_s, own)
    if not columns:
        return trace
    parts = [*filter(None, trace.synthetic.split(", ")), "SLO targets"]
    return replace(
        trace,
        requests=trace.requests.assign(**columns),
        synthetic=", ".join(dict.fromkeys(parts)),
    )
