"""Prompts for a trace: token ids that share exactly the blocks whose ids the trace shares.

A block's tokens are a one-to-one image of its 63-bit id, so two prompts agree in a full block
exactly where the trace says so. What the trace does not know (the rest of a prompt) is named by
the request, and therefore shared with nobody.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from sim.request import PRIVATE_BITS
from traces import Trace

__all__ = ["PromptError", "Prompts", "ordinary"]

Words = NDArray[np.uint64]
PRIVATE = np.uint64(1) << np.uint64(63)
"""Set in the names of blocks that the trace does not know; its own ids are below."""
STRIDE = np.uint64(0x9E3779B97F4A7C15)


class PromptError(ValueError):
    """Block ids that cannot be told apart in so few tokens."""


class Prompts(Sequence[NDArray[np.int64]]):
    """The prompt of each request of a trace, made when it is asked for.

    Args:
        trace: whose prompts.
        block_tokens: the engine's block size.
        vocabulary: token ids that may occur, for example ``ordinary(...)``.
        seed: of what is shared with nobody; the blocks of the trace do not depend on it.

    Raises:
        PromptError: the vocabulary is too small for blocks of this size.
        TraceError: the block size does not fit the trace's.
    """

    def __init__(self, trace: Trace, block_tokens: int, vocabulary: range, seed: int = 0) -> None:
        self._digits = _digits(len(vocabulary))
        if vocabulary.step != 1 or len(vocabulary) < 2 or self._digits > block_tokens:
            raise PromptError(
                f"blocks of {block_tokens} tokens out of {len(vocabulary)} cannot name 2^64 "
                f"blocks; larger blocks or a larger vocabulary are needed"
            )
        self._chains = trace.recoded(block_tokens, full_blocks_only=True)
        self._lengths: NDArray[np.int64] = trace.requests["prompt_tokens"].to_numpy()
        self._block_tokens = block_tokens
        self._vocabulary = vocabulary
        self._salt = _mixed(np.array([seed % (1 << 64)], dtype=np.uint64)) & ~PRIVATE

    def __len__(self) -> int:
        return len(self._lengths)

    def __getitem__(self, row: int) -> NDArray[np.int64]:  # type: ignore[override]
        """Token ids of one prompt."""
        length = int(self._lengths[row])
        known = self._chains.blocks(row).astype(np.uint64)
        unknown = np.arange(-(-length // self._block_tokens) - len(known), dtype=np.uint64)
        # One to one within the private half, because only bits below the top one are changed.
        private = (np.uint64(row) << np.uint64(PRIVATE_BITS)) + unknown
        names = np.concatenate((known, (private ^ self._salt) | PRIVATE))
        return self._tokens(_mixed(names)).reshape(-1)[:length]

    def _tokens(self, mixed: Words) -> NDArray[np.int64]:
        """The blocks' tokens: first the digits of the name, then noise that depends on it."""
        table = np.empty((len(mixed), self._block_tokens), dtype=np.uint64)
        base = np.uint64(len(self._vocabulary))
        rest = mixed.copy()
        for column in range(self._digits):
            table[:, column] = rest % base
            rest //= base
        columns = np.arange(self._digits, self._block_tokens, dtype=np.uint64)
        table[:, self._digits :] = _mixed(mixed[:, None] + STRIDE * columns) % base
        return table.astype(np.int64) + self._vocabulary.start


def ordinary(vocabulary_tokens: int, special: Iterable[int]) -> range:
    """The longest range of token ids below ``vocabulary_tokens`` without a special one."""
    marks = sorted({-1, vocabulary_tokens, *(i for i in special if 0 <= i < vocabulary_tokens)})
    return max((range(low + 1, high) for low, high in pairwise(marks)), key=len)


@lru_cache
def _digits(base: int) -> int:
    """Digits of the largest 64-bit number."""
    digits, reach = 0, 1
    while base > 1 and reach < 1 << 64:
        digits, reach = digits + 1, reach * base
    return digits


def _mixed(words: Words) -> Words:
    """A one-to-one scramble of 64-bit words.

    Source: Steele et al., Fast Splittable Pseudorandom Number Generators, OOPSLA 2014
    (the finaliser of SplitMix64)
    """
    words = words + STRIDE
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))
