"""The variables for processes that run vLLM on the CPU."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from validate.environment import cpu_environment


def test_the_openmp_library_is_preloaded_where_there_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    assert "LD_PRELOAD" not in cpu_environment()
    library = tmp_path / "lib" / "libiomp5.so"
    library.parent.mkdir()
    library.touch()
    assert cpu_environment()["LD_PRELOAD"] == str(library)


def test_what_the_caller_set_is_kept_but_for_what_makes_timing_worthless(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MINE", "1")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "7")
    monkeypatch.setenv("KMP_BLOCKTIME", "200")
    monkeypatch.delenv("VLLM_CPU_OMP_THREADS_BIND", raising=False)
    values = cpu_environment()
    assert values["MINE"] == "1"
    assert values["VLLM_CPU_KVCACHE_SPACE"] == "7"
    assert values["KMP_BLOCKTIME"] == "1"
    assert "VLLM_CPU_OMP_THREADS_BIND" not in values
    assert cpu_environment(core=1)["VLLM_CPU_OMP_THREADS_BIND"] == "1"
