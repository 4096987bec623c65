"""What the operators of one step cost in seconds, for one chip, model and layout.

This is the readable, floating-point half of the step-time model; ``sim.latency`` turns it into
integers and caches it. Shapes are those of one rank.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from math import ceil, sqrt

from sim.hardware import Chip
from sim.kernels import MOE_COMPUTE_DERATE, MOE_KNEE, MOE_T0_S, pnorm
from sim.model import ModelSpec, Moe
from sim.parallel import Parallel

__all__ = ["AttentionLayers", "Operators", "StepOptions"]

GRAPH_SIZES = (1, 2, 4, *range(8, 257, 8), *range(272, 513, 16))
"""Token counts for which vLLM captures CUDA graphs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepOptions:
    """How the engine runs its steps; the chip's profile holds the rest."""

    graph_max_tokens: int = 512
    """Steps of up to this many tokens are padded to the next CUDA-graph size; 0 is eager mode."""
    launch_s_per_layer: float = 0.0
    """CPU time to launch one layer, a floor under the step: 0.4e-3 to 0.55e-3 in eager mode."""
    launch_s_per_sequence: float = 0.0
    """CPU time per sequence, also part of that floor."""
    skew: bool = True
    """Whether the longest sequence of a mixed step is looked at."""
    gap_factor: float | None = None
    """Replaces the chip's factor on kernel time."""
    step_s: float | None = None
    """Replaces the chip's fixed time per step, which depends on the engine's version."""

    def __post_init__(self) -> None:
        for field in ("graph_max_tokens", "launch_s_per_layer", "launch_s_per_sequence", "step_s"):
            value = getattr(self, field)
            if value is not None and value < 0:
                raise ValueError(f"{field}: must not be negative, got {value!r}")
        if self.gap_factor is not None and self.gap_factor < 1:
            raise ValueError(f"gap_factor: must be at least 1, got {self.gap_factor!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionLayers:
    """Attention of layers of one kind, reduced to coefficients; times are of all these layers."""

    window_tokens: int | None
    decode_t0_s: float
    decode_sequence_s: float
    decode_exponent: float
    decode_min_tokens: float
    decode_token_s: float
    """Per KV token of all decodes, in a step without prompts."""
    mixed_t0_s: float
    extra_tokens: int
    """Fixed cost of a thread block, as KV tokens."""
    work_s: float
    """Per half KV token of a thread block, with all multiprocessors busy."""
    block_s: float
    """Per KV token of the longest thread block: no step is shorter."""
    tail: float
    kv_token_s: float
    """Per KV token that a mixed step reads."""
    context_token_s: float
    """Per cached token of a prompt; latent attention must unpack it."""
    split: bool
    """Decodes run in a kernel of their own even beside prompts (latent attention)."""

    def decode_fixed_s(self, decodes: int) -> float:
        """The part of decode attention that does not depend on context."""
        if decodes == 0:
            return 0.0
        return self.decode_t0_s + self.decode_sequence_s * float(decodes**self.decode_exponent)

    def decode_tokens(self, decodes: int, context_tokens: int) -> int:
        """KV tokens that decodes pay for; in a window, those of sequences of mean length."""
        tokens = max(context_tokens, self.least_tokens(decodes))
        return tokens if self.window_tokens is None else min(tokens, self.window_tokens * decodes)

    def least_tokens(self, decodes: int) -> int:
        """KV tokens that so many decodes pay for at least."""
        least = ceil(self.decode_min_tokens * decodes)
        return least if self.window_tokens is None else min(least, self.window_tokens * decodes)

    def decode_s(self, decodes: int, context_tokens: int) -> float:
        """Decode attention of a step without prompts."""
        tokens = self.decode_tokens(decodes, context_tokens)
        return self.decode_fixed_s(decodes) + tokens * self.decode_token_s

    def mixed_s(
        self,
        prefills: tuple[tuple[int, int], ...],
        decodes: int,
        context_tokens: int,
        longest_tokens: int,
    ) -> float:
        """Attention of a step with prompts: waves of thread blocks against memory traffic.

        Sums are integers, so the order of the prompts cannot matter. It never costs less than the
        decodes alone would: the two were fitted apart and cross at very short contexts.
        """
        window = self.window_tokens
        extra = 2 * self.extra_tokens
        work = read = unpacked = longest = 0
        if decodes and not self.split:
            read = context_tokens if window is None else min(context_tokens, window * decodes)
            work = 2 * read + extra * decodes
            longest = longest_tokens if window is None else min(longest_tokens, window)
        for new, old in prefills:
            if window is not None and old > window:
                old = window  # noqa: PLW2901
            pairs = new + 2 * old
            if window is not None and pairs > 2 * window:
                pairs = 2 * window
            work += ((new + 63) >> 6) * (pairs + extra)
            read += new + old
            unpacked += old
            end = new + old
            if window is not None and end > window:
                end = window
            longest = max(longest, end)
        critical_s = (longest + self.extra_tokens) * self.block_s
        compute_s = max(work * self.work_s + self.tail * critical_s, critical_s)
        memory_s = read * self.kv_token_s
        time_s = self.mixed_t0_s + unpacked * self.context_token_s
        time_s += sqrt(sqrt(compute_s**4 + memory_s**4))  # p-norm with p = 4
        if decodes == 0:
            return time_s
        alone_s = self.decode_s(decodes, context_tokens)
        return time_s + alone_s if self.split else max(time_s, alone_s)


class Operators:
    """Seconds of every operator of a step."""

    def __init__(
        self, chip: Chip, model: ModelSpec, layout: Parallel, options: StepOptions
    ) -> None:
        layout.check(chip, model)
        self.chip = chip
        self.model = model
        self.layout = layout
        self.options = options
        overhead = chip.kernels.overhead
        self.gap_factor = overhead.gap_factor if options.gap_factor is None else options.gap_factor
        self.step_s = overhead.step_s if options.step_s is None else options.step_s
        self.attention = self._attention()
        sizes = [size for size in GRAPH_SIZES if size <= options.graph_max_tokens]
        if options.graph_max_tokens > (sizes[-1] if sizes else 0):
            sizes.append(options.graph_max_tokens)
        self._graph_sizes = sizes

    def padded(self, tokens: int) -> int:
        """Tokens after padding to a CUDA-graph size."""
        sizes = self._graph_sizes
        return sizes[bisect_left(sizes, tokens)] if sizes and tokens <= sizes[-1] else tokens

    def launch_floor_s(self, sequences: int) -> float:
        """CPU time under which no step gets."""
        options = self.options
        return (
            options.launch_s_per_layer * self.model.layers
            + options.launch_s_per_sequence * sequences
        )

    def token_parts_s(self, tokens: int) -> dict[str, float]:
        """Everything that depends on the (padded) number of tokens only."""
        model, layout = self.model, self.layout
        hidden = model.hidden_size
        parts = {
            "gemm": model.layers * self._attention_gemms_s(tokens),
            "elementwise": model.layers * self._layer_elementwise_s(tokens)
            + self._elementwise_s(4 * tokens * hidden)  # embedding
            + self._elementwise_s(8 * tokens * hidden),  # final norm
            "moe": 0.0,
            "collectives": 0.0,
            "pipeline": 0.0,
        }
        parts["gemm"] += model.dense_layers * self._ffn_gemms_s(tokens, model.ffn_size)
        parts["elementwise"] += model.dense_layers * self._activation_s(tokens, model.ffn_size)
        if model.moe is not None:
            shared = model.shared_ffn_size
            if shared:
                parts["gemm"] += model.moe_layers * self._ffn_gemms_s(tokens, shared)
                parts["elementwise"] += model.moe_layers * self._activation_s(tokens, shared)
            parts["moe"] = model.moe_layers * self._experts_s(model.moe, tokens)
        message = 2.0 * tokens * hidden
        if layout.tp > 1:
            parts["collectives"] += 2 * model.layers * self._collective_s(layout.tp, 2, message)
        if layout.copies > 1:  # dispatch to the experts and back
            parts["collectives"] += 2 * model.moe_layers * self._collective_s(layout.ep, 1, message)
        if layout.pp > 1:
            link = self.chip.link_between(layout.ranks)
            hop_s = link.latency_s + message / link.rate(2)
            parts["pipeline"] = (layout.pp - 1) * hop_s
        return parts

    def head_s(self, sequences: int) -> float:
        """LM head and sampler for one row per sequence."""
        model = self.model
        columns = ceil(model.vocabulary / self.layout.tp)
        head_s = self._gemm_s(sequences, columns, model.hidden_size, 2.0)
        return head_s + self.chip.kernels.sampler.seconds(sequences)

    # ------------------------------------------------------------------ parts

    def _gemm_s(self, rows: int, columns: float, depth: float, weight_bytes: float) -> float:
        chip = self.chip
        kernels = chip.kernels
        gemm, flops, input_bytes = kernels.gemm, chip.bf16_flops, 2.0
        if weight_bytes < 2 and self._has_fp8_math:
            assert kernels.gemm_fp8 is not None
            assert chip.fp8_flops is not None
            gemm, flops, input_bytes = kernels.gemm_fp8, chip.fp8_flops, 1.0
        return gemm.seconds(
            rows,
            ceil(columns),
            ceil(depth),
            flops=flops,
            bytes_per_s=chip.memory_bytes_per_s,
            units=chip.parallel_units,
            weight_bytes=weight_bytes,
            input_bytes=input_bytes,
        )

    @property
    def _has_fp8_math(self) -> bool:
        """Without it FP8 weights are unpacked on the fly and multiplied in BF16, as Marlin does."""
        return (
            self.model.weight_dtype == "fp8"
            and self.chip.kernels.gemm_fp8 is not None
            and self.chip.fp8_flops is not None
        )

    def _attention_gemms_s(self, tokens: int) -> float:
        model, tp = self.model, self.layout.tp
        heads = model.heads // tp
        width = model.linear_bytes
        hidden = model.hidden_size
        if model.mla is not None:
            mla = model.mla
            down = mla.q_rank + mla.kv_rank + mla.rope_dim
            return (
                self._gemm_s(tokens, down, hidden, width)
                + self._gemm_s(tokens, heads * (mla.nope_dim + mla.rope_dim), mla.q_rank, width)
                + self._gemm_s(tokens, heads * (mla.nope_dim + mla.value_dim), mla.kv_rank, width)
                + self._gemm_s(tokens, hidden, heads * mla.value_dim, width)
            )
        qkv = (heads + 2 * model.kv_heads_per_rank(tp)) * model.head_dim
        return self._gemm_s(tokens, qkv, hidden, width) + self._gemm_s(
            tokens, hidden, heads * model.head_dim, width
        )

    def _ffn_gemms_s(self, tokens: int, ffn_size: int) -> float:
        model = self.model
        ffn = ffn_size / self.layout.tp
        width = model.linear_bytes
        return self._gemm_s(tokens, 2 * ffn, model.hidden_size, width) + self._gemm_s(
            tokens, model.hidden_size, ffn, width
        )

    def _elementwise_s(self, traffic_bytes: float) -> float:
        return self.chip.kernels.elementwise.seconds(traffic_bytes, self.chip.memory_bytes_per_s)

    def _activation_s(self, tokens: int, ffn_size: int) -> float:
        return self._elementwise_s(6.0 * tokens * ffn_size / self.layout.tp)

    def _layer_elementwise_s(self, tokens: int) -> float:
        """Two norms and the rotary embedding; the norm of q and k where the model has it."""
        model, tp = self.model, self.layout.tp
        vectors = model.heads // tp * model.head_dim
        vectors += (
            model.mla.kv_rank + model.mla.rope_dim
            if model.mla is not None
            else model.kv_heads_per_rank(tp) * model.head_dim
        )
        passes = 2 if model.qk_norm or model.mla is not None else 1
        return 2 * self._elementwise_s(8.0 * tokens * model.hidden_size) + passes * (
            self._elementwise_s(4.0 * tokens * vectors)
        )

    def _experts_s(self, moe: Moe, tokens: int) -> float:
        """Routed experts of one layer: uniform routing, tokens of all copies."""
        model, chip, layout = self.model, self.chip, self.layout
        gemm, flops = chip.kernels.gemm, chip.bf16_flops
        if self._has_fp8_math:
            assert chip.kernels.gemm_fp8 is not None
            assert chip.fp8_flops is not None
            gemm, flops = chip.kernels.gemm_fp8, chip.fp8_flops
        ranks = max(layout.tp, layout.ep)
        everyone = tokens * layout.copies
        share = moe.active_experts / moe.experts
        touched = moe.experts / ranks * (1.0 - (1.0 - share) ** everyone)
        size = 3.0 * model.hidden_size * moe.expert_ffn_size
        memory_s = (
            touched * size * model.expert_bytes / (chip.memory_bytes_per_s * gemm.memory_efficiency)
        )
        compute_s = 2.0 * everyone * moe.active_experts / ranks * size
        compute_s /= flops * gemm.compute_efficiency * MOE_COMPUTE_DERATE
        return MOE_T0_S + pnorm(MOE_KNEE, memory_s, compute_s)

    def _collective_s(self, ranks: int, passes: int, message_bytes: float) -> float:
        """All-reduce (two passes) or all-to-all (one) of a message of every rank."""
        t0_s, rate = self.chip.collective(ranks)
        return t0_s + passes * (ranks - 1) / ranks * message_bytes / rate

    def _attention(self) -> tuple[AttentionLayers, ...]:
        model = self.model
        kinds = [self._attention_layers(model.full_layers, None)]
        if model.window is not None:
            kinds.append(self._attention_layers(model.window.layers, model.window.tokens))
        return tuple(kinds)

    def _attention_layers(self, layers: int, window: int | None) -> AttentionLayers:
        chip, model, tp = self.chip, self.model, self.layout.tp
        fit = chip.kernels.attention
        units = chip.parallel_units
        heads = model.heads // tp
        rate = chip.memory_bytes_per_s * fit.decode_efficiency
        block_s = fit.block_seconds(flops=chip.bf16_flops, units=units)
        efficiency = fit.efficiency(flops=chip.bf16_flops, units=units)
        read_bytes = float(model.kv_bytes_per_layer_token(tp))
        decode_token_s = read_bytes / rate
        context_token_s = 0.0
        pair_size = 2 * model.head_dim
        if model.mla is not None:
            mla = model.mla
            pair_size = mla.nope_dim + mla.rope_dim + mla.value_dim
            flops = 2.0 * heads * (2 * mla.kv_rank + mla.rope_dim)
            decode_token_s = max(decode_token_s, flops / (chip.bf16_flops * efficiency))
            read_bytes = 2.0 * heads * pair_size
            unpack = 2.0 * heads * mla.kv_rank * (mla.nope_dim + mla.value_dim)
            context_token_s = unpack / (chip.bf16_flops * chip.kernels.gemm.compute_efficiency)
        block_s *= pair_size / 256
        return AttentionLayers(
            window_tokens=window,
            decode_t0_s=layers * fit.decode_t0_s,
            decode_sequence_s=layers * fit.decode_sequence_s,
            decode_exponent=fit.decode_exponent,
            decode_min_tokens=fit.decode_min_tokens,
            decode_token_s=layers * decode_token_s,
            mixed_t0_s=layers * fit.prefill_t0_s,
            extra_tokens=fit.prefill_extra_tokens,
            work_s=layers * heads * block_s / (2 * units),
            block_s=layers * block_s,
            tail=fit.tail,
            kv_token_s=layers * read_bytes / rate,
            context_token_s=layers * context_token_s,
            split=model.mla is not None,
        )
