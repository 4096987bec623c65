"""The command line: results on stdout, the rest on stderr, errors in one line."""

from __future__ import annotations

import filecmp
import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from experiments.cli import app
from sim.hardware import chips, load_chip

ROOT = Path(__file__).parents[2]
SMALL = ["replay", "demo", "--limit", "60"]


def servelab(*arguments: str) -> tuple[int, str, str]:
    done = CliRunner().invoke(app, list(arguments))
    return done.exit_code, done.stdout, done.stderr


def python(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    root = tmp_path_factory.mktemp("runs")
    for eviction in ("lru", "slo_aware"):
        code, _, err = servelab(*SMALL, "--eviction", eviction, "--out", str(root / eviction))
        assert code == 0, err
    return [str(root / "lru"), str(root / "slo_aware")]


# --------------------------------------------------------------------------- replay


def test_json_is_alone_on_stdout() -> None:
    code, out, err = servelab(*SMALL, "--json")
    said = json.loads(out)
    assert (code, said["requests"], said["run"]) == (0, 60, None)
    assert "note: trace demo_chat" in err


def test_the_table_is_on_stdout_and_the_folder_on_stderr(tmp_path: Path) -> None:
    code, out, err = servelab(*SMALL, "--out", str(tmp_path / "run"))
    assert code == 0
    assert "TTFT p99 (ms)" in out
    assert f"wrote {tmp_path / 'run'}" in err
    assert "wrote" not in out


def test_options_become_the_configuration(tmp_path: Path) -> None:
    arguments = (
        "--chip h100 --model qwen3_8b --engines 2 --tp 2 --admission priority --reuse cap "
        "--eviction slo_aware --routing least_loaded --rate-scale 2 --from 1 --to 90 "
        "--signal-age 0.1 --seed 3 --mode stepwise policies.eviction.grace_s=2"
    )
    code, _, err = servelab(*SMALL, *arguments.split(), "--out", str(tmp_path / "run"))
    assert code == 0, err
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert (config["chip"]["name"], config["model"]["name"]) == ("h100", "qwen3_8b")
    assert (config["engines"], config["tp"], config["seed"]) == (2, 2, 3)
    assert config["policies"]["eviction"] == {"name": "slo_aware", "grace_s": 2.0, "floor_s": 0.05}
    assert config["policies"]["admission"] == {"name": "priority"}
    assert config["trace"]["between"] == [1.0, 90.0]
    assert (config["trace"]["limit"], config["trace"]["rate_scale"]) == (60, 2.0)
    assert (config["signal_age_s"], config["mode"]) == (0.1, "stepwise")


def test_a_run_is_replayed_from_its_configuration(two_runs: list[str], tmp_path: Path) -> None:
    config = f"{two_runs[1]}/config.yaml"
    code, _, err = servelab("replay", "--config", config, "--out", str(tmp_path / "again"))
    assert code == 0, err
    for name in ("requests.parquet", "summary.json", "config.yaml"):
        assert filecmp.cmp(f"{two_runs[1]}/{name}", tmp_path / "again" / name, shallow=False)


def test_a_file_of_a_public_format_is_replayed(tmp_path: Path) -> None:
    file = tmp_path / "some.jsonl"
    file.write_text(
        '{"timestamp": 0, "input_length": 700, "output_length": 3, "hash_ids": [1, 2]}\n'
        '{"timestamp": 4000, "input_length": 900, "output_length": 5, "hash_ids": [1, 3]}\n'
    )
    code, out, err = servelab("replay", str(file), "--json")
    assert code == 0, err
    assert json.loads(out)["prefix_hit_rate"] == pytest.approx(512 / 1600)


def test_own_policies_are_used_and_kept_in_the_run(tmp_path: Path) -> None:
    file = tmp_path / "evict_nothing_special.py"
    file.write_text(
        "from dataclasses import dataclass\n"
        "from policies.eviction.lru import Lru\n"
        "from policies.registry import register\n"
        '@register("eviction/nothing_special")\n'
        "@dataclass(slots=True, eq=False)\n"
        "class NothingSpecial(Lru):\n"
        '    """As LRU."""\n'
    )
    run = tmp_path / "run"
    code, _, err = servelab(
        *SMALL, "--policy-module", str(file), "--eviction", "nothing_special", "--out", str(run)
    )
    assert code == 0, err
    code, out, err = servelab("replay", "--config", str(run), "--json")
    assert code == 0, err
    assert json.loads(out)["policies"]["eviction"].endswith("nothing_special")


MISTAKES = {
    "replay demo --eviction slo_awre": "slo_aware",
    "replay demo --chip nope.yaml": "nope.yaml",
    "replay demoo": "'demo'",
    "replay no/such/file.jsonl": "no/such",
    "replay demo engine.max_num_seqs=0": "max_num_seqs=0",
    "replay demo --model llama3_70b": "does not fit",
    "replay demo --policy-module absent.py": "absent.py",
    "replay demo --config absent.yaml": "absent.yaml",
    "replay demo --from 9999": "9999",
    "traces stats demo --format natve": "native",
    "compare absent": "absent",
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_bad_input_is_one_line_and_exit_code_2(mistake: str) -> None:
    code, out, err = servelab(*mistake.split())
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert err.startswith("error: ")
    assert MISTAKES[mistake] in err


def test_a_chip_that_should_not_be_used_warns_on_stderr() -> None:
    chip = next(name for name in chips() if load_chip(name).trust == "D")
    code, out, err = servelab(*SMALL, "--chip", chip, "--model", "qwen3_0_6b", "--json")
    assert code == 0, err
    assert f"warning: chip {chip}" in err
    assert json.loads(out)["warnings"]


# --------------------------------------------------------------------------- the others


def test_compare_names_what_differs(two_runs: list[str]) -> None:
    code, out, err = servelab("compare", *two_runs)
    assert code == 0, err
    assert "policies.eviction.name" in out
    assert "policies.routing.name" not in out


def test_compare_as_json_holds_every_run(two_runs: list[str]) -> None:
    code, out, _ = servelab("compare", *two_runs, "--json")
    said = json.loads(out)
    assert (code, list(said["runs"])) == (0, ["lru", "slo_aware"])
    assert said["differences"]["policies.eviction.name"] == {"lru": "lru", "slo_aware": "slo_aware"}


def test_statistics_of_a_trace_as_json() -> None:
    code, out, _ = servelab("traces", "stats", "demo", "--json")
    said = json.loads(out)
    assert code == 0
    assert said["requests"] > 2000
    assert 0 < said["ideal_hit_blocks"] < said["block_accesses"]
    assert min(said["prompt_tokens"], said["output_tokens"]) > 0


@pytest.mark.parametrize("command", ["chips", "models", "policies", "traces formats"])
def test_lists_are_tables_or_json(command: str) -> None:
    code, out, err = servelab(*command.split(), "--json")
    rows = json.loads(out)
    assert (code, err) == (0, "")
    code, out, _ = servelab(*command.split())
    assert code == 0
    for row in rows:
        assert next(iter(row.values())) in out


def test_the_demo_says_where_its_figures_are(tmp_path: Path) -> None:
    code, out, err = servelab("demo", "--limit", "40", "--out", str(tmp_path))
    assert code == 0, err
    assert "slo_aware-prefix_affinity" in out
    assert err.splitlines()[-1] == f"wrote {tmp_path / 'tradeoff.png'}"


def test_help_has_examples() -> None:
    code, out, _ = servelab("replay", "--help")
    assert code == 0
    assert "servelab replay demo" in out


# --------------------------------------------------------------------------- processes


INTERRUPTING = """
import os, signal
from dataclasses import dataclass
from policies.api import ADMIT, AdmissionPolicy
from policies.registry import register

@register("admission/interrupting")
@dataclass(slots=True, eq=False)
class Interrupting(AdmissionPolicy):
    "Sends Ctrl-C to its own process."

    def admit(self, request, engine, now):
        if request.arrival_s > 5:
            os.kill(os.getpid(), signal.SIGINT)
        return ADMIT
"""


def test_ctrl_c_is_one_line_and_exit_code_2_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "interrupting.py").write_text(INTERRUPTING)
    done = python(
        "-m", "experiments.cli", "replay", "demo", "--policy-module", "interrupting.py",
        "--admission", "interrupting", "--out", "runs/run", folder=tmp_path,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1] == "interrupted: nothing of the run in progress was saved"
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix) == ["interrupting.py"]
    assert not (tmp_path / "runs").exists() or not any((tmp_path / "runs").iterdir())


def test_the_command_line_imports_little_before_it_has_to(tmp_path: Path) -> None:
    code = (
        "import sys, experiments.cli; print({'pandas', 'hydra', 'matplotlib'} & set(sys.modules))"
    )
    done = python("-c", code, folder=tmp_path)
    assert done.stdout == "set()\n", done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["replay", "demo", "--enginse", "3"],
            "error: No such option: --enginse (Possible options",
        ),
        (["replya"], "error: No such command 'replya'. Did you mean 'replay'?"),
        (["replay"], "error: Invalid value for PATH|NAME: name a trace"),
    ],
)
def test_a_slip_of_the_keyboard_is_one_line(
    tmp_path: Path, arguments: list[str], message: str
) -> None:
    done = python("-m", "experiments.cli", *arguments, folder=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith(message)
    assert len(done.stderr.splitlines()) == 1


RAISING = """
from dataclasses import dataclass
from policies.api import Router
from policies.eviction.scored import ScoredEviction
from policies.registry import register

@register("eviction/peeking")
@dataclass(slots=True, eq=False)
class Peeking(ScoredEviction):
    "Looks at what no view has."

    def score(self, block, now):
        return block.secret

@register("routing/off")
@dataclass(slots=True, eq=False)
class Off(Router):
    "Answers with no instance."

    def route(self, request, instances, now):
        return 99
"""


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (("--eviction", "peeking"), "error: eviction/peeking.score raised AttributeError: "),
        (("--routing", "off"), "error: routing/off in pd/colocated.place(0) answered "),
    ],
)
def test_a_policy_that_breaks_its_contract_is_named_with_the_call(
    tmp_path: Path, option: tuple[str, str], message: str
) -> None:
    (tmp_path / "raising.py").write_text(RAISING)
    done = python(
        "-m", "experiments.cli", "replay", "demo", "--limit", "300", "--policy-module",
        "raising.py", *option, "--out", "run", "engine.num_gpu_blocks=1000", folder=tmp_path,
    )  # fmt: skip
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()
