"""A very small model with random weights: ``python -m validate.tiny_model DIR``.

It writes a Qwen3 configuration and a word-level tokenizer (words ``t0``, ``t1``, ...) with a chat
template. There are no weights: vLLM makes them up (``load_format="dummy"``), always the same ones.
With the default sizes a step takes a few milliseconds on a CPU core.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sim.result import replace_folder

__all__ = ["ModelFolderError", "main", "write"]

SPECIAL = ("<unk>", "<eos>", "<pad>")
"""The first words of the vocabulary."""
HEAD_DIM = 32
MAKER = "validate.tiny_model"
"""Stands in the configuration and tells our folders from others."""
CHAT = (
    "{% for message in messages %}{{ message['role'] }} {{ message['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}assistant{% endif %}"
)
ROLES = ("system", "user", "assistant", "tool")


class ModelFolderError(ValueError):
    """The folder cannot become a model's."""


def write(
    folder: str | Path,
    *,
    layers: int = 4,
    hidden: int = 256,
    vocabulary: int = 1024,
    context: int = 32_768,
) -> Path:
    """Write the model, whole or not at all; another one written earlier is replaced.

    Args:
        folder: where to.
        layers: of the transformer.
        hidden: width; attention heads have 32, and there are half as many of keys and values.
        vocabulary: words, special ones included.
        context: longest sequence in tokens.

    Raises:
        ModelFolderError: a size makes no sense, or the folder holds something else.
    """
    target = Path(folder)
    if layers < 1 or context < 1:
        raise ModelFolderError(f"layers={layers}, context={context}: both must be 1 or more")
    if hidden < 2 * HEAD_DIM or hidden % (2 * HEAD_DIM):
        raise ModelFolderError(f"hidden={hidden}: must be a multiple of {2 * HEAD_DIM}")
    if vocabulary < 64:
        raise ModelFolderError(f"vocabulary={vocabulary}: must be 64 or more")
    _check_target(target)
    files = {
        "config.json": _config(layers, hidden, vocabulary, context),
        "tokenizer.json": _tokenizer(vocabulary),
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "unk_token": SPECIAL[0],
            "eos_token": SPECIAL[1],
            "pad_token": SPECIAL[2],
            "model_max_length": context,
            "clean_up_tokenization_spaces": False,
            "chat_template": CHAT,
        },
    }
    texts = {name: json.dumps(content, indent=1) + "\n" for name, content in files.items()}
    if all((target / name).is_file() for name in texts) and all(
        (target / name).read_text(encoding="utf-8") == text for name, text in texts.items()
    ):
        return target  # somebody may be using it
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    except OSError as error:
        raise ModelFolderError(f"{target}: {error.strerror or error}") from None
    try:
        for name, text in texts.items():
            (scratch / name).write_text(text, encoding="utf-8")
        scratch.chmod(0o755)
        replace_folder(scratch, target)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    return target


def _check_target(target: Path) -> None:
    if not target.exists():
        return
    try:
        if target.is_dir() and not any(target.iterdir()):
            return
        ours = json.loads((target / "config.json").read_text(encoding="utf-8"))["made_by"] == MAKER
    except (OSError, ValueError, KeyError, TypeError):
        ours = False
    if not ours:
        raise ModelFolderError(f"{target}: exists and is no tiny model; choose another folder")


def _config(layers: int, hidden: int, vocabulary: int, context: int) -> dict[str, Any]:
    heads = hidden // HEAD_DIM
    return {
        "made_by": MAKER,
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": 4 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 2,
        "head_dim": HEAD_DIM,
        "max_position_embeddings": context,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "attention_bias": False,
        "tie_word_embeddings": False,
        "eos_token_id": 1,
        "pad_token_id": 2,
        "torch_dtype": "bfloat16",
    }


def _tokenizer(vocabulary: int) -> dict[str, Any]:
    words = [*SPECIAL, *ROLES]
    words += [f"t{i}" for i in range(vocabulary - len(words))]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": word, **flags, "special": True} for i, word in enumerate(SPECIAL)
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": None,
        "decoder": None,
        "model": {
            "type": "WordLevel",
            "vocab": {word: i for i, word in enumerate(words)},
            "unk_token": SPECIAL[0],
        },
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Write a model; 2 if that is not possible."""
    parser = argparse.ArgumentParser(prog="python -m validate.tiny_model", description=__doc__)
    parser.add_argument("folder", metavar="DIR")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--vocabulary", type=int, default=1024)
    parser.add_argument("--context", type=int, default=32_768)
    options = vars(parser.parse_args(argv))
    try:
        print(write(**options))
    except ModelFolderError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
