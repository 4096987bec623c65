"""The engines of a live run while they are up, and the thread that their clients live in."""

from __future__ import annotations

import asyncio
import gc
import tempfile
import threading
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from validate.vllm_plugin.live import LiveEngine

__all__ = ["EnginesUp"]

T = TypeVar("T")


class EnginesUp:
    """Engines that are up, and the event loop that their clients are bound to.

    The loop has a thread of its own, because the caller may be in a loop (a notebook is).
    """

    def __init__(self) -> None:
        self.engines: list[LiveEngine] = []
        self.complete = False
        """All engines have started."""
        self.runs = 0
        self.scratch = tempfile.TemporaryDirectory(prefix="servelab-")
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="live", daemon=True)
        self._thread.start()

    @property
    def reusable(self) -> bool:
        """Whether another run can use the engines."""
        return self.complete and all(e.renewable and not e.died for e in self.engines)

    def wait(self, work: Coroutine[Any, Any, T], interrupt: Callable[[], bool]) -> T:
        """Run it on the loop; ``interrupt`` says whether it then ends by itself."""
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        while True:
            try:
                return future.result()
            except KeyboardInterrupt:
                if not interrupt():
                    future.cancel()
                    raise

    def close(self) -> None:
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        for engine in self.engines:
            engine.forget()
        self.engines.clear()
        gc.collect()  # vLLM's clients are reference cycles that hold sockets
        self.scratch.cleanup()

    async def _end(self) -> None:
        # First what vLLM's clients left running in the loop, which would report a dead engine.
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        for engine in self.engines:
            engine.close()
