"""The model is always the same, is never half there, and replaces nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from validate import tiny_model
from validate.tiny_model import ModelFolderError, write


def test_the_same_sizes_give_the_same_bytes(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a"), write(tmp_path / "b")
    assert {f.name: f.read_bytes() for f in a.iterdir()} == {
        f.name: f.read_bytes() for f in b.iterdir()
    }


def test_sizes_are_in_the_configuration(tmp_path: Path) -> None:
    folder = write(tmp_path / "m", layers=2, hidden=128, vocabulary=300, context=512)
    config = json.loads((folder / "config.json").read_text())
    assert config["num_hidden_layers"] == 2
    assert config["hidden_size"] == 128
    assert config["num_attention_heads"] == 4
    assert config["max_position_embeddings"] == 512
    words = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    assert sorted(words.values()) == list(range(300))


def test_a_model_is_replaced_but_an_equal_one_is_left_alone(tmp_path: Path) -> None:
    folder = write(tmp_path / "m")
    first = (folder / "config.json").stat().st_ino
    write(folder)
    assert (folder / "config.json").stat().st_ino == first
    write(folder, layers=1)
    assert json.loads((folder / "config.json").read_text())["num_hidden_layers"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_what_somebody_else_wrote_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["Real"]}')
    with pytest.raises(ModelFolderError, match="is no tiny model"):
        write(tmp_path)
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(ModelFolderError, match="is no tiny model"):
        write(file)
    assert file.read_text() == "x"


def test_a_failure_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(tiny_model, "replace_folder", fail)
    with pytest.raises(OSError, match="disk full"):
        write(tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ({"layers": 0}, "layers=0"),
        ({"hidden": 100}, "hidden=100: must be a multiple of 64"),
        ({"vocabulary": 10}, "vocabulary=10: must be 64 or more"),
    ],
)
def test_impossible_sizes_are_refused(tmp_path: Path, sizes: Any, said: str) -> None:
    with pytest.raises(ModelFolderError, match=said):
        write(tmp_path / "m", **sizes)


def test_the_command_prints_the_folder_or_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tiny_model.main([str(tmp_path / "m"), "--layers", "2"]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "m")
    assert tiny_model.main([str(tmp_path / "m"), "--layers", "0"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.vllm
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_transformers_reads_tokenizer_template_and_configuration(tmp_path: Path) -> None:
    transformers = pytest.importorskip(
        "transformers", reason="needs vLLM: make validate builds an environment with it"
    )
    folder = write(tmp_path / "m")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert tokenizer("t0 t5 unheard").input_ids == [7, 12, 0]
    assert tokenizer.decode([7, 12]) == "t0 t5"
    assert sorted(tokenizer.all_special_ids) == [0, 1, 2]
    chat = [{"role": "user", "content": "t1 t2"}]
    assert tokenizer.apply_chat_template(
        chat, tokenize=False, add_generation_prompt=True
    ).split() == ["user", "t1", "t2", "assistant"]
    config = transformers.AutoConfig.from_pretrained(folder)
    assert (config.model_type, config.num_hidden_layers) == ("qwen3", 4)
