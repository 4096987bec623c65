"""Shapes of transformer models, and what follows from them: parameters, bytes and operations.

Nothing here is measured; every size is computed from the published configuration.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from math import ceil
from typing import Literal, TypeAlias, get_args

from sim.profiles import ProfileError, Section, build, names, read, stem

__all__ = ["Mla", "ModelSpec", "Moe", "ProfileError", "WeightDtype", "Window"]
__all__ += ["load_model", "models"]

WeightDtype: TypeAlias = Literal["bf16", "fp16", "fp8", "mxfp4"]
"""``fp8``: linear layers in blocks of 128x128; ``mxfp4``: routed experts only."""

HALF_BYTES = 2.0
FP8_BYTES = 1.0 + 4.0 / 128**2
"""One byte, and a four-byte scale per block of 128x128."""
MXFP4_BYTES = 0.5 + 1.0 / 32
"""Half a byte, and a one-byte scale per 32 weights."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Moe:
    """Routed experts in place of the feed-forward part of some layers."""

    experts: int
    active_experts: int
    """Routed experts per token."""
    shared_experts: int
    """Experts that see every token."""
    expert_ffn_size: int
    dense_layers: int
    """Leading layers without experts."""
    expert_bias: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Mla:
    """Multi-head latent attention: the cache holds one compressed vector per token and layer."""

    kv_rank: int
    q_rank: int
    rope_dim: int
    nope_dim: int
    value_dim: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """Layers that attend to the last ``tokens`` tokens only."""

    tokens: int
    layers: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """A decoder-only transformer."""

    name: str
    title: str
    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn_size: int
    """Of dense layers; unused where every layer has experts."""
    vocabulary: int
    tied_embeddings: bool = False
    qk_norm: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    max_context_tokens: int
    weight_dtype: WeightDtype = "bf16"
    moe: Moe | None = None
    mla: Mla | None = None
    window: Window | None = None

    def __post_init__(self) -> None:
        sizes = ["hidden_size", "layers", "heads", "kv_heads", "head_dim", "ffn_size"]
        for field in [*sizes, "vocabulary", "max_context_tokens"]:
            if getattr(self, field) < 1:
                raise ValueError(f"{field}: must be positive, got {getattr(self, field)}")
        if self.heads % self.kv_heads:
            raise ValueError(f"kv_heads: {self.kv_heads} do not divide {self.heads} heads")
        if self.weight_dtype not in get_args(WeightDtype):
            raise ValueError(f"weight_dtype: {self.weight_dtype!r} is none of {WeightDtype}")
        if self.moe is not None:
            if not 0 <= self.moe.dense_layers <= self.layers:
                raise ValueError(f"moe.dense_layers: {self.moe.dense_layers} of {self.layers}")
            if not 1 <= self.moe.active_experts <= self.moe.experts:
                raise ValueError(
                    f"moe.active_experts: {self.moe.active_experts} of {self.moe.experts}"
                )
        if self.window is not None and not 0 <= self.window.layers <= self.layers:
            raise ValueError(f"window.layers: {self.window.layers} of {self.layers}")

    # ------------------------------------------------------------------ layers

    @property
    def moe_layers(self) -> int:
        """Layers with routed experts."""
        return 0 if self.moe is None else self.layers - self.moe.dense_layers

    @property
    def dense_layers(self) -> int:
        """Layers with an ordinary feed-forward part."""
        return self.layers - self.moe_layers

    @property
    def full_layers(self) -> int:
        """Layers that attend to the whole context."""
        return self.layers - (0 if self.window is None else self.window.layers)

    # ------------------------------------------------------------------ parameters

    def attention_params(self, tp: int = 1) -> float:
        """Matrix parameters of one layer's attention on one of ``tp`` ranks."""
        h = self.hidden_size
        heads = self.heads / tp
        if self.mla is not None:
            mla = self.mla
            down = h * (mla.q_rank + mla.kv_rank + mla.rope_dim)  # on every rank
            up = heads * (
                mla.q_rank * (mla.nope_dim + mla.rope_dim)
                + mla.kv_rank * (mla.nope_dim + mla.value_dim)
                + mla.value_dim * h
            )
            return down + up
        return h * self.head_dim * (2 * heads + 2 * self.kv_heads_per_rank(tp))

    @property
    def expert_params(self) -> int:
        """Matrix parameters of all routed experts of one layer."""
        if self.moe is None:
            return 0
        return 3 * self.moe.experts * self.hidden_size * self.moe.expert_ffn_size

    @property
    def shared_ffn_size(self) -> int:
        """Width of the feed-forward part that every token of an expert layer passes."""
        return 0 if self.moe is None else self.moe.shared_experts * self.moe.expert_ffn_size

    def _small_params(self) -> int:
        """Norms, biases and routers of all layers; always in two bytes."""
        h = self.hidden_size
        layer = 2 * h + (2 * self.head_dim if self.qk_norm else 0)
        if self.qkv_bias:
            layer += (self.heads + 2 * self.kv_heads) * self.head_dim
        if self.output_bias:
            layer += h
        if self.mla is not None:
            layer += self.mla.q_rank + self.mla.kv_rank
        total = h + self.layers * layer
        if self.moe is not None:
            router = self.moe.experts * h
            if self.moe.expert_bias:
                router += self.moe.experts * (2 * self.moe.expert_ffn_size + h + 1)
            total += self.moe_layers * router
        return total

    @property
    def params(self) -> int:
        """All parameters; multi-token-prediction layers are left out."""
        h = self.hidden_size
        embeddings = self.vocabulary * h * (1 if self.tied_embeddings else 2)
        dense = 3 * h * (self.dense_layers * self.ffn_size + self.moe_layers * self.shared_ffn_size)
        attention = round(self.layers * self.attention_params())
        experts = self.moe_layers * self.expert_params
        return embeddings + attention + dense + experts + self._small_params()

    @property
    def active_params(self) -> int:
        """Parameters that one token uses."""
        if self.moe is None:
            return self.params
        idle = self.moe.experts - self.moe.active_experts
        unused = self.expert_params * idle // self.moe.experts
        if self.moe.expert_bias:
            unused += idle * (2 * self.moe.expert_ffn_size + self.hidden_size)
        return self.params - self.moe_layers * unused

    # ------------------------------------------------------------------ bytes

    @property
    def linear_bytes(self) -> float:
        """Bytes of one weight of attention and feed-forward matrices."""
        return FP8_BYTES if self.weight_dtype == "fp8" else HALF_BYTES

    @property
    def expert_bytes(self) -> float:
        """Bytes of one weight of a routed expert."""
        return MXFP4_BYTES if self.weight_dtype == "mxfp4" else self.linear_bytes

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights in their native type."""
        return self.weight_bytes_per_rank()

    def weight_bytes_per_rank(self, tp: int = 1, pp: int = 1, ep: int = 1) -> int:
        """Bytes of weights on the fullest rank.

        Matrices are split over ``tp`` ranks, routed experts over ``max(tp, ep)``; norms, routers
        and the down projections of latent attention are on every rank. Layers are split over
        ``pp`` stages, and the last stage, the fullest, also holds the LM head.
        """
        h = self.hidden_size
        layers = ceil(self.layers / pp)
        moe_layers = min(self.moe_layers, layers)
        dense_layers = layers - moe_layers
        if self.expert_params < 3 * h * self.ffn_size:  # dense layers are the heavier ones
            dense_layers = min(self.dense_layers, layers)
            moe_layers = layers - dense_layers
        ffn = 3 * h * (dense_layers * self.ffn_size + moe_layers * self.shared_ffn_size) / tp
        linear = (layers * self.attention_params(tp) + ffn) * self.linear_bytes
        experts = moe_layers * self.expert_params / max(tp, ep) * self.expert_bytes
        tables = 2 if pp == 1 and not self.tied_embeddings else 1
        embeddings = tables * self.vocabulary * h / tp * HALF_BYTES
        return ceil(linear + experts + embeddings + self._small_params() / pp * HALF_BYTES)

    def kv_heads_per_rank(self, tp: int = 1) -> int:
        """KV heads on one rank; they are copied when there are more ranks than heads."""
        return max(1, self.kv_heads // tp)

    def kv_bytes_per_layer_token(self, tp: int = 1, dtype_bytes: int = 2) -> int:
        """Bytes of KV cache of one token in one layer on one rank.

        Latent attention keeps one vector for all heads, so every ``tp`` rank holds all of it.
        """
        if self.mla is not None:
            return (self.mla.kv_rank + self.mla.rope_dim) * dtype_bytes
        return 2 * self.kv_heads_per_rank(tp) * self.head_dim * dtype_bytes

    def kv_bytes_per_token(self, tp: int = 1, pp: int = 1, dtype_bytes: int = 2) -> int:
        """Bytes of KV cache per token on the fullest rank.

        Sliding-window layers are not counted here, because their share stops growing: see
        ``kv_bytes_per_sequence``.
        """
        return ceil(self.full_layers / pp) * self.kv_bytes_per_layer_token(tp, dtype_bytes)

    def kv_bytes_per_sequence(self, tp: int = 1, pp: int = 1, dtype_bytes: int = 2) -> int:
        """Bytes of KV cache that each sequence keeps for sliding-window layers on one rank."""
        if self.window is None:
            return 0
        per_token = self.kv_bytes_per_layer_token(tp, dtype_bytes)
        return ceil(self.window.layers / pp) * self.window.tokens * per_token

    # ------------------------------------------------------------------ operations

    def matmul_flops(self, tokens: int, sequences: int) -> float:
        """Operations of all matrix products but attention; the LM head sees one row a sequence."""
        h = self.hidden_size
        ffn = self.dense_layers * self.ffn_size + self.moe_layers * self.shared_ffn_size
        params = self.layers * self.attention_params() + 3 * h * ffn
        if self.moe is not None:
            active = self.expert_params * self.moe.active_experts / self.moe.experts
            params += self.moe_layers * (active + h * self.moe.experts)
        return 2.0 * (params * tokens + h * self.vocabulary * sequences)

    def attention_flops(self, pairs: int) -> float:
        """Operations of the full-context layers for ``pairs`` of a query and a KV token."""
        size = 2 * self.head_dim
        if self.mla is not None:
            size = self.mla.nope_dim + self.mla.rope_dim + self.mla.value_dim
        return 2.0 * self.full_layers * self.heads * size * pairs


def models() -> tuple[str, ...]:
    """Names that ``load_model`` knows."""
    return names("model")


@cache
def load_model(name: str) -> ModelSpec:
    """A model by name or by the path of a YAML file.

    Raises:
        ProfileError: unknown name, or a file with a missing, unknown or impossible value.
    """
    section = read("model", name)
    section.provenance()
    section.text("note", "")
    values = {
        "name": stem(name),
        "title": section.text("title"),
        "hidden_size": section.integer("hidden_size"),
        "layers": section.integer("layers"),
        "heads": section.integer("heads"),
        "kv_heads": section.integer("kv_heads"),
        "head_dim": section.integer("head_dim"),
        "ffn_size": section.integer("ffn_size"),
        "vocabulary": section.integer("vocabulary"),
        "tied_embeddings": section.flag("tied_embeddings", False),
        "qk_norm": section.flag("qk_norm", False),
        "qkv_bias": section.flag("qkv_bias", False),
        "output_bias": section.flag("output_bias", False),
        "max_context_tokens": section.integer("max_context_tokens"),
        "weight_dtype": section.choice("weight_dtype", get_args(WeightDtype), "bf16"),
        "moe": _moe(section.section("moe")) if "moe" in section else None,
        "mla": _mla(section.section("mla")) if "mla" in section else None,
        "window": _window(section.section("window")) if "window" in section else None,
    }
    section.close()
    return build(ModelSpec, section, values)


def _moe(section: Section) -> Moe:
    keys = ("experts", "active_experts", "shared_experts", "expert_ffn_size", "dense_layers")
    values: dict[str, int] = {key: section.integer(key) for key in keys}
    values["expert_bias"] = section.flag("expert_bias", False)
    section.close()
    return build(Moe, section, values)


def _mla(section: Section) -> Mla:
    keys = ("kv_rank", "q_rank", "rope_dim", "nope_dim", "value_dim")
    values = {key: section.integer(key) for key in keys}
    section.close()
    return build(Mla, section, values)


def _window(section: Section) -> Window:
    values = {key: section.integer(key) for key in ("tokens", "layers")}
    section.close()
    return build(Window, section, values)
