"""Arrival processes, and the named random streams that everything synthetic is drawn from."""

from __future__ import annotations

from math import exp, lgamma, log
from typing import Literal, cast
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from traces.errors import TraceError, at_least, positive, unknown

__all__ = ["ArrivalKind", "arrivals", "stream"]

ArrivalKind = Literal["poisson", "gamma", "weibull"]


def stream(seed: int, name: str) -> np.random.Generator:
    """The random numbers of one purpose: streams of other names or seeds are independent."""
    if seed < 0:
        raise TraceError(f"seed must be at least 0, not {seed}")
    return np.random.default_rng([seed, crc32(name.encode())])


def arrivals(
    kind: ArrivalKind = "poisson",
    *,
    rate_per_s: float,
    count: int,
    cv: float | None = None,
    shape: float | None = None,
    seed: int = 0,
) -> NDArray[np.float64]:
    """Arrival times of a renewal process with mean gap ``1 / rate_per_s``, from the first gap on.

    Gamma and Weibull gaps take either their ``cv`` (standard deviation / mean) or their ``shape``;
    both are 1 for Poisson.
    """
    positive("rate_per_s", rate_per_s)
    at_least("count", count, 1)
    rng = stream(seed, "arrivals")
    for name, value in (("cv", cv), ("shape", shape)):
        if value is not None:
            positive(name, value)
    if kind == "poisson":
        if cv is not None or shape is not None:
            raise TraceError(
                "poisson arrivals have cv = shape = 1: use gamma or weibull for others"
            )
        gaps_s = rng.exponential(1.0, count)
    elif kind not in ("gamma", "weibull"):
        raise unknown("kind of arrivals", kind, ("poisson", "gamma", "weibull"))
    elif (cv is None) == (shape is None):
        raise TraceError(f"{kind} arrivals take exactly one of cv and shape")
    elif kind == "gamma":
        k = shape if shape is not None else 1.0 / cast(float, cv) ** 2
        gaps_s = rng.gamma(k, 1.0 / k, count)
    else:
        k = shape if shape is not None else _weibull_shape(cast(float, cv))
        gaps_s = rng.weibull(k, count) / exp(lgamma(1 + 1 / k))
    return np.cumsum(gaps_s / rate_per_s).round(6)


def _weibull_shape(cv: float) -> float:
    """The shape with which Weibull gaps have this cv, by bisection on its logarithm."""

    def log_moment_ratio(k: float) -> float:
        return lgamma(1 + 2 / k) - 2 * lgamma(1 + 1 / k)

    low, high = 0.05, 1000.0
    target = log(1 + cv * cv)
    if not log_moment_ratio(high) < target < log_moment_ratio(low):
        raise TraceError(f"no Weibull shape of {low} to {high} has cv={cv}")
    for _ in range(100):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if log_moment_ratio(middle) > target else (low, middle)
    return low
