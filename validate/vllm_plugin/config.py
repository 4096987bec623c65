"""What ``--additional-config '{"servelab": {...}}'`` may say, and the policies it names.

Everything is checked when the engine starts; a mistake is one line that names the key, the value
and what is allowed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from policies.api import AdmissionPolicy, EvictionPolicy, PolicyError, ReusePolicy
from policies.parameters import nearest
from policies.registry import build, factory, load_module
from sim.latency import PS_PER_S, AffineStepModel, StepModel

__all__ = ["KEY", "KEYS", "ConfigError", "Settings", "read"]

KEY = "servelab"
"""Our key in vLLM's ``additional_config``."""

KINDS = ("admission", "eviction", "reuse")
KEYS = (*KINDS, "policy_modules", "seed", "decisions", "step_times")
"""What the mapping below ``servelab`` may hold; all of it may be left out.

``decisions`` is for measurements and not for years of production: the log only grows, and the
recorder remembers the name of every content that was ever cached. With data parallelism rank 0
writes to the file itself, and every other rank to one beside it with its number at the end of the
name: ``rows.jsonl``, ``rows-1.jsonl``, ...
"""

CONSTANTS = AffineStepModel.CONSTANTS_S
"""What ``step_times`` holds: the constants of ``sim.latency.AffineStepModel``, in seconds."""

ELSEWHERE = {"routing", "pd"}


class ConfigError(ValueError):
    """The ``servelab`` part of ``additional_config`` cannot be used."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """One engine's policies (``None``: vLLM's own code runs) and options."""

    admission: AdmissionPolicy | None = None
    eviction: EvictionPolicy | None = None
    reuse: ReusePolicy | None = None
    decisions: str | None = None
    """File that every step's decision row of this engine is appended to."""
    steps: StepModel | None = None
    """Step times for ``EngineView.prefill_s``; ``None``: measured while the engine runs."""


def read(additional_config: object, engine: int = 0) -> Settings:
    """The settings of one engine, its policies made and seeded as the simulator does.

    Args:
        additional_config: vLLM's ``VllmConfig.additional_config``.
        engine: number of the engine (its data-parallel rank); it enters the seeds and the name
            of the file of decisions.

    Raises:
        ConfigError: a key, a policy, a parameter or a value is wrong.
    """
    given = additional_config.get(KEY) if isinstance(additional_config, Mapping) else None
    if given is None:
        return Settings()
    if not isinstance(given, Mapping):
        raise ConfigError(f"{KEY} is {given!r}; allowed: a mapping with {', '.join(KEYS)}")
    for key in given:
        if key in ELSEWHERE:
            raise ConfigError(
                f"{KEY}.{key}: one engine does not route; give it to the front process "
                f"(servelab front), which sends requests to the engines"
            )
        if key not in KEYS:
            raise ConfigError(f"{KEY}: {nearest('key', key, KEYS)}")
    seed = given.get("seed", 0)
    if type(seed) is not int:
        raise ConfigError(f"{KEY}.seed is {seed!r}; allowed: a whole number")
    decisions = given.get("decisions")
    if decisions is not None and not isinstance(decisions, str):
        raise ConfigError(f"{KEY}.decisions is {decisions!r}; allowed: the path of a file")
    _load(given.get("policy_modules", ()))
    policies = {
        kind: _policy(kind, given[kind], seed, engine)
        for kind in KINDS
        if given.get(kind) is not None
    }
    if decisions is not None and engine:
        path = Path(decisions)
        decisions = str(path.with_name(f"{path.stem}-{engine}{path.suffix}"))
    return Settings(decisions=decisions, steps=_steps(given.get("step_times")), **policies)


def _load(modules: object) -> None:
    if isinstance(modules, str) or not isinstance(modules, list | tuple):
        raise ConfigError(
            f"{KEY}.policy_modules is {modules!r}; allowed: a list of files or modules"
        )
    for module in modules:
        try:
            load_module(module)
        except (OSError, PolicyError) as error:
            raise ConfigError(f"{KEY}.policy_modules: {error}") from error


def _policy(kind: str, spec: object, seed: int, engine: int) -> Any:
    made = _factory(kind, spec)
    try:
        policy = build(made, seed, f"{kind}/{engine}")
    except PolicyError as error:
        raise ConfigError(f"{KEY}.{kind}: {error}") from error
    if getattr(policy, "needs_oracle", False):
        raise ConfigError(
            f"{KEY}.{kind}: {policy.policy_name} reads the future (needs_oracle), "
            f"which only the simulator can show; choose another policy"
        )
    return policy


def _factory(kind: str, spec: object) -> Callable[..., Any]:
    options = dict(spec) if isinstance(spec, Mapping) else {}
    name = options.pop("name", None) if isinstance(spec, Mapping) else spec
    if not isinstance(name, str):
        raise ConfigError(
            f"{KEY}.{kind} is {spec!r}; allowed: a name, or a mapping with a name and parameters"
        )
    of, slash, short = name.partition("/")
    if slash and of != kind:
        raise ConfigError(f"{KEY}.{kind} is {name!r}, which is of another kind")
    try:
        return factory(f"{kind}/{short if slash else name}", **options)
    except (KeyError, TypeError, ValueError, PolicyError) as error:
        raise ConfigError(f"{KEY}.{kind}: {error}") from error


def _steps(given: object) -> StepModel | None:
    if given is None:
        return None
    if not isinstance(given, Mapping) or set(given) != set(CONSTANTS):
        raise ConfigError(
            f"{KEY}.step_times is {given!r}; allowed: a mapping with exactly "
            f"{', '.join(CONSTANTS)}, in seconds"
        )
    for name, value in given.items():
        if type(value) not in (int, float) or not 0 <= value < float("inf"):
            raise ConfigError(f"{KEY}.step_times.{name} is {value!r}; allowed: seconds, 0 or more")
    c0, *others = (round(given[name] * PS_PER_S) for name in CONSTANTS)
    return AffineStepModel(max(c0, 1), *others)
