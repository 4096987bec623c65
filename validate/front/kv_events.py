"""Follows the KV events that a vLLM engine publishes over ZeroMQ.

An engine publishes with ``--kv-events-config '{"enable_kv_cache_events": true, "publisher":
"zmq", "endpoint": "tcp://*:5557", "replay_endpoint": "tcp://*:5558"}'``; the replay endpoint is
optional. Messages are ``(topic, sequence number, batch)``; see ``distributed/kv_events.py``.
"""

# ruff: noqa: PLC0415 - the libraries come with vLLM

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from validate.front.prefix_index import PrefixIndex

__all__ = ["KvEvents"]

END = (-1).to_bytes(8, "big", signed=True)
"""Instead of a sequence number: the replay is over."""

REPLAY_TIMEOUT_S = 2.0


class KvEvents:
    """Keeps the prefix index of one engine up to date.

    When messages were missed (or the engine had published before we listened), they are asked
    for again where there is a replay endpoint. What remains missing makes the index wrong, so it
    is dropped, which ``say`` hears, and grows again with what is stored from then on.

    Args:
        index: what to update.
        endpoints: ``tcp://host:port``, or two of them with a comma: events and replay.
        say: called with one line about the engine's events.

    Raises:
        ValueError: ``endpoints`` is malformed.
    """

    def __init__(self, index: PrefixIndex, endpoints: str, say: Callable[[str], None]) -> None:
        parts = endpoints.split(",")
        if len(parts) > 2 or not all(part.startswith(("tcp://", "ipc://")) for part in parts):
            raise ValueError(
                f"KV events endpoint {endpoints!r} is not of the form tcp://HOST:PORT or "
                f"tcp://HOST:PORT,tcp://HOST:REPLAY_PORT"
            )
        self.index = index
        self._events, self._replay = parts[0], parts[1] if len(parts) == 2 else None
        self._say = say
        self._next: int | None = None
        self._heard = -1
        self.resets = 0
        """How often the index was dropped because events were missing."""

    def restart(self) -> None:
        """The engine has died: what it had cached is gone, and it will count from 0 again."""
        self._next = None
        self._heard = -1
        self.index.clear()

    async def follow(self) -> None:
        """Take in events until cancelled."""
        import zmq
        import zmq.asyncio

        with zmq.asyncio.Context() as context, context.socket(zmq.SUB) as socket:
            socket.setsockopt(zmq.LINGER, 0)
            socket.setsockopt(zmq.RCVHWM, 0)
            socket.subscribe(b"")
            socket.connect(self._events)
            while True:
                _, number, payload = await socket.recv_multipart()
                await self.take(int.from_bytes(number, "big"), payload)

    async def take(self, number: int, payload: bytes) -> None:
        """Take in the batch with this sequence number, after those missing before it."""
        if number <= self._heard:  # numbers only fall when another publisher begins
            self.restart()
        self._heard = number
        expected = self._next or 0
        if number > expected and self._replay is not None:
            for missing, batch in await self._replayed(expected):
                self._apply(missing, batch)
        if number >= (self._next or 0):  # a replay may have brought it already
            self._apply(number, payload)

    def _apply(self, number: int, payload: bytes) -> None:
        import msgspec

        first = self._next is None
        missing = number - (self._next or 0)
        if missing < 0:
            return
        if missing:
            self.index.clear()
            if first:
                self._say(f"{missing} batches of KV events came before the front listened")
            else:
                self.resets += 1
                self._say(f"{missing} batches of KV events are missing: prefix index dropped")
        self._next = number + 1
        for event in msgspec.msgpack.decode(payload)[1]:
            self.index.apply(event)

    async def _replayed(self, start: int) -> list[tuple[int, bytes]]:
        """Batches from this number on, as far as the engine still has them."""
        import zmq
        import zmq.asyncio

        batches: list[tuple[int, bytes]] = []

        async def ask(socket: Any) -> None:
            await socket.send_multipart([b"", start.to_bytes(8, "big")])
            while True:
                _, _, number, payload = await socket.recv_multipart()
                if number == END:
                    return
                batches.append((int.from_bytes(number, "big"), payload))

        with zmq.asyncio.Context() as context, context.socket(zmq.DEALER) as socket:
            socket.setsockopt(zmq.LINGER, 0)
            socket.connect(self._replay)
            try:
                await asyncio.wait_for(ask(socket), REPLAY_TIMEOUT_S)
            except TimeoutError:
                self._say(f"no replay of KV events from {self._replay}")
        return batches
