"""Rules of reuse policies: no more than the match is used, and asking changes nothing."""

from __future__ import annotations

import random
from collections.abc import Mapping

from policies.api import PrefixMatch, Tier
from policies.contract.subject import SLOS, Answers, Subject, guarded
from policies.fakes import FakeEngine, FakeRequest


def reuse(subject: Subject, asks: int) -> Answers:
    """Offer matches of all sizes; ask for each ``asks`` times over."""
    dice = random.Random(3)
    engine = guarded(FakeEngine())
    answers: Answers = []
    for index in range(60):
        prompt = dice.choice((16, 500, 4000, 30_000))
        request = guarded(FakeRequest(id=f"r{index}", prompt_tokens=prompt, slo=dice.choice(SLOS)))
        match = PrefixMatch(((Tier.HBM, dice.randrange(prompt) // 16 * 16),))
        args = (request, match, engine, float(index))
        used = [subject.ask("use", *args) for _ in range(asks)]
        for use in used:
            if type(use) is not int or not 0 <= use <= match.tokens:
                raise subject.broke(
                    "use", args, f"answered {use!r}; a whole number to {match.tokens} was expected"
                )
            if use != used[0]:
                raise subject.broke("use", args, f"answered {used[0]}, then {use}")
        kept = subject.ask("retain", request, engine, float(index))
        if kept is not None and not (
            isinstance(kept, Mapping)
            and all(isinstance(tier, Tier) for tier in kept)
            and all(type(tokens) is int and tokens >= 0 for tokens in kept.values())
        ):
            raise subject.broke(
                "retain",
                (request, engine, float(index)),
                f"answered {kept!r}; None or tokens (0 or more) per Tier were expected",
            )
        answers.append((used[0], None if kept is None else dict(kept)))
    return answers
