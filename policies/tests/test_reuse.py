"""Reuse policies against a table worked out by hand."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from policies.api import PrefixMatch, ReusePolicy, Tier
from policies.fakes import FakeEngine, FakeRequest
from policies.reuse.always import Always
from policies.reuse.cap import Cap
from policies.reuse.never import Never


@pytest.mark.parametrize(
    ("policy", "used", "kept"),
    [
        (Always(), [0, 96, 960], None),
        (Never(), [0, 0, 0], {Tier.HBM: 0}),
        (Cap(max_tokens=100), [0, 96, 100], None),
        (Cap(max_tokens=0), [0, 0, 0], None),
    ],
)
def test_what_is_used_of_a_match_and_kept_of_a_prompt(
    policy: ReusePolicy, used: list[int], kept: Mapping[Tier, int] | None
) -> None:
    request, engine = FakeRequest(prompt_tokens=1000), FakeEngine()
    matches = [PrefixMatch(((Tier.HBM, tokens),)) for tokens in (0, 96, 960)]
    assert [policy.use(request, match, engine, 0.0) for match in matches] == used
    assert policy.retain(request, engine, 0.0) == kept


def test_a_negative_cap_is_refused() -> None:
    with pytest.raises(ValueError, match="max_tokens is -1; at least 0 is allowed"):
        Cap(max_tokens=-1)
