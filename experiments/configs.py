"""What can be chosen: policies, profiles, traces and limits as typed nodes of Hydra's store.

A node's fields are read from the thing itself (a policy's dataclass, a generator's signature), so
a new policy, profile or generator is an option of its group without an edit here.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields, make_dataclass
from functools import cache
from typing import Any

import omegaconf
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from policies.registry import KINDS, catalog
from sim.hardware import chips
from sim.model import models
from sim.scheduler import EngineLimits
from traces.synthetic import generators

__all__ = ["GROUPS", "PACKAGED", "options", "register"]

GROUPS = ("chip", "model", "trace", *(f"policies/{kind}" for kind in KINDS), "engine")
"""Every group of which a run has one option."""

PACKAGED = "pkg://"
"""Begins the path of a file that comes with a package: ``pkg://traces/data/demo.jsonl.gz``."""

Spec = tuple[str, Any, Any]
"""A field: name, type, default."""


@dataclass
class Slo:
    """Targets of requests whose trace sets none."""

    ttft_s: float | None = None
    tpot_s: float | None = None
    e2e_s: float | None = None


@dataclass
class Live:
    """Of ``backend=vllm``; see ``validate.vllm_backend.VllmBackend``."""

    model: str | None = None
    options: list[Any] = field(default_factory=list)
    """Mappings from names of options to values; a list, because keys cannot be added here."""
    timeout_s: float | None = None
    max_lateness_s: float = 0.05


@dataclass
class Run:
    """The types of ``conf/config.yaml``; groups bring their own."""

    chip: Any = None
    model: Any = None
    trace: Any = None
    policies: Any = None
    engine: Any = None
    engines: int = 1
    tp: int = 1
    pp: int = 1
    ep: int = 1
    backend: str = "sim"
    live: Live = field(default_factory=Live)
    signal_age_s: float = 0.0
    mode: str = "fast"
    seed: int = 0
    slo: Slo = field(default_factory=Slo)
    data: str = ""
    policy_modules: list[str] = field(default_factory=list)
    record_runs: bool = True
    record_decisions: bool = False
    out: str | None = None


@dataclass
class Profile:
    """A chip or a model."""

    name: str = omegaconf.MISSING
    """Of a profile, or the path of a YAML file."""


@dataclass
class Cut:
    """What is done to any trace after it was read or generated."""

    limit: int | None = None
    """Only so many requests, from the start."""
    rate_scale: float = 1.0
    """Arrivals so many times as fast."""
    dequantise_s: float | None = None
    """Spread arrivals that were recorded on ticks of this length."""
    between: list[float] | None = None
    """Only arrivals from the first of two times (s) to the second."""
    classes: list[Any] = field(default_factory=list)
    """SLO classes that are drawn for sessions: {name, share, ttft_s, tpot_s, e2e_s, priority}."""


@dataclass
class TraceFile(Cut):
    """A trace that was recorded."""

    name: str = "file"
    path: str = omegaconf.MISSING
    format: str | None = None
    """``null``: told by the first line."""
    block_tokens: int | None = None
    time_unit: str | None = None


FILES = {
    "demo": f"{PACKAGED}traces/data/demo_chat.jsonl.gz",
    "mooncake": "${data}/traces/mooncake/conversation_trace.jsonl.gz",
    "mooncake_synthetic": "${data}/traces/mooncake/synthetic_trace.jsonl.gz",
    "azure_conv": "${data}/traces/azure/AzureLLMInferenceTrace_conv.csv.gz",
    "azure_code": "${data}/traces/azure/AzureLLMInferenceTrace_code.csv.gz",
    "file": omegaconf.MISSING,
}
"""Trace files by option."""

SIZES: Mapping[str, Mapping[str, Any]] = {
    "independent": {"count": 1000, "rate_per_s": 4.0, "block_tokens": 16},
    "chat": {"sessions": 300, "session_rate_per_s": 1.0},
}
"""Values for what a generator leaves to its caller, so that its option works as it stands."""


def register() -> None:
    """Enter everything into Hydra's store; call it again after new policies were registered."""
    OmegaConf.register_new_resolver("servelab.first", _first, replace=True)
    store = ConfigStore.instance()
    for group in GROUPS:
        for name, node in _nodes(group).items():
            if _entered.get((group, name)) is not node:
                store.store(group=group, name=name, node=node, provider="servelab")
                _entered[group, name] = node
    if "schema" not in _entered:
        store.store(name="schema", node=Run, provider="servelab")
        _entered["schema"] = Run


_entered: dict[object, Any] = {}
"""What the store has: a policy that is defined again (in a notebook) replaces its node."""


def options(group: str) -> tuple[str, ...]:
    """The names that ``group=...`` takes."""
    return tuple(_nodes(group))


def _first(*values: Any) -> Any:
    """The first value that is there."""
    return next(value for value in values if value not in (None, "None", "null"))


def _nodes(group: str) -> Mapping[str, Any]:
    if not group.startswith("policies/"):
        return _fixed(group)
    kind = group.removeprefix("policies/")
    entries = (entry for entry in catalog().values() if entry.kind == kind)
    return {entry.name: _policy(entry.cls, entry.name) for entry in entries}


@cache
def _fixed(group: str) -> Mapping[str, Any]:
    """The options of a group to which a program adds none."""
    if group == "chip":
        return {name: Profile(name=name) for name in chips()}
    if group == "model":
        return {name: Profile(name=name) for name in models()}
    if group == "engine":
        return {"vllm": _limits()}
    return {name: TraceFile(name=name, path=path) for name, path in FILES.items()} | {
        _trace_name(name): _generated(name) for name in generators()
    }


@cache
def _policy(cls: type, name: str) -> Any:
    """A node with the name of a policy and its parameters."""
    entry = next(entry for entry in catalog().values() if entry.cls is cls)
    parameters: list[Spec] = [
        # Where nobody sets the seed of a policy, the backend derives one from the run's.
        ("seed", int | None, None) if p.name == "seed" else (p.name, p.type, p.default)
        for p in entry.parameters
    ]
    return _node(cls.__name__, [("name", str, name), *parameters])


def _limits() -> Any:
    """A node with the options of ``EngineLimits``."""
    hints = typing.get_type_hints(EngineLimits)
    return _node("EngineLimits", [(f.name, hints[f.name], f.default) for f in fields(EngineLimits)])


def _generated(name: str) -> Any:
    """A node with the parameters of a trace generator, which is named in ``generator``."""
    function = generators()[name]
    hints = typing.get_type_hints(function)
    given: dict[str, Any] = {
        key: MISSING if parameter.default is parameter.empty else parameter.default
        for key, parameter in inspect.signature(function).parameters.items()
        if key not in ("classes", "name", "seed")
    }
    given |= SIZES.get(name, {})
    specs: list[Spec] = [("name", str, _trace_name(name)), ("generator", str, name)]
    specs += [(key, hints[key], value) for key, value in given.items()]
    specs.append(("seed", int | None, None))  # null: the run's
    return _node(name.title(), specs, (Cut,))


def _trace_name(generator: str) -> str:
    return "synthetic" if generator == "independent" else generator


def _node(name: str, specs: Iterable[Spec], bases: tuple[type, ...] = ()) -> Any:
    """A structured config; a type that OmegaConf does not know holds anything."""
    made: list[Any] = []
    for key, hint, default in specs:
        value = omegaconf.MISSING if default is MISSING else default
        if isinstance(value, list | tuple | dict | set):
            value = field(default_factory=lambda copied=value: copied)  # type: ignore[misc]
        made.append((key, hint if _supported(hint) else Any, value))
    return make_dataclass(name, made, bases=bases)


def _supported(hint: Any) -> bool:
    try:
        OmegaConf.structured(make_dataclass("Probe", [("value", hint, omegaconf.MISSING)]))
    except OmegaConfBaseException:
        return False
    return True
