"""The prefix cache of one engine, with a reuse policy and the views that eviction policies see.

Four methods of this engine's block pool and one of its cache manager are wrapped, on the objects,
so that no class of vLLM changes (``v1/core/block_pool.py``, ``v1/core/kv_cache_manager.py``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from policies.api import EvictionPolicy, PolicyError, PrefixMatch, ReusePolicy, Tier
from validate.vllm_plugin.eviction import PolicyFreeQueue
from validate.vllm_plugin.views import BlockView, EngineView, RequestView, policy_name

__all__ = ["PrefixCache"]


class PrefixCache:
    """Answers vLLM's questions to its prefix cache, as the policies want.

    vLLM looks up one waiting request, tries to allocate for it, and goes on to the next only if
    it was admitted or set aside. So blocks that are touched or taken after a lookup are for that
    request: ``candidate``.

    Raises:
        PolicyError: from inside ``schedule``: an answer of the reuse policy is of the wrong kind.
    """

    def __init__(
        self,
        manager: Any,
        eviction: EvictionPolicy | None,
        reuse: ReusePolicy | None,
        engine: EngineView,
        requests: Mapping[str, RequestView],
    ) -> None:
        """Plugs itself into vLLM's ``KVCacheManager`` and its ``BlockPool``."""
        pool = manager.block_pool
        self.candidate: RequestView | None = None
        """Who was looked up in this step and has got no block yet."""
        self._engine = engine
        self._requests = requests
        self._reuse = reuse
        self._uses = reuse is not None and type(reuse).use is not ReusePolicy.use
        self._retains = reuse is not None and type(reuse).retain is not ReusePolicy.retain
        self._block_tokens = engine.block_tokens
        self._free: PolicyFreeQueue | None = None
        if eviction is not None:
            free = pool.free_block_queue.get_all_free_blocks()
            self._free = PolicyFreeQueue(free, len(pool.blocks), eviction, engine)
            pool.free_block_queue = self._free
        self._truncate = manager.truncate_computed_blocks
        self._find, manager.get_computed_blocks = manager.get_computed_blocks, self.find
        self._touch, pool.touch = pool.touch, self.touch
        self._get, pool.get_new_blocks = pool.get_new_blocks, self.get
        self._store, pool.cache_full_blocks = pool.cache_full_blocks, self.store
        self._reset, pool.reset_prefix_cache = pool.reset_prefix_cache, self.reset

    def find(self, request: Any) -> Any:
        """``KVCacheManager.get_computed_blocks``: what a waiting request would hit."""
        blocks, tokens, *boundary = self._find(request)
        self.candidate = view = self._requests[request.request_id]
        if tokens and self._uses:
            used = self._used_tokens(view, tokens)
            if used < tokens:
                blocks, tokens = self._truncate(blocks, used), used
        return blocks, tokens, *boundary

    def touch(self, blocks: Any) -> None:
        """``BlockPool.touch``: a request uses cached blocks."""
        view = self.candidate
        if view is not None and view.admitted_s < 0:
            self._admit(view)
        self._touch(blocks)
        if view is None or self._free is None:
            return
        held, slo = self._free.views, view.slo
        for block in blocks:
            hit = held[block.block_id]
            assert hit is not None
            hit.hits += 1
            if slo.ttft_s < hit.slo.ttft_s:
                hit.slo = slo

    def get(self, num_blocks: int) -> Any:
        """``BlockPool.get_new_blocks``: a request gets blocks for what it will compute."""
        view = self.candidate
        if view is not None:
            self.candidate = None
            if view.admitted_s < 0:
                self._admit(view)
        return self._get(num_blocks)

    def store(
        self,
        request: Any,
        blocks: Any,
        num_cached_blocks: int,
        num_full_blocks: int,
        block_size: int,
        kv_cache_group_id: int,
        block_mask: Any = None,
    ) -> None:
        """``BlockPool.cache_full_blocks``: blocks get their hashes.

        What the reuse policy does not keep gets none, so nobody can hit it and it is the first
        to be taken when it is free.
        """
        view = self._requests[request.request_id]
        kept = view.retained_blocks
        if kept is not None and kept < num_full_blocks:
            if kept <= num_cached_blocks:
                return
            num_full_blocks = kept
            block_mask = block_mask and block_mask[: kept - num_cached_blocks]
        self._store(
            request, blocks, num_cached_blocks, num_full_blocks, block_size,
            kv_cache_group_id, block_mask,
        )  # fmt: skip
        if self._free is None:
            return
        engine, held = self._engine, self._free.views
        hashes = request.block_hashes
        for depth in range(num_cached_blocks, num_full_blocks):
            block = blocks[depth]
            if block.block_hash is not None:
                held[block.block_id] = BlockView(engine, block, hashes[depth], depth, view)

    def reset(self) -> Any:
        """``BlockPool.reset_prefix_cache``: also reached by sleep and by weight updates."""
        done = self._reset()
        if done and self._free is not None:
            self._free.forget()
        return done

    # ------------------------------------------------------------------ asking the policy

    def _used_tokens(self, view: RequestView, tokens: int) -> int:
        assert self._reuse is not None
        match = PrefixMatch(((Tier.HBM, tokens),))
        use = self._reuse.use(view, match, self._engine, self._engine.now_s)
        if not isinstance(use, int) or not 0 <= use <= tokens:
            raise PolicyError(
                f"{policy_name(self._reuse)}.use({view.id}) answered {use!r}; "
                f"a whole number from 0 to {tokens} was expected"
            )
        return use - use % self._block_tokens

    def _admit(self, view: RequestView) -> None:
        """Blocks are about to be given to the request for the first time."""
        view.admitted_s = self._engine.now_s
        if not self._retains:
            return
        assert self._reuse is not None
        kept = self._reuse.retain(view, self._engine, self._engine.now_s)
        if kept is None:
            return
        tokens = kept.get(Tier.HBM, 0) if isinstance(kept, Mapping) else None
        if not isinstance(tokens, int) or tokens < 0:
            raise PolicyError(
                f"{policy_name(self._reuse)}.retain({view.id}) answered {kept!r}; "
                f"None or a whole number of tokens, 0 or more, per tier was expected"
            )
        view.retained_blocks = tokens // self._block_tokens
