"""The free list of vLLM's block pool, with an eviction policy that picks what is given up.

``BlockPool`` reaches its free blocks only through the attribute ``free_block_queue``, so the list
of one pool can be exchanged without touching any class (``v1/core/block_pool.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vllm.v1.core.kv_cache_utils import FreeKVCacheBlockQueue

from policies.api import EvictionPolicy, PolicyError
from validate.vllm_plugin.views import BlockView, EngineView, policy_name

__all__ = ["PolicyFreeQueue"]


class PolicyFreeQueue(FreeKVCacheBlockQueue):
    """Blank blocks first, as in vLLM; then whatever the policy names.

    All free blocks also stay linked in vLLM's own order. So a reset, which makes blanks of them
    all, leaves the same list as stock vLLM has, and least-recently-used order is the list itself.

    Raises:
        PolicyError: from ``popleft_n``: the policy named a block that is not evictable. The
            engine stops; its log ends with the message.
    """

    def __init__(
        self, blocks: list[Any], total: int, policy: EvictionPolicy, engine: EngineView
    ) -> None:
        """Takes over the free ``blocks`` of a pool with ``total`` blocks, none of them cached."""
        super().__init__(blocks)
        self.policy = policy
        self.views: list[BlockView | None] = [None] * total
        """What each physical block holds, by its id; out of date where a block has no hash."""
        self.idle = 0
        """How many free blocks are cached: those that the policy orders."""
        self._engine = engine
        self._batch = bool(policy.in_order)

    def append_n(self, blocks: list[Any]) -> None:
        """Cached blocks that nobody uses any more (``BlockPool.free_blocks``)."""
        super().append_n(blocks)
        views, add, now = self.views, self.policy.add, self._engine.now_s
        for block in blocks:
            view = views[block.block_id]
            assert view is not None
            view.used_s = now
            view.idle = True
            add(view, now)
        self.idle += len(blocks)

    def append(self, block: Any) -> None:
        """As ``append_n``, for one block."""
        self.append_n([block])

    def remove(self, block: Any) -> None:
        """A request hit a free block (``BlockPool.touch``)."""
        super().remove(block)
        view = self.views[block.block_id]
        assert view is not None
        self.idle -= 1
        view.idle = False
        self.policy.remove(view, self._engine.now_s)

    def popleft_n(self, n: int) -> list[Any]:
        """Blocks for new content (``BlockPool.get_new_blocks``)."""
        blank = self.num_free_blocks - self.idle
        if n <= blank:
            return list(super().popleft_n(n))
        taken: list[Any] = super().popleft_n(blank)
        wanted = n - blank
        if self._batch:
            self._evict(wanted, taken)
        else:
            for _ in range(wanted):
                self._evict(1, taken)
        return taken

    def popleft(self) -> Any:
        """As ``popleft_n``, for one block."""
        return self.popleft_n(1)[0]

    def forget(self) -> None:
        """The cache was reset: every free block is blank now."""
        now = self._engine.now_s
        for view in self.views:
            if view is not None and view.idle:
                view.idle = False
                self.policy.remove(view, now)
        self.idle = 0

    def _evict(self, count: int, taken: list[Any]) -> None:
        now = self._engine.now_s
        policy = self.policy
        victims = policy.victims(count, now)
        if not isinstance(victims, Sequence) or len(victims) < count:
            raise self._wrong(count, victims)
        unlink, forget = super().remove, policy.remove
        for view in victims[:count]:
            if type(view) is not BlockView or not view.idle:
                raise self._wrong(count, victims)
            block = view.block
            view.idle = False
            unlink(block)
            forget(view, now)
            taken.append(block)
        self.idle -= count

    def _wrong(self, count: int, victims: object) -> PolicyError:
        return PolicyError(
            f"{policy_name(self.policy)}.victims({count}, now={self._engine.now_s}) answered "
            f"{victims!r}; a sequence of blocks that nobody uses was expected"
        )
