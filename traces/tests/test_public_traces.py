"""The published traces, against their published counts."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from traces import Trace, read, stats, write
from traces.schema import COLUMNS

ROOT = Path(__file__).parents[2]
DATA = Path(os.environ.get("SERVELAB_DATA", ROOT.parent / "shared")) / "traces"

pytestmark = [
    pytest.mark.data,
    pytest.mark.skipif(not DATA.is_dir(), reason=f"no public traces in {DATA}"),
]

CONVERSATION = "mooncake/conversation_trace.jsonl.gz"
SYNTHETIC = "mooncake/synthetic_trace.jsonl.gz"
CODE = "azure/AzureLLMInferenceTrace_code.csv.gz"
CONV = "azure/AzureLLMInferenceTrace_conv.csv.gz"


def load(name: str) -> Trace:
    if not (DATA / name).exists():
        pytest.skip(f"{DATA / name} is absent")
    return read(DATA / name)


@pytest.mark.parametrize(
    ("name", "requests", "prompt_tokens", "output_tokens", "span_s"),
    [
        (CONVERSATION, 12_031, 144_793_823, 4_122_048, 3536.999),
        (SYNTHETIC, 3_993, 61_194_628, 595_432, 1022.025),
        (CODE, 8_819, 18_059_974, 245_896, 3435.948056),
        (CONV, 19_366, 22_361_870, 4_088_665, 3501.721937),
    ],
)
def test_totals_are_exact(
    name: str, requests: int, prompt_tokens: int, output_tokens: int, span_s: float
) -> None:
    trace = load(name)
    assert (len(trace), trace.prompt_tokens, trace.output_tokens) == (
        requests,
        prompt_tokens,
        output_tokens,
    )
    assert trace.span_s == pytest.approx(span_s, abs=1e-9)


@pytest.mark.parametrize(
    ("name", "accesses", "distinct", "hits", "longest", "token_rate", "vllm_rate"),
    [
        (CONVERSATION, 288_500, 182_790, 105_710, 247, 0.37362, 0.37338),
        (SYNTHETIC, 121_877, 43_924, 77_953, 374, 0.65124, 0.65043),
    ],
)
def test_an_infinite_cache_hits_the_reference_number_of_blocks(
    name: str,
    *,
    accesses: int,
    distinct: int,
    hits: int,
    longest: int,
    token_rate: float,
    vllm_rate: float,
) -> None:
    described = stats(load(name))
    assert described["block_tokens"] == 512
    assert described["block_accesses"] == accesses
    assert described["distinct_blocks"] == distinct
    assert described["ideal_hit_blocks"] == hits
    assert described["longest_request_blocks"] == longest
    assert round(described["ideal_token_hit_rate"], 5) == token_rate
    assert round(described["ideal_vllm_hit_rate"], 5) == vllm_rate


@pytest.mark.parametrize(
    ("name", "rate", "cv", "iod"),
    [
        (CONVERSATION, 3.401, 3.03, (7.89, 2.09, 2.85)),
        (SYNTHETIC, 3.906, 1.011, (1.09, 1.37, 12.98)),
        (CODE, 2.566, 13.15, (13.2, 71.3, 160.5)),
        (CONV, 5.530, 1.094, (1.39, 4.00, 20.6)),
    ],
)
def test_rates_and_burstiness_match_the_reference(
    name: str, rate: float, cv: float, iod: tuple[float, float, float]
) -> None:
    described = stats(load(name))
    assert described["rate_per_s"] == pytest.approx(rate, abs=6e-4)
    assert described["arrival_cv"] == pytest.approx(cv, abs=6e-3)
    assert tuple(described["iod"].values()) == pytest.approx(iod, rel=4e-3)


def test_lengths_of_the_conversation_trace_match_the_reference() -> None:
    described = stats(load(CONVERSATION))
    assert [round(v) for v in described["prompt"].values()] == [12035, 6909, 27367, 85400, 126195]
    assert list(described["output"].values())[1:] == pytest.approx([350, 597, 1118.5, 2000])


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_dequantised_conversation_arrivals_look_like_poisson(seed: int) -> None:
    trace = load(CONVERSATION)
    assert len(np.unique(trace.requests["arrival_s"])) == 1_180
    spread = stats(trace.dequantised(3.0, seed))
    assert spread["arrival_cv"] == pytest.approx(1.01, abs=0.02)
    assert spread["iod"][1] == pytest.approx(1.05, abs=0.1)
    assert spread["ideal_hit_blocks"] == 105_710


def test_recoding_to_16_tokens_keeps_the_share_of_reused_tokens() -> None:
    trace = load(CONVERSATION)
    chains = trace.recoded(16)
    assert np.array_equal(chains.lengths, trace.requests["prompt_tokens"] // 16)
    columns = {name: trace.requests[name] for name in COLUMNS}
    fine = stats(Trace.build("fine", columns, chains, block_tokens=16))
    assert fine["ideal_token_hit_rate"] == pytest.approx(0.37362, abs=0.002)


@pytest.mark.parametrize("name", [CONVERSATION, CODE])
def test_the_native_format_keeps_public_traces_exactly(name: str, tmp_path: Path) -> None:
    trace = load(name)
    write(trace, tmp_path / "t.jsonl.gz")
    assert read(tmp_path / "t.jsonl.gz") == trace


@pytest.mark.parametrize(
    ("name", "options", "requests", "block_tokens"),
    [
        ("mooncake.jsonl", {}, 10, 512),
        ("mooncake_aiperf_session.jsonl", {}, 10, 512),
        ("gmi_lmbench_ILLUSTRATIVE.jsonl", {}, 1, 32),
        ("guidellm_trace_seconds.jsonl", {"time_unit": "s"}, 10, 0),
        ("azure_2023.csv", {}, 10, 0),
    ],
)
def test_examples_of_every_variant_are_read(
    name: str, options: dict[str, str], requests: int, block_tokens: int
) -> None:
    if not (DATA / "formats" / name).exists():
        pytest.skip(f"{name} is absent")
    trace = read(DATA / "formats" / name, **options)  # type: ignore[arg-type]
    assert (len(trace), trace.block_tokens) == (requests, block_tokens)
