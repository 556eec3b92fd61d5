"""A tokenizer of transformers as the keys of a GGUF file, by which llama.cpp cuts texts into the same tokens.

llama.cpp does not read the rules of tokenizer.json. It has rules of its own under names, so a tokenizer can be written
only if its rules are those of a name: PRETOKENIZERS. Others are refused, since a model that gets other tokens than it
was trained on talks nonsense without an error.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quantcli.errors import ModelError, first_line, is_of_library
from quantcli.model.checkpoint import read_json

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""tokenizer.ggml.token_type"""

_WORDS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _WORDS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _REST
_QWEN2 = _WORDS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _REST
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

PRETOKENIZERS: dict[tuple[tuple[str, ...], bool], str] = {
    (("gpt2 words",), False): "gpt-2",
    (("single digits", "gpt2 words"), False): "smollm",
    ((_LLAMA3, "bytes"), True): "llama-bpe",
    ((_LLAMA3, "bytes"), False): "smaug-bpe",
    ((_QWEN2, "bytes"), False): "qwen2",
    ((_TEKKEN, "bytes"), True): "tekken",
}
"""Steps of a byte-level pre-tokenizer, and whether words of the vocabulary are taken whole (ignore_merges) → the name
of the same rules in llama.cpp. The tests compare the two on text."""

_SPACE = "▁"


def tokenizer_keys(directory: Path, vocabulary: int) -> dict[str, Any]:
    """Keys of the file → values: the tokens and their types, merges or scores, special tokens and the chat template.

    `vocabulary` is the number of rows of the embedding: tokens are added up to it, as unused ones. Raises ModelError
    for rules that llama.cpp has no name for, and with a remedy for files that are damaged.
    """
    tokenizer = _load(directory)
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    model = rules["model"]
    if model.get("type") != "BPE":
        raise ModelError(f"has no rules for a tokenizer of type {model.get('type')}")
    if model.get("dropout") or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise ModelError("has no rules for the options of this BPE tokenizer")
    count = 1 + max([*model["vocab"].values(), *(own["id"] for own in rules["added_tokens"])], default=-1)
    if vocabulary and count > vocabulary:
        raise ModelError(f"has {vocabulary} rows of the embedding for the {count} tokens of this tokenizer")
    tokens, types = _tokens(model["vocab"], rules["added_tokens"], max(vocabulary, count))
    keys = _spaced(rules, tokens, types) if model.get("byte_fallback") else _byte_level(rules)
    keys |= {"tokens": tokens, "token_type": types}
    keys |= _added(tokenizer)
    for kind in ("bos", "eos", "unknown", "padding", "separator", "mask"):
        short = {"unknown": "unk", "padding": "pad", "separator": "sep"}.get(kind, kind)
        number = getattr(tokenizer, f"{short}_token_id", None)
        if isinstance(number, int):
            name = {"separator": "seperator"}.get(kind, kind)  # as the format spells it
            keys[f"{name}_token_id"] = number
    found = {f"tokenizer.ggml.{key}": value for key, value in keys.items()}
    template = tokenizer.chat_template
    if isinstance(template, Mapping):
        template = template.get("default")
    return found | ({"tokenizer.chat_template": template} if template else {})


def _load(directory: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except BaseException as error:
        if not is_of_library(error):
            raise
        said = first_line(error)
        _require_whole(directory)
        if not any("token" in file.name or "vocab" in file.name for file in directory.iterdir()):
            said = "there is no file of one"
        raise ModelError(f"needs a tokenizer, and this model's cannot be read: {said}") from error
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise ModelError("needs the rules of tokenizer.json, which this model's tokenizer does not have")
    return tokenizer


def _require_whole(directory: Path) -> None:
    """Raise ModelError if a file of the tokenizer is there and damaged."""
    from tokenizers import Tokenizer

    settings, rules = directory / "tokenizer_config.json", directory / "tokenizer.json"
    try:
        if settings.is_file():
            read_json(settings)
        if rules.is_file():
            Tokenizer.from_file(str(rules))
    except BaseException as error:
        if not is_of_library(error):
            raise
        said = error.message if isinstance(error, ModelError) else f"{rules} cannot be read: {first_line(error)}."
        raise ModelError(said, "Download it again.") from error


def _tokens(vocabulary: Mapping[str, int], added: list[dict[str, Any]], count: int) -> tuple[list[str], list[int]]:
    """Every token and its type, by id; ids that no token has are unused ones."""
    tokens = [f"[PAD{number}]" for number in range(count)]
    types = [UNUSED] * count
    for token, number in vocabulary.items():
        tokens[number], types[number] = token, NORMAL
    for entry in added:
        number = entry["id"]
        tokens[number] = entry["content"]
        types[number] = CONTROL if entry["special"] else USER_DEFINED
    return tokens, types


def _steps(part: Mapping[str, Any] | None, inside: str) -> list[Mapping[str, Any]]:
    """A normalizer or pre-tokenizer as a flat list of steps."""
    if part is None:
        return []
    if part["type"] == "Sequence":
        return [step for own in part[inside] for step in _steps(own, inside)]
    return [part]


def _byte_level(rules: Mapping[str, Any]) -> dict[str, Any]:
    """Keys of a BPE over bytes, whose pre-tokenizer decides which rules of llama.cpp are the same."""
    steps = [_named(step) for step in _steps(rules["pre_tokenizer"], "pretokenizers")]
    normal = [step["type"] for step in _steps(rules["normalizer"], "normalizers")]
    whole = bool(rules["model"].get("ignore_merges"))
    name = PRETOKENIZERS.get((tuple(steps), whole))
    # llama.cpp leaves text as it is, which for composed text (NFC) is the same
    if name is None or normal not in ([], ["NFC"]):
        told = ", ".join([*normal, *steps]) or "none"
        raise ModelError(f"has no name in llama.cpp for the rules by which this tokenizer cuts words ({told})")
    return {"model": "gpt2", "pre": name, "merges": _merges(rules["model"])}


def _named(step: Mapping[str, Any]) -> str:
    kind = step["type"]
    if kind == "ByteLevel" and not step["add_prefix_space"]:
        return "gpt2 words" if step.get("use_regex", True) else "bytes"
    if kind == "Digits" and step.get("individual_digits"):
        return "single digits"
    pattern = step.get("pattern", {}).get("Regex") if kind == "Split" else None
    # patterns of PRETOKENIZERS fit every character, so that what lies between their matches is nothing
    if pattern is not None and (step.get("behavior"), bool(step.get("invert"))) in (
        ("Isolated", False),
        ("Removed", True),
    ):
        return str(pattern)
    return json.dumps(dict(step))


def _merges(model: Mapping[str, Any]) -> list[str]:
    return [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]


def _spaced(rules: Mapping[str, Any], tokens: list[str], types: list[int]) -> dict[str, Any]:
    """Keys of a BPE over characters with ▁ for a space and bytes for what it does not know, as SentencePiece makes it.

    llama.cpp joins the neighbours whose joint token has the highest score: minus the rank of the merge that makes it.
    """
    normal = _steps(rules["normalizer"], "normalizers")
    before = [step for step in _steps(rules["pre_tokenizer"], "pretokenizers") if not (normal and _at_spaces(step))]
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    first = {"type": "Prepend", "prepend": _SPACE}
    prefix = first in normal
    plain = spaces in normal and all(step in (spaces, first) for step in normal)
    if len(before) == 1 and _is_metaspace(before[0]) and not normal:
        prefix = before[0].get("prepend_scheme", "always") != "never"
    elif before or not plain:
        raise ModelError("has no rules like those by which this tokenizer treats spaces")
    if odd := [own["content"] for own in rules["added_tokens"] if own["normalized"] and _SPACE in own["content"]]:
        raise ModelError(
            f"finds added tokens in text as it is, and this tokenizer {odd[0]} behind its rules for spaces"
        )
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(_merges(rules["model"])):
        ranks.setdefault(merge.replace(" ", ""), rank)
    last = len(ranks)
    scores = [-float(ranks.get(token, last if types[number] == NORMAL else 0)) for number, token in enumerate(tokens)]
    for number, token in enumerate(tokens):
        if types[number] == NORMAL and len(token) == 6 and token.startswith("<0x"):
            types[number], scores[number] = BYTE, 0.0
        elif token == rules["model"].get("unk_token"):
            types[number] = UNKNOWN
    return {"model": "llama", "pre": "default", "scores": scores, "add_space_prefix": prefix}


def _is_metaspace(step: Mapping[str, Any]) -> bool:
    """Whether a step makes ▁ of spaces and cuts nowhere."""
    return step["type"] == "Metaspace" and step.get("replacement") == _SPACE and not step.get("split", True)


def _at_spaces(step: Mapping[str, Any]) -> bool:
    """Whether a step only cuts at spaces, as Gemma's does, of which a normalizer has left none."""
    return step["type"] == "Split" and step.get("pattern") == {"String": " "} and not step.get("invert")


def _added(tokenizer: Any) -> dict[str, bool]:
    """Which special tokens are put before and behind a text. Raises ModelError for others than bos and eos."""
    bare = tokenizer.encode("a", add_special_tokens=False)
    full = tokenizer.encode("a")
    for begins in (False, True):
        for ends in (False, True):
            if full == [tokenizer.bos_token_id] * begins + bare + [tokenizer.eos_token_id] * ends:
                return {"add_bos_token": begins, "add_eos_token": ends}
    raise ModelError(f"puts only bos and eos around a text, and this tokenizer makes {full} of {bare}")
