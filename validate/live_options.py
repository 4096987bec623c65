"""From deployments and policies to what vLLM is started with. Works without vLLM."""

from __future__ import annotations

import os
import sys
import zlib
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from policies.api import PolicyError, PolicySet
from policies.registry import KINDS, describe, lookup
from sim.scheduler import EngineLimits
from validate import tiny_model

__all__ = ["NAMES", "LiveError", "model_folder", "policy_config", "vllm_options"]

NAMES = {"block_tokens": "block_size", "num_gpu_blocks": "num_gpu_blocks_override"}
"""Limits whose vLLM option has another name; ``max_model_len: None`` is -1 there."""


class LiveError(ValueError):
    """A live run that cannot be started; the message is one line."""


def vllm_options(limits: EngineLimits) -> dict[str, Any]:
    """The limits as options of vLLM's ``EngineArgs``."""
    options = {NAMES.get(key, key): value for key, value in asdict(limits).items()}
    options.setdefault("async_scheduling", False)
    if options["max_model_len"] is None:
        options["max_model_len"] = -1  # what the model allows or the KV cache holds
    return options


def policy_config(policies: PolicySet, seed: int, engine: int) -> dict[str, Any]:
    """What ``additional_config["servelab"]`` says for one engine.

    Seeds are those of the simulator. A base class (``AdmissionPolicy``, ``ReusePolicy``) is left
    out, which leaves vLLM's own code in place.

    Raises:
        PolicyError: another process cannot make the policy, or it needs to know the future.
    """
    config: dict[str, Any] = {}
    modules: list[str] = []
    for kind in ("admission", "eviction", "reuse"):
        factory = getattr(policies, kind)
        cls = factory.func if isinstance(factory, partial) else factory
        if cls is KINDS[kind]:
            continue
        positional = isinstance(factory, partial) and bool(factory.args)
        name = cls.__dict__.get("policy_name") if isinstance(cls, type) else None
        if name is None or positional or not isinstance(cls, type):
            raise PolicyError(
                f"{kind}={describe(factory)}: the engine's process makes its own policies, so "
                f"this must be a class with @register({f'{kind}/...'!r}) or a functools.partial "
                f"of one with named parameters"
            )
        entry = lookup(name)
        if entry.needs_oracle:
            raise PolicyError(f"{name} needs to know the future, which only the simulator does")
        options = dict(factory.keywords) if isinstance(factory, partial) else {}
        if any(parameter.name == "seed" for parameter in entry.parameters):
            options.setdefault("seed", zlib.crc32(f"{seed}/{kind}/{engine}".encode()))
        config[kind] = {"name": entry.name, **options}
        modules += _modules(name, cls)
    return config | {"policy_modules": modules} if modules else config


def _modules(name: str, cls: type) -> list[str]:
    """What another process must load to have the policy, if the catalogue does not bring it."""
    module = cls.__module__
    if module.startswith("policies."):
        return []
    if module == "__main__":
        raise PolicyError(
            f"{name} is defined in the program itself, where the engine's process cannot find "
            f"it; move it to a file of its own and load that (policy_modules)"
        )
    file = getattr(sys.modules.get(module), "__file__", None)
    return [file if file is not None and "." not in module else module]


def model_folder(model: str | Path | None) -> str:
    """A folder with a model, or a name for Hugging Face."""
    if model is None:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        return str(tiny_model.write(cache / "servelab" / "tiny_model"))
    path = Path(model).expanduser()
    if (path / "config.json").is_file():
        return str(path.resolve())
    text = str(model)
    if path.exists() or text.startswith(("/", ".", "~")) or text.count("/") > 1:
        what = "has no config.json" if path.exists() else "does not exist"
        raise LiveError(f"live.model={text}: the folder {what}")
    return text
