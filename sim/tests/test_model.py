"""Model sizes against the totals that their makers advertise."""

from __future__ import annotations

from pathlib import Path

import pytest

from sim.model import ProfileError, load_model, models

# name: parameters and active parameters in 1e9 (advertised), weights in GB (native type),
# KV bytes per token of full layers in two bytes
EXPECTED = {
    "qwen3_0_6b": (0.6, 0.6, 1.19, 114688),
    "qwen3_4b": (4.0, 4.0, 8.04, 147456),
    "qwen3_8b": (8.2, 8.2, 16.38, 147456),
    "qwen3_14b": (14.8, 14.8, 29.54, 163840),
    "qwen3_32b": (32.8, 32.8, 65.52, 262144),
    "qwen3_30b_a3b": (30.5, 3.3, 61.06, 98304),
    "qwen3_235b_a22b": (235.0, 22.0, 470.19, 192512),
    "llama3_8b": (8.0, 8.0, 16.06, 131072),
    "llama3_70b": (70.6, 70.6, 141.11, 327680),
    "llama2_7b": (6.7, 6.7, 13.48, 524288),
    "llama2_70b": (69.0, 69.0, 137.95, 327680),
    "mixtral_8x7b": (46.7, 12.9, 93.41, 131072),
    "deepseek_v3": (671.0, 37.0, 673.04, 70272),
    "kimi_k2": (1026.0, 32.0, 1029.01, 70272),  # advertised as "1T"
    "glm4_5": (355.0, 32.0, 705.60, 376832),
    "glm4_5_air": (106.0, 12.0, 213.70, 188416),
    "gpt_oss_20b": (20.9, 3.6, 13.75, 24576),
    "gpt_oss_120b": (116.8, 5.1, 65.19, 36864),
}


def test_the_table_above_covers_every_model() -> None:
    assert set(EXPECTED) == set(models())


@pytest.mark.parametrize("name", EXPECTED)
def test_sizes_match_the_advertised_totals(name: str) -> None:
    model = load_model(name)
    params, _, weights, kv = EXPECTED[name]
    assert model.params / 1e9 == pytest.approx(params, rel=0.015)
    assert model.weight_bytes / 1e9 == pytest.approx(weights, rel=0.015)
    assert model.kv_bytes_per_token() == kv


@pytest.mark.parametrize("name", [n for n in EXPECTED if n not in {"gpt_oss_20b", "gpt_oss_120b"}])
def test_active_parameters_match_the_advertised_ones(name: str) -> None:
    # GLM-4.5-Air counts its embedding twice and says 12; gpt-oss leaves embeddings out.
    assert load_model(name).active_params / 1e9 == pytest.approx(EXPECTED[name][1], rel=0.13)


def test_llama_3_1_8b_by_hand() -> None:
    model = load_model("llama3_8b")
    attention = 4096 * (32 + 2 * 8 + 32) * 128
    layer = attention + 3 * 4096 * 14336 + 2 * 4096
    assert model.params == 32 * layer + 4096 + 2 * 128256 * 4096
    matrices = 32 * (attention + 3 * 4096 * 14336)
    assert model.matmul_flops(10, 2) == 2 * (10 * matrices + 2 * 128256 * 4096)
    assert model.attention_flops(1000) == 4 * 32 * 32 * 128 * 1000
    assert model.kv_bytes_per_token() == 2 * 32 * 8 * 128 * 2


def test_heads_are_split_over_ranks_and_then_copied() -> None:
    model = load_model("llama3_8b")
    assert [model.kv_bytes_per_token(tp) for tp in (1, 2, 8, 16)] == [131072, 65536, 16384, 16384]


def test_latent_attention_is_on_every_tensor_parallel_rank() -> None:
    model = load_model("deepseek_v3")
    assert model.kv_bytes_per_token(8) == model.kv_bytes_per_token(1) == 61 * (512 + 64) * 2


def test_window_layers_are_counted_per_sequence_and_not_per_token() -> None:
    model = load_model("gpt_oss_20b")
    assert model.kv_bytes_per_token() == 12 * 2 * 8 * 64 * 2
    assert model.kv_bytes_per_sequence() == 128 * 12 * 2 * 8 * 64 * 2
    assert load_model("llama3_8b").kv_bytes_per_sequence() == 0


def test_pipeline_stages_hold_their_share_of_layers() -> None:
    model = load_model("llama3_70b")
    assert model.kv_bytes_per_token(1, 4) * 4 == model.kv_bytes_per_token()
    assert model.weight_bytes / 4 < model.weight_bytes_per_rank(1, 4) < model.weight_bytes / 3


def test_experts_are_spread_over_expert_ranks() -> None:
    model = load_model("qwen3_235b_a22b")
    assert model.weight_bytes_per_rank(4, 1, 8) < model.weight_bytes_per_rank(4, 1, 1)
    assert model.weight_bytes_per_rank(8, 1, 8) == model.weight_bytes_per_rank(8, 1, 1)


@pytest.mark.parametrize("name", models())
def test_more_ranks_never_need_more_memory_each(name: str) -> None:
    model = load_model(name)
    weights = [model.weight_bytes_per_rank(tp) for tp in (1, 2, 4, 8, 16)]
    assert weights == sorted(weights, reverse=True)
    cache = [model.kv_bytes_per_token(tp) for tp in (1, 2, 4, 8, 16)]
    assert cache == sorted(cache, reverse=True)
    stages = [model.weight_bytes_per_rank(1, pp) for pp in (1, 2, 4, 8)]
    assert stages == sorted(stages, reverse=True)


def test_unknown_models_bring_the_nearest_one() -> None:
    with pytest.raises(ProfileError, match=r"no model 'lama3_8b'; did you mean 'llama3_8b'\?"):
        load_model("lama3_8b")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("extends: llama3_8b\nhiden_size: 1\n", r"hiden_size: unknown key; did you mean 'hidden_s"),
        ("extends: llama3_8b\nkv_heads: 5\n", r"kv_heads: 5 do not divide 32 heads"),
        ("extends: llama3_8b\nweight_dtype: fp9\n", r"weight_dtype: unknown value 'fp9'"),
        ("extends: llama3_8b\nmoe: {experts: 8}\n", r"moe.active_experts: missing"),
        ("title: x\n", r"hidden_size: missing"),
    ],
)
def test_bad_model_files_are_named_with_their_key(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ProfileError, match=rf"mine\.yaml: {message}"):
        load_model(str(path))
