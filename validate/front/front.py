"""The front: one HTTP server before several vLLM engines, which our routing policies fill.

``servelab front`` places every request with the same ``PDPolicy`` and ``Router`` objects that
the simulator uses. What these see of the engines, and how old it is, says ``signals.Instance``.
"""

# ruff: noqa: PLC0415 - aiohttp comes with vLLM

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Sequence
from typing import Any
from urllib.parse import urlsplit

import yaml

from policies.api import InstanceView, PDPolicy, PolicyError
from policies.registry import PolicySpec, build, load_module, policy_set
from validate.front.http_requests import HttpRequest
from validate.front.signals import Instance, Sample

__all__ = ["Front", "NoEngineError", "front", "policy_spec"]

HOST = "127.0.0.1"


class NoEngineError(RuntimeError):
    """No engine is up."""


class Front:
    """Places requests with one ``PDPolicy``; a ``ClusterView`` of the engines that are up.

    Args:
        urls: of the engines, which are numbered from 0 in this order.
        pd: the policy.
        clock: seconds since the front began.
        warn: called with one line when an engine goes down or the policy fails.
        note: called with one line when an engine comes up.
    """

    def __init__(
        self,
        urls: Sequence[str],
        pd: PDPolicy,
        clock: Callable[[], float],
        *,
        warn: Callable[[str], None],
        note: Callable[[str], None],
    ) -> None:
        self.engines = [Instance(ident, url, clock) for ident, url in enumerate(urls)]
        self.pd = pd
        self.clock = clock
        self.warn = warn
        self.note = note
        self._up: list[Instance] = []
        self._listens = getattr(pd, "listens", False)
        self._down_said: set[int] = set()
        self._unfollowed_said = False

    @property
    def instances(self) -> Sequence[InstanceView]:
        """The engines that are up; another list whenever that changes."""
        return self._up

    @property
    def up(self) -> Sequence[Instance]:
        """As ``instances``."""
        return self._up

    def place(self, request: HttpRequest) -> Instance:
        """The engine that gets the request.

        Raises:
            NoEngineError: none is up.
            PolicyError: the policy failed, or answered something else than an engine that is up.
        """
        if not self._up:
            raise NoEngineError(
                f"no engine is up; tried again soon: {', '.join(map(_name, self.engines))}"
            )
        call = f"{self.policy}.place({request.id})"
        try:
            placement = self.pd.place(request, self, self.clock())
        except Exception as error:
            raise PolicyError(f"{call} failed: {type(error).__name__}: {error}") from error
        prefill = getattr(placement, "prefill", None)
        decode = getattr(placement, "decode", None)
        instance: Instance | None = next((engine for engine in self._up if engine is prefill), None)
        if instance is None:
            raise PolicyError(
                f"{call} answered {placement!r}; "
                f"a Placement of instances of the cluster was expected"
            )
        # An engine pair would be driven from here: prefill with max_tokens=1, then decode.
        if decode is not prefill:
            raise PolicyError(
                f"{call} split prefill and decode over instances {instance.id} and "
                f"{getattr(decode, 'id', None)}; this deployment is colocated"
            )
        if instance.wanted and not instance.followed and not self._unfollowed_said:
            self._unfollowed_said = True
            self.warn(
                f"{self.policy} asks what {_name(instance)} has cached, but nobody follows its "
                f"KV events: the answer is always 0"
            )
        return instance

    def sent(self, instance: Instance, request: HttpRequest) -> None:
        """The request goes to the engine now."""
        instance.sent(request)
        self._changed(instance)

    def ended(self, instance: Instance, request: HttpRequest) -> None:
        """The engine has answered the request, or will not any more."""
        if instance.ended(request):
            self._changed(instance)

    def polled(self, instance: Instance, sample: Sample, asked_s: float) -> None:
        """The engine answered a poll that was sent at ``asked_s``: it is up."""
        changed = instance.polled(sample, asked_s)
        if not instance.up:
            instance.up = True
            self._up = [engine for engine in self.engines if engine.up]
            self._down_said.discard(instance.id)
            self.note(f"{_name(instance)} is up")
            changed = True
        if changed:
            self._changed(instance)

    def lost(self, instance: Instance, why: str) -> None:
        """The engine cannot be reached: it gets no request until a poll succeeds."""
        instance.up = False
        self._up = [engine for engine in self._up if engine is not instance]
        if instance.id not in self._down_said:
            self._down_said.add(instance.id)
            self.warn(f"{_name(instance)} is down ({why}); {len(self._up)} left, tried again")

    def _changed(self, instance: Instance) -> None:
        if not self._listens:
            return
        try:
            self.pd.changed(instance)
        except Exception as error:
            self.warn(f"{self.policy}.changed failed: {type(error).__name__}: {error}")

    @property
    def policy(self) -> str:
        """The placement policy, with its router if it has one, for messages."""
        router = getattr(self.pd, "router", None)
        return _policy(self.pd) if router is None else f"{_policy(router)} in {_policy(self.pd)}"


def policy_spec(name: str, options: Sequence[str]) -> PolicySpec:
    """A policy with parameters from a command line: ``("prefix_affinity", ["balance_abs=4"])``.

    Raises:
        ValueError: an option is not of the form ``key=value``.
    """
    values: dict[str, Any] = {}
    for option in options:
        key, equals, value = option.partition("=")
        if not equals or not key.isidentifier():
            raise ValueError(f"{option!r} is not of the form key=value (a parameter of {name})")
        try:
            values[key] = yaml.safe_load(value)
        except yaml.YAMLError:
            values[key] = value
    return {"name": name, **values}


def front(
    engines: Sequence[str],
    *,
    routing: PolicySpec | None = None,
    pd: PolicySpec = "colocated",
    policy_modules: Sequence[str] = (),
    kv_events: Sequence[str] = (),
    host: str = HOST,
    port: int = 8000,
    signal_s: float = 0.25,
    seed: int = 0,
) -> None:
    """Serve until interrupted (SIGINT, SIGTERM).

    Args:
        engines: base URLs of vLLM servers (``http://127.0.0.1:8001``).
        routing: router for the PD policy; round robin if not given.
        pd: placement policy.
        policy_modules: files or modules with policies of the user's own, loaded first.
        kv_events: for each engine the endpoint of its KV events, ``tcp://HOST:PORT`` or
            ``tcp://HOST:PORT,tcp://HOST:REPLAY_PORT``, or an empty text; nothing for all.
        host: address to listen on.
        port: port to listen on.
        signal_s: seconds between two polls of an engine.
        seed: of everything random.

    Raises:
        ValueError: an argument is out of range, a parameter of a policy is unknown or has the
            wrong type, the port is in use, or aiohttp is missing.
        UnknownPolicy: no policy has the name.
        PolicyError: a policy module or factory fails.
    """
    from experiments.console import note, warn

    try:
        from validate.front.proxy import Proxy
    except ModuleNotFoundError as error:
        raise ValueError(
            f"the front needs {error.name}, which is not installed: pip install 'servelab[vllm]'"
        ) from None

    urls = check_engines(engines)
    if not signal_s > 0:
        raise ValueError(f"signal_s is {signal_s}; more than 0 is allowed")
    if kv_events and len(kv_events) != len(urls):
        raise ValueError(
            f"{len(kv_events)} KV events endpoints for {len(urls)} engines; "
            f"give one for each engine, in the same order"
        )
    for module in policy_modules:
        load_module(module)
    try:
        policy: PDPolicy = build(policy_set(pd=pd, routing=routing).pd, seed, "pd")
    except TypeError as error:
        raise ValueError(str(error)) from None

    async def run() -> None:
        stop = asyncio.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        began = asyncio.get_running_loop().time
        start_s = began()
        cluster = Front(urls, policy, lambda: began() - start_s, warn=warn, note=note)
        proxy = Proxy(cluster, kv_events=kv_events, signal_s=signal_s)
        async with proxy.serving(host, port) as url:
            note(f"front of {len(urls)} engines at {url}, {cluster.policy}")
            await stop.wait()
        note(proxy.summary())

    asyncio.run(run())


def check_engines(urls: Sequence[str]) -> list[str]:
    """The base URLs, without a slash or ``/v1`` at the end.

    Raises:
        ValueError: there is none, one is malformed, or one is named twice.
    """
    plain = [url.rstrip("/").removesuffix("/v1") for url in urls]
    if not plain:
        raise ValueError("no engine; name at least one, for example http://127.0.0.1:8001")
    for url in plain:
        parts = urlsplit(url)
        if parts.scheme not in {"http", "https"} or not parts.hostname or parts.path:
            raise ValueError(f"engine {url!r} is no base URL like http://127.0.0.1:8001")
        if plain.count(url) > 1:
            raise ValueError(f"engine {url} is named twice")
    return plain


def _name(instance: Instance) -> str:
    return f"engine {instance.id} at {instance.url}"


def _policy(policy: object) -> str:
    return str(getattr(type(policy), "policy_name", type(policy).__qualname__))
