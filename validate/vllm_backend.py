"""The backend that serves a trace on a real vLLM, with the same policies and the same tables.

Engines run in processes of their own, which end when ``serve`` returns or, in a ``with`` statement,
with the statement. So live and simulated runs can follow each other in one process. A program
that uses it needs ``if __name__ == "__main__":``, because those processes import it.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from math import isnan
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from policies.api import PolicySet
from policies.parameters import nearest
from policies.registry import build, describe
from sim.backend import Deployment
from sim.result import Result
from sim.scheduler import EngineLimits, _name
from traces import Trace
from validate.environment import cpu_environment, has_vllm
from validate.live_engines import EnginesUp
from validate.live_options import NAMES, LiveError, model_folder, policy_config, vllm_options
from validate.live_result import decision_rows, length_warnings, live_result, on_clock
from validate.prompts import Prompts
from validate.replay import EngineDied, Replay

if TYPE_CHECKING:
    from validate.decisions import Decision
    from validate.vllm_plugin.live import LiveEngine

__all__ = ["LiveError", "VllmBackend", "policy_config", "vllm_options"]

OURS = {
    "additional_config", "async_scheduling", "disable_log_stats", "enable_expert_parallel",
    "model", "pipeline_parallel_size", "scheduler_cls", "tensor_parallel_size",
    "worker_extension_cls",
}  # fmt: skip
"""Options that the deployment and the policies decide."""

SHOWN = ("LD_PRELOAD", "KMP_BLOCKTIME", "KMP_TPAUSE", "VLLM_CPU_OMP_THREADS_BIND")
"""Variables that a result names, because times depend on them."""

CAUSES = (
    "the cause is in the engine's output above; mostly it is memory "
    "(engine.gpu_memory_utilization, engine.num_gpu_blocks, engine.max_model_len; "
    "on a CPU the variable VLLM_CPU_KVCACHE_SPACE) or one of live.options"
)

MEANS = (
    "make validate builds an environment with vLLM for CPUs; "
    "on a machine with a GPU: pip install 'servelab[vllm]'"
)


class VllmBackend:
    """Serves traces on live vLLM engines, in real time.

    In a ``with`` statement the engines stay up; each ``serve`` begins with empty caches and new
    policies all the same, because it puts a new scheduler into the running engine.

    Args:
        deployment: engines, parallelism and limits; its chip and model profiles are not used.
        model: folder or Hugging Face name of the model that is served; ``None`` is the tiny model
            with random weights of ``validate.tiny_model``, kept in the user's cache folder.
        engine_options: more options of vLLM's ``EngineArgs``, by their names there.
        timeout_s: a replay that takes longer is given up, and what it has is kept.
        max_lateness_s: the 99th percentile of how late requests are sent, beyond which the
            result warns.
        record_runs: keep the table of steps (timelines and inter-token latencies).

    Raises:
        LiveError: an option is wrong, or there is no such model.
    """

    def __init__(
        self,
        deployment: Deployment,
        *,
        model: str | Path | None = None,
        engine_options: Mapping[str, Any] | None = None,
        timeout_s: float | None = None,
        max_lateness_s: float = 0.05,
        record_runs: bool = True,
    ) -> None:
        if timeout_s is not None and not timeout_s > 0:
            raise LiveError(f"timeout_s={timeout_s}: must be above 0")
        self.deployment = deployment
        self.model = model_folder(model)
        self.engine_options = dict(engine_options or {})
        self.timeout_s = timeout_s
        self.max_lateness_s = max_lateness_s
        self.record_runs = record_runs
        self.decisions: list[list[Decision]] = []
        """Each engine's decision rows in the last run, on the clock of its result."""
        self.vocabulary = range(0)
        """Token ids that the prompts of the last run were made of."""
        self._kept = False
        self._up: EnginesUp | None = None
        for name in self.engine_options:
            if name in OURS or name in NAMES.values() or name in EngineLimits.__slots__:
                raise LiveError(
                    f"engine_options: {name} follows from the deployment and the policies"
                )

    def __enter__(self) -> Self:
        self._kept = True
        return self

    def __exit__(self, *error: object) -> None:
        self._kept = False
        self._close()

    def serve(
        self,
        trace: Trace,
        policies: PolicySet,
        *,
        seed: int = 0,
        progress: Callable[[int, int], None] | None = None,
    ) -> Result:
        """Replay the trace in real time.

        Whatever happens to the engines, there is a result with a row for each request; where not
        all were answered, ``meta["incomplete"]`` says why, as it does after an interruption with
        Ctrl-C. Engines that died since the last run are started again.

        Args:
            trace: what arrives; later turns of a session wait for their predecessor.
            policies: factories. Those of engines must be registered policies, because another
                process makes them; placement and routing run here.
            seed: of the policies and of prompts that the trace does not know.
            progress: called (from another thread) with (requests done, requests).

        Raises:
            LiveError: vLLM is missing or does not start with these options and policies.
            PolicyError: a policy cannot run live, or the placement policy broke its contract.
            TraceError: the trace's blocks do not fit the engine's.
        """
        trace.recoded(self.deployment.limits.block_tokens)  # fails before engines are started
        configs = [policy_config(policies, seed, i) for i in range(self.deployment.engines)]
        pd = build(policies.pd, seed, "pd")
        live = _vllm()
        self._check_options(live)
        _check_policies(configs)
        run = _Run(self, live, trace, policies, pd, configs, seed, progress)
        try:
            up = self._up if self._up is not None and self._up.reusable else self._fresh()
            try:
                result = run.on(up)
            except EngineDied:  # before a request was sent: nothing is lost yet
                up = self._fresh()
                result = run.on(up)
            self.vocabulary = up.engines[0].vocabulary
        except EngineDied as error:
            raise LiveError(f"{error}; so it did when it was started again") from error
        finally:
            if not self._kept:
                self._close()
        self.decisions = run.decisions
        return result

    def options(self, *, cpu: bool) -> dict[str, Any]:
        """The options of vLLM's ``EngineArgs``, without policies."""
        deployment = self.deployment
        options = vllm_options(deployment.limits) | {
            "model": self.model,
            "tensor_parallel_size": deployment.tp,
            "pipeline_parallel_size": deployment.pp,
            "enable_expert_parallel": deployment.ep > 1,
        }
        if cpu:
            options["enforce_eager"] = True  # compiling for a CPU takes minutes
        folder = Path(self.model)
        if folder.is_dir() and not [*folder.glob("*.safetensors"), *folder.glob("*.bin")]:
            options["load_format"] = "dummy"
        return options | self.engine_options

    def _check_options(self, live: Any) -> None:
        block_tokens = self.deployment.limits.block_tokens
        if live.on_cpu() and block_tokens % 32:
            raise LiveError(
                f"engine.block_tokens={block_tokens}: on a CPU vLLM needs a multiple of 32; "
                f"set engine.block_tokens=32"
            )
        known = live.option_names()
        for name in self.engine_options.keys() - known:
            raise LiveError(f"engine_options: {nearest('option', name, known)}")

    def _fresh(self) -> EnginesUp:
        """Room for engines that are to be started, after the others have ended."""
        self._close()
        self._up = EnginesUp()
        return self._up

    def _close(self) -> None:
        if self._up is not None:
            self._up.close()
            self._up = None


class _Run:
    """One replay."""

    def __init__(
        self,
        backend: VllmBackend,
        live: Any,
        trace: Trace,
        policies: PolicySet,
        pd: Any,
        configs: Sequence[Mapping[str, Any]],
        seed: int,
        progress: Callable[[int, int], None] | None,
    ) -> None:
        self.backend = backend
        self.live = live
        self.trace = trace
        self.policies = policies
        self.pd = pd
        self.configs = configs
        self.seed = seed
        self.progress = progress
        self.replay: Replay | None = None
        self.decisions: list[list[Decision]] = []

    def on(self, up: EnginesUp) -> Result:
        up.runs += 1
        folder = Path(up.scratch.name)
        logs = [folder / f"run-{up.runs}-{i}.jsonl" for i in range(len(self.configs))]
        replay = up.wait(self._play(up, logs), self._interrupt)
        fates = replay.fates
        known = self.trace.requests["id"].tolist()
        admitted = {name: f.admitted - replay.start for name, f in zip(known, fates, strict=True)}
        self.decisions = [on_clock(decision_rows(log, known), admitted) for log in logs]
        return live_result(
            self.trace,
            fates,
            replay.start,
            self.decisions,
            [engine.kv_blocks for engine in up.engines],
            self._meta(up.engines, self.backend.options(cpu=self.live.on_cpu()), replay),
            record_runs=self.backend.record_runs,
        )

    def _interrupt(self) -> bool:
        if self.replay is None:
            return False
        self.replay.interrupt()
        return True

    async def _play(self, up: EnginesUp, logs: Sequence[Path]) -> Replay:
        settings = [
            {**config, "decisions": str(log)}
            for config, log in zip(self.configs, logs, strict=True)
        ]
        cpu = self.live.on_cpu()
        if up.complete:
            for engine, setting in zip(up.engines, settings, strict=True):
                await engine.renew(setting)
        else:
            options = self.backend.options(cpu=cpu)
            for i, setting in enumerate(settings):
                up.engines.append(self._start(i, options, setting, cpu))
            await asyncio.gather(*(engine.ready() for engine in up.engines))
            up.complete = True
        self.replay = replay = self._replay(up.engines)
        await replay.run()
        return replay

    def _start(
        self, ident: int, options: Mapping[str, Any], config: Mapping[str, Any], cpu: bool
    ) -> LiveEngine:
        scheduler = "AsyncPolicyScheduler" if options["async_scheduling"] else "PolicyScheduler"
        given = {
            **options,
            "scheduler_cls": f"validate.vllm_plugin.{scheduler}",
            "additional_config": {"servelab": dict(config)},
        }
        try:
            engine: LiveEngine = self.live.LiveEngine(
                ident, given, self._environment(ident) if cpu else {}
            )
        except Exception as error:
            said = " ".join(str(error).split()) or type(error).__name__
            if "Engine core initialization failed" in said:
                said = CAUSES
            raise LiveError(f"engine {ident} did not start: {said}") from error
        return engine

    def _environment(self, ident: int) -> dict[str, str]:
        """Variables for an engine's process on the CPU; several engines get cores of their own.

        The model runs in the engine core's process, which saves messages in every step. Which
        cores a single engine uses is left to vLLM.
        """
        count, cores = len(self.configs), sorted(os.sched_getaffinity(0))
        share = len(cores) // count
        values = cpu_environment()
        if count > 1 and share and "VLLM_CPU_OMP_THREADS_BIND" not in os.environ:
            mine = cores[ident * share : (ident + 1) * share]
            values["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, mine))
        if not Path(self.backend.model).is_dir():
            values.pop("HF_HUB_OFFLINE")
        return {key: value for key, value in values.items() if os.environ.get(key) != value}

    def _replay(self, engines: Sequence[LiveEngine]) -> Replay:
        tokens = engines[0].block_tokens
        return Replay(
            self.trace,
            self.trace.recoded(tokens),
            Prompts(self.trace, tokens, engines[0].vocabulary, self.seed),
            engines,
            self.pd,
            model=engines[0].model,
            timeout_s=self.backend.timeout_s,
            progress=self.progress,
        )

    def _meta(
        self, engines: Sequence[LiveEngine], options: Mapping[str, Any], replay: Replay
    ) -> dict[str, Any]:
        deployment, trace = self.backend.deployment, self.trace
        device = engines[0].chip
        kinds = ("admission", "eviction", "reuse")
        environment = {**os.environ, **(self._environment(0) if self.live.on_cpu() else {})}
        return {
            "backend": "vllm",
            "vllm": _version(),
            "device": device,
            "trace": trace.name,
            "trace_notes": list(trace.notes),
            "synthetic": trace.synthetic,
            "chip": device,
            "model": Path(self.backend.model).name,
            "engines": len(engines),
            "chips": deployment.chips_per_engine * len(engines),
            "block_tokens": engines[0].block_tokens,
            "kv_blocks": engines[0].kv_blocks,
            "max_model_len": engines[0].max_model_len,
            "seed": self.seed,
            "policies": {
                **{kind: _named(getattr(self.policies, kind)) for kind in kinds},
                "pd": _name(self.pd),
                "routing": _name(getattr(getattr(self.pd, "policy", self.pd), "router", self.pd)),
            },
            "calibrated": True,
            "calibration": "measured",
            "warnings": self._warnings(replay, environment, engines[0].max_model_len),
            "incomplete": replay.incomplete,
            "price_usd_per_s": None,
            "engine_options": {key: str(value) for key, value in options.items()},
            "environment": {key: environment[key] for key in SHOWN if key in environment},
        }

    def _warnings(
        self, replay: Replay, environment: Mapping[str, str], max_model_len: int
    ) -> list[str]:
        lines = [f"incomplete: {replay.incomplete}"] if replay.incomplete else []
        late = sorted(f.arrival - f.due for f in replay.fates if not isnan(f.arrival))
        most_s = self.backend.max_lateness_s
        if late and (at := late[int(0.99 * (len(late) - 1))]) > most_s:
            lines.append(
                f"the client was late: 1 % of requests were sent {at:.3f} s or more after they "
                f"were due (max_lateness_s={most_s:g})"
            )
        lines += length_warnings(self.trace, max_model_len)
        if self.live.on_cpu() and "libiomp5" not in environment.get("LD_PRELOAD", ""):
            lines.append(
                f"no {Path(sys.prefix) / 'lib' / 'libiomp5.so'} to preload: step times may be "
                f"wrong by a factor of ten (pip install intel-openmp)"
            )
        return lines


def _vllm() -> Any:
    """``validate.vllm_plugin.live``."""
    if not has_vllm():
        raise LiveError(f"vLLM is not installed here: {MEANS}")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")  # read when it is imported
    from validate.vllm_plugin import live  # noqa: PLC0415 - vLLM may be missing, and takes seconds

    return live


def _check_policies(configs: Sequence[Mapping[str, Any]]) -> None:
    """Make the policies here first, because an engine's process fails with many lines."""
    from validate.vllm_plugin.config import KEY, ConfigError, read  # noqa: PLC0415 - needs vLLM

    for engine, config in enumerate(configs):
        try:
            read({KEY: config}, engine)
        except ConfigError as error:
            raise LiveError(str(error)) from error


def _version() -> str:
    for package in ("vllm", "vllm-cpu"):
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "unknown"


def _named(factory: object) -> str:
    return describe(factory.func if isinstance(factory, partial) else factory)
