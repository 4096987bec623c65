"""What the simulator and a real engine have in common: a deployment in, a result out."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Protocol

from policies.api import PolicySet
from sim.hardware import Chip, ProfileError, load_chip
from sim.latency import ParametricStepModel, StepModel, kv_capacity_blocks
from sim.model import ModelSpec, load_model
from sim.scheduler import EngineLimits

if TYPE_CHECKING:
    from sim.result import Result
    from traces.schema import Trace


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployment:
    """Which engines serve: ``engines`` equal instances of one model on one kind of chip."""

    chip: Chip
    model: ModelSpec
    engines: int = 1
    tp: int = 1
    """Chips that share every layer."""
    pp: int = 1
    """Stages of consecutive layers, one batch in flight."""
    ep: int = 1
    """Chips that share the experts of a mixture-of-experts model."""
    limits: EngineLimits = field(default_factory=EngineLimits)

    def __post_init__(self) -> None:
        for key in ("engines", "tp", "pp", "ep"):
            if getattr(self, key) < 1:
                raise ProfileError(f"{key}={getattr(self, key)}: must be 1 or more")

    @classmethod
    def of(
        cls,
        chip: str,
        model: str,
        *,
        engines: int = 1,
        tp: int = 1,
        pp: int = 1,
        ep: int = 1,
        **limits: object,
    ) -> Deployment:
        """A deployment by profile names; ``limits`` are fields of ``EngineLimits``."""
        return cls(
            chip=load_chip(chip),
            model=load_model(model),
            engines=engines,
            tp=tp,
            pp=pp,
            ep=ep,
            limits=EngineLimits(**limits),  # type: ignore[arg-type]
        )

    @property
    def chips_per_engine(self) -> int:
        return self.tp * self.pp

    def kv_blocks(self) -> int:
        """Usable KV blocks of one engine (vLLM's null block excluded).

        Raises:
            ProfileError: the model does not fit the chips.
        """
        if self.limits.num_gpu_blocks is not None:
            return self.limits.num_gpu_blocks - 1
        return kv_capacity_blocks(
            self.chip,
            self.model,
            tp=self.tp,
            pp=self.pp,
            ep=self.ep,
            block_tokens=self.limits.block_tokens,
            gpu_memory_utilization=self.limits.gpu_memory_utilization,
        )

    def max_model_len(self) -> int:
        """The longest sequence (prompt and output) one engine serves.

        Raises:
            ProfileError: the KV cache cannot hold the length that was asked for.
        """
        capacity = self.kv_blocks() * self.limits.block_tokens
        length = self.limits.max_model_len
        if length is None:
            length = min(self.model.max_context_tokens, capacity)
        elif length > capacity:
            raise ProfileError(
                f"max_model_len={length} needs more KV than there is: {capacity} tokens fit; "
                f"lower it, raise gpu_memory_utilization or tp"
            )
        budget = self.limits.max_num_batched_tokens
        if not self.limits.enable_chunked_prefill and budget < length:
            raise ProfileError(
                f"enable_chunked_prefill=False needs a step to hold the longest prompt, but "
                f"max_num_batched_tokens={budget} is less than max_model_len={length}; "
                f"raise the one or lower the other"
            )
        return length

    def step_model(self) -> StepModel:
        return _step_model(self.chip, self.model, self.tp, self.pp, self.ep)


@lru_cache(maxsize=32)
def _step_model(chip: Chip, model: ModelSpec, tp: int, pp: int, ep: int) -> StepModel:
    """Kept between runs, because it remembers what it has computed."""
    return ParametricStepModel(chip, model, tp=tp, pp=pp, ep=ep)


class Backend(Protocol):
    """Serves a trace under policies."""

    def serve(self, trace: Trace, policies: PolicySet, *, seed: int = 0) -> Result: ...
