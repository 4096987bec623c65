"""Which prefixes an engine has cached, learnt from the KV events that it publishes.

Blocks are known by what is in them and before them (a chained digest of token ids), so one
request can be compared with engines that hash differently.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import Any

__all__ = ["PrefixIndex", "chain"]

DIGEST_BYTES = 16


def chain(
    tokens: Sequence[int],
    block_tokens: int,
    parent: bytes = b"",
    extra_keys: Sequence[Sequence[object] | None] = (),
) -> list[bytes]:
    """Digests of the full blocks of a prompt, each one of its block and all before it.

    Args:
        tokens: ids, the first one at a block boundary.
        block_tokens: tokens per block.
        parent: digest of the block before the first one; empty at the start of a prompt.
        extra_keys: per block what else its content depends on (a cache salt, a LoRA adapter, an
            image), as vLLM publishes it; nothing for blocks that are not named.
    """
    ids = array("q", tokens)
    digests = []
    for block in range(len(ids) // block_tokens):
        digest = blake2b(parent, digest_size=DIGEST_BYTES)
        digest.update(ids[block * block_tokens : (block + 1) * block_tokens])
        extra = extra_keys[block] if block < len(extra_keys) else None
        if extra:
            digest.update(repr(list(extra)).encode())
        parent = digest.digest()
        digests.append(parent)
    return digests


class PrefixIndex:
    """The cached blocks of one engine.

    It follows vLLM's events (``distributed/kv_events.py``): ``BlockStored`` comes once per copy
    of a block, ``BlockRemoved`` once per evicted copy. A block whose predecessor is unknown (it
    was cached before the index began) is left out, so what is found is a lower bound. Only the
    KV cache itself and its first group count: no offloading tiers, no hybrid models.
    """

    def __init__(self) -> None:
        self.block_tokens = 0
        """Tokens per block; 0 until the first block is stored."""
        self._digests: dict[bytes | int, bytes] = {}
        self._copies: dict[bytes, int] = {}

    def __len__(self) -> int:
        """Different blocks."""
        return len(self._copies)

    def clear(self) -> None:
        """Forget everything."""
        self._digests.clear()
        self._copies.clear()

    def apply(self, event: Mapping[str, Any]) -> None:
        """Take in one event, as decoded from MessagePack.

        Raises:
            ValueError: the event is of an unknown type.
            KeyError: a field is missing.
        """
        kind = event["type"]
        if kind == "AllBlocksCleared":
            self.clear()
            return
        if kind not in {"BlockStored", "BlockRemoved"}:
            raise ValueError(f"KV event of unknown type {kind!r}")
        if event.get("medium") not in {None, "GPU"} or event.get("group_idx"):
            return
        if kind == "BlockStored":
            self._store(event)
        else:
            self._remove(event["block_hashes"])

    def matched_blocks(self, digests: Sequence[bytes]) -> int:
        """How many leading blocks are cached."""
        for count, digest in enumerate(digests):
            if digest not in self._copies:
                return count
        return len(digests)

    def _store(self, event: Mapping[str, Any]) -> None:
        parent = event["parent_block_hash"]
        above = b"" if parent is None else self._digests.get(parent)
        if above is None:
            return
        size = event["block_size"]
        if self.block_tokens not in {0, size}:
            self.clear()
        self.block_tokens = size
        # A reuse policy may keep only the first blocks: then there are fewer hashes than blocks.
        digests = chain(event["token_ids"], size, above, event.get("extra_keys") or ())
        for name, digest in zip(event["block_hashes"], digests, strict=False):
            self._digests[name] = digest
            self._copies[digest] = self._copies.get(digest, 0) + 1

    def _remove(self, names: Sequence[bytes | int]) -> None:
        for name in names:
            digest = self._digests.get(name)
            if digest is None:
                continue
            left = self._copies[digest] - 1
            if left:
                self._copies[digest] = left
            else:
                del self._copies[digest], self._digests[name]
