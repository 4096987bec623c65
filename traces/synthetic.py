"""Synthetic traces: independent requests, and chats whose prompts grow and share prefixes.

Everything is drawn from named streams of one seed, so a parameter of one part (say, of output
lengths) does not change the draws of another (say, arrivals). Times are rounded to microseconds.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from math import log
from typing import Any, TypeVar

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from traces.arrivals import ArrivalKind, arrivals, stream
from traces.chains import Chains, Ints, ranges
from traces.errors import TraceError, at_least, unknown
from traces.schema import Trace
from traces.slo import SloClasses, assign_slo

__all__ = [
    "SloClasses",
    "arrivals",
    "assign_slo",
    "chat",
    "generate",
    "generator",
    "generators",
    "independent",
]

Generator = TypeVar("Generator", bound=Callable[..., Trace])
_GENERATORS: dict[str, Callable[..., Trace]] = {}


def generator(function: Generator) -> Generator:
    """Registers a function under its own name for ``generate``."""
    _GENERATORS[function.__name__] = function
    return function


def generators() -> Mapping[str, Callable[..., Trace]]:
    """All generators by name."""
    return dict(sorted(_GENERATORS.items()))


def generate(name: str, /, **params: Any) -> Trace:
    """The trace that the named generator makes of these parameters. Raises ``TraceError``."""
    if name not in _GENERATORS:
        raise unknown("generator", name, generators())
    function = _GENERATORS[name]
    known = inspect.signature(function).parameters
    for param in params:
        if param not in known:
            raise unknown(f"parameter of generator {name!r}", param, known)
    missing = [p for p, spec in known.items() if spec.default is spec.empty and p not in params]
    if missing:
        raise TraceError(f"generator {name!r} needs a value for {missing[0]!r}")
    return function(**params)


@generator
def independent(
    *,
    count: int,
    rate_per_s: float,
    prompt_mean: float = 1000.0,
    output_mean: float = 200.0,
    prompt_cv: float = 1.0,
    output_cv: float = 1.0,
    prompt_max: int = 131_072,
    output_max: int = 16_384,
    arrival: ArrivalKind = "poisson",
    arrival_cv: float | None = None,
    block_tokens: int = 0,
    classes: SloClasses = (),
    seed: int = 0,
    name: str = "independent",
) -> Trace:
    """Requests that share nothing, with lognormal lengths (cut at the maxima; cv 0: constant).

    With ``block_tokens`` each request has block ids of its own, for full blocks only.
    """
    arrival_s = arrivals(arrival, rate_per_s=rate_per_s, count=count, cv=arrival_cv, seed=seed)
    prompt = _lengths(
        "prompt", mean=prompt_mean, cv=prompt_cv, most=prompt_max, count=count, seed=seed
    )
    output = _lengths(
        "output", mean=output_mean, cv=output_cv, most=output_max, count=count, seed=seed
    )
    chains = None
    if block_tokens > 0:
        chains = _own_chains(prompt // block_tokens)
    trace = Trace.build(
        name,
        {"arrival_s": arrival_s, "prompt_tokens": prompt, "output_tokens": output},
        chains,
        block_tokens=block_tokens,
        synthetic="arrivals, lengths",
    )
    return assign_slo(trace, classes, seed=seed) if classes else trace


@generator
def chat(
    *,
    sessions: int,
    session_rate_per_s: float,
    turns_mean: float = 4.0,
    user_mean: float = 100.0,
    user_cv: float = 1.0,
    output_mean: float = 200.0,
    output_cv: float = 1.0,
    output_max: int = 4096,
    prompt_max: int = 131_072,
    system_prompts: int = 8,
    system_min: int = 512,
    system_max: int = 3072,
    system_zipf: float = 1.0,
    think_mean_s: float = 15.0,
    token_s: float = 0.03,
    block_tokens: int = 16,
    classes: SloClasses = (),
    seed: int = 0,
    name: str = "chat",
) -> Trace:
    """Chats: each turn's prompt is the previous prompt, its output, and what the user adds.

    A session starts with one of ``system_prompts`` shared prompts, the i-th with a popularity of
    1 / i^``system_zipf``; their lengths are spread log-uniformly from ``system_min`` to
    ``system_max`` tokens. Turns per session are geometric; a session ends early where a prompt
    would exceed ``prompt_max``. Block ids cover full blocks, and those of a turn begin with all of
    the turn before; output gets new ids in the next prompt, as in every public trace.

    A turn arrives an exponential pause (``think_s``) after the previous one would end if each of
    its output tokens took ``token_s``. Replay with sessions can use the pause itself.
    """
    at_least("sessions", sessions, 1)
    at_least("turns_mean", turns_mean, 1)
    at_least("system_prompts", system_prompts, 1)
    at_least("system_min", system_min, 1)
    at_least("system_max", system_max, system_min)
    at_least("block_tokens", block_tokens, 1)
    at_least("prompt_max", prompt_max, system_max + 1)
    for label, value in (("think_mean_s", think_mean_s), ("token_s", token_s)):
        at_least(label, value, 0)
    start_s = arrivals(rate_per_s=session_rate_per_s, count=sessions, seed=seed)
    turns = stream(seed, "turns").geometric(1.0 / turns_mean, sessions)
    rng = stream(seed, "system prompts")
    spread = rng.permutation(np.linspace(0.0, 1.0, system_prompts))
    popularity = 1.0 / np.arange(1, system_prompts + 1) ** system_zipf
    system = rng.choice(system_prompts, sessions, p=popularity / popularity.sum())
    system_tokens = np.rint(system_min * (system_max / system_min) ** spread).astype(np.int64)

    rows = int(turns.sum())
    session = np.repeat(np.arange(sessions), turns)
    turn = ranges(np.zeros(sessions, np.int64), turns)
    longest = prompt_max - system_max
    user = _lengths("user", mean=user_mean, cv=user_cv, most=longest, count=rows, seed=seed)
    output = _lengths(
        "output", mean=output_mean, cv=output_cv, most=output_max, count=rows, seed=seed
    )
    think_s = stream(seed, "think times").exponential(think_mean_s, rows).round(6)
    think_s[turn == 0] = 0.0
    before_s = np.where(turn == 0, 0.0, think_s + token_s * _shifted(output))
    prompt = system_tokens[system[session]] + _running(
        user + np.where(turn == 0, 0, _shifted(output)), turns
    )
    arrival_s = (start_s[session] + _running(before_s, turns)).round(6)

    keep = prompt <= prompt_max
    session, prompt = session[keep], prompt[keep]
    shared = system_tokens // block_tokens
    chains = _shared_chains(shared, system[session], session, prompt // block_tokens)
    trace = Trace.build(
        name,
        {
            "arrival_s": arrival_s[keep],
            "prompt_tokens": prompt,
            "output_tokens": output[keep],
            "session": "s" + pd.Series(session).astype("str"),
            "turn": turn[keep],
            "think_s": think_s[keep],
            "kind": "chat",
        },
        chains,
        block_tokens=block_tokens,
        synthetic="arrivals, lengths, sessions, shared prefixes",
        notes=(f"later turns arrive as if each output token took {token_s:g} s",),
    )
    return assign_slo(trace, classes, seed=seed) if classes else trace


def _lengths(what: str, *, mean: float, cv: float, most: int, count: int, seed: int) -> Ints:
    """Lognormal lengths of 1 to ``most`` tokens; ``mean`` and ``cv`` are those before the cut."""
    at_least(f"{what}_mean", mean, 1)
    at_least(f"{what}_cv", cv, 0)
    at_least(f"{what}_max", most, 1)
    variance = log(1 + cv * cv)
    draws = stream(seed, f"{what} lengths").lognormal(
        log(mean) - variance / 2, variance**0.5, count
    )
    return np.clip(np.rint(draws), 1, most).astype(np.int64)


def _shifted(values: Ints) -> Ints:
    return np.concatenate((values[:1], values[:-1]))


def _running(values: NDArray[Any], groups: Ints) -> NDArray[Any]:
    """Running sums that start anew in each group of rows."""
    total = np.cumsum(values)
    first = np.cumsum(groups) - groups
    running: NDArray[Any] = total - np.repeat(total[first] - values[first], groups)
    return running


def _own_chains(blocks: Ints) -> Chains:
    """One run of new ids per request."""
    start = np.cumsum(blocks) - blocks
    some = blocks > 0
    offset = np.concatenate(([0], np.cumsum(some)))
    return Chains(offset, start[some], blocks[some])


def _shared_chains(shared: Ints, system: Ints, session: Ints, blocks: Ints) -> Chains:
    """A run of the system prompt's ids, then one of the session's own, longer with every turn."""
    system_start = np.cumsum(shared) - shared
    own = np.maximum(blocks - shared[system], 0)
    longest = np.zeros(int(session.max()) + 1, dtype=np.int64)
    np.maximum.at(longest, session, own)
    own_start = int(shared.sum()) + np.cumsum(longest) - longest
    start = np.stack((system_start[system], own_start[session]), axis=1)
    count = np.stack((shared[system], own), axis=1)
    some = count > 0
    offset = np.concatenate(([0], np.cumsum(some.sum(axis=1))))
    return Chains(offset, start[some], count[some])
