"""From what a user writes to a configuration: Hydra overrides in, a checked config or one line out.

Options of command lines and ``config.yaml`` of earlier runs become overrides too, so there is one
path from any of them to a run.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import hydra
import yaml
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import (
    HydraException,
    MissingConfigException,
)
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from experiments.configs import GROUPS, PACKAGED, options, register
from policies.parameters import nearest
from policies.registry import load_module

__all__ = [
    "ConfigError",
    "compose",
    "explain",
    "override",
    "overrides_of",
    "prepared",
    "resolved",
    "trace_overrides",
]

PROFILE_SUFFIXES = (".yaml", ".yml")


class ConfigError(ValueError):
    """A configuration that cannot be; the message is one line."""


# --------------------------------------------------------------------------- composing


def compose(overrides: Sequence[str] = ()) -> DictConfig:
    """The configuration of a run: the defaults with these Hydra overrides.

    Raises:
        ConfigError: an override is malformed, or names an unknown key, option or type.
        PolicyError: a module of ``policy_modules`` cannot be imported.
    """
    ready = prepared(overrides)
    with _own_hydra():
        try:
            return hydra.compose("config", overrides=ready)
        except (HydraException, OmegaConfBaseException) as error:
            raise explain(error, ready) from None


@contextmanager
def _own_hydra() -> Iterator[None]:
    """Hydra with our configuration, whatever Hydra the caller has initialised before."""
    callers = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        with hydra.initialize_config_module("experiments.conf", version_base="1.3"):
            yield
    finally:
        GlobalHydra.instance().hydra = callers


def prepared(overrides: Sequence[str]) -> list[str]:
    """Overrides as Hydra takes them, after everything they may name was registered.

    Loads ``policy_modules``, and lets a path stand where a group has a name: ``chip=mine.yaml``
    is ``chip.name=mine.yaml``, ``trace=mine.jsonl`` is ``trace=file trace.path=mine.jsonl``.
    """
    ready: list[str] = []
    for text, parsed in zip(overrides, _parsed(overrides), strict=True):
        key = parsed.key_or_group
        value = None if parsed.is_sweep_override() else parsed.value()
        if not key.startswith("hydra"):
            _refuse_odd(text, parsed)
        if key == "policy_modules":
            for module in _items(text, parsed.value()):
                load_module(module)
        if parsed.is_sweep_override() or key not in ("chip", "model", "trace"):
            ready.append(text)
        elif key == "trace" and _is_path(value):
            ready += ["trace=file", override("trace.path", str(value))]
        elif key != "trace" and str(value).endswith(PROFILE_SUFFIXES):
            ready.append(override(f"{key}.name", str(value)))
        else:
            ready.append(text)
    register()
    return ready


def resolved(config: DictConfig) -> dict[str, Any]:
    """The configuration as plain values that mean the same in any folder; ``out`` is left open.

    Raises:
        ConfigError: a value is missing or an interpolation names nothing.
    """
    if missing := OmegaConf.missing_keys(config):
        raise ConfigError(f"{min(missing)} has no value; set {min(missing)}=...")
    try:
        plain = OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key}: {_first_line(error)}") from None
    assert isinstance(plain, dict)
    values: dict[str, Any] = {str(key): value for key, value in plain.items()} | {"out": None}
    values["data"] = str(Path(values["data"]).resolve())
    for group in ("chip", "model"):
        if values[group]["name"].endswith(PROFILE_SUFFIXES):
            values[group]["name"] = str(Path(values[group]["name"]).resolve())
    path = values["trace"].get("path")
    if path is not None and not path.startswith(PACKAGED):
        values["trace"]["path"] = str(Path(path).resolve())
    values["policy_modules"] = [
        str(Path(module).resolve()) if module.endswith(".py") else module
        for module in values["policy_modules"]
    ]
    return values


# --------------------------------------------------------------------------- overrides


def override(key: str, value: object) -> str:
    """``key=value`` with whatever quoting Hydra's grammar needs."""
    return f"{key}={_literal(value)}"


def trace_overrides(trace: str) -> list[str]:
    """What chooses a trace by name or by path.

    Raises:
        ConfigError: it is neither.
    """
    names = [name for name in options("trace") if name != "file"]
    if trace in names:
        return [f"trace={trace}"]
    if "/" not in trace and "." not in trace and not Path(trace).exists():
        raise ConfigError(f"no file {trace!r} here, and {nearest('trace', trace, names)}")
    return ["trace=file", override("trace.path", trace)]


def overrides_of(path: str | Path, changes: Sequence[str] = ()) -> list[str]:
    """The overrides that compose what a run folder's ``config.yaml`` holds, then the changes.

    A group of which the changes choose an option starts from that option's own values.

    Raises:
        ConfigError: the file is missing or holds no configuration.
    """
    file = Path(path)
    if file.is_dir():
        file = file / "config.yaml"
    try:
        data = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: {getattr(error, 'strerror', None) or error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{file}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict) or "chip" not in data:
        raise ConfigError(f"{file}: not the config.yaml of a run folder")
    chosen = {parsed.key_or_group for parsed in _parsed(changes)}
    first = [override("policy_modules", data.get("policy_modules") or [])]
    values: list[str] = []
    for group in GROUPS:
        node = data
        *parents, name = group.split("/")
        for parent in parents:
            node = node.get(parent) or {}
        node = node.pop(name, None) or {}
        if group in chosen:
            continue
        if group in ("chip", "model"):
            values.append(override(f"{group}.name", node.get("name")))
            continue
        if group != "engine":
            first.append(override(group, node.pop("name", None)))
        values += [override(f"{group.replace('/', '.')}.{key}", node[key]) for key in node]
    data.pop("policies", None)
    values += [override(key, value) for key, value in _leaves(data) if key != "policy_modules"]
    return [*first, *values, *changes]


def _leaves(data: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in data.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _literal(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{_literal(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(_literal(item) for item in value) + "]"
    # In Hydra's grammar a backslash counts only before a quote (and at the end of the text).
    escaped = re.sub(r"(\\*)('|$)", lambda m: m[1] * 2 + ("\\'" if m[2] else ""), str(value))
    return f"'{escaped}'"


def _parsed(overrides: Sequence[str]) -> list[Override]:
    parser = OverridesParser.create()
    parsed: list[Override] = []
    for text in overrides:
        try:
            parsed.append(parser.parse_override(text))
        except HydraException:
            raise ConfigError(
                f"{text!r} is not of the form key=value; special characters need quotes: key='a b'"
            ) from None
    return parsed


def _refuse_odd(text: str, parsed: Override) -> None:
    """What Hydra allows and this configuration has no use for."""
    key = parsed.key_or_group
    if parsed.is_add() or parsed.is_force_add() or parsed.is_delete():
        raise ConfigError(f"{text}: keys are neither added nor removed here; write key=value")
    group = key.removesuffix(".name").replace(".", "/")
    if group in GROUPS and "." in key and group not in ("chip", "model"):
        raise ConfigError(f"{text}: an option is chosen with {group}=...")


def _items(text: str, value: object) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise ConfigError(f"{text}: policy_modules is a list, for example [my_policy.py]")
    return value


def _is_path(value: object) -> bool:
    text = str(value)
    return text not in options("trace") and ("/" in text or Path(text).is_file())


# --------------------------------------------------------------------------- explaining


def explain(error: Exception, overrides: Sequence[str]) -> ConfigError:
    """What is wrong, in one line, with the nearest valid name."""
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, name = error.missing_cfg_file.rpartition("/")
        return ConfigError(f"{group}={name}: {_near(name, error.options or ())}")
    sweep = re.match(r"(?:Ambiguous value for argument|Sweep parameters) '([^']+)'", str(error))
    if sweep is not None:
        return ConfigError(
            f"{sweep[1]}: one value is needed (a list is written [a,b]; a sweep needs "
            f"python -m experiments.run -m)"
        )
    unknown = re.match(r"Could not override '([^']+)'", str(error))
    if unknown is None:
        because = f": {_first_line(error.__cause__)}" if error.__cause__ else ""
        said = _first_line(error).removeprefix("Error merging override ")
        return ConfigError(f"{said}{because}")
    key = unknown[1]
    if key == "policies" or "/" in key or key in ("chips", "models", "traces"):
        return ConfigError(f"no group {key!r}: {_near(key, GROUPS)}")
    beside, every = _keys(key, overrides)
    if not beside:
        above = key.rpartition(".")[0]
        return ConfigError(f"no key {key!r}: {above} has none with the option that was chosen")
    return ConfigError(f"no key {key!r}: {_near(key, beside, every)}")


def _near(given: str, valid: Sequence[str], more: Sequence[str] = ()) -> str:
    near = get_close_matches(given, [*valid, *more], 1)
    near = near or [name for name in valid if given and name.startswith(given)][:1]
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"{hint}valid: {', '.join(valid)}"


def _keys(key: str, overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    """What can be set beside an unknown key (where its parent is known), and everything.

    Both depend on the groups that were chosen, so those are composed once more.
    """
    groups = [text for text in overrides if text.partition("=")[0] in GROUPS]
    with _own_hydra():
        try:
            config = hydra.compose("config", overrides=groups)
        except (HydraException, OmegaConfBaseException):  # a sweep, for example
            config = hydra.compose("config")
    plain = OmegaConf.to_container(config)
    assert isinstance(plain, dict)
    leaves = [name for name, _ in _leaves({str(k): v for k, v in plain.items()})]
    every = [
        name
        for name in leaves
        if not name.endswith(".name") or name.startswith(("chip.", "model."))
    ]
    parent = key.rpartition(".")[0]
    if not any(name.rpartition(".")[0] == parent for name in leaves):
        return [name for name in every if "." not in name], every
    return [name for name in every if name.rpartition(".")[0] == parent], every


def _first_line(error: BaseException | None) -> str:
    return str(error).strip().partition("\n")[0].strip()
