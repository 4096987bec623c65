"""Writes the bundled demo trace: ``python -m traces.make_demo``.

The trace is all synthetic: five minutes of chats with shared system prompts and three SLO classes.
The same program gives the same file.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from traces.native import write
from traces.schema import Trace
from traces.synthetic import chat

__all__ = ["DEMO_PATH", "demo_chat"]

DEMO_PATH = Path(__file__).parent / "data" / "demo_chat.jsonl.gz"
"""Where the demo trace lies."""

_CLASSES = (
    {"name": "interactive", "share": 0.5, "ttft_s": 0.5, "tpot_s": 0.05, "priority": 0},
    {"name": "standard", "share": 0.3, "ttft_s": 2.0, "tpot_s": 0.1, "priority": 1},
    {"name": "batch", "share": 0.2, "ttft_s": 20.0, "tpot_s": 0.5, "priority": 2},
)


def demo_chat() -> Trace:
    """About 2,400 requests of 5 minutes."""
    trace = chat(
        sessions=630,
        session_rate_per_s=2.1,
        turns_mean=4.5,
        user_mean=175.0,
        output_mean=180.0,
        output_max=1500,
        system_prompts=8,
        system_min=512,
        system_max=3000,
        system_zipf=0.8,
        think_mean_s=12.0,
        block_tokens=16,
        classes=_CLASSES,
        seed=1,
        name="demo_chat",
    )
    return replace(trace.between(0.0, 300.0), name="demo_chat")


if __name__ == "__main__":
    write(demo_chat(), DEMO_PATH)
    print(f"wrote {DEMO_PATH}")
