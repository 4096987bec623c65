"""The price of the plug-in: what is counted, and when it is too high."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any

import pytest
import typer

from validate import overhead


@pytest.mark.parametrize(("lru_us", "code"), [(109.0, 0), (111.0, 1)])
def test_the_exit_code_tells_whether_lru_costs_too_much(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    lru_us: float,
    code: int,
) -> None:
    slow: Iterator[float] = iter([1000.0, lru_us, lru_us])  # one bad round does not count

    def measure(policies: Mapping[str, Any], requests: int) -> tuple[float, int]:
        if policies == {"eviction": "lru"}:
            return next(slow), 10
        return (500.0 if policies else 100.0), 10

    monkeypatch.setitem(sys.modules, "validate.vllm_plugin", ModuleType("plugin"))
    monkeypatch.setattr(overhead, "measure", measure)
    monkeypatch.setattr(overhead, "evictions", lambda requests: 20)
    with pytest.raises(typer.Exit) as ended:
        overhead.main(5, 3)
    assert ended.value.exit_code == code
    out = capsys.readouterr().out
    assert f"eviction lru takes {lru_us / 100:.3f} of stock vLLM's time" in out
    assert ("that is too much: at most 1.10 is allowed" in out) == bool(code)


@pytest.mark.vllm
def test_measuring_step_times_is_part_of_the_price(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("vllm", reason="needs vLLM: make validate builds an environment with it")
    from validate.vllm_plugin.views import StepTimes  # noqa: PLC0415 - needs vLLM

    told: list[int] = []
    monkeypatch.setattr(StepTimes, "ran", lambda self, began, ended, tokens: told.append(tokens))
    _, steps = overhead.measure({"eviction": "lru"}, 5)
    assert 0 < len(told) <= steps
    told.clear()
    overhead.measure({}, 5)
    assert not told
