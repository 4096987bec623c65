"""What a policy sees of an HTTP request, whatever a client sends."""

from __future__ import annotations

from math import inf, nan
from typing import Any

import pytest

from policies.api import Slo
from validate.front.http_requests import HttpRequest, prompts_of, request_of
from validate.front.prefix_index import chain


def view(
    body: dict[str, Any],
    prompts: list[list[int]] | None = None,
    headers: dict[str, str] | None = None,
) -> HttpRequest:
    return request_of(
        body, headers or {}, prompts or [[1, 2, 3]], ident="r", now=2.5, context_tokens=100,
        block_tokens=2,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("body", "prompts"),
    [
        ({"prompt": "a b"}, ["a b"]),
        ({"prompt": [1, 2]}, [[1, 2]]),
        ({"prompt": ["a", "b"]}, ["a", "b"]),
        ({"prompt": [[1], [2, 3]]}, [[1], [2, 3]]),
        ({"prompt": []}, []),
        ({"prompt": [1, "a"]}, []),
        ({"prompt": [[1], [-2]]}, [[1], [-2]]),
        ({"prompt": [[1], [2.0]]}, []),
        ({"prompt": [True]}, []),
        ({}, []),
    ],
)
def test_prompts(body: dict[str, Any], prompts: list[Any]) -> None:
    assert prompts_of(body) == prompts


def test_without_facts_everything_is_at_its_default() -> None:
    request = view({})
    assert (request.id, request.arrival_s, request.prompt_tokens) == ("r", 2.5, 3)
    assert (request.max_tokens, request.priority, request.slo) == (16, 0, Slo())
    assert (request.session, request.tenant, request.model, request.kind) == ("", "", "", "")
    assert request.computed_tokens == request.output_tokens == request.preemptions == 0


@pytest.mark.parametrize(
    ("body", "tokens"),
    [
        ({"max_tokens": 5}, 5),
        ({"max_tokens": 5, "max_completion_tokens": 6}, 6),
        ({"max_tokens": 5, "vllm_xargs": {"client_max_tokens": 7}}, 7),
        ({"max_tokens": "5"}, 16),
        ({"messages": []}, 97),
        ({"messages": [], "max_tokens": 4}, 4),
    ],
)
def test_limits(body: dict[str, Any], tokens: int) -> None:
    assert view(body).max_tokens == tokens


def test_facts_come_before_fields_and_headers() -> None:
    body = {"session_id": "b", "user": "u", "model": "m", "priority": 2}
    assert view(body).session == "b"
    assert view({}, headers={"X-Session-ID": "h"}).session == "h"
    assert view(body, headers={"X-Vllm-Priority": "-1"}).priority == -1
    facts = {"session": 7, "tenant": "t", "model": "n", "kind": "k", "slo_e2e_s": "2"}
    request = view(body | {"vllm_xargs": facts})
    assert (request.session, request.tenant, request.model) == ("7", "t", "n")
    assert (request.kind, request.priority, request.slo.e2e_s) == ("k", 2, 2.0)


@pytest.mark.parametrize("wrong", [-1, 2**63])
def test_impossible_token_ids_are_refused(wrong: int) -> None:
    assert view({}, [[0, 2**63 - 1], []]).block_hashes
    with pytest.raises(ValueError, match=f"token id {wrong} in the prompt: 0 to 92233"):
        view({}, [[1, 2], [3, wrong, 4]])


@pytest.mark.parametrize("wrong", [None, "soon", nan, [], {"a": 1}])
def test_values_of_the_wrong_type_count_as_missing(wrong: Any) -> None:
    facts = {"slo_ttft_s": wrong, "slo_class": None, "client_max_tokens": wrong}
    request = view({"vllm_xargs": facts, "priority": wrong})
    assert (request.slo.ttft_s, request.slo.name) == (inf, "none")
    assert (request.max_tokens, request.priority) == (16, 0)
    assert view({"vllm_xargs": wrong}).tenant == ""


def test_an_endless_priority_counts_as_missing() -> None:
    assert view({"priority": inf}).priority == 0


def test_several_prompts_count_together_and_the_first_is_looked_up() -> None:
    request = view({}, [[1, 2, 3, 4, 5], [6, 7]])
    assert request.prompt_tokens == 7
    assert request.block_hashes == chain([1, 2, 3, 4], 2)
    assert request.digests(3) == chain([1, 2, 3], 3)
    salted = view({"cache_salt": "s"}, [[1, 2, 3, 4]])
    assert salted.block_hashes == chain([1, 2, 3, 4], 2, extra_keys=[["s"]])
