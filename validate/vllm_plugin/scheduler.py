"""vLLM's schedulers with the policies of ``policies/``, chosen by ``--additional-config``.

    vllm serve MODEL --scheduler-cls validate.vllm_plugin.PolicyScheduler \
        --additional-config '{"servelab": {"eviction": "lfu"}}'

Only objects are changed, never a class of vLLM: the waiting queue and the free list are exchanged
and some methods of this engine's block pool and cache manager are wrapped. What no policy is
given for stays vLLM's own. The names relied on are in ``validate.vllm_plugin.seams``.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.request_queue import SchedulingPolicy, create_request_queue
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason
from vllm.v1.request import RequestStatus

from policies.api import AdmissionPolicy
from validate.decisions import DecisionLog
from validate.vllm_plugin import config
from validate.vllm_plugin.queue import PolicyQueue
from validate.vllm_plugin.recorder import Recorder
from validate.vllm_plugin.rejections import REJECTED
from validate.vllm_plugin.reuse import PrefixCache
from validate.vllm_plugin.views import EngineView, RequestView

__all__ = ["AsyncPolicyScheduler", "PolicyMixin", "PolicyScheduler"]

HELD_POLL_S = 0.005
"""How long an engine sleeps at most while everything it has is held back by a policy."""


class PolicyMixin:
    """What both schedulers add to vLLM's.

    Raises:
        validate.vllm_plugin.config.ConfigError: at start, for a mistake in the configuration.
        PolicyError: while running, when a policy answers what its contract does not allow. The
            exception ends the engine, as any error in a scheduler does; its log has the message.
    """

    # vLLM's, as far as they are used here.
    vllm_config: Any
    kv_cache_config: Any
    kv_cache_manager: Any
    block_size: int
    hash_block_size: int
    running: list[Any]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        parallel = self.vllm_config.parallel_config
        engine = int(parallel.data_parallel_index)
        settings = config.read(self.vllm_config.additional_config, engine)
        self.policies: dict[str, Any] = {
            "admission": settings.admission,
            "eviction": settings.eviction,
            "reuse": settings.reuse,
        }
        """The policy objects; ``None`` where vLLM's own code runs."""
        began_s = time.monotonic()
        self._clock: Callable[[], float] = lambda: time.monotonic() - began_s
        self._epoch_s = time.time()
        self._live = True
        self._engine = EngineView(self, engine, settings.steps)
        self._views: dict[str, RequestView] = {}
        self._arrivals = 0
        self._rejected: list[tuple[Any, str]] = []
        self._began_s: deque[float] = deque()
        self._cache: PrefixCache | None = None
        self._active = any(p is not None for p in self.policies.values())
        if self._active:
            self._plug_in()
        self._log = None if settings.decisions is None else self._record(settings.decisions)

    @property
    def clock(self) -> Callable[[], float]:
        """Seconds since the run began. With another clock, arrival times are read on it too."""
        return self._clock

    @clock.setter
    def clock(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._epoch_s = 0.0
        self._live = False

    # ------------------------------------------------------------------ plugging in

    def _plug_in(self) -> None:
        admission, eviction, reuse = self.policies.values()
        if eviction is not None or reuse is not None:
            self._check_cache()
        if admission is not None:
            self._queue_requests(admission)
        if eviction is not None or reuse is not None:
            self._cache = PrefixCache(
                self.kv_cache_manager,
                eviction,
                reuse,
                self._engine,
                self._views,
            )

    def _check_cache(self) -> None:
        groups = len(self.kv_cache_config.kv_cache_groups)
        if groups != 1:
            raise config.ConfigError(
                f"{config.KEY}: eviction and reuse policies need a model whose layers share one "
                f"KV cache; this one has {groups} groups of layers"
            )
        if self.hash_block_size != self.block_size:
            raise config.ConfigError(
                f"{config.KEY}: eviction and reuse policies need blocks that are cached as a "
                f"whole; here prefixes match every {self.hash_block_size} tokens in blocks of "
                f"{self.block_size}; leave out --prefix-match-unit"
            )
        transfer = self.vllm_config.kv_transfer_config
        connector = getattr(transfer, "kv_connector", None)
        if connector == "SimpleCPUOffloadConnector":
            raise config.ConfigError(
                f"{config.KEY}: {connector} reads the free list as eviction order, which an "
                f"eviction policy changes; use OffloadingConnector or leave the policy out"
            )

    def _queue_requests(self, admission: AdmissionPolicy) -> None:
        """The policy takes the place of ``--scheduling-policy``."""
        by_order = admission.preempts == "order"
        self.policy = SchedulingPolicy.PRIORITY if by_order else SchedulingPolicy.FCFS
        self.kv_holding_waiting = create_request_queue(self.policy)
        kind = type(admission)
        plain = kind.order is AdmissionPolicy.order and kind.admit is AdmissionPolicy.admit
        if plain and not by_order:
            self.waiting = create_request_queue(self.policy)
        else:
            self.waiting = PolicyQueue(admission, self._engine, self._views, self._reject)

    def _record(self, path: str) -> DecisionLog:
        try:
            log = DecisionLog(Path(path))
        except OSError as error:
            raise config.ConfigError(f"{config.KEY}.decisions: {error}") from error
        Recorder(self, log)
        return log

    # ------------------------------------------------------------------ requests come and go

    def add_request(self, request: Any) -> None:
        """A request arrives (``EngineCore.add_request``)."""
        if self._active:
            self._engine.now_s = self._clock()
            self._engine.changes += 1
            if request.request_id not in self._views:
                self._arrivals += 1
                self._views[request.request_id] = self._view(request)
        super().add_request(request)  # type: ignore[misc]

    def finish_requests(self, request_ids: Any, finished_status: Any) -> Any:
        """Requests are aborted."""
        if self._active and not self._engine.planning:
            self._engine.now_s = self._clock()
        return super().finish_requests(request_ids, finished_status)  # type: ignore[misc]

    def _free_request(self, request: Any, *args: Any, **kwargs: Any) -> Any:
        if self._active:
            self._engine.changes += 1
            self._views.pop(request.request_id, None)
        return super()._free_request(request, *args, **kwargs)  # type: ignore[misc]

    def _preempt_request(self, request: Any, *args: Any, **kwargs: Any) -> None:
        if self._active:
            self._engine.changes += 1
        super()._preempt_request(request, *args, **kwargs)  # type: ignore[misc]

    def _view(self, request: Any) -> RequestView:
        return RequestView(
            request,
            rank=self._arrivals,
            epoch_s=self._epoch_s,
            model=str(self.vllm_config.model_config.served_model_name),
            hashing=(self.block_size // self.hash_block_size, self.block_size),
        )

    def _reject(self, request: Any, reason: str) -> None:
        """The policy refuses a waiting request; the client is told with this step's output."""
        self.finish_requests((request.request_id,), RequestStatus.FINISHED_ABORTED)
        self._rejected.append((request, reason))

    # ------------------------------------------------------------------ steps

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        """One step (``EngineCore.step``)."""
        if not self._active:
            return super().schedule(*args, **kwargs)  # type: ignore[misc]
        engine = self._engine
        engine.now_s = self._clock()
        began_s = time.perf_counter()
        engine.planning = True
        if self._cache is not None:
            self._cache.candidate = None
        try:
            output = super().schedule(*args, **kwargs)  # type: ignore[misc]
        finally:
            engine.planning = False
        if output.total_num_scheduled_tokens:
            engine.steps_done += 1
            if engine.measured is not None:
                self._began_s.append(began_s)
        elif self._live:
            self._wait(engine.now_s)
        return output

    def _wait(self, now_s: float) -> None:
        """Sleep a little if nothing can happen before a deferral ends.

        Otherwise an engine that only holds requests would poll about a thousand times a second.
        """
        if self.running or self._rejected or not isinstance(self.waiting, PolicyQueue):
            return
        until_s = self.waiting.deferred_until_s()
        if until_s is not None:
            time.sleep(max(min(until_s - now_s, HELD_POLL_S), 0.0))

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        """The step ended (``EngineCore.step``)."""
        if self._active:
            self._engine.now_s = self._clock()
        outputs = super().update_from_output(  # type: ignore[misc]
            scheduler_output, model_runner_output
        )
        tokens = scheduler_output.total_num_scheduled_tokens
        measured = self._engine.measured
        if measured is not None and self._began_s and tokens:
            # Decodes have one token each, so what goes beyond that is prompts.
            prompt_tokens = tokens - len(scheduler_output.num_scheduled_tokens)
            measured.ran(self._began_s.popleft(), time.perf_counter(), prompt_tokens)
        if self._rejected:
            for request, reason in self._rejected:
                outputs.setdefault(request.client_index, EngineCoreOutputs()).outputs.append(
                    EngineCoreOutput(
                        request_id=request.request_id,
                        new_token_ids=[],
                        finish_reason=FinishReason.ABORT,
                        stop_reason=f"{REJECTED}{reason}",
                        events=request.take_events(),
                        trace_headers=request.trace_headers,
                    )
                )
            self._rejected.clear()
        return outputs

    def reset_prefix_cache(self, *args: Any, **kwargs: Any) -> Any:
        """The cache is emptied, and with ``reset_running_requests`` everything preempted."""
        self._engine.now_s = self._clock()
        return super().reset_prefix_cache(*args, **kwargs)  # type: ignore[misc]

    def shutdown(self) -> None:
        """The engine ends."""
        super().shutdown()  # type: ignore[misc]
        if self._log is not None:
            self._log.close()


class PolicyScheduler(PolicyMixin, Scheduler):
    """``Scheduler`` with policies; turns vLLM's asynchronous scheduling off."""


class AsyncPolicyScheduler(PolicyMixin, AsyncScheduler):
    """``AsyncScheduler`` with policies, for engines with asynchronous scheduling."""
