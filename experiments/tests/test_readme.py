"""The documents keep their word: code runs, commands work, links lead somewhere, tables are whole.

A block of Python or YAML whose first line is ``# name.py`` is a file that the other blocks of its
document use. Commands run with a limit on the requests; those on public traces need the data.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields
from importlib.util import find_spec
from pathlib import Path

import pytest

from sim.result import Result
from sim.scheduler import EngineLimits

ROOT = Path(__file__).parents[2]
DOCUMENTS = ("README.md", *sorted(f"docs/{file.name}" for file in (ROOT / "docs").glob("*.md")))
PUBLIC = re.compile(r"\b(mooncake|azure_conv|azure_code)\b")
"""Names of traces that do not come with the package."""

LIVE = re.compile(
    r"servelab (validate|parity|front)|backend=vllm|validate\.(ranking|overhead|vllm)"
)
"""What needs vLLM."""

LIMITS = {
    "servelab replay": ["--limit", "100"],
    "servelab demo": ["--limit", "60"],
    "python -m experiments.run": ["trace.limit=100"],
    "python -m experiments.bench": ["--case", "generated", "--limit", "100"],
    "servelab validate": ["--help"],
    "servelab parity --seeds": ["--seeds", "0:5", "--jobs", "1"],
    "servelab front": ["--help"],
    "python -m validate.ranking": ["--help"],
    "python -m validate.overhead": ["--help"],
}
"""What is added to a documented command so that it takes seconds."""


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block of a document."""

    document: str
    line: int
    language: str
    text: str

    @property
    def file(self) -> str | None:
        """The name of the file that this block is."""
        found = re.match(r"# (\w+\.(?:py|yaml))\b", self.text)
        return found[1] if found else None

    @property
    def commands(self) -> list[str]:
        """The lines of a block of shell that somebody would type, in one line each."""
        joined = self.text.replace("\\\n", " ").splitlines()
        return [line.strip() for line in joined if line.strip() and not line.startswith("#")]


def blocks_of(document: str) -> Iterator[Block]:
    text = (ROOT / document).read_text(encoding="utf-8")
    for found in re.finditer(r"^```(\w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        yield Block(document, text.count("\n", 0, found.start()) + 1, found[1], found[2])


def marks(text: str) -> Iterator[pytest.MarkDecorator]:
    if PUBLIC.search(text):
        yield pytest.mark.data
    if LIVE.search(text):
        yield pytest.mark.vllm
        reason = "needs vLLM: make validate builds an environment with it"
        yield pytest.mark.skipif(find_spec("vllm") is None, reason=reason)


def parameters(language: str) -> list[object]:
    """The blocks of a language that are run, those on public traces with their mark."""
    return [
        pytest.param(block, id=f"{block.document}:{block.line}", marks=list(marks(block.text)))
        for document in DOCUMENTS
        for block in blocks_of(document)
        if block.language == language and block.file is None
    ]


@pytest.fixture
def desk(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A folder with the files of the block's document."""
    block: Block = request.node.callspec.params["block"]
    if PUBLIC.search(block.text):
        request.getfixturevalue("data")
    for other in blocks_of(block.document):
        if other.file is not None:
            (tmp_path / other.file).write_text(other.text, encoding="utf-8")
    return tmp_path


def run(arguments: list[str], folder: Path) -> None:
    data = Path(os.environ.get("SERVELAB_DATA", ROOT.parent / "shared")).resolve()
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "SERVELAB_DATA": str(data)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, f"{shlex.join(arguments)}\n{done.stdout}\n{done.stderr}"


# --------------------------------------------------------------------------- what is run


@pytest.mark.parametrize("block", parameters("python"))
def test_the_code_runs_as_written(block: Block, desk: Path) -> None:
    run(["-c", block.text], desk)


@pytest.mark.parametrize("block", parameters("sh"))
def test_the_commands_work(block: Block, desk: Path) -> None:
    for command in block.commands:
        words = shlex.split(command, comments=True)
        if words[0] == "make":
            makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
            assert re.search(rf"^{words[1]}:", makefile, re.MULTILINE), command
        if words[0] not in ("servelab", "python"):
            continue
        for start, more in LIMITS.items():
            if command.startswith(start):
                words += more
        run(["-m", "experiments.cli", *words[1:]] if words[0] == "servelab" else words[1:], desk)


def test_the_readme_has_what_is_run() -> None:
    assert len(parameters("python")) >= 2
    assert len(parameters("sh")) >= 5


# --------------------------------------------------------------------------- what is said


@pytest.mark.parametrize("document", [*DOCUMENTS, "CHANGELOG.md"])
def test_links_lead_to_files(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text)]
    for link in filter(None, links):
        if "://" not in link:
            assert ((ROOT / document).parent / link).exists(), link


@pytest.mark.parametrize("document", DOCUMENTS)
def test_tests_that_are_cited_exist(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    for file, name in re.findall(r"`([\w/]+\.py)::(\w+)`", text):
        source = (ROOT / file).read_text(encoding="utf-8")
        assert re.search(rf"^def {name}\(", source, re.MULTILINE), f"{file}::{name}"


def test_every_column_and_figure_is_explained(results: dict[str, Result]) -> None:
    result = next(iter(results.values()))
    explained = headings(ROOT / "docs" / "results.md")
    for section, names in (
        ("requests.parquet", result.requests.columns),
        ("runs.parquet", result.runs.columns),
        ("engines.parquet", result.engines.columns),
        ("meta.json", result.meta),
        ("summary.json", result.summary()),
    ):
        assert explained[section] == set(names)


def headings(file: Path) -> dict[str, set[str]]:
    """First cells of the tables below each heading; ``<p>`` stands for 50, 90 and 99."""
    found: dict[str, set[str]] = {}
    section = ""
    for line in file.read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            section = line.removeprefix("## ").strip("`")
        elif line.startswith("| `"):
            for name in re.findall(r"`([^`]+)`", line.split("|")[1]):
                names = {name.replace("<p>", p) for p in ("50", "90", "99")}
                found.setdefault(section, set()).update(names)
    return found


def test_every_limit_of_an_engine_is_explained() -> None:
    text = (ROOT / "docs" / "engine.md").read_text(encoding="utf-8")
    for limit in fields(EngineLimits):
        assert f"`{limit.name}`" in text
