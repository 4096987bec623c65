"""How long single GPU operations take: formulae with constants fitted to kernel measurements.

One formula per operation serves every chip; a chip's profile holds the constants and their source.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, inf

__all__ = [
    "MOE_COMPUTE_DERATE",
    "MOE_KNEE",
    "MOE_T0_S",
    "QUERY_TILE",
    "AllReduce",
    "Attention",
    "Elementwise",
    "Gemm",
    "KernelConstants",
    "Overhead",
    "Sampler",
    "pnorm",
]

QUERY_TILE = 64
"""Prompt tokens that one thread block of FlashAttention handles."""

# Grouped GEMM of routed experts, from vLLM 0.19 runs of Qwen3-30B-A3B on RTX PRO 6000; no other
# chip has been fitted. The fixed part holds the router, the sort and the launches.
MOE_T0_S = 25e-6
MOE_COMPUTE_DERATE = 0.6
MOE_KNEE = 3.0


def pnorm(p: float, x: float, y: float) -> float:
    """A smooth maximum of two non-negative numbers: the sum at ``p = 1``, the maximum at inf."""
    high, low = (x, y) if x >= y else (y, x)
    if p == inf or high == 0:
        return high
    return high * float((1.0 + (low / high) ** p) ** (1.0 / p))


def _positive(owner: object, *fields: str) -> None:
    for field in fields:
        value = getattr(owner, field)
        if not value > 0:
            raise ValueError(f"{field}: must be positive, got {value!r}")


def _not_negative(owner: object, *fields: str) -> None:
    for field in fields:
        value = getattr(owner, field)
        if not value >= 0:
            raise ValueError(f"{field}: must not be negative, got {value!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Gemm:
    """Matrix products: launch + smooth maximum of arithmetic and memory traffic."""

    compute_efficiency: float
    """Fraction of the dense peak that large products reach."""
    memory_efficiency: float
    """Fraction of the memory bandwidth that small products reach."""
    t0_s: float
    knee: float = inf
    """Exponent p of the smooth maximum; inf is the roofline's sharp one."""
    parallel_loss: float = 0.0
    """Loss by products with too few 128x128 tiles to fill the chip."""
    tile: float = 0.0
    """How much of the padding of rows to whole tiles costs time: 0 none, 1 all."""
    m_half_tokens: float = 0.0
    """Rows at which half the efficiency is reached, on top of the terms above."""

    def __post_init__(self) -> None:
        _positive(self, "compute_efficiency", "memory_efficiency", "knee")
        _not_negative(self, "t0_s", "parallel_loss", "tile", "m_half_tokens")
        if self.knee < 1 or self.tile > 1:
            raise ValueError(f"knee >= 1 and tile <= 1 needed, got {self.knee} and {self.tile}")

    def seconds(
        self,
        rows: int,
        columns: int,
        depth: int,
        *,
        flops: float,
        bytes_per_s: float,
        units: int,
        weight_bytes: float = 2.0,
        input_bytes: float = 2.0,
    ) -> float:
        """Time of (rows x depth) @ (depth x columns); ``weight_bytes`` per weight."""
        padded = 64 if rows <= 64 else 128 * ceil(rows / 128)
        worked = self.tile * padded + (1 - self.tile) * max(rows, 16)
        # The fit divides by ceil(worked / 128), which falls at every 128 rows; its upper envelope
        # is the same at whole tiles and never makes a larger product cheaper.
        idle = self.parallel_loss * units * min(worked, 128.0) / ceil(columns / 128)
        effective_rows = worked + self.m_half_tokens + idle
        compute_s = 2.0 * effective_rows * columns * depth / (flops * self.compute_efficiency)
        traffic = weight_bytes * columns * depth + rows * (input_bytes * depth + 2.0 * columns)
        memory_s = traffic / (bytes_per_s * self.memory_efficiency)
        return self.t0_s + pnorm(self.knee, compute_s, memory_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Elementwise:
    """Norms, activations, rotary embeddings: launch + bytes at two rates."""

    t0_s: float
    efficiency: float
    """Fraction of the memory bandwidth."""
    cache_bytes: float = 0.0
    """Bytes that stay in the L2 cache and move at ``cache_efficiency``."""
    cache_efficiency: float = 1.0

    def __post_init__(self) -> None:
        _positive(self, "efficiency", "cache_efficiency")
        _not_negative(self, "t0_s", "cache_bytes")

    def seconds(self, traffic_bytes: float, bytes_per_s: float) -> float:
        """Time of one operation that moves ``traffic_bytes``."""
        cached = min(traffic_bytes, self.cache_bytes)
        streamed = traffic_bytes - cached
        return (
            self.t0_s
            + cached / (bytes_per_s * self.cache_efficiency)
            + streamed / (bytes_per_s * self.efficiency)
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    """FlashAttention: a wave model with a prompt in the step, a bandwidth model without."""

    block_s: float | None = None
    """Time of one thread block (64 queries of one head of size 128) per KV token."""
    prefill_efficiency: float | None = None
    """Fraction of the dense peak of a long prompt; stands in where ``block_s`` was not fitted."""
    prefill_extra_tokens: int
    """Fixed cost of a thread block, as KV tokens."""
    prefill_t0_s: float
    tail: float
    """How much of the longest thread block is left over after the last full wave."""
    decode_efficiency: float
    """Fraction of the memory bandwidth when reading KV."""
    decode_t0_s: float
    decode_sequence_s: float = 0.0
    decode_exponent: float = 1.0
    """n sequences cost ``decode_sequence_s * n ** decode_exponent``."""
    decode_min_tokens: float = 0.0
    """A sequence costs at least as much as one with this many KV tokens."""

    def __post_init__(self) -> None:
        if (self.block_s is None) == (self.prefill_efficiency is None):
            raise ValueError("exactly one of block_s and prefill_efficiency is needed")
        fitted = "block_s" if self.block_s is not None else "prefill_efficiency"
        _positive(self, fitted, "decode_efficiency", "decode_exponent")
        _not_negative(self, "prefill_extra_tokens", "prefill_t0_s", "tail")
        _not_negative(self, "decode_t0_s", "decode_sequence_s", "decode_min_tokens")

    def block_seconds(self, *, flops: float, units: int) -> float:
        """``block_s``, from the efficiency where it was not fitted itself."""
        if self.block_s is not None:
            return self.block_s
        assert self.prefill_efficiency is not None
        return 4 * 128 * QUERY_TILE * units / (flops * self.prefill_efficiency)

    def efficiency(self, *, flops: float, units: int) -> float:
        """The inverse: fraction of the dense peak that ``block_seconds`` means."""
        return 4 * 128 * QUERY_TILE * units / (flops * self.block_seconds(flops=flops, units=units))


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampler:
    """Picking one token for each of n sequences: ``t0_s + sequence_s * n ** exponent``."""

    t0_s: float
    sequence_s: float
    exponent: float

    def __post_init__(self) -> None:
        _positive(self, "exponent")
        _not_negative(self, "t0_s", "sequence_s")

    def seconds(self, sequences: int) -> float:
        """Time for all sequences of a step."""
        return self.t0_s + self.sequence_s * float(sequences**self.exponent)


@dataclass(frozen=True, slots=True, kw_only=True)
class AllReduce:
    """Collectives: measured per number of ranks where possible, else derived from the link."""

    t0_s: float
    link_efficiency: float
    """Fraction of the link rate, for numbers of ranks without a measurement."""
    measured: tuple[tuple[int, float, float], ...] = ()
    """(ranks, t0 in seconds, bus bytes per second), ascending; inside one node."""

    def __post_init__(self) -> None:
        _positive(self, "link_efficiency")
        _not_negative(self, "t0_s")
        for ranks, t0_s, rate in self.measured:
            if ranks < 2 or t0_s < 0 or rate <= 0:
                raise ValueError(f"measured: impossible entry {(ranks, t0_s, rate)!r}")

    def at(self, ranks: int) -> tuple[float, float] | None:
        """Measured (t0, bus rate) for this many ranks, or for the next larger number."""
        for count, t0_s, rate in self.measured:
            if count >= ranks:
                return t0_s, rate
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Overhead:
    """What a step costs beyond its kernels, with CUDA graphs (or their like)."""

    gap_factor: float
    """Gaps between kernels, which kernel tables do not hold: kernel time is multiplied by it."""
    step_s: float
    """Fixed time per step: host work that is not hidden."""

    def __post_init__(self) -> None:
        _not_negative(self, "step_s")
        if self.gap_factor < 1:
            raise ValueError(f"gap_factor: must be at least 1, got {self.gap_factor!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelConstants:
    """All constants of one chip."""

    gemm: Gemm
    gemm_fp8: Gemm | None = None
    """None where FP8 products were not fitted: then weights are FP8 but arithmetic is BF16."""
    elementwise: Elementwise
    attention: Attention
    sampler: Sampler
    all_reduce: AllReduce
    overhead: Overhead
