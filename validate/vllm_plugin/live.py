"""Live vLLM engines: one behind an asynchronous client for times, one stepped by hand.

Clocks. A request *arrives* when the client hands it over; it is *admitted* when the scheduler
first schedules it, its *first token* and its *finish* are when the engine has the token: those
three are ``RequestStateStats`` of vLLM's ``v1/metrics/stats.py``, taken by the engine. All are
``time.monotonic()``, one clock for all processes of a machine, in seconds. The way from the engine
back to the client is in none of them; ``Fate.received`` has it.

Processes. The engine core of ``AsyncLLM`` is always a process of its own. With
``VLLM_ENABLE_V1_MULTIPROCESSING=0`` the model runs inside it; with 1, vLLM's default, on a CPU in
yet another process that it exchanges messages with in every step (``platforms/cpu.py``).
"""

from __future__ import annotations

import asyncio
import gc
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import isfinite
from typing import Any

from vllm import EngineArgs, SamplingParams
from vllm.distributed.parallel_state import cleanup_dist_env_and_memory
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.inputs.engine import tokens_input
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.core import EngineCore
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.engine.llm_engine import LLMEngine
from vllm.v1.metrics.loggers import StatLoggerBase

from sim.request import Request
from validate.live_options import LiveError
from validate.prompts import ordinary
from validate.replay import EngineDied, Fate, Instance
from validate.vllm_plugin.config import KEY
from validate.vllm_plugin.rejections import REJECTED

__all__ = ["LiveEngine", "SteppedEngine", "device", "on_cpu", "option_names"]

EXTENSION = "validate.vllm_plugin.live.Renewal"
CLOSE_S = 30
"""How long an engine's process may take to end by itself."""
RENEW_S = 30
"""How long an idle engine may take to begin anew."""


def on_cpu() -> bool:
    """Whether this vLLM runs models on the CPU."""
    return bool(current_platform.is_cpu())


def device() -> str:
    """The name of what models run on."""
    return str(current_platform.get_device_name())


def option_names() -> list[str]:
    """The options of vLLM's ``EngineArgs``."""
    return list(AsyncEngineArgs.__dataclass_fields__)


class LiveEngine(Instance):
    """One engine in a process of its own, until ``close``.

    Args:
        ident: number of the engine.
        options: of vLLM's ``AsyncEngineArgs``.
        environment: variables that are set while its process starts.
    """

    def __init__(
        self, ident: int, options: Mapping[str, Any], environment: Mapping[str, str]
    ) -> None:
        super().__init__(ident, model=str(options["model"]), chip=device())

        def logger(config: Any, index: int = 0) -> StatLoggerBase:
            return _Signals(self)

        with _environment({**environment, "VLLM_WORKER_MULTIPROC_METHOD": "spawn"}):
            # Without vLLM's own statistics loggers, which print and publish.
            arguments = AsyncEngineArgs(
                **options, disable_log_stats=True, worker_extension_cls=EXTENSION
            )
            self._llm = AsyncLLM.from_engine_args(arguments, stat_loggers=[logger])
        config = self._llm.vllm_config
        self.block_tokens = int(config.cache_config.block_size)
        self.kv_blocks = int(config.cache_config.num_gpu_blocks) - 1
        self.max_model_len = int(config.model_config.max_model_len)
        tokenizer = self._llm.get_tokenizer()
        self.vocabulary = ordinary(config.model_config.get_vocab_size(), tokenizer.all_special_ids)
        """Token ids that prompts may have."""

        self.renewable = config.parallel_config.distributed_executor_backend == "uni"
        """Whether ``renew`` works: the model runs in the process of the scheduler."""

    async def renew(self, config: Mapping[str, Any]) -> None:
        """Begin anew with other policies and an empty cache; nothing may be running.

        Args:
            config: ``additional_config["servelab"]`` from now on.

        Raises:
            EngineDied: the engine is gone or does not answer.
            LiveError: it cannot, for another reason.
        """
        self._cached.clear()
        try:
            # vLLM's client waits for ever if the engine dies in the middle of a call.
            async with asyncio.timeout(RENEW_S):
                await self._llm.collective_rpc("servelab_renew", args=(dict(config),))
        except EngineDeadError as error:
            raise EngineDied(f"engine {self.id} died: {error}") from error
        except TimeoutError as error:
            raise EngineDied(f"engine {self.id} did not answer within {RENEW_S} s") from error
        except Exception as error:
            said = " ".join(str(error).split()) or type(error).__name__
            raise LiveError(f"engine {self.id} cannot begin anew: {said}") from error

    async def ready(self) -> None:
        """Make the connection, so that the first request need not.

        Raises:
            EngineDied: the engine is gone.
        """
        try:
            await self._llm.get_supported_tasks()
        except EngineDeadError as error:
            raise EngineDied(f"engine {self.id} died: {error}") from error

    async def serve(self, request: Request, prompt: list[int], fate: Fate) -> None:
        params = _parameters(request, RequestOutputKind.DELTA)
        stats: Any = None
        fate.arrival = time.monotonic()
        try:
            async for output in self._llm.generate(
                tokens_input(prompt), params, request.id, priority=request.priority
            ):
                stats = output.metrics
                answer = output.outputs[0]
                fate.output_tokens += len(answer.token_ids)
                fate.cached_tokens = output.num_cached_tokens or 0
                fate.received = time.monotonic()
                if answer.finish_reason is not None:
                    _conclude(fate, answer.finish_reason, answer.stop_reason)
        except EngineDeadError as error:
            raise EngineDied(f"engine {self.id} died: {error}") from error
        finally:
            if stats is not None:
                _stamp(fate, stats)

    def close(self) -> None:
        """End the engine's process."""
        self._llm.shutdown(timeout=CLOSE_S)

    def forget(self) -> None:
        """Give up what vLLM's client leaves open; after its event loop has ended."""
        self._llm.engine_core.resources.ctx.destroy(linger=0)
        del self._llm


class Renewal:
    """What vLLM adds to its worker (``worker_extension_cls``): a way to the scheduler."""

    def servelab_renew(self, config: dict[str, Any]) -> None:
        """Called by the engine core that runs this worker in its own process."""
        frame = sys._getframe()
        while not isinstance(frame.f_locals.get("self"), EngineCore):
            if frame.f_back is None:
                raise RuntimeError("the worker does not run in the engine core's process")
            frame = frame.f_back
        renew(frame.f_locals["self"], config)


def renew(core: Any, config: Mapping[str, Any]) -> None:
    """Put a new scheduler into an engine core, as ``EngineCore.__init__`` makes it.

    Args:
        core: vLLM's ``EngineCore``; it must have nothing to do.
        config: ``additional_config["servelab"]`` from now on.
    """
    old = core.scheduler
    while old.has_requests():  # the model runner has yet to hear of the last ones that finished
        if old.has_unfinished_requests():
            raise RuntimeError("the engine is busy: its scheduler cannot be exchanged")
        core.step_fn()
    old.shutdown()  # first: the new one publishes KV events at the same endpoint
    core.vllm_config.additional_config[KEY] = dict(config)
    core.scheduler = type(old)(
        vllm_config=core.vllm_config,
        kv_cache_config=old.kv_cache_config,
        structured_output_manager=core.structured_output_manager,
        include_finished_set=old.finished_req_ids_dict is not None,
        log_stats=old.log_stats,
        block_size=old.block_size,
        hash_block_size=old.hash_block_size,
    )


class _Signals(StatLoggerBase):
    """Hands what an engine reports after each step to its view."""

    def __init__(self, instance: Instance) -> None:
        self._instance = instance

    def record(self, scheduler_stats: Any, *args: Any, **options: Any) -> None:
        if scheduler_stats is not None:
            self._instance.said(scheduler_stats.num_running_reqs, scheduler_stats.kv_cache_usage)

    def log_engine_initialized(self) -> None:
        pass


class SteppedEngine:
    """One engine in this process that takes a step when it is told to.

    So requests can enter it at given steps, and its decisions do not depend on time. The process
    must have been started with the environment of ``validate.environment`` if times matter.

    Args:
        options: of vLLM's ``EngineArgs``.
    """

    def __init__(self, options: Mapping[str, Any]) -> None:
        with _environment({"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}):
            self._engine = LLMEngine.from_engine_args(EngineArgs(**options))
        config = self._engine.vllm_config
        self.max_model_len = int(config.model_config.max_model_len)
        special = self._engine.get_tokenizer().all_special_ids
        self.vocabulary = ordinary(config.model_config.get_vocab_size(), special)

    @property
    def scheduler(self) -> Any:
        """The scheduler, for a recorder to watch."""
        return self._engine.engine_core.engine_core.scheduler

    def renew(self, config: Mapping[str, Any]) -> None:
        """Begin anew with other policies and an empty cache; nothing may be running.

        Args:
            config: ``additional_config["servelab"]`` from now on.
        """
        renew(self._engine.engine_core.engine_core, config)

    @property
    def busy(self) -> bool:
        """Whether a request has not ended."""
        return bool(self._engine.has_unfinished_requests())

    def add(self, request: Request, prompt: list[int]) -> None:
        """Hand a request over; it enters with the next step."""
        request.max_tokens = self.max_model_len - request.prompt_tokens
        params = _parameters(request, RequestOutputKind.FINAL_ONLY)
        self._engine.add_request(
            request.id, tokens_input(prompt), params, priority=request.priority
        )

    def abort(self, ident: str) -> None:
        """Take a request back."""
        self._engine.abort_request([ident])

    def step(self) -> list[tuple[str, Fate]]:
        """One engine step; ids and fates of the requests that ended in it."""
        ended = []
        for output in self._engine.step():
            if output.finished:
                answer = output.outputs[0]
                fate = Fate(
                    engine=0,
                    output_tokens=len(answer.token_ids),
                    cached_tokens=output.num_cached_tokens or 0,
                )
                _conclude(fate, answer.finish_reason, answer.stop_reason)
                if output.metrics is not None:
                    _stamp(fate, output.metrics)
                ended.append((output.request_id, fate))
        return ended

    def close(self) -> None:
        """Free the model, so that another engine can be made in this process."""
        self._engine.engine_core.shutdown()
        del self._engine
        gc.collect()
        cleanup_dist_env_and_memory()


# --------------------------------------------------------------------------- inside


def _parameters(request: Request, kind: RequestOutputKind) -> SamplingParams:
    """Sampling that generates what the trace says, and what policies may know."""
    slo = request.slo
    facts: dict[str, Any] = {
        "client_max_tokens": request.max_tokens,
        "slo_class": slo.name,
        "slo_ttft_s": slo.ttft_s,
        "slo_tpot_s": slo.tpot_s,
        "slo_e2e_s": slo.e2e_s,
        "session": request.session,
        "tenant": request.tenant,
        "kind": request.kind,
        "model": request.model,
    }
    return SamplingParams(
        max_tokens=min(request._true_output_tokens, request.max_tokens),
        ignore_eos=True,
        temperature=0.0,
        detokenize=False,
        output_kind=kind,
        extra_args={
            key: value
            for key, value in facts.items()
            if value != "" and not (isinstance(value, float) and not isfinite(value))
        },
    )


def _conclude(fate: Fate, finish_reason: str | None, stop_reason: object) -> None:
    if finish_reason != "abort":
        fate.state = "finished"
    elif isinstance(stop_reason, str) and stop_reason.startswith(REJECTED):
        fate.state, fate.reason = "rejected", stop_reason.removeprefix(REJECTED)
    else:
        fate.state, fate.reason = "failed", "aborted by the engine"


def _stamp(fate: Fate, stats: Any) -> None:
    """Copy the engine's times (0 where it has none) and counts."""
    fate.preemptions = stats.num_preemptions
    if stats.scheduled_ts:
        fate.admitted = stats.scheduled_ts
    if stats.first_token_ts:
        fate.first = stats.first_token_ts
    if stats.last_token_ts and fate.state == "finished":
        fate.finish = stats.last_token_ts


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """The variables set for a while, for the processes that are started in it."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
