"""Hit counts of published traces, through the whole engine, against numbers found without it.

The expected LRU hits come from a Mattson stack-distance analysis of the traces' block ids
(requests one at a time in file order, end of a prompt evicted before its beginning), those of an
infinite cache from counting distinct ids.
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from policies.registry import policy_set
from sim.backend import Deployment
from sim.latency import AffineStepModel
from sim.simulator import Simulator
from traces import Trace, read

ROOT = Path(__file__).parents[2]
DATA = Path(os.environ.get("SERVELAB_DATA", ROOT.parent / "shared")) / "traces" / "mooncake"

pytestmark = [
    pytest.mark.data,
    pytest.mark.slow,
    pytest.mark.skipif(not DATA.is_dir(), reason=f"no public traces in {DATA}"),
]

BLOCK_TOKENS = 512
INFINITE = 1_000_000
LRU_HITS = {
    "conversation_trace": {
        1_000: 12_847,
        2_000: 15_665,
        3_000: 18_850,
        5_859: 39_258,
        10_000: 61_046,
        20_000: 83_035,
        30_000: 93_978,
        50_000: 102_290,
        97_656: 104_870,
        100_000: 104_924,
        INFINITE: 105_710,
    },
    "synthetic_trace": {
        1_000: 10_252,
        2_000: 17_839,
        3_000: 23_226,
        5_859: 37_703,
        10_000: 51_669,
        20_000: 69_686,
        30_000: 76_077,
        50_000: 77_953,
        97_656: 77_953,
        100_000: 77_953,
        INFINITE: 77_953,
    },
}
"""Hit blocks by capacity in blocks."""


@cache
def one_at_a_time(name: str) -> Trace:
    """The trace's blocks, all full, one token after them, and nothing at the same time."""
    path = DATA / f"{name}.jsonl.gz"
    if not path.exists():
        pytest.skip(f"{path} is absent")
    trace = read(path)
    columns = {
        "arrival_s": np.arange(len(trace), dtype=np.float64),
        "prompt_tokens": trace.chains.lengths * BLOCK_TOKENS + 1,
        "output_tokens": 1,
    }
    return Trace.build(name, columns, trace.chains, block_tokens=BLOCK_TOKENS)


@pytest.mark.parametrize(
    ("name", "capacity", "hits"),
    [(name, *row) for name, rows in LRU_HITS.items() for row in rows.items()],
)
def test_lru_hits_are_those_of_the_reference(name: str, capacity: int, hits: int) -> None:
    trace = one_at_a_time(name)
    deployment = Deployment.of(
        "a100_80g",
        "llama3_8b",
        block_tokens=BLOCK_TOKENS,
        # One more for vLLM's null block, one for the token behind the last full block.
        num_gpu_blocks=capacity + 2,
        max_model_len=200_000,
        max_num_batched_tokens=200_000,
    )
    simulator = Simulator(deployment, step_model=AffineStepModel(10**9, 0, 0, 0, 0))
    requests = simulator.serve(trace, policy_set(eviction="lru")).requests
    assert (requests["state"] == "finished").all()
    assert int(requests["cached_tokens"].sum()) == hits * BLOCK_TOKENS
