"""Every name of vLLM that the plug-in relies on, and whether the installed vLLM has it.

vLLM calls its scheduler interface "not public": names may go with any release. ``check`` runs
when ``validate.vllm_plugin`` is imported, so a vLLM that does not fit is refused by name, before
an engine starts, instead of failing in the middle of a run.
"""

from __future__ import annotations

import dataclasses
import dis
import inspect
import warnings
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from types import CodeType
from typing import Any, NamedTuple

from validate.front.signals import GAUGES

__all__ = ["SEAMS", "SUPPORTED", "Seam", "VllmError", "check", "contract", "supported"]

SUPPORTED = ("0.31", "0.32")
"""Releases that the tests run on."""

RECIPE = "run `make validate`, which builds an environment (with a GPU: pip install 'vllm==0.32.*')"


class VllmError(ValueError):
    """vLLM is missing, or not one that the plug-in fits into."""


class Seam(NamedTuple):
    """One thing that must be so in vLLM."""

    module: str
    name: str
    """``Class``, ``Class.member`` (of the class, or set by its ``__init__``), or a function."""
    what: str
    """What cannot be done without it."""
    parameters: tuple[str, ...] = ()
    """Parameters that it must take, by name."""
    uses: tuple[str, ...] = ()
    """Attributes that its code must read or call, or strings that must stand in it."""
    returns: str = ""
    """What it must be annotated to return."""

    @property
    def path(self) -> str:
        """The full name."""
        return f"{self.module}.{self.name}"

    def fault(self) -> str | None:
        """What is wrong with it in the installed vLLM."""
        try:
            owner: Any = import_module(self.module)
        except ImportError as error:
            gone = isinstance(error, ModuleNotFoundError) and _of_vllm(error.name)
            return "is gone" if gone else f"cannot be imported ({_first_line(error)})"
        *outer, last = self.name.split(".")
        for part in outer:
            owner = getattr(owner, part, None)
            if owner is None:
                return "is gone"
        if not hasattr(owner, last):
            known = outer and last in _set_by_init(owner)
            return None if known else "is gone"
        found = getattr(owner, last)
        if self.parameters:
            taken = inspect.signature(found).parameters
            for name in self.parameters:
                if name not in taken:
                    return f"takes no parameter {name!r} any more"
        if self.returns and self.returns not in str(inspect.signature(found).return_annotation):
            return f"does not return {self.returns!r} any more"
        if self.uses:
            used = set(_used_by(found.__code__))
            for name in self.uses:
                if name not in used:
                    return f"does not use {name!r} any more"
        return None


def _seams(module: str, what: str, *names: str) -> list[Seam]:
    return [Seam(module, name, what) for name in names]


_CORE = "vllm.v1.core"
_SCHEDULER = f"{_CORE}.sched.scheduler"
_QUEUE = f"{_CORE}.sched.request_queue"
_POOL = f"{_CORE}.block_pool"
_UTILS = f"{_CORE}.kv_cache_utils"
_MANAGER = f"{_CORE}.kv_cache_manager"
_ENGINE = "vllm.v1.engine"
_REQUEST = "vllm.v1.request"
_METRICS = "vllm.v1.metrics"
_STATS = f"{_METRICS}.stats"
_KV_EVENTS = "vllm.distributed.kv_events"
_START = "the scheduler class cannot be plugged in"
_STEP = "steps cannot be followed"
_ADMIT = "admission cannot be plugged in"
_EVICT = "eviction cannot be plugged in"
_REUSE = "reuse cannot be plugged in"
_REJECT = "rejections cannot reach the client"
_VIEW = "policies cannot be shown requests"
_RECORD = "decisions cannot be recorded"
_RENEW = "an engine cannot begin anew with other policies"
_RESULT = "results of requests cannot be read"
_EVENTS = "the front cannot follow what engines have cached"
_POLL = "the front cannot ask engines for their state"

SEAMS: tuple[Seam, ...] = (
    *_seams("vllm.config", _START, "SchedulerConfig.get_scheduler_cls"),
    *_seams("vllm.config", _START, "VllmConfig.additional_config", "VllmConfig.kv_transfer_config"),
    *_seams("vllm.config", _START, "VllmConfig.parallel_config", "VllmConfig.model_config"),
    *_seams("vllm.config", _START, "ParallelConfig.data_parallel_index"),
    *_seams("vllm.config", _VIEW, "ModelConfig.served_model_name"),
    *_seams(_SCHEDULER, _START, "Scheduler.vllm_config", "Scheduler.kv_cache_config"),
    *_seams(_SCHEDULER, _START, "Scheduler.block_size", "Scheduler.hash_block_size"),
    *_seams(_SCHEDULER, _START, "Scheduler.kv_cache_manager", "Scheduler.shutdown"),
    *_seams(f"{_CORE}.sched.async_scheduler", _START, "AsyncScheduler"),
    *_seams(_SCHEDULER, _STEP, "Scheduler.update_from_output", "Scheduler.finish_requests"),
    *_seams(_SCHEDULER, _STEP, "Scheduler.add_request", "Scheduler.reset_prefix_cache"),
    Seam(_SCHEDULER, "Scheduler._free_request", _STEP, parameters=("request",)),
    Seam(
        _SCHEDULER,
        "Scheduler._preempt_request",
        _ADMIT,
        parameters=("request",),
        uses=("prepend_request",),
    ),
    *_seams(f"{_CORE}.sched.output", _STEP, "SchedulerOutput.total_num_scheduled_tokens"),
    *_seams(f"{_CORE}.sched.output", _STEP, "SchedulerOutput.num_scheduled_tokens"),
    # The queue: schedule() asks its truth, then its head, and takes the head out.
    Seam(
        _SCHEDULER,
        "Scheduler.schedule",
        _ADMIT,
        uses=("peek_request", "pop_request", "prepend_requests", "priority", "arrival_time"),
    ),
    *_seams(_SCHEDULER, _ADMIT, "Scheduler.waiting", "Scheduler.kv_holding_waiting"),
    *_seams(_SCHEDULER, _ADMIT, "Scheduler.running", "Scheduler.policy"),
    *_seams(_SCHEDULER, _ADMIT, "Scheduler.max_num_active_reqs"),
    *_seams(_SCHEDULER, _ADMIT, "Scheduler.num_waiting_for_streaming_input"),
    *_seams(_QUEUE, _ADMIT, "SchedulingPolicy.FCFS", "SchedulingPolicy.PRIORITY"),
    *_seams(_QUEUE, _ADMIT, "create_request_queue"),
    *(
        Seam(_QUEUE, f"RequestQueue.{name}", _ADMIT)
        for name in (
            "add_request", "prepend_request", "prepend_requests", "pop_request", "peek_request",
            "remove_request", "remove_requests", "__bool__", "__len__", "__iter__",
        )
    ),
    # The free list.
    *_seams(_POOL, _EVICT, "BlockPool.free_block_queue", "BlockPool.blocks"),
    *_seams(_POOL, _EVICT, "BlockPool.num_gpu_blocks", "BlockPool.get_num_free_blocks"),
    Seam(_POOL, "BlockPool.free_blocks", _EVICT, uses=("append_n", "prepend_n")),
    Seam(
        _POOL,
        "BlockPool.get_new_blocks",
        _EVICT,
        parameters=("num_blocks",),
        uses=("popleft_n",),
    ),
    Seam(_POOL, "BlockPool.touch", _EVICT, parameters=("blocks",), uses=("remove",)),
    *_seams(_POOL, _EVICT, "BlockPool.reset_prefix_cache"),
    *(
        Seam(_UTILS, f"FreeKVCacheBlockQueue.{name}", _EVICT)
        for name in (
            "append", "append_n", "prepend_n", "popleft", "popleft_n", "remove",
            "get_all_free_blocks", "num_free_blocks",
        )
    ),
    *_seams(_UTILS, _EVICT, "KVCacheBlock.block_id", "KVCacheBlock.block_hash"),
    # Lookup and insertion.
    *_seams(_MANAGER, _EVICT, "KVCacheManager.block_pool"),
    Seam(_MANAGER, "KVCacheManager.get_computed_blocks", _REUSE, parameters=("request",)),
    Seam(
        _MANAGER,
        "KVCacheManager.truncate_computed_blocks",
        _REUSE,
        parameters=("blocks", "num_computed_tokens"),
    ),
    Seam(
        _POOL,
        "BlockPool.cache_full_blocks",
        _REUSE,
        parameters=(
            "request", "blocks", "num_cached_blocks", "num_full_blocks", "block_size",
            "kv_cache_group_id", "block_mask",
        ),
    ),
    Seam(
        f"{_CORE}.single_type_kv_cache_manager",
        "SingleTypeKVCacheManager.cache_blocks",
        _REUSE,
        uses=("cache_full_blocks",),
    ),
    # What is read of requests and sent to clients.
    *(
        Seam(_REQUEST, f"Request.{name}", _VIEW)
        for name in (
            "request_id", "arrival_time", "priority", "sampling_params", "session_id",
            "num_prompt_tokens", "max_tokens", "num_computed_tokens", "num_output_tokens",
            "num_preemptions", "block_hashes",
        )
    ),
    *_seams("vllm.sampling_params", _VIEW, "SamplingParams.extra_args"),
    *_seams(_REQUEST, _REJECT, "Request.client_index", "Request.trace_headers"),
    *_seams(_REQUEST, _REJECT, "Request.take_events", "RequestStatus.FINISHED_ABORTED"),
    *_seams(_ENGINE, _REJECT, "EngineCoreOutputs.outputs", "FinishReason.ABORT"),
    *(
        Seam(_ENGINE, f"EngineCoreOutput.{name}", _REJECT)
        for name in (
            "request_id", "new_token_ids", "finish_reason", "stop_reason", "events",
            "trace_headers",
        )
    ),
    *_seams("vllm.engine.protocol", _REJECT, "EngineClient.generate"),
    *_seams("vllm.outputs", _REJECT, "RequestOutput.outputs", "CompletionOutput.token_ids"),
    *_seams("vllm.outputs", _REJECT, "CompletionOutput.finish_reason"),
    *_seams("vllm.outputs", _REJECT, "CompletionOutput.stop_reason"),
    # The recorder.
    *_seams(_SCHEDULER, _RECORD, "Scheduler.requests"),
    Seam(_SCHEDULER, "Scheduler.schedule", _RECORD, uses=("_preempt_request",)),
    Seam(_SCHEDULER, "Scheduler.finish_requests", _RECORD, returns="Request]"),
    *_seams(f"{_CORE}.sched.output", _RECORD, "SchedulerOutput.scheduled_cached_reqs"),
    *_seams(f"{_CORE}.sched.output", _RECORD, "CachedRequestData.req_ids"),
    *_seams(f"{_CORE}.sched.output", _RECORD, "CachedRequestData.new_block_ids"),
    Seam(_MANAGER, "KVCacheManager.get_block_ids", _RECORD, parameters=("request_id",)),
    Seam(_POOL, "BlockPool._maybe_evict_cached_block", _RECORD, parameters=("block",)),
    Seam(_POOL, "BlockPool.get_new_blocks", _RECORD, uses=("_maybe_evict_cached_block",)),
    # Exchanging the scheduler of an engine.
    *(
        Seam(f"{_ENGINE}.core", f"EngineCore.{name}", _RENEW)
        for name in ("scheduler", "step_fn", "structured_output_manager", "vllm_config")
    ),
    Seam(
        _SCHEDULER,
        "Scheduler.__init__",
        _RENEW,
        parameters=(
            "vllm_config", "kv_cache_config", "structured_output_manager",
            "include_finished_set", "log_stats", "block_size", "hash_block_size",
        ),
    ),
    *_seams(_SCHEDULER, _RENEW, "Scheduler.finished_req_ids_dict", "Scheduler.log_stats"),
    *_seams(_SCHEDULER, _RENEW, "Scheduler.has_requests", "Scheduler.has_unfinished_requests"),
    # What clients are told.
    *_seams("vllm.outputs", _RESULT, "RequestOutput.metrics", "RequestOutput.finished"),
    *_seams("vllm.outputs", _RESULT, "RequestOutput.num_cached_tokens"),
    *(
        Seam(_STATS, f"RequestStateStats.{name}", _RESULT)
        for name in ("num_preemptions", "scheduled_ts", "first_token_ts", "last_token_ts")
    ),
    *_seams(_STATS, _RESULT, "SchedulerStats.num_running_reqs", "SchedulerStats.kv_cache_usage"),
    # The front: KV events, by name in MessagePack, and the gauges of /metrics.
    *(
        Seam(_KV_EVENTS, name, _EVENTS)
        for name in (
            "KVEventBatch.events", "AllBlocksCleared", "BlockStored.block_hashes",
            "BlockStored.parent_block_hash", "BlockStored.token_ids", "BlockStored.block_size",
            "BlockStored.medium", "BlockStored.extra_keys", "BlockStored.group_idx",
            "BlockRemoved.block_hashes", "BlockRemoved.medium", "BlockRemoved.group_idx",
        )
    ),
    Seam(f"{_METRICS}.loggers", "PrometheusStatLogger.__init__", _POLL, uses=GAUGES),
)  # fmt: skip
"""All of them."""


def contract() -> list[str]:
    """What the installed vLLM lacks, a line for each; empty if the plug-in fits."""
    faults = ((seam, seam.fault()) for seam in SEAMS)
    return [f"{seam.path} {fault}: {seam.what}" for seam, fault in faults if fault is not None]


def supported(version: str) -> bool:
    """Whether it is one of the releases that the tests run on."""
    return version.startswith(tuple(f"{release}." for release in SUPPORTED))


def check() -> None:
    """See that the installed vLLM fits; warn if it is a release that nobody has tried.

    Raises:
        VllmError: there is no vLLM, it cannot be imported, or it lacks something.
    """
    try:
        version = str(import_module("vllm").__version__)
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "vllm":
            raise VllmError(f"vLLM is not installed here; {RECIPE}") from error
        raise VllmError(
            f"vLLM is installed but cannot be imported ({_first_line(error)}); {RECIPE}"
        ) from error
    missing = contract()
    if missing:
        releases = " or ".join(f"{release}.*" for release in SUPPORTED)
        raise VllmError(
            f"the plug-in does not fit into vLLM {version} (use {releases}): {'; '.join(missing)}"
        )
    if not supported(version):
        warnings.warn(
            f"vLLM {version} has everything that the plug-in needs, but the tests have only seen "
            f"{', '.join(SUPPORTED)}: compare decisions first (servelab parity)",
            stacklevel=2,
        )


def _of_vllm(module: str | None) -> bool:
    return module is not None and module.partition(".")[0] == "vllm"


def _first_line(error: ImportError) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _set_by_init(owner: Any) -> set[str]:
    """Names of attributes that instances get."""
    names = {field.name for field in dataclasses.fields(owner)} if _is_data(owner) else set()
    code = getattr(owner.__init__, "__code__", None)
    return names if code is None else names | _stored_by(code)


@cache
def _stored_by(code: CodeType) -> frozenset[str]:
    steps = dis.get_instructions(code)
    return frozenset(step.argval for step in steps if step.opname == "STORE_ATTR")


def _is_data(owner: Any) -> bool:
    return isinstance(owner, type) and dataclasses.is_dataclass(owner)


def _used_by(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, str):
            yield constant
        if isinstance(constant, CodeType):
            yield from _used_by(constant)
