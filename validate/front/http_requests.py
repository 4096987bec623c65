"""What an HTTP request to an OpenAI-style server shows a policy: a ``RequestView``."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import Any, TypeGuard, TypeVar

from policies.api import Slo
from validate.front.prefix_index import chain

__all__ = ["COMPLETION_TOKENS", "HttpRequest", "prompts_of", "request_of"]

T = TypeVar("T")

COMPLETION_TOKENS = 16
"""What ``/v1/completions`` generates when the client names no limit (OpenAI's default)."""

TOKEN_IDS = range(1 << 63)
"""What a prompt may hold; which of them the model has, its engine knows."""

SESSION_HEADER = "X-Session-ID"
PRIORITY_HEADER = "X-Vllm-Priority"
"""As in vLLM (``entrypoints/generate/base/serving.py``)."""


@dataclass(frozen=True, kw_only=True, eq=False)
class HttpRequest:
    """A request as it arrives at the front; a ``RequestView``.

    Several prompts in one request are placed together: their tokens are added up, and the
    prefix is the first one's.
    """

    id: str
    arrival_s: float
    prompt_tokens: int
    max_tokens: int
    priority: int = 0
    slo: Slo = field(default_factory=Slo)
    session: str = ""
    tenant: str = ""
    model: str = ""
    kind: str = ""
    tokens: Sequence[int] = ()
    """Ids of the (first) prompt; empty where only the number of tokens is known."""
    cache_salt: str = ""
    block_tokens: int = 0
    """Block size of ``block_hashes``; 0: nothing is known of the engines' caches."""

    computed_tokens = 0
    output_tokens = 0
    preemptions = 0

    def __post_init__(self) -> None:
        self.__dict__["_chains"] = {}

    @property
    def block_hashes(self) -> Sequence[Hashable]:
        """Digests by content, in the block size that the first engine published."""
        return self.digests(self.block_tokens) if self.block_tokens else ()

    def digests(self, block_tokens: int) -> Sequence[bytes]:
        """As ``block_hashes``, in any block size."""
        chains: dict[int, list[bytes]] = self.__dict__["_chains"]
        if block_tokens not in chains:
            extra = ([self.cache_salt],) if self.cache_salt else ()
            chains[block_tokens] = chain(self.tokens, block_tokens, extra_keys=extra)
        return chains[block_tokens]


def prompts_of(body: Mapping[str, Any]) -> list[str | list[int]]:
    """The prompts of a completion request, texts or token ids; none where it is malformed."""
    prompt = body.get("prompt")
    if isinstance(prompt, str):
        return [prompt]
    if not isinstance(prompt, list) or not prompt:
        return []
    if all(map(_is_int, prompt)):
        return [prompt]
    if all(isinstance(p, str) or (isinstance(p, list) and all(map(_is_int, p))) for p in prompt):
        return prompt
    return []


def request_of(
    body: Mapping[str, Any],
    headers: Mapping[str, str],
    prompts: Sequence[Sequence[int]],
    *,
    ident: str,
    now: float,
    context_tokens: int = 0,
    block_tokens: int = 0,
) -> HttpRequest:
    """The view of a request.

    Facts for policies come from ``vllm_xargs`` under the names of trace columns: ``slo_class,
    slo_ttft_s, slo_tpot_s, slo_e2e_s`` (seconds), ``session``, ``tenant``, ``kind``, ``model``,
    ``client_max_tokens``. Where these are missing, ``session`` is vLLM's session id (field or
    header), ``tenant`` is OpenAI's ``user`` and ``model`` is the field of that name. A value of
    the wrong type counts as missing: the engine is the one to refuse it.

    Args:
        body: the JSON object.
        headers: looked up without regard to case.
        prompts: token ids of every prompt; empty where they are not known.
        ident: name of the request in messages.
        now: arrival, seconds since the front began.
        context_tokens: most tokens of prompt and answer together; what a chat may generate
            when it names no limit is what the prompt leaves of it. 0: unknown.
        block_tokens: block size of ``block_hashes``; 0 where no engine has published one.

    Raises:
        ValueError: a token id is not one of ``TOKEN_IDS``.
    """
    for extreme in (f(prompt) for prompt in prompts if prompt for f in (min, max)):
        if extreme not in TOKEN_IDS:
            raise ValueError(f"token id {extreme} in the prompt: 0 to {TOKEN_IDS[-1]} are allowed")
    facts = body.get("vllm_xargs")
    facts = facts if isinstance(facts, Mapping) else {}
    tokens = sum(map(len, prompts))
    limits = (facts.get("client_max_tokens"), body.get("max_completion_tokens"))
    wanted = (*limits, body.get("max_tokens"))
    limit = next((v for v in wanted if _is_int(v) and v >= 0), None)
    if limit is None:
        limit = max(context_tokens - tokens, 0) if "messages" in body else COMPLETION_TOKENS
    sessions = (facts.get("session"), body.get("session_id"), headers.get(SESSION_HEADER))
    return HttpRequest(
        id=ident,
        arrival_s=now,
        prompt_tokens=tokens,
        max_tokens=limit,
        priority=_number(int, headers.get(PRIORITY_HEADER), body.get("priority"), default=0),
        slo=Slo(
            name=_text(facts.get("slo_class")) or "none",
            ttft_s=_number(float, facts.get("slo_ttft_s"), default=inf),
            tpot_s=_number(float, facts.get("slo_tpot_s"), default=inf),
            e2e_s=_number(float, facts.get("slo_e2e_s"), default=inf),
        ),
        session=_text(*sessions, facts.get("session_id")),
        tenant=_text(facts.get("tenant"), body.get("user")),
        model=_text(facts.get("model"), body.get("model")),
        kind=_text(facts.get("kind")),
        tokens=prompts[0] if prompts else (),
        cache_salt=_text(body.get("cache_salt")),
        block_tokens=block_tokens,
    )


def _is_int(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _text(*values: object) -> str:
    """The first value that is a text or a number, as a text."""
    for value in values:
        if isinstance(value, str | int | float) and not isinstance(value, bool) and value != "":
            return str(value)
    return ""


def _number(kind: Callable[[Any], T], *values: object, default: T) -> T:
    """The first value that is a number or reads as one."""
    for value in values:
        if isinstance(value, str | int | float) and str(value) != "nan":
            try:
                return kind(value)
            except (ValueError, OverflowError):
                continue
    return default
