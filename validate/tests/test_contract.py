"""The installed vLLM has what the plug-in relies on, and a missing piece is noticed by name."""

# ruff: noqa: E402 - vLLM is looked for before what needs it is imported

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from types import CodeType, FunctionType, SimpleNamespace
from typing import Any

import pytest

pytestmark = pytest.mark.vllm
pytest.importorskip("vllm", reason="needs vLLM: make validate builds an environment with it")

import vllm
from vllm.v1.core.block_pool import BlockPool

from validate.vllm_plugin import seams
from validate.vllm_plugin.seams import SEAMS, Seam, VllmError


def test_the_installed_vllm_fits() -> None:
    assert seams.contract() == []


def rename(code: CodeType, name: str) -> CodeType:
    """The code with every ``name`` in it called something else."""

    def other(names: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple("renamed" if each == name else each for each in names)

    consts = other(tuple(rename(c, name) if isinstance(c, CodeType) else c for c in code.co_consts))
    return code.replace(
        co_names=other(code.co_names), co_varnames=other(code.co_varnames), co_consts=consts
    )


class Without:
    """A class or module of vLLM that lacks one name, or has another object in its place."""

    def __init__(self, owner: Any, name: str, instead: Any = None) -> None:
        self._owner, self._name, self._instead = owner, name, instead
        init = getattr(getattr(owner, "__init__", None), "__code__", None)
        if init is not None:
            self.__dict__["__init__"] = SimpleNamespace(__code__=rename(init, name))
        if name == "__init__":
            self.__dict__[name] = instead

    def __getattr__(self, name: str) -> Any:
        if name != self._name:
            return getattr(self._owner, name)
        if self._instead is None:
            raise AttributeError(name)
        return self._instead


def broken(seam: Seam) -> Iterator[tuple[Any, str]]:
    """Stand-ins for the seam's module, each with one thing gone, and what the message says."""
    module = importlib.import_module(seam.module)
    outer, _, last = seam.name.rpartition(".")
    owner = getattr(module, outer) if outer else module

    def stand_in(instead: Any = None) -> Any:
        changed = Without(owner, last, instead)
        return Without(module, outer, changed) if outer else changed

    if last != "__init__":  # which every class has
        yield stand_in(), "is gone"
    if seam.returns:
        other = FunctionType(getattr(owner, last).__code__, {})
        yield stand_in(other), f"does not return {seam.returns!r} any more"
    for names, says in ((seam.parameters, "takes no parameter"), (seam.uses, "does not use")):
        for name in names:
            code = rename(getattr(owner, last).__code__, name)
            yield stand_in(FunctionType(code, {})), f"{says} {name!r} any more"


@pytest.mark.parametrize("seam", SEAMS, ids=[seam.path for seam in SEAMS])
def test_a_seam_that_goes_is_noticed_and_named(seam: Seam, monkeypatch: Any) -> None:
    monkeypatch.setattr(seams, "SEAMS", (seam,))
    assert seams.contract() == []
    for module, says in broken(seam):
        monkeypatch.setattr(seams, "import_module", lambda _, module=module: module)
        assert seams.contract() == [f"{seam.path} {says}: {seam.what}"]


def test_a_method_removed_from_vllm_is_noticed(monkeypatch: Any) -> None:
    monkeypatch.delattr(BlockPool, "touch")
    path = "vllm.v1.core.block_pool.BlockPool.touch"
    assert seams.contract() == [f"{path} is gone: eviction cannot be plugged in"]
    with pytest.raises(VllmError, match=f"does not fit into vLLM .*{path} is gone"):
        seams.check()


def test_an_attribute_no_longer_set_is_noticed(monkeypatch: Any) -> None:
    def init(self: Any) -> None:
        self.blocks = self.num_gpu_blocks = ()

    monkeypatch.setattr(BlockPool, "__init__", init)
    (line,) = seams.contract()
    assert line == (
        "vllm.v1.core.block_pool.BlockPool.free_block_queue is gone: eviction cannot be plugged in"
    )


def test_a_changed_signature_and_a_changed_body_are_noticed(monkeypatch: Any) -> None:
    def get_new_blocks(self: Any, count: int) -> Any:
        return self.free_block_queue.take(count)

    monkeypatch.setattr(BlockPool, "get_new_blocks", get_new_blocks)
    line, *_ = seams.contract()
    assert "get_new_blocks takes no parameter 'num_blocks' any more" in line

    def renamed(self: Any, num_blocks: int) -> Any:
        return self.free_block_queue.take(num_blocks)

    monkeypatch.setattr(BlockPool, "get_new_blocks", renamed)
    line, *_ = seams.contract()
    assert "get_new_blocks does not use 'popleft_n' any more" in line


@pytest.mark.parametrize("version", ["0.31.0", "0.32.0", "0.32.4+cpu"])
def test_supported_releases_pass_silently(version: str, monkeypatch: Any) -> None:
    monkeypatch.setattr(vllm, "__version__", version)
    seams.check()


@pytest.mark.parametrize("version", ["0.30.0", "0.33.0", "1.0"])
def test_an_untried_release_that_fits_gives_a_warning(version: str, monkeypatch: Any) -> None:
    monkeypatch.setattr(vllm, "__version__", version)
    with pytest.warns(UserWarning, match=f"vLLM {version} has everything .* only seen 0.31, 0.32"):
        seams.check()


def test_an_untried_release_that_does_not_fit_is_refused(monkeypatch: Any) -> None:
    monkeypatch.setattr(vllm, "__version__", "0.33.0")
    monkeypatch.delattr(BlockPool, "get_new_blocks")
    with pytest.raises(VllmError, match=r"vLLM 0\.33\.0 \(use 0\.31\.\* or 0\.32\.\*\)"):
        seams.check()


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            ModuleNotFoundError("No module named 'vllm'", name="vllm"),
            "vLLM is not installed here; run `make validate`",
        ),
        (
            ModuleNotFoundError("No module named 'torch'", name="torch"),
            r"vLLM is installed but cannot be imported \(No module named 'torch'\); run `make",
        ),
        (
            ImportError("libcudart.so.13: cannot open\nmore"),
            r"cannot be imported \(libcudart.so.13: cannot open\); run `make validate`",
        ),
    ],
)
def test_a_vllm_that_cannot_be_imported_is_one_line(
    error: ImportError, said: str, monkeypatch: Any
) -> None:
    real = importlib.import_module

    def missing(name: str) -> Any:
        if name == "vllm":
            raise error
        return real(name)

    monkeypatch.setattr(seams, "import_module", missing)
    with pytest.raises(VllmError, match=said) as caught:
        seams.check()
    assert "\n" not in str(caught.value)


def test_a_part_of_vllm_that_lacks_a_library_is_not_called_gone(monkeypatch: Any) -> None:
    (seam,) = (seam for seam in SEAMS if seam.name == "AllBlocksCleared")
    monkeypatch.setitem(sys.modules, seam.module, None)
    assert seam.fault() == "is gone"

    def missing(name: str) -> Any:
        raise ModuleNotFoundError("No module named 'zmq'", name="zmq")

    monkeypatch.setattr(seams, "import_module", missing)
    assert seam.fault() == "cannot be imported (No module named 'zmq')"
