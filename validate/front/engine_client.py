"""What the front asks vLLM servers over HTTP.

This module needs aiohttp, which comes with vLLM.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Mapping
from hashlib import blake2b
from typing import Any

from aiohttp import ClientError, ClientSession, ClientTimeout, TCPConnector

from validate.front.http_requests import prompts_of
from validate.front.signals import Sample, parse_metrics

__all__ = ["UNREACHABLE", "EngineClient"]

UNREACHABLE = (ClientError, TimeoutError, OSError, ValueError, KeyError)
"""What a question raises whose engine is down, refuses, or answers nonsense."""

ANSWER_S = 5.0
"""An engine that does not answer a question for so long is down."""

KEEP_ALIVE_S = 2.0
"""Idle connections are closed before the engine does it (``VLLM_HTTP_TIMEOUT_KEEP_ALIVE``, 5 s):
a request sent while that happens would be lost."""

TOKENIZED = 1024
"""Prompts whose tokens are remembered."""

CHAT_FIELDS = (
    "model", "messages", "add_generation_prompt", "continue_final_message", "add_special_tokens",
    "chat_template", "chat_template_kwargs", "media_io_kwargs", "mm_processor_kwargs", "tools",
)  # fmt: skip
"""What of a chat the engine's ``/tokenize`` takes."""


class EngineClient:
    """A pool of connections to all engines; use it as an asynchronous context.

    Every question raises one of ``UNREACHABLE``.
    """

    def __init__(self) -> None:
        self._session: Any = None
        self._tokens: OrderedDict[bytes, list[list[int]]] = OrderedDict()

    async def __aenter__(self) -> EngineClient:
        self._session = ClientSession(
            connector=TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_S),
            timeout=ClientTimeout(total=None, sock_connect=ANSWER_S),
            auto_decompress=False,
            skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding"),
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    def send(self, url: str, body: bytes, headers: Mapping[str, str]) -> Any:
        """A client's request, as it came: an asynchronous context with aiohttp's response.

        Leaving it before the answer's end closes the connection, upon which vLLM aborts.
        """
        return self._session.post(
            url, data=body, headers=headers, skip_auto_headers=("Content-Type",)
        )

    async def sample(self, url: str) -> Sample:
        """The engine's queues now."""
        return parse_metrics((await self._ask("GET", f"{url}/metrics")).decode())

    async def models(self, url: str) -> list[dict[str, Any]]:
        """The models that it serves, as OpenAI lists them."""
        models: list[dict[str, Any]] = json.loads(await self._ask("GET", f"{url}/v1/models"))[
            "data"
        ]
        return models

    async def prompts(self, url: str, body: Mapping[str, Any]) -> list[list[int]]:
        """Token ids of every prompt of a request; the latest ones are remembered."""
        if "messages" in body:
            asked = [{key: body[key] for key in CHAT_FIELDS if key in body}]
        else:
            prompts = prompts_of(body)
            ids = [prompt for prompt in prompts if isinstance(prompt, list)]
            if len(ids) == len(prompts):
                return ids
            options = {key: body[key] for key in ("model", "add_special_tokens") if key in body}
            asked = [options | {"prompt": prompt} for prompt in prompts]
        name = blake2b(json.dumps(asked, sort_keys=True).encode(), digest_size=16).digest()
        if name not in self._tokens:
            texts = [await self._ask("POST", f"{url}/tokenize", each) for each in asked]
            self._tokens[name] = [json.loads(text)["tokens"] for text in texts]
            if len(self._tokens) > TOKENIZED:
                self._tokens.popitem(last=False)
        self._tokens.move_to_end(name)
        return self._tokens[name]

    async def _ask(self, method: str, url: str, body: object = None) -> bytes:
        async with self._session.request(
            method, url, json=body, timeout=ClientTimeout(total=ANSWER_S), raise_for_status=True
        ) as answer:
            read: bytes = await answer.read()
            return read
