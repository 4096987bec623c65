"""Notebooks run from top to bottom, and are kept with their outputs."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
LIVE = {"04_live_validation"}
"""Those that need vLLM."""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning:zmq|jupyter|nbclient|ipykernel"),
]


def cases() -> list[object]:
    live = [
        pytest.mark.vllm,
        pytest.mark.skipif(
            find_spec("vllm") is None,
            reason="needs vLLM: make validate builds an environment with it",
        ),
    ]
    return [
        pytest.param(path, id=path.stem, marks=live if path.stem in LIVE else [])
        for path in NOTEBOOKS
    ]


@pytest.mark.parametrize("path", cases())
def test_a_notebook_runs(path: Path, tmp_path: Path) -> None:
    nbformat = pytest.importorskip("nbformat", reason="needs pip install 'servelab[notebooks]'")
    nbclient = pytest.importorskip("nbclient", reason="needs pip install 'servelab[notebooks]'")
    notebook = nbformat.read(path, as_version=4)
    assert all(cell.outputs for cell in notebook.cells if cell.cell_type == "code"), "no outputs"
    client = nbclient.NotebookClient(
        notebook, timeout=400, resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()
