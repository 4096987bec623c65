"""How long an engine step takes, in integer picoseconds, and how a run of decode steps adds up.

Inside a run of decode-only steps nothing but the context grows, so a step costs an integer
intercept plus an integer slope times the context. A simulator can then jump over any number of
steps and land on exactly the picosecond that step-by-step simulation reaches.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import sqrt
from typing import NamedTuple, Protocol

from sim.hardware import Chip
from sim.model import ModelSpec
from sim.operators import AttentionLayers, Operators, StepOptions
from sim.parallel import Parallel, kv_capacity_blocks

__all__ = [
    "UNLIMITED_STEPS",
    "AffineStepModel",
    "Batch",
    "DecodeRun",
    "ParametricStepModel",
    "StepModel",
    "StepOptions",
    "kv_capacity_blocks",
]

PS_PER_S = 10**12
UNLIMITED_STEPS = 1 << 62


class Batch(NamedTuple):
    """What one engine step computes."""

    prefills: tuple[tuple[int, int], ...]
    """(new tokens, tokens already in KV) of every prompt chunk; new tokens are positive."""
    decodes: int
    """Sequences that decode one token each."""
    decode_context_tokens: int
    """KV tokens of all decodes together, the ones computed in this step included."""
    longest_decode_tokens: int
    """The largest of them; read only if ``StepModel.longest_matters``."""


class DecodeRun(NamedTuple):
    """Consecutive decode-only steps: step j costs ``first_ps + j * slope_ps``."""

    first_ps: int
    slope_ps: int
    steps: int
    """How many steps this holds for, exactly; ``UNLIMITED_STEPS`` for ever."""


_decode_run: Callable[[tuple[int, int, int]], DecodeRun] = partial(tuple.__new__, DecodeRun)
"""``DecodeRun`` from a tuple, in half the time of calling the class."""


class StepModel(Protocol):
    """Times of steps. ``step_ps`` of a decode-only step is ``decode_run(...).first_ps``."""

    @property
    def longest_matters(self) -> bool:
        """False if ``longest_decode_tokens`` is never read, so nobody needs to track it."""
        ...

    def step_ps(self, batch: Batch) -> int:
        """Picoseconds of any step that is not empty."""
        ...

    def decode_run(self, decodes: int, context_tokens: int) -> DecodeRun:
        """Steps from this context (computed tokens included) on; each adds ``decodes`` to it."""
        ...

    def prefill_ps(self, tokens: int, context: int = 0) -> int:
        """A step that computes one prompt chunk and nothing else."""
        ...


class AffineStepModel:
    """``c0 + cp*P + cd*D + cc*C + ca*A + cn*N`` picoseconds: for theory, fuzz tests and fits.

    P prompt tokens, D decodes, C their context, A the sum over prompt chunks of
    ``2*n*old + n*n``, and N the number of prompt chunks.
    """

    CONSTANTS_S = ("c0_s", "cp_s", "cd_s", "cc_s", "ca_s", "cn_s")
    """What the constants are called where they are given in seconds."""

    longest_matters = False

    def __init__(self, c0: int, cp: int, cd: int, cc: int, ca: int, cn: int = 0) -> None:
        coefficients = (c0, cp, cd, cc, ca, cn)
        if c0 < 1 or min(coefficients) < 0:
            raise ValueError(f"c0 must be positive, the rest not negative: got {coefficients}")
        self._coefficients = coefficients

    def step_ps(self, batch: Batch) -> int:
        """Picoseconds of any step."""
        c0, cp, cd, cc, ca, cn = self._coefficients
        prompt = area = 0
        for new, old in batch.prefills:
            prompt += new
            area += new * (2 * old + new)
        _check_not_empty(prompt + batch.decodes)
        decode = cd * batch.decodes + cc * batch.decode_context_tokens
        return c0 + cp * prompt + decode + ca * area + cn * len(batch.prefills)

    def decode_run(self, decodes: int, context_tokens: int) -> DecodeRun:
        """Affine for ever."""
        _check_not_empty(decodes)
        c0, _, cd, cc, _, _ = self._coefficients
        return DecodeRun(c0 + cd * decodes + cc * context_tokens, cc * decodes, UNLIMITED_STEPS)

    def prefill_ps(self, tokens: int, context: int = 0) -> int:
        """A step with one chunk only."""
        return self.step_ps(Batch(((tokens, context),), 0, 0, 0))


class _Segment(NamedTuple):
    """Decode-only steps of one batch size whose context is at least ``start``."""

    start: int
    intercept_ps: int
    context_ps: int
    """Added per KV token."""


class ParametricStepModel:
    """Step times of a chip, a model and a layout, from kernel formulae with fitted constants.

    The float formulae of ``sim.operators`` are evaluated once per number of tokens and sequences,
    rounded to picoseconds and cached; a step then only adds integers, and in mixed steps the
    wave term of attention.
    """

    def __init__(
        self,
        chip: Chip,
        model: ModelSpec,
        tp: int = 1,
        pp: int = 1,
        ep: int = 1,
        *,
        options: StepOptions | None = None,
    ) -> None:
        self.chip = chip
        self.model = model
        self.layout = Parallel(tp=tp, pp=pp, ep=ep)
        self.options = options or StepOptions()
        self.longest_matters = self.options.skew
        self._operators = Operators(chip, model, self.layout, self.options)
        kernel_ps = PS_PER_S * self._operators.gap_factor
        kinds = self._operators.attention
        self._kernel_ps = kernel_ps
        self._overhead_ps = round(PS_PER_S * self._operators.step_s)
        self._context_ps = tuple(round(kernel_ps * kind.decode_token_s) for kind in kinds)
        self._tokens_ps: dict[int, int] = {}
        self._sequences_ps: dict[int, tuple[int, int]] = {}
        self._segments: dict[int, list[_Segment]] = {}
        self._last: dict[int, _Segment] = {}
        self._alone_ps: dict[int, tuple[int, int]] = {}
        self._read_token_ps = self._context_ps[0]
        # The common case, one kind of layer and one kernel for all, is written out in step_ps.
        full = kinds[0]
        self._plain = len(kinds) == 1 and not full.split
        self._extra = 2 * full.extra_tokens
        self._work_ps = kernel_ps * full.work_s
        self._block_ps = kernel_ps * full.block_s
        self._tail = full.tail
        self._read_ps = kernel_ps * full.kv_token_s
        self._mixed_ps = kernel_ps * full.mixed_t0_s

    def step_ps(self, batch: Batch) -> int:
        """Picoseconds of any step that is not empty."""
        prefills, decodes, context, longest = batch
        if not prefills:
            return self.decode_run(decodes, context)[0]
        if not self._plain:
            return self._mixed_step_ps(batch)
        tokens = decodes
        extra = self._extra
        work = 2 * context + extra * decodes
        read = context
        if not (decodes and self.longest_matters):
            longest = 0
        for new, old in prefills:
            end = new + old
            tokens += new
            work += ((new + 63) >> 6) * (end + old + extra)
            read += end
            longest = end if end > longest else longest  # max() takes three times as long
        critical = (longest + 0.5 * extra) * self._block_ps
        compute = work * self._work_ps + self._tail * critical
        compute = critical if compute < critical else compute
        memory = read * self._read_ps
        compute *= compute
        memory *= memory
        attention = round(self._mixed_ps + sqrt(sqrt(compute * compute + memory * memory)))
        if decodes:  # never less than the decodes alone
            fixed_ps, least = self._alone_ps.get(decodes) or self._fill_alone(decodes)
            alone = fixed_ps + self._read_token_ps * (context if context > least else least)
            attention = alone if alone > attention else attention
        tokens_ps = self._tokens_ps.get(tokens)
        if tokens_ps is None:
            tokens_ps = self._fill_tokens(tokens)
        fixed = self._sequences_ps.get(decodes + len(prefills))
        if fixed is None:
            fixed = self._fill_sequences(decodes + len(prefills))
        kernels = tokens_ps + fixed[0] + attention
        return (kernels if kernels > fixed[1] else fixed[1]) + self._overhead_ps

    def decode_run(self, decodes: int, context_tokens: int) -> DecodeRun:
        """Decode-only steps; affine for ever except at very short contexts, windows and floors."""
        segment = self._last.get(decodes)
        if segment is None:
            segment = self._fill_segments(decodes)
        start, intercept, slope = segment
        if context_tokens >= start:
            return _decode_run(
                (intercept + slope * context_tokens, slope * decodes, UNLIMITED_STEPS)
            )
        end = start
        for start, intercept, slope in reversed(self._segments[decodes][:-1]):
            if context_tokens >= start:
                steps = -((context_tokens - end) // decodes)  # until the context reaches `end`
                return DecodeRun(intercept + slope * context_tokens, slope * decodes, steps)
            end = start
        raise ValueError(f"context_tokens must not be negative, got {context_tokens}")

    def prefill_ps(self, tokens: int, context: int = 0) -> int:
        """A step with one prompt chunk only."""
        return self.step_ps(Batch(((tokens, context),), 0, 0, 0))

    def explain(self, batch: Batch) -> dict[str, float]:
        """Seconds of every part of a step; they sum to ``step_ps`` but for rounding."""
        operators = self._operators
        prefills, decodes, context, longest = batch
        tokens = decodes + sum(new for new, _ in prefills)
        _check_not_empty(tokens)
        sequences = decodes + len(prefills)
        parts = operators.token_parts_s(operators.padded(tokens))
        parts["attention"] = sum(
            kind.mixed_s(prefills, decodes, context, longest if self.longest_matters else 0)
            if prefills
            else kind.decode_s(decodes, context)
            for kind in operators.attention
        )
        parts["head"] = operators.head_s(sequences)
        kernels_s = sum(parts.values())
        parts["kernel_gaps"] = (operators.gap_factor - 1) * kernels_s
        busy_s = operators.gap_factor * kernels_s
        parts["launch_wait"] = max(0.0, operators.launch_floor_s(sequences) - busy_s)
        parts["overhead"] = operators.step_s
        return parts

    # ------------------------------------------------------------------ caches

    def _mixed_step_ps(self, batch: Batch) -> int:
        """As ``step_ps``, for windows and latent attention."""
        prefills, decodes, context, longest = batch
        tokens = decodes + sum(new for new, _ in prefills)
        if not self.longest_matters:
            longest = 0
        attention = sum(
            max(
                round(self._kernel_ps * kind.mixed_s(prefills, decodes, context, longest)),
                self._kind_decode_ps(kind, context_ps, decodes, context) if decodes else 0,
            )
            for kind, context_ps in zip(self._operators.attention, self._context_ps, strict=True)
        )
        tokens_ps = self._tokens_ps.get(tokens) or self._fill_tokens(tokens)
        sequences = decodes + len(prefills)
        head, floor = self._sequences_ps.get(sequences) or self._fill_sequences(sequences)
        return max(tokens_ps + head + attention, floor) + self._overhead_ps

    def _fill_tokens(self, tokens: int) -> int:
        _check_not_empty(tokens)
        padded = self._operators.padded(tokens)
        value = round(self._kernel_ps * sum(self._operators.token_parts_s(padded).values()))
        self._tokens_ps[tokens] = value
        return value

    def _fill_sequences(self, sequences: int) -> tuple[int, int]:
        """(LM head and sampler, CPU floor) for a number of sequences."""
        value = (
            round(self._kernel_ps * self._operators.head_s(sequences)),
            round(PS_PER_S * self._operators.launch_floor_s(sequences)),
        )
        self._sequences_ps[sequences] = value
        return value

    def _kind_decode_ps(
        self, kind: AttentionLayers, context_ps: int, decodes: int, context: int
    ) -> int:
        fixed = round(self._kernel_ps * kind.decode_fixed_s(decodes))
        return fixed + context_ps * kind.decode_tokens(decodes, context)

    def _fill_alone(self, decodes: int) -> tuple[int, int]:
        """Attention of the decodes alone, for one kind of layer: (time, least tokens)."""
        kind = self._operators.attention[0]
        fixed = round(self._kernel_ps * kind.decode_fixed_s(decodes))
        self._alone_ps[decodes] = fixed, kind.least_tokens(decodes)
        return self._alone_ps[decodes]

    def _fill_segments(self, decodes: int) -> _Segment:
        """Cuts the cost of decode-only steps at its knots; returns the last, unlimited piece."""
        _check_not_empty(decodes)
        kinds = self._operators.attention
        constant = self._tokens_ps.get(decodes) or self._fill_tokens(decodes)
        head, floor = self._sequences_ps.get(decodes) or self._fill_sequences(decodes)

        def kernels_at(context: int) -> int:
            return (
                constant
                + head
                + sum(
                    self._kind_decode_ps(kind, context_ps, decodes, context)
                    for kind, context_ps in zip(kinds, self._context_ps, strict=True)
                )
            )

        knots = {0}
        for kind in kinds:
            knots.add(kind.least_tokens(decodes))
            if kind.window_tokens is not None:
                knots.add(kind.window_tokens * decodes)
        overhead = self._overhead_ps
        segments: list[_Segment] = []
        for start in sorted(knots):
            value = kernels_at(start)
            slope = kernels_at(start + 1) - value
            if value < floor:
                segments.append(_Segment(start, floor + overhead, 0))
                if slope:  # where the kernels catch up with the CPU
                    start += -((value - floor) // slope)  # noqa: PLW2901
                    value += slope * (start - segments[-1].start)
            if value >= floor:
                segments.append(_Segment(start, value - slope * start + overhead, slope))
        self._segments[decodes] = _without_overlap(segments)
        self._last[decodes] = self._segments[decodes][-1]
        return self._last[decodes]


def _without_overlap(segments: list[_Segment]) -> list[_Segment]:
    """Drops pieces that begin only where or after the next knot does."""
    kept: list[_Segment] = []
    for segment in segments:
        while kept and kept[-1].start >= segment.start:
            kept.pop()
        kept.append(segment)
    return kept


def _check_not_empty(tokens: int) -> None:
    if tokens < 1:
        raise ValueError(f"a step must compute at least one token, got {tokens}")
