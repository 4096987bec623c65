"""From measured engine steps to ``sim.latency.AffineStepModel``, with how far it can be trusted.

The steps come from the decision rows of a live engine (or from any table of batches and times),
best from traffic made for it (``validate.calibration_traffic``).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import floor, isfinite, log
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sim.latency import PS_PER_S, AffineStepModel, Batch

__all__ = [
    "CONSTANTS",
    "CalibrationError",
    "MeasuredStep",
    "StepFit",
    "drift",
    "fit_steps",
    "measured_steps",
]

CONSTANTS = AffineStepModel.CONSTANTS_S
"""Names of the model's constants in seconds: of a step, a prompt token, a decoding sequence, a
token of its context, and a unit of ``2*n*old + n*n`` of a prompt chunk."""

LEAST_STEPS = 20
OUTLIER = 3.0
"""A step so many times longer (or shorter) than the fit says was disturbed by something else."""
WORST = 10.0
"""What a disturbed step counts for at most, in parts of what it should have taken."""
GRID = log(1.25)
"""Batches whose features differ by less than a quarter are one point of the fit."""
HELD_OUT_STEPS = 25
"""Every fourth stretch of so many consecutive steps is predicted by a fit to the others."""
FOLDS = 4
MOST_WEIGHT = 100
"""Steps of a point beyond which it gets no more weight."""

Floats = NDArray[np.float64]


class CalibrationError(ValueError):
    """Measured steps that no step model can be fitted to."""


class MeasuredStep(NamedTuple):
    """What a step computed and how long it took."""

    batch: Batch
    duration_s: float
    name: str = ""
    """For messages, such as ``step 17``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepFit:
    """A fitted step model and its errors."""

    constants_s: Mapping[str, float]
    """By the names of ``CONSTANTS``."""
    steps: int
    points: int
    """Different batch compositions."""
    r2: float
    """Share of the points' variance that the model explains."""
    mape: float
    """Mean absolute error relative to the measured time, over points."""
    held_out_mape: float
    """The same over single steps that the fit had not seen."""
    held_out_total_error: float
    """Relative error of the sum of those steps' times."""
    outliers: tuple[str, ...]
    """Names of disturbed steps: they count for the sum of all times, but not for single points."""
    outlier_share: float
    """Their part of the measured time."""

    @property
    def model(self) -> AffineStepModel:
        """The step model, in whole picoseconds."""
        c0, *others = (round(self.constants_s[name] * PS_PER_S) for name in CONSTANTS)
        return AffineStepModel(max(c0, 1), *others)

    def lines(self) -> list[str]:
        """The fit in words."""
        c0, cp, cd, cc, ca, cn = (self.constants_s[name] for name in CONSTANTS)
        disturbed = (
            f"{len(self.outliers)} more disturbed ({100 * self.outlier_share:.1f} % of the time)"
        )
        return [
            f"step time = {1e3 * c0:.3f} ms + {1e3 * cn:.3f} ms x prompt chunks "
            f"+ {1e6 * cp:.2f} us x prompt tokens + {1e6 * cd:.2f} us x decodes "
            f"+ {1e9 * cc:.2f} ns x context + {1e9 * ca:.3f} ns x (2 n old + n n)",
            f"fitted to {self.steps} steps at {self.points} points, {disturbed}: "
            f"R2 {self.r2:.4f}, error {100 * self.mape:.1f} %; held-out steps: "
            f"{100 * self.held_out_mape:.1f} % each, {100 * self.held_out_total_error:+.1f} % "
            f"in total",
        ]

    def document(self) -> dict[str, Any]:
        """The fit as plain data."""
        return {
            "constants_s": dict(self.constants_s),
            "steps": self.steps,
            "points": self.points,
            "r2": self.r2,
            "mape": self.mape,
            "held_out_mape": self.held_out_mape,
            "held_out_total_error": self.held_out_total_error,
            "outliers": len(self.outliers),
            "outlier_share": self.outlier_share,
        }


# --------------------------------------------------------------------------- measured steps


def measured_steps(
    rows: Iterable[Mapping[str, Any]], prompt_tokens: Mapping[str, int]
) -> list[MeasuredStep]:
    """What the engine computed in each step and how long it took, from its decision rows.

    The time of a step runs to the beginning of the next one where the engine went on working,
    because sending answers off and taking requests in is time that a busy engine loses. Where it
    fell idle, the usual time between two steps is added.

    Args:
        rows: decision rows with ``began_s`` and ``ended_s``.
        prompt_tokens: of each request in them.

    Raises:
        CalibrationError: a row has no times, or names a request without prompt length.
    """
    known = dict(prompt_tokens)
    computed: dict[str, int] = {}
    decoding: set[str] = set()
    batches: list[Batch] = []
    kept: list[Mapping[str, Any]] = []
    for row in rows:
        for name in row["preempted"]:
            computed.pop(name, None)
            decoding.discard(name)
        for name in (*row["new"], *row["resumed"]):
            computed[name] = int(row["hits"].get(name, 0))
            decoding.discard(name)
        prefills: list[tuple[int, int]] = []
        decodes = context = longest = 0
        for name, tokens in row["scheduled"].items():
            if name not in known or name not in computed:
                raise CalibrationError(
                    f"step {row['step']}: request {name!r} was scheduled, but its "
                    f"{'prompt length' if name not in known else 'admission'} is not known"
                )
            before = computed[name]
            computed[name] = before + tokens
            if name in decoding:
                decodes += 1
                context += before + 1
                longest = max(longest, before + 1)
            else:
                prefills.append((tokens, before))
            if computed[name] >= known[name]:
                known[name] = computed[name] + 1  # its next token
                decoding.add(name)
        if not row["scheduled"]:
            continue
        if "began_s" not in row or "ended_s" not in row:
            raise CalibrationError(
                f"step {row['step']}: no times; rows of a live engine have began_s and ended_s"
            )
        batches.append(Batch(tuple(prefills), decodes, context, longest))
        kept.append(row)
    gaps_s = [_gap_s(row, after) for row, after in pairwise(kept)]
    usual_s = float(np.median([gap for gap in gaps_s if gap is not None] or [0.0]))
    # A gap far above the usual one is a wait for something that the rows do not show.
    spent_s = [
        usual_s if gap is None or gap > 10 * usual_s + 1e-3 else gap for gap in [*gaps_s, None]
    ]
    return [
        MeasuredStep(batch, row["ended_s"] - row["began_s"] + gap_s, f"step {row['step']}")
        for batch, row, gap_s in zip(batches, kept, spent_s, strict=True)
    ]


def _gap_s(row: Mapping[str, Any], after: Mapping[str, Any]) -> float | None:
    """Time between two steps of an engine that had work left; ``None`` if it may have had none."""
    left = {*row["running"], *row["waiting"]}
    busy = not left.isdisjoint(after["scheduled"])
    return max(float(after["began_s"] - row["ended_s"]), 0.0) if busy else None


# --------------------------------------------------------------------------- fitting


def fit_steps(steps: Sequence[MeasuredStep]) -> StepFit:
    """The five constants that describe these steps best, none of them negative.

    First a fit to the median time of each point (batches that are almost alike), which tells
    disturbed steps from the others; then relative least squares on the mean times of the rest,
    scaled to the sum of all, because a run takes as long as its steps take on average.

    Raises:
        CalibrationError: too few steps, a time that is not positive, or no step with a prompt
            or with decodes, so that a constant cannot be told.
    """
    _check(steps)
    features, times = _features(steps), np.array([step.duration_s for step in steps])
    groups = _points(features)
    constants, kept = _robust(features, times, groups)
    points, mean_s, _ = _centres(features[kept], times[kept], groups[kept])
    predicted = points @ constants
    spread = float(((mean_s - mean_s.mean()) ** 2).sum())
    held_mape, held_total = _held_out(features, times, groups)
    left_out: list[int] = np.flatnonzero(~kept).tolist()
    return StepFit(
        constants_s=dict(zip(CONSTANTS, constants.tolist(), strict=True)),
        steps=int(kept.sum()),
        points=len(points),
        r2=1 - float(((mean_s - predicted) ** 2).sum()) / spread if spread > 0 else 1.0,
        mape=float(np.mean(np.abs(predicted / mean_s - 1))),
        held_out_mape=held_mape,
        held_out_total_error=held_total,
        outliers=tuple(steps[i].name or f"step {i}" for i in left_out),
        outlier_share=float(times[left_out].sum() / times.sum()),
    )


def drift(fit: StepFit, before: Sequence[MeasuredStep], after: Sequence[MeasuredStep]) -> float:
    """How much slower the engine was afterwards: 0.1 is 10 % more time for the same work.

    Disturbed steps count with at most ``WORST`` times what they should have taken.
    """
    ratios = []
    for steps in (before, after):
        predicted = _features(steps) @ np.array([fit.constants_s[name] for name in CONSTANTS])
        measured = np.array([step.duration_s for step in steps])
        ratios.append(float(np.minimum(measured, WORST * predicted).sum() / predicted.sum()))
    return ratios[1] / ratios[0] - 1


def _check(steps: Sequence[MeasuredStep]) -> None:
    if len(steps) < LEAST_STEPS:
        raise CalibrationError(f"{len(steps)} steps: a fit needs at least {LEAST_STEPS}")
    for i, step in enumerate(steps):
        if not (isfinite(step.duration_s) and step.duration_s > 0):
            raise CalibrationError(
                f"{step.name or f'step {i}'}: duration_s={step.duration_s} must be above 0"
            )
    if not any(step.batch.prefills for step in steps):
        raise CalibrationError("no step computed a prompt, so the time per token is not known")
    if not any(step.batch.decodes for step in steps):
        raise CalibrationError("no step decoded, so the time per sequence is not known")


def _features(steps: Sequence[MeasuredStep]) -> Floats:
    """One row per step: 1, P, D, C, A, N of ``AffineStepModel``."""
    table = np.ones((len(steps), len(CONSTANTS)))
    for row, (batch, _, _) in zip(table, steps, strict=True):
        row[1] = sum(new for new, _ in batch.prefills)
        row[2] = batch.decodes
        row[3] = batch.decode_context_tokens
        row[4] = sum(new * (2 * old + new) for new, old in batch.prefills)
        row[5] = len(batch.prefills)
    return table


def _points(features: Floats) -> NDArray[np.int64]:
    """The point of each step: equal numbers for batches that are almost alike."""
    cells: dict[tuple[int, ...], int] = {}
    keys = ((floor(log(1 + value) / GRID) for value in row[1:]) for row in features.tolist())
    return np.array([cells.setdefault(tuple(key), len(cells)) for key in keys])


def _centres(
    features: Floats, times: Floats, groups: NDArray[np.int64], *, median: bool = False
) -> tuple[Floats, Floats, Floats]:
    """Features, time and weight of each point."""
    members = [np.flatnonzero(groups == group) for group in np.unique(groups)]
    weights = [min(len(rows), MOST_WEIGHT) ** 0.5 for rows in members]
    return (
        np.array([features[rows].mean(axis=0) for rows in members]),
        np.array(
            [float(np.median(times[rows]) if median else times[rows].mean()) for rows in members]
        ),
        np.array(weights),
    )


def _solve(features: Floats, times: Floats, weights: Floats) -> Floats:
    """Least squares of relative errors: what is divided by is the prediction, which has no noise.

    Dividing by measured times would give those that happen to be short more weight.
    """
    from scipy.optimize import nnls  # noqa: PLC0415 - slow to import, and only needed here

    divisor = times
    constants = np.zeros(features.shape[1])
    scale = np.maximum(features.max(axis=0), 1e-300)  # columns differ by ten orders of magnitude
    for _ in range(4):
        share = weights / divisor
        constants = nnls(features / scale * share[:, None], times * share)[0] / scale
        divisor = np.maximum(features @ constants, 0.1 * times)
    return constants


def _robust(
    features: Floats, times: Floats, groups: NDArray[np.int64]
) -> tuple[Floats, NDArray[np.bool_]]:
    """The constants, and which steps they were fitted to."""
    first = _solve(*_centres(features, times, groups, median=True))
    ratio = times / np.maximum(features @ first, 1e-300)
    kept = (ratio < OUTLIER) & (ratio > 1 / OUTLIER)
    if kept.sum() < len(times) / 2:
        raise CalibrationError(
            f"{len(times) - int(kept.sum())} of {len(times)} steps are more than {OUTLIER:g} "
            f"times off any fit: the machine is too busy to measure on, or its OpenMP threads spin"
        )
    constants = _solve(*_centres(features[kept], times[kept], groups[kept]))
    # Neither what the model cannot express nor disturbances, which live runs have as well, must
    # make the whole longer or shorter than it was.
    predicted = features @ constants
    return constants * np.minimum(times, WORST * predicted).sum() / predicted.sum(), kept


def _held_out(features: Floats, times: Floats, groups: NDArray[np.int64]) -> tuple[float, float]:
    """Errors on steps the fit has not seen: mean of single ones, and of their sum."""
    fold = np.arange(len(times)) // HELD_OUT_STEPS % FOLDS
    if len(np.unique(fold)) < FOLDS:
        fold = np.arange(len(times)) % FOLDS
    measured: list[Floats] = []
    predicted: list[Floats] = []
    for k in range(FOLDS):
        seen = fold != k
        constants, _ = _robust(features[seen], times[seen], groups[seen])
        guess = features[~seen] @ constants
        measured.append(np.minimum(times[~seen], WORST * guess))
        predicted.append(guess)
    truth, guess = np.concatenate(measured), np.concatenate(predicted)
    ordinary = truth < OUTLIER * guess
    error = float(np.mean(np.abs(guess[ordinary] / truth[ordinary] - 1)))
    return error, float(guess.sum() / truth.sum() - 1)
