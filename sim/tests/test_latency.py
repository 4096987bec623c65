"""Step times: exact laws in picoseconds, bounds nobody can beat, and a hand-worked table."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sim.hardware import ProfileError, chips, load_chip
from sim.latency import (
    UNLIMITED_STEPS,
    AffineStepModel,
    Batch,
    ParametricStepModel,
    StepModel,
    StepOptions,
    kv_capacity_blocks,
)
from sim.model import load_model, models

EAGER = StepOptions(graph_max_tokens=0, launch_s_per_layer=0.4e-3, launch_s_per_sequence=2e-6)
CASES = {
    "llama on a100": ("a100_80g", "llama3_8b", 1, 1, 1, None),
    "llama on 4090": ("rtx4090", "llama3_8b", 1, 1, 1, None),
    "llama on pro 6000, tp 2": ("rtx_pro_6000", "llama3_8b", 2, 1, 1, None),
    "qwen on 910b, tp 4": ("ascend_910b", "qwen3_32b", 4, 1, 1, None),
    "llama 70b on h100, tp 2 pp 2": ("h100", "llama3_70b", 2, 2, 1, None),
    "qwen moe on h20, tp 4 ep 8": ("h20", "qwen3_235b_a22b", 4, 1, 8, None),
    "latent attention on h200": ("h200", "deepseek_v3", 8, 1, 8, None),
    "windows on h100": ("h100", "gpt_oss_120b", 1, 1, 1, None),
    "eager on a100": ("a100_80g", "llama3_8b", 1, 1, 1, EAGER),
    "eager windows on l40s": ("l40s", "gpt_oss_20b", 1, 1, 1, EAGER),
    "no skew on h100": ("h100", "llama3_8b", 1, 1, 1, StepOptions(skew=False)),
}


@cache
def model_of(case: str) -> ParametricStepModel:
    chip, model, tp, pp, ep, options = CASES[case]
    return ParametricStepModel(load_chip(chip), load_model(model), tp, pp, ep, options=options)


cases = st.sampled_from(sorted(CASES))
chunks = st.tuples(st.integers(1, 4096), st.integers(0, 20000))


@st.composite
def batches(draw: st.DrawFn, least_prefills: int = 0) -> Batch:
    prefills = tuple(draw(st.lists(chunks, min_size=least_prefills, max_size=3)))
    contexts = draw(st.lists(st.integers(1, 20000), min_size=0 if prefills else 1, max_size=5))
    repeat = draw(st.integers(1, 60))
    return Batch(prefills, len(contexts) * repeat, sum(contexts) * repeat, max(contexts, default=0))


# ------------------------------------------------------------------ laws of runs


@given(case=cases, decodes=st.integers(1, 700), each=st.integers(1, 300), data=st.data())
@settings(deadline=None)
def test_every_step_of_a_run_costs_exactly_what_the_run_says(
    case: str, decodes: int, each: int, data: st.DataObject
) -> None:
    model = model_of(case)
    context = decodes * each + data.draw(st.integers(0, decodes))
    first, slope, steps = model.decode_run(decodes, context)
    assert steps >= 1
    far = min(steps - 1, 100_000)
    for j in {0, min(1, far), far, data.draw(st.integers(0, far))}:
        step = Batch((), decodes, context + j * decodes, data.draw(st.integers(0, 10**6)))
        assert model.step_ps(step) == first + j * slope
        assert model.decode_run(decodes, context + j * decodes)[:2] == (first + j * slope, slope)


def test_a_run_ends_at_the_window_and_goes_on_flatter() -> None:
    model = model_of("windows on h100")
    first, slope, steps = model.decode_run(4, 4 * 100)
    assert steps == 28  # contexts of 100, 101, ... 127; from 128 on the window is full
    _, later, rest = model.decode_run(4, 4 * 128)
    assert (slope, rest) == (2 * later, UNLIMITED_STEPS)
    assert model.step_ps(Batch((), 4, 4 * 128, 128)) == first + 28 * slope


def test_a_cpu_floor_is_flat_until_the_gpu_catches_up() -> None:
    model = model_of("eager on a100")
    floor, slope, steps = model.decode_run(8, 8 * 10)
    assert slope == 0
    assert 1 < steps < UNLIMITED_STEPS
    assert model.step_ps(Batch((), 8, 8 * (10 + steps - 1), 0)) == floor
    assert model.step_ps(Batch((), 8, 8 * (10 + steps), 0)) > floor
    assert floor == round(1e12 * (32 * 0.4e-3 + 8 * 2e-6)) + round(1e12 * 0.5e-3)


def test_a_fitted_least_context_holds_for_very_short_ones() -> None:
    model = model_of("llama on pro 6000, tp 2")
    assert model.decode_run(10, 10).slope_ps == 0
    assert model.decode_run(10, 10).steps == 7  # 75 KV tokens are charged at least
    assert model.decode_run(10, 75).slope_ps > 0


# ------------------------------------------------------------------ laws of single steps


@given(case=cases, batch=batches(), data=st.data())
@settings(deadline=None)
def test_more_work_is_never_cheaper(case: str, batch: Batch, data: st.DataObject) -> None:
    model = model_of(case)
    before = model.step_ps(batch)
    prefills, decodes, context, longest = batch
    more = data.draw(st.integers(1, 600))
    grown = [
        Batch((*prefills, (more, 0)), decodes, context, longest),
        Batch(prefills, decodes + more, context + more, max(longest, 1)),
    ]
    if decodes:
        grown.append(Batch(prefills, decodes, context + more, max(longest, context // decodes)))
        grown.append(Batch(prefills, decodes, context, longest + more))
    if prefills:
        (new, old), *others = prefills
        grown.append(Batch(((new + more, old), *others), decodes, context, longest))
        grown.append(Batch(((new, old + more), *others), decodes, context, longest))
    for batch_after in grown:
        assert model.step_ps(batch_after) >= before


@given(case=cases, batch=batches(least_prefills=2))
@settings(deadline=None)
def test_the_order_of_prompts_does_not_matter(case: str, batch: Batch) -> None:
    model = model_of(case)
    assert model.step_ps(batch) == model.step_ps(batch._replace(prefills=batch.prefills[::-1]))


@given(case=cases, batch=batches())
@settings(deadline=None)
def test_the_parts_of_a_step_sum_to_it(case: str, batch: Batch) -> None:
    model = model_of(case)
    parts = model.explain(batch)
    assert min(parts.values()) >= 0
    # decode context is charged in whole picoseconds per token
    slack = 1e-12 * (5 + batch.decode_context_tokens)
    assert sum(parts.values()) == pytest.approx(model.step_ps(batch) / 1e12, abs=slack)


@given(batch=batches())
def test_the_longest_decode_is_not_read_when_it_does_not_matter(batch: Batch) -> None:
    model = model_of("no skew on h100")
    assert not model.longest_matters
    assert model.step_ps(batch) == model.step_ps(batch._replace(longest_decode_tokens=10**6))


@given(batch=batches())
@settings(deadline=None)
def test_a_fresh_model_and_a_warm_one_agree(batch: Batch) -> None:
    fresh = ParametricStepModel(load_chip("a100_80g"), load_model("llama3_8b"))
    assert fresh.step_ps(batch) == model_of("llama on a100").step_ps(batch)


def test_empty_steps_are_refused() -> None:
    for model in (model_of("llama on a100"), AffineStepModel(1, 1, 1, 1, 1)):
        with pytest.raises(ValueError, match="at least one token"):
            model.step_ps(Batch((), 0, 0, 0))
        with pytest.raises(ValueError, match="at least one token"):
            model.decode_run(0, 0)
    with pytest.raises(ValueError, match="context_tokens must not be negative"):
        model_of("windows on h100").decode_run(1, -1)


# ------------------------------------------------------------------ bounds


@pytest.mark.parametrize("chip_name", chips())
def test_no_step_beats_the_roofline(chip_name: str) -> None:
    for model_name in models():
        for batch in (
            Batch((), 1, 500, 500),
            Batch((), 256, 256 * 2000, 4000),
            Batch(((2048, 0),), 0, 0, 0),
            Batch(((512, 8192),), 64, 64 * 1000, 3000),
        ):
            seconds = (
                ParametricStepModel(load_chip(chip_name), load_model(model_name)).step_ps(batch)
                / 1e12
            )
            assert seconds >= roofline_s(chip_name, model_name, batch), (model_name, batch)


def roofline_s(chip_name: str, model_name: str, batch: Batch) -> float:
    """The larger of operations over peak and bytes that must be read over bandwidth."""
    chip, model = load_chip(chip_name), load_model(model_name)
    tokens = batch.decodes + sum(new for new, _ in batch.prefills)
    sequences = batch.decodes + len(batch.prefills)
    pairs = batch.decode_context_tokens
    pairs += sum(new * (old + new // 2) for new, old in batch.prefills)
    flops = model.matmul_flops(tokens, sequences) + model.attention_flops(pairs)
    peak = max(chip.bf16_flops, (chip.fp8_flops or 0) if model.weight_dtype == "fp8" else 0)
    read = float(model.weight_bytes)
    if not model.tied_embeddings:  # of the embedding only a few rows are read
        read -= 2 * model.vocabulary * model.hidden_size
    if model.moe is not None:  # one token's experts are read at least
        idle = 1 - model.moe.active_experts / model.moe.experts
        read -= idle * model.moe_layers * model.expert_params * model.expert_bytes
        # routers and biases are part of the fixed cost of the experts
        read -= model.moe_layers * model.moe.experts * model.hidden_size * 5
        read -= model.moe_layers * model.moe.experts * model.moe.expert_ffn_size * 4
    read *= 0.999  # norms and biases
    read += batch.decode_context_tokens * model.kv_bytes_per_token()
    return max(flops / peak, read / chip.memory_bytes_per_s)


@pytest.mark.parametrize(
    ("chip", "decode_ms", "prefill_ms"),
    [
        # Weights of 15.0 GB (without the embedding) at 82 % of 2.04 TB/s: 9.0 ms; 32 layers x
        # (4 products of 5 us, attention 20 us, 4 small kernels of 3 us): 1.6 ms; knee, head,
        # gaps and host: 1.3 ms. Prefill: 2 x 7.0e9 x 2048 operations at 73 % of 312e12: 125 ms,
        # tiles 2, attention 8, small kernels 11, gaps and host 5.
        ("a100_80g", (11.0, 12.5), (148, 156)),
        # 15.0 GB at 90 % of 3.35 TB/s: 5.0 ms; 32 x (4 x 4.7 + 12 + 4 x 2.2): 1.3 ms.
        ("h100", (6.5, 7.5), (48, 58)),
        # 15.0 GB at 94 % of 1.008 TB/s: 15.8 ms; 32 x (4 x 5.1 + 12 + 4 x 2.3): 1.3 ms.
        ("rtx4090", (17.5, 19.0), (195, 215)),
    ],
)
def test_llama_8b_takes_what_it_takes_by_hand(
    chip: str, decode_ms: tuple[float, float], prefill_ms: tuple[float, float]
) -> None:
    model = ParametricStepModel(load_chip(chip), load_model("llama3_8b"))
    low, high = decode_ms
    assert low < model.step_ps(Batch((), 1, 512, 512)) / 1e9 < high
    low, high = prefill_ms
    assert low < model.prefill_ps(2048) / 1e9 < high


def test_tensor_parallelism_over_a_mesh_pair_pays_for_its_thin_link() -> None:
    mesh, switch = load_chip("ascend_910b"), load_chip("a800_80g")
    model = load_model("qwen3_32b")
    prompt = Batch(((4096, 0),), 0, 0, 0)
    mesh_s = ParametricStepModel(mesh, model, 2).explain(prompt)["collectives"]
    switch_s = ParametricStepModel(switch, model, 2).explain(prompt)["collectives"]
    assert 7 < mesh_s / switch_s < 8.5  # 18 against 143 GB/s


def test_pipeline_stages_only_add_hops() -> None:
    chip, model = load_chip("h100"), load_model("llama3_70b")
    batch = Batch(((1000, 0),), 10, 10_000, 2000)
    one = ParametricStepModel(chip, model, 2, 1).explain(batch)
    two = ParametricStepModel(chip, model, 2, 2).explain(batch)
    assert one.pop("pipeline") == 0 < two.pop("pipeline")
    assert {k: v for k, v in one.items() if k != "kernel_gaps"} == {
        k: v for k, v in two.items() if k != "kernel_gaps"
    }


def test_a_decode_beside_a_prompt_pays_per_query_head() -> None:
    model = model_of("llama on pro 6000, tp 2")
    prompt = ((256, 0),)
    alone = model.decode_run(64, 64 * 2000).slope_ps
    short = model.step_ps(Batch(prompt, 64, 64 * 2000, 2100))
    mixed = model.step_ps(Batch(prompt, 64, 64 * 2001, 2100)) - short
    assert 1.3 < mixed / alone < 2.2


@pytest.mark.parametrize("chip", ["a100_80g", "h100"])
def test_fp8_weights_nearly_halve_the_products_of_a_decode(chip: str) -> None:
    full = load_model("llama3_8b")
    half = replace(full, weight_dtype="fp8")
    batch = Batch((), 1, 500, 500)
    seconds = [
        ParametricStepModel(load_chip(chip), model).explain(batch)["gemm"] for model in (half, full)
    ]
    assert 0.5 < seconds[0] / seconds[1] < 0.68


def test_spreading_experts_wider_trades_weight_reading_for_messages() -> None:
    chip, model = load_chip("mi300x"), load_model("deepseek_v3")
    batch = Batch((), 64, 64_000, 1000)
    near = ParametricStepModel(chip, model, 8, 1, 8).explain(batch)
    wide = ParametricStepModel(chip, model, 8, 1, 16).explain(batch)
    assert wide["moe"] < near["moe"]
    assert wide["collectives"] > near["collectives"]


# ------------------------------------------------------------------ affine


@given(
    st.tuples(st.integers(1, 10**10), *[st.integers(0, 10**6)] * 5),
    batches(),
    st.integers(0, 1000),
)
def test_the_affine_model_is_affine(c: tuple[int, ...], batch: Batch, j: int) -> None:
    model: StepModel = AffineStepModel(*c)
    prompt = sum(new for new, _ in batch.prefills)
    area = sum((old + new) ** 2 - old**2 for new, old in batch.prefills)
    decode = c[2] * batch.decodes + c[3] * batch.decode_context_tokens
    prefill = c[1] * prompt + c[4] * area + c[5] * len(batch.prefills)
    assert model.step_ps(batch) == c[0] + prefill + decode
    decodes, context = batch.decodes + 1, batch.decode_context_tokens + 1
    run = model.decode_run(decodes, context)
    later = Batch((), decodes, context + j * decodes, 0)
    assert model.step_ps(later) == run.first_ps + j * run.slope_ps
    assert run.steps == UNLIMITED_STEPS


def test_the_affine_model_refuses_negative_coefficients() -> None:
    with pytest.raises(ValueError, match="c0 must be positive"):
        AffineStepModel(0, 1, 1, 1, 1)


# ------------------------------------------------------------------ memory


def test_blocks_of_llama_on_an_a100_by_hand() -> None:
    left = 80 * 2**30 * 0.9 - 16.06e9 - 3.5e9
    blocks = kv_capacity_blocks(load_chip("a100_80g"), load_model("llama3_8b"))
    assert blocks == pytest.approx(left / (16 * 131072), rel=1e-3)


def test_more_tensor_parallelism_never_leaves_fewer_blocks() -> None:
    for name in ("llama3_8b", "qwen3_32b", "gpt_oss_120b"):
        blocks = [
            kv_capacity_blocks(load_chip("h200"), load_model(name), tp, sequences=64)
            for tp in (1, 2, 4, 8)
        ]
        assert blocks == sorted(blocks)


def test_windows_take_their_share_for_every_sequence() -> None:
    chip, model = load_chip("h100"), load_model("gpt_oss_20b")
    few = kv_capacity_blocks(chip, model, sequences=1)
    many = kv_capacity_blocks(chip, model, sequences=257)
    lost = 256 * model.kv_bytes_per_sequence() / (16 * model.kv_bytes_per_token())
    assert few - many == pytest.approx(lost, abs=1)


def test_a_model_that_does_not_fit_names_what_is_missing_and_what_would_do() -> None:
    message = r"llama3_70b does not fit on a100_80g with tp 1.*6\d\.\d GB are missing.*tp 2 would"
    with pytest.raises(ProfileError, match=message):
        kv_capacity_blocks(load_chip("a100_80g"), load_model("llama3_70b"))
    with pytest.raises(ProfileError, match=r"kimi_k2 does not fit.*no tp inside one node would"):
        kv_capacity_blocks(load_chip("h100"), load_model("kimi_k2"), 8)


def test_the_advice_respects_heads() -> None:
    # 96 heads and 8 KV heads: tp 3 and 6 would split the heads, but not the KV heads.
    with pytest.raises(ProfileError, match=r"tp 4 would do"):
        kv_capacity_blocks(load_chip("h100"), load_model("glm4_5_air"), 2)


@pytest.mark.parametrize(
    ("model", "tp", "pp", "ep", "message"),
    [
        ("llama3_8b", 3, 1, 1, "tp 3 does not divide 32 attention heads"),
        ("glm4_5", 6, 1, 1, "tp 6 and 8 KV heads: neither divides the other"),
        ("llama3_8b", 1, 33, 1, "pp 33 is more than 32 layers"),
        ("llama3_8b", 1, 1, 8, "ep 8, but the model has no routed experts"),
        ("mixtral_8x7b", 1, 1, 16, "ep 16 does not divide 8 experts"),
        ("mixtral_8x7b", 4, 1, 6, "ep: 6 is no multiple of tp 4"),
        ("mixtral_8x7b", 0, 1, 1, "tp: must be positive, got 0"),
    ],
)
def test_impossible_layouts_are_refused(
    model: str, tp: int, pp: int, ep: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        ParametricStepModel(load_chip("h100"), load_model(model), tp, pp, ep)
