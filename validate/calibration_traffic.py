"""Requests that make an engine compute every kind of step, so that step times can be fitted."""

from __future__ import annotations

from math import log
from typing import Any

import numpy as np

from sim.scheduler import EngineLimits
from traces import Chains, Trace
from validate.calibrate import CalibrationError

__all__ = ["calibration_trace"]

PAUSE_S = 0.05
"""Mean time between an answer and the session's next request."""


def calibration_trace(
    limits: EngineLimits,
    seed: int,
    *,
    requests: int = 120,
    longest_tokens: int = 1024,
    most_running: int = 16,
) -> Trace:
    """Requests whose steps cover what an engine can be asked to compute.

    ``most_running`` sessions begin at once and each sends its next request soon after the last one
    is answered, so the traffic adapts to any engine. They have between one and many turns, so the
    number of decodes falls from ``most_running`` to one while it runs; the last session ends with
    prompts that find the engine idle, as most do at low load: such steps take longer. In every
    second session a turn continues the one before, which gives short chunks behind long contexts.

    Args:
        limits: of the engine; prompts stay within its context length.
        seed: of all lengths.
        requests: about how many.
        longest_tokens: of a prompt.
        most_running: sessions.
    """
    rng = np.random.default_rng([seed, 8641])
    size = limits.block_tokens
    longest = min(longest_tokens, (limits.max_model_len or longest_tokens + 128) - 128)
    if longest < 16:
        raise CalibrationError(f"max_model_len={limits.max_model_len}: calibration needs 144")
    seats = min(most_running, limits.max_num_seqs)
    shares = np.arange(1, seats + 1)
    turns = np.maximum(np.rint(requests * shares / shares.sum()), 1).astype(int)
    columns: dict[str, list[Any]] = {
        name: [] for name in ("prompt_tokens", "output_tokens", "session", "turn", "think_s")
    }
    chains: list[list[int]] = []
    unused = 0

    def add(session: int, turn: int, prompt: int, output: int, chain: list[int]) -> None:
        pause_s = float(rng.exponential(PAUSE_S)) if turn else 0.0
        values = (prompt, output, f"calibration-{session}", turn, pause_s)
        for column, value in zip(columns.values(), values, strict=True):
            column.append(value)
        chains.append(chain)

    def fresh(blocks: int) -> list[int]:
        nonlocal unused
        unused += blocks
        return list(range(unused - blocks, unused))

    for session in range(seats):
        prompt = 0
        chain: list[int] = []
        for turn in range(turns[session]):
            # Lengths are spread evenly over their orders of magnitude.
            more = int(np.exp(rng.uniform(log(8), log(longest))))
            output = int(np.exp(rng.uniform(log(8), log(160))))
            if session % 2 == 0 or prompt + more > longest:
                prompt, chain = 0, []
            prompt += more
            chain = chain + fresh(prompt // size - len(chain))
            add(session, turn, prompt, output, chain)
    alone = np.unique(np.geomspace(8, longest, 12).astype(int))
    for i, prompt in enumerate(np.repeat(alone, 2).tolist()):
        add(seats - 1, int(turns[-1]) + i, prompt, 8, fresh(prompt // size))
    return Trace.build(
        "calibration",
        {"arrival_s": 0.0, **columns},
        Chains.from_lists(chains),
        block_tokens=size,
        synthetic="everything",
        notes=("sessions send their next request soon after the last one is answered",),
    )
