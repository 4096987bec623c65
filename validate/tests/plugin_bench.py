"""A scheduler with the plug-in and a fake model, one step at a time, for the tests of the plug-in.

``Bench(eviction=policy)`` takes policy objects, so tests can bring their own without registering
them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest.mock import patch

from vllm.sampling_params import SamplingParams
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request

from sim.scheduler import EngineLimits
from validate.vllm_plugin import bare, config
from validate.workloads import Workload

LIMITS = EngineLimits(
    block_tokens=16, max_num_batched_tokens=256, max_num_seqs=8, max_model_len=320,
    num_gpu_blocks=41,
)  # fmt: skip


class Bench:
    """One engine; ``now_s`` is its clock."""

    def __init__(self, *, stock: bool = False, limits: Any = None, **settings: Any) -> None:
        limits = replace(LIMITS, **(limits or {}))
        workload = Workload(name="bench", limits=limits, entries=())
        self.now_s = 0.0
        given = config.Settings(**settings)
        with patch.object(config, "read", lambda *_: given):
            self.engine = bare.BareEngine(workload, plugged=not stock)
        self.scheduler = self.engine.scheduler
        if not stock:
            self.scheduler.clock = lambda: self.now_s
        self.ended: dict[str, tuple[str, Any, int]] = {}
        """Finish reason, stop reason and client of every request that ended."""

    @property
    def rows(self) -> list[Any]:
        return self.engine.rows

    @property
    def pool(self) -> Any:
        return self.scheduler.kv_cache_manager.block_pool

    def add(
        self, ident: str, prompt: list[int], output: int = 1, *, client: int = 0,
        priority: int = 0, **facts: Any,
    ) -> Any:  # fmt: skip
        request = Request(
            request_id=ident,
            prompt_token_ids=list(prompt),
            sampling_params=SamplingParams(
                max_tokens=output, ignore_eos=True, extra_args=facts or None
            ),
            pooling_params=None,
            arrival_time=self.now_s,
            client_index=client,
            priority=priority,
            block_hasher=self.engine._hasher,
        )
        self.scheduler.add_request(request)
        return request

    def step(self) -> Any:
        """One step of 0.1 s; what was scheduled."""
        scheduler = self.scheduler
        planned = scheduler.schedule()
        ids = list(planned.num_scheduled_tokens)
        tokens = [
            [] if scheduler.requests[i].is_prefill_chunk
            else [2 + (scheduler.requests[i].num_tokens + len(i)) % 50]
            for i in ids
        ]  # fmt: skip
        output = ModelRunnerOutput(
            req_ids=ids,
            req_id_to_index={ident: place for place, ident in enumerate(ids)},
            sampled_token_ids=tokens,
        )
        self.now_s += 0.1
        for client, answers in scheduler.update_from_output(planned, output).items():
            for answer in answers.outputs:
                if answer.finish_reason is not None:
                    end = (str(answer.finish_reason), answer.stop_reason, client)
                    self.ended[answer.request_id] = end
        return planned

    def run(self, steps: int = 1000) -> None:
        """Step until nobody is left."""
        for _ in range(steps):
            if not self.scheduler.has_requests():
                return
            self.step()
        raise AssertionError(f"not done after {steps} steps")

    def serve(self, ident: str, prompt: list[int], output: int = 1, **options: Any) -> int:
        """Run one request to its end; how many cached tokens it used."""
        self.add(ident, prompt, output, **options)
        self.run()
        hits = [row["hits"][ident] for row in self.rows if ident in row["hits"]]
        return int(hits[0])


def words(seed: int, count: int) -> list[int]:
    """Tokens of a prompt that shares nothing with those of other seeds."""
    return [seed * 1000 + place for place in range(count)]
