"""Live engines of the tests run in the environment that vLLM needs on a CPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from validate.environment import cpu_environment


@pytest.fixture(scope="session", autouse=True)
def _environment() -> Iterator[None]:
    """What can still be set: ``LD_PRELOAD`` is for processes that start later."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in cpu_environment().items():
            patch.setenv(name, value)
        yield
