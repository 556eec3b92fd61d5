"""The keys of a GGUF export are checked by other tables than wrote them: a changed, a missing and a further key of the
model and of its tokenizer are found, whatever the family."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf as package
import pytest
import torch
import transformers
from test_gguf_models import GEMMA, GEMMA3, LLAMA3, LONGROPE, W4, made, parts_of
from tiny_exports import Export
from tiny_models import tiny_config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from quantcli.errors import VerificationError
from quantcli.formats.verify_gguf_keys import check_keys, frequency_divisors
from quantcli.model.gguf_file import configuration
from quantcli.model.gguf_tokenizer import tokenizer_keys

YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "yarn": ("llama", {"rope_parameters": YARN}),
    "gemma2": ("gemma2", GEMMA),
    "gemma3": ("gemma3", GEMMA3),
    "longrope": ("phi3", LONGROPE),
    "granite": ("granite", {}),
    "cohere": ("cohere", {}),
    "stablelm": ("stablelm", {}),
}


def keys_of(export: Export) -> dict[str, Any]:
    reader = package.GGUFReader(export.folder / "model.gguf")
    return {key: field.contents() for key, field in reader.fields.items()}


def other(value: Any) -> Any:
    """A value of the same kind."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, list):
        return [*value[:-2], value[-1], value[-2]] if value[-1] != value[-2] else [*value[:-1], other(value[-1])]
    return value + ("x" if isinstance(value, str) else 1)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_key_that_says_something_else_is_found(name: str, tmp_path: Path) -> None:
    family, changes = FAMILIES[name]
    export = made(tmp_path, W4, family, **changes)
    export.verify()
    fields, config = keys_of(export), configuration(export.folder)
    check_keys(export.folder, fields, config)
    architecture = fields["general.architecture"]
    told = [key for key in fields if key.startswith((f"{architecture}.", "tokenizer."))]
    assert len(told) > 18
    for key in [*told, "general.architecture"]:
        without = {own: value for own, value in fields.items() if own != key}
        for changed in (fields | {key: other(fields[key])}, without):
            with pytest.raises(VerificationError):
                check_keys(export.folder, changed, config)
    for further in (
        f"{architecture}.rope.scaling.alpha",
        f"{architecture}.expert_count",
        "tokenizer.ggml.mask_token_id",
    ):
        with pytest.raises(VerificationError, match=further):
            check_keys(export.folder, fields | {further: 3}, config)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("tokenizer.ggml.token_type", "token 0 is not that of the tokenizer"),
        ("tokenizer.ggml.merges", "the merges are not those of the tokenizer"),
        ("tokenizer.ggml.pre", "tokenizer.ggml.pre is not that of the tokenizer"),
        ("tokenizer.chat_template", "the chat template is not that of the tokenizer"),
        ("llama.attention.head_count_kv", "llama.attention.head_count_kv is not that of config.json"),
    ],
)
def test_a_flipped_bit_of_a_key_in_the_file_is_found(key: str, message: str, tmp_path: Path) -> None:
    export = made(tmp_path, W4, "llama")
    tokenizer = transformers.AutoTokenizer.from_pretrained(export.model)
    tokenizer.chat_template = "{{ messages[0].content }}"
    tokenizer.save_pretrained(export.model)
    for file in export.folder.iterdir():
        file.unlink()
    export.write(export.folder)
    export.verify()
    field = package.GGUFReader(export.folder / "model.gguf", "r+").fields[key]
    field.parts[field.data[0]][0] ^= 1
    with pytest.raises(VerificationError, match=message):
        export.verify()


@pytest.mark.parametrize("kind", ["spaced", "metaspace", "gemma"])
def test_scores_stand_in_the_order_of_merges(kind: str, tmp_path: Path) -> None:
    """Of tokenizers with ▁ for spaces, which have scores in the place of merges, and bytes."""
    kinds = pytest.importorskip("test_llama_cpp")
    export = made(tmp_path, W4, "llama")
    tokenizer = kinds.spaced(True) if kind == "spaced" else getattr(kinds, kind)()
    for file in [file for folder in (export.folder, export.model) for file in folder.glob("*token*")]:
        file.unlink()
    tokenizer.save_pretrained(export.folder)
    config = configuration(export.folder)
    fields = {key: value for key, value in keys_of(export).items() if not key.startswith("tokenizer.")}
    fields |= tokenizer_keys(export.folder, config["vocab_size"])
    check_keys(export.folder, fields, config)
    types, scores = (fields[f"tokenizer.ggml.{key}"] for key in ("token_type", "scores"))
    assert {1, 6} <= {*types}
    assert (2 in types) == (kind != "metaspace")
    first, second, *_ = sorted(range(len(types)), key=lambda number: (types[number] != 1, -scores[number]))
    assert 0 >= scores[first] > scores[second]
    changed = [*scores]
    changed[first], changed[second] = scores[second], scores[first]
    with pytest.raises(VerificationError, match="order of the merges"):
        check_keys(export.folder, fields | {"tokenizer.ggml.scores": changed}, config)
    number = types.index(6)
    with pytest.raises(VerificationError, match=f"token {number} "):
        check_keys(
            export.folder, fields | {"tokenizer.ggml.token_type": [*types[:number], 1, *types[number + 1 :]]}, config
        )


def test_frequencies_of_llama3_are_those_of_transformers(tmp_path: Path) -> None:
    config = tiny_config("llama", rope_parameters=LLAMA3)
    (divisors,) = frequency_divisors(config.to_dict()).values()
    stretched, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 1e4 ** (-torch.arange(0, 16, 2) / 16)
    torch.testing.assert_close(torch.tensor(divisors), plain / stretched, rtol=1e-6, atol=0)
    assert divisors[0] == 1.0
    assert divisors[-1] == 8.0
    export = made(tmp_path, W4, "llama", rope_parameters=LLAMA3)
    export.verify()
    assert "rope_freqs.weight" in parts_of(export)


def test_a_tokenizer_that_joins_nothing_has_no_key_of_merges(tmp_path: Path) -> None:
    """A file holds no empty arrays."""
    export = made(tmp_path, W4, "llama")
    file = export.folder / "tokenizer.json"
    content = json.loads(file.read_text())
    content["model"]["merges"] = []
    file.write_text(json.dumps(content))
    config = configuration(export.folder)
    fields = {key: value for key, value in keys_of(export).items() if not key.startswith("tokenizer.")}
    fields |= tokenizer_keys(export.folder, config["vocab_size"])
    assert fields.pop("tokenizer.ggml.merges") == []
    check_keys(export.folder, fields, config)
    with pytest.raises(VerificationError, match="merges"):
        check_keys(export.folder, fields | {"tokenizer.ggml.merges": ["a b"]}, config)
