"""How a model is spread over devices, and how many KV blocks then fit.

A layout is checked once against the model and the chip, so that nothing behind it has to be.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import floor

from sim.hardware import Chip
from sim.model import ModelSpec
from sim.profiles import ProfileError

__all__ = ["ACTIVATION_BYTES", "COMM_BYTES", "Parallel", "kv_capacity_blocks"]

ACTIVATION_BYTES = 3_500_000_000
"""Activations, CUDA context and graphs: the constant of aiconfigurator for vLLM."""
COMM_BYTES = 400_000_000
"""NCCL buffers, 0.34 to 0.39 GB in aiconfigurator; only with more than one rank."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parallel:
    """Tensor, pipeline and expert parallelism of one engine."""

    tp: int = 1
    pp: int = 1
    ep: int = 1
    """Ranks over which routed experts are spread. 1: experts are sliced by ``tp`` instead.

    More than ``tp`` means ``ep / tp`` data-parallel copies of attention that run in lockstep; the
    engine is one of them and takes the others to be loaded like itself.
    """

    def __post_init__(self) -> None:
        for field in ("tp", "pp", "ep"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field}: must be positive, got {getattr(self, field)}")
        if self.ep > 1 and self.ep % self.tp:
            raise ValueError(f"ep: {self.ep} is no multiple of tp {self.tp}")

    @property
    def copies(self) -> int:
        """Data-parallel copies of attention that share the experts."""
        return max(1, self.ep // self.tp)

    @property
    def ranks(self) -> int:
        """Devices of this engine: of one data-parallel copy."""
        return self.tp * self.pp

    def check(self, chip: Chip, model: ModelSpec) -> None:
        """Raises ``ProfileError`` where the layout does not suit the model or the chip."""
        if problem := self._problem(chip, model):
            raise ProfileError(f"{model.name} on {chip.name}: {problem}")

    def _problem(self, chip: Chip, model: ModelSpec) -> str:
        if model.heads % self.tp:
            return f"tp {self.tp} does not divide {model.heads} attention heads"
        kv = model.kv_heads
        if model.mla is None and kv % self.tp and self.tp % kv:
            return f"tp {self.tp} and {kv} KV heads: neither divides the other"
        if self.pp > model.layers:
            return f"pp {self.pp} is more than {model.layers} layers"
        if self.ep > 1 and model.moe is None:
            return f"ep {self.ep}, but the model has no routed experts"
        if model.moe is not None and self.ep > 1 and model.moe.experts % self.ep:
            return f"ep {self.ep} does not divide {model.moe.experts} experts"
        if max(self.ranks, self.ep) > chip.devices_per_node and chip.network_link is None:
            return (
                f"{max(self.ranks, self.ep)} devices, but a node has {chip.devices_per_node} "
                "and the chip has no network_link"
            )
        return ""


def kv_capacity_blocks(
    chip: Chip,
    model: ModelSpec,
    tp: int = 1,
    pp: int = 1,
    ep: int = 1,
    *,
    block_tokens: int = 16,
    gpu_memory_utilization: float = 0.9,
    sequences: int = 256,
    kv_dtype_bytes: int = 2,
    activation_bytes: int = ACTIVATION_BYTES,
    comm_bytes: int = COMM_BYTES,
) -> int:
    """KV blocks that fit beside weights, activations and communication buffers.

    Sliding-window layers take their full window for each of ``sequences`` (vLLM's
    ``max_num_seqs``) off the top; blocks then only hold the other layers.

    Raises:
        ProfileError: the layout is impossible, or not even one block fits. The message says how
            much memory is missing and which ``tp`` would do.
    """
    if not 0 < gpu_memory_utilization <= 1:
        raise ProfileError(
            f"gpu_memory_utilization: must be in (0, 1], got {gpu_memory_utilization}"
        )
    if block_tokens < 1 or sequences < 1:
        raise ProfileError(
            f"block_tokens and sequences must be positive, got {block_tokens} and {sequences}"
        )
    layout = Parallel(tp=tp, pp=pp, ep=ep)
    layout.check(chip, model)
    usable = floor(chip.memory_bytes * gpu_memory_utilization)

    def left(ranks: int, experts: int) -> int:
        used = model.weight_bytes_per_rank(ranks, pp, experts) + activation_bytes
        used += model.kv_bytes_per_sequence(ranks, pp, kv_dtype_bytes) * sequences
        return usable - used - (comm_bytes if max(ranks * pp, experts) > 1 else 0)

    def block(ranks: int) -> int:
        return block_tokens * model.kv_bytes_per_token(ranks, pp, kv_dtype_bytes)

    free = left(tp, ep)
    if free >= block(tp) > 0:
        return free // block(tp)
    advice = "no tp inside one node would do"
    for larger in range(tp + 1, chip.devices_per_node // pp + 1):
        experts = max(ep, larger) if ep > 1 else 1
        if ep > 1 and experts % larger:
            continue
        if Parallel(tp=larger, pp=pp, ep=experts)._problem(chip, model):
            continue
        if left(larger, experts) >= block(larger):
            advice = f"tp {larger} would do"
            break
    weights = model.weight_bytes_per_rank(tp, pp, ep)
    raise ProfileError(
        f"{model.name} does not fit on {chip.name} with tp {tp}, pp {pp}: "
        f"{(block(tp) - free) / 1e9:.1f} GB are missing for a single KV block "
        f"({usable / 1e9:.1f} GB usable, {weights / 1e9:.1f} GB of weights per device); {advice}"
    )
