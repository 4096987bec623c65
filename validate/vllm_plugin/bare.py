"""vLLM's real scheduler without a model, stepped on a virtual clock: the truth about decisions.

It decides exactly as inside an engine, because it never sees what the model does except for
tokens, and takes 0.2 ms per step. All steps take equally long (``workloads.STEP_PS``); a step
with nothing scheduled takes no time; while nobody is there, the clock jumps to the next arrival.
"""

from __future__ import annotations

import atexit
import json
import logging
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from math import inf
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from vllm.engine.arg_utils import EngineArgs
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from sim.latency import AffineStepModel
from sim.request import PS_PER_S
from sim.scheduler import EngineLimits
from validate.decisions import Decision
from validate.vllm_plugin.recorder import Recorder
from validate.vllm_plugin.scheduler import AsyncPolicyScheduler, PolicyScheduler
from validate.workloads import (
    STEP_CONSTANTS_PS,
    STEP_PS,
    Entry,
    Workload,
    abort_ps,
    arrival_ps,
    output_token,
)

CLASSES: Mapping[tuple[bool, bool], type[Any]] = {
    (False, False): Scheduler,
    (False, True): AsyncScheduler,
    (True, False): PolicyScheduler,
    (True, True): AsyncPolicyScheduler,
}
"""Schedulers by whether they are the plug-in's and whether they are asynchronous."""

_MODEL = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "vocab_size": 1024,
    "max_position_embeddings": 1 << 30,
    "torch_dtype": "bfloat16",
}
"""What vLLM must know of a model to make a configuration; there are no weights."""


def engine_config(
    limits: EngineLimits,
    *,
    priority: bool = False,
    additional_config: Mapping[str, Any] | None = None,
) -> Any:
    """A ``VllmConfig`` with an engine's options, as ``vllm serve`` would make it.

    Args:
        limits: the options; ``num_gpu_blocks`` and ``max_model_len`` must be numbers.
        priority: the scheduling policy is ``priority`` instead of ``fcfs``.
        additional_config: where the plug-in's policies are named.
    """
    with _quiet():
        config = EngineArgs(
            model=_model_folder(),
            skip_tokenizer_init=True,
            load_format="dummy",
            dtype="bfloat16",
            enforce_eager=True,
            max_model_len=limits.max_model_len,
            max_num_batched_tokens=limits.max_num_batched_tokens,
            max_num_seqs=limits.max_num_seqs,
            enable_prefix_caching=limits.enable_prefix_caching,
            enable_chunked_prefill=limits.enable_chunked_prefill,
            long_prefill_token_threshold=limits.long_prefill_token_threshold,
            long_prefill_token_threshold_adaptive=limits.long_prefill_token_threshold_adaptive,
            watermark=limits.watermark,
            scheduler_reserve_full_isl=limits.scheduler_reserve_full_isl,
            scheduling_policy="priority" if priority else "fcfs",
            additional_config=dict(additional_config or {}),
        ).create_engine_config()
    # What the CPU platform would refuse, although the scheduler does not care: small blocks
    # (its kernels want multiples of 32) and asynchronous scheduling.
    config.cache_config.block_size = limits.block_tokens
    config.cache_config.num_gpu_blocks = limits.num_gpu_blocks
    config.scheduler_config.async_scheduling = limits.async_scheduling
    return config


class BareEngine:
    """A scheduler with a fake model, and the loop of ``EngineCore`` around it."""

    def __init__(self, workload: Workload, *, plugged: bool = False, record: bool = True) -> None:
        """Make the scheduler.

        Args:
            workload: its options and policies, and what ``run`` will play.
            plugged: use the plug-in's scheduler classes even if no policy is given.
            record: write down what is decided, which takes longer than deciding it.
        """
        self.workload = workload
        self.rows: list[Decision] = []
        """What was decided, after ``run``."""
        self.finished: dict[str, tuple[int, int]] = {}
        """When requests finished, in picoseconds, and with how many output tokens."""
        limits = workload.limits
        constants = zip(AffineStepModel.CONSTANTS_S, STEP_CONSTANTS_PS, strict=True)
        step_times = {key: value / PS_PER_S for key, value in constants}
        config = engine_config(
            limits,
            priority=workload.priority,
            additional_config={"servelab": {**workload.policies, "step_times": step_times}},
        )
        kind = CLASSES[plugged or bool(workload.policies), limits.async_scheduling]
        self.scheduler = _scheduler(config, kind)
        self._depth = 2 if limits.async_scheduling else 1
        self._now_ps = 0
        self._hasher: Any = None
        if limits.enable_prefix_caching:  # as EngineCore.__init__
            hash_function = get_hash_fn_by_name(config.cache_config.prefix_caching_hash_algo)
            init_none_hash(hash_function)
            self._hasher = get_request_block_hasher(limits.block_tokens, hash_function)
        self.scheduler.clock = self.clock  # vLLM's own classes have none, but the recorder asks
        if record:
            Recorder(self.scheduler, self.rows.append)

    def clock(self) -> float:
        """The virtual time in seconds."""
        return self._now_ps / PS_PER_S

    def run(self) -> list[Decision]:
        """Play the workload; the rows that were recorded.

        The loop is that of ``step`` and ``step_with_batch_queue`` of ``v1/engine/core.py``, with
        one or two steps in flight: take in what has arrived, schedule, and wait for the oldest
        step unless there is room for another. Aborts that arrive meanwhile are processed before
        its output is.

        Raises:
            RuntimeError: requests wait, but nothing will ever happen.
        """
        scheduler = self.scheduler
        events = deque(_events(self.workload.entries))
        flight: deque[tuple[Any, list[str], int]] = deque()
        """Oldest first: vLLM's step, who gets a token, when it ends."""
        busy_until_ps = 0
        while True:
            self._take_in(events, self._now_ps)
            if scheduler.has_requests():
                step = scheduler.schedule()
                work = bool(step.num_scheduled_tokens)
                executing = any(before.num_scheduled_tokens for before, _, _ in flight)
                sampling = [
                    ident
                    for ident in step.num_scheduled_tokens
                    if not scheduler.requests[ident].is_prefill_chunk
                ]
                busy_until_ps = max(busy_until_ps, self._now_ps) + STEP_PS * work
                flight.append((step, sampling, busy_until_ps))
                if not (work or executing or step.preempted_req_ids):
                    while flight:
                        self._end(*flight.popleft())
                    if scheduler.has_unfinished_requests():
                        self._now_ps = self._wake_ps(events)
                    continue
                if len(flight) < self._depth and (work or scheduler.has_requests()):
                    continue
            elif not flight:
                if not events:
                    return self.rows
                self._now_ps = events[0][0]
                continue
            step, sampling, end_ps = flight.popleft()
            self._take_in(events, end_ps)
            self._now_ps = max(self._now_ps, end_ps)
            self._end(step, sampling, end_ps)

    def _take_in(self, events: deque[tuple[int, int, Entry]], until_ps: int) -> None:
        """Arrivals and aborts, each at its own time.

        Who arrives during a step enters now and not at its end: nobody looks at the queue before.
        """
        now_ps = self._now_ps
        while events and events[0][0] <= until_ps:
            at_ps, index, entry = events.popleft()
            self._now_ps = at_ps
            if index < 0:
                self.scheduler.finish_requests(entry.id, RequestStatus.FINISHED_ABORTED)
            else:
                self.scheduler.add_request(self._request(entry, index))
        self._now_ps = now_ps

    def _end(self, step: Any, sampling: Sequence[str], end_ps: int) -> None:
        """Take in the fake model's output."""
        scheduler = self.scheduler
        ids = list(step.num_scheduled_tokens)
        tokens: list[list[int]] = [[] for _ in ids]
        for place, ident in enumerate(ids):
            request = scheduler.requests.get(ident)
            if request is not None and ident in sampling:
                tokens[place] = [output_token(ident, request.num_tokens)]
        output = ModelRunnerOutput(
            req_ids=ids,
            req_id_to_index={ident: place for place, ident in enumerate(ids)},
            sampled_token_ids=tokens,
        )
        lengths = {
            ident: request.num_output_tokens for ident, request in scheduler.requests.items()
        }
        for client in scheduler.update_from_output(step, output).values():
            for answer in client.outputs:
                if str(answer.finish_reason) == "length":
                    done = lengths[answer.request_id] + len(answer.new_token_ids)
                    self.finished[answer.request_id] = (end_ps, done)

    def _wake_ps(self, events: deque[tuple[int, int, Entry]]) -> int:
        """When something happens although no step is in flight."""
        times = [events[0][0]] if events else []
        until_s = getattr(self.scheduler.waiting, "deferred_until_s", lambda: None)()
        if until_s is not None and until_s < inf:
            times.append(-int(-until_s * PS_PER_S // 1))
        if not times:
            waiting = [request.request_id for request in self.scheduler.waiting]
            raise RuntimeError(
                f"{self.workload.name}: {', '.join(waiting)} wait for ever: nothing is left to "
                f"change although the engine is idle"
            )
        return min(times)

    def _request(self, entry: Entry, index: int) -> Any:
        slo = entry.slo
        facts = {
            "slo_class": slo.name if slo.name != "none" else "",
            "slo_ttft_s": slo.ttft_s,
            "slo_tpot_s": slo.tpot_s,
            "slo_e2e_s": slo.e2e_s,
            "session": entry.session,
            "tenant": entry.tenant,
            "kind": entry.kind,
            "model": entry.model,
            "client_max_tokens": self.workload.max_model_len - len(entry.prompt),
        }
        return Request(
            request_id=entry.id,
            prompt_token_ids=list(entry.prompt),
            sampling_params=SamplingParams(
                max_tokens=entry.output_tokens,
                ignore_eos=True,
                skip_reading_prefix_cache=entry.skip_reading,
                extra_args={key: value for key, value in facts.items() if value not in ("", inf)},
            ),
            pooling_params=None,
            arrival_time=arrival_ps(entry, index) / PS_PER_S,
            cache_salt=entry.salt or None,
            priority=entry.priority,
            block_hasher=self._hasher,
        )


def _events(entries: Sequence[Entry]) -> list[tuple[int, int, Entry]]:
    """Arrivals (with the request's index) and aborts (-1) in order of time."""
    events = [(arrival_ps(e), i, e) for i, e in enumerate(entries)]
    events += [(abort_ps(e), -1, e) for e in entries if e.abort_step is not None]
    return sorted(events, key=lambda event: event[0])


def _scheduler(config: Any, kind: type[Any]) -> Any:
    """A scheduler as ``EngineCore.__init__`` makes it, for one group of full attention."""
    size = config.cache_config.block_size
    group = KVCacheGroupSpec(
        ["layer"],
        FullAttentionSpec(block_size=size, num_kv_heads=1, head_size=1, dtype=torch.bfloat16),
    )
    memory = KVCacheConfig(
        num_blocks=config.cache_config.num_gpu_blocks, kv_cache_tensors=[], kv_cache_groups=[group]
    )
    memory.hash_block_size = memory.cache_hit_alignment_tokens = size
    return kind(
        vllm_config=config,
        kv_cache_config=memory,
        structured_output_manager=StructuredOutputManager(config),
        block_size=size,
        hash_block_size=size,
        log_stats=False,
    )


@cache
def _model_folder() -> str:
    folder = TemporaryDirectory(prefix="servelab-")
    atexit.register(folder.cleanup)
    Path(folder.name, "config.json").write_text(json.dumps(_MODEL), encoding="utf-8")
    return folder.name


@contextmanager
def _quiet() -> Iterator[None]:
    """Without vLLM's warnings about options that matter only to models."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
