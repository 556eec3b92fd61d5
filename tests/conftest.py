"""Settings that must stand before transformers is imported, and what tests of every package share."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

Tree = dict[str, str]


@pytest.fixture(scope="session", autouse=True)
def _cache_of_the_session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test reads or writes the user's cache; what one finds out about a model, the next may use."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
        yield


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of three blocks with a tokenizer. Tests must not change it."""
    from tiny_models import save_tiny_model

    return save_tiny_model("llama", tmp_path_factory.mktemp("tiny-llama"), with_tokenizer=True, num_hidden_layers=3)


@pytest.fixture(scope="session")
def prose(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text file, long enough to calibrate and score a tiny model. Tests must not change it."""
    file = tmp_path_factory.mktemp("prose") / "prose.txt"
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight"]
    file.write_text(
        "\n".join(f"The {a} of the hill saw {b} old sheep." for a in words for b in words), encoding="utf-8"
    )
    return file


@pytest.fixture(scope="session")
def static_recipe(tiny_llama: Path, prose: Path) -> Callable[[Path], dict[str, Any]]:
    """A recipe, as a mapping, that runs every stage on the tiny Llama in under a second; the argument is its output.

    A random model's perplexity is that of noise, so the sanity check only warns.
    """
    text = {"dataset": "text", "path": str(prose)}

    def recipe(output: Path) -> dict[str, Any]:
        return {
            "version": 1,
            "model": {"path": str(tiny_llama), "sanity_check": "warn"},
            "calibration": {**text, "samples": 4, "sequence_length": 32},
            "quantize": {"activations": {"bits": 8, "scope": "tensor"}},
            "evaluate": {
                "perplexity": {**text, "sequence_length": 32, "windows": 4},
                "output_error": {"tokens": 32},
                "generate": {"prompts": ["The hill"], "max_new_tokens": 3},
            },
            "output": str(output),
        }

    return recipe


@pytest.fixture(scope="session")
def tree() -> Callable[[Path], Tree]:
    """The files below a directory with their sha256; directories end with a slash."""

    def read(root: Path) -> Tree:
        return {
            str(path.relative_to(root)): "/" if path.is_dir() else hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(root.rglob("*"))
        }

    return read
