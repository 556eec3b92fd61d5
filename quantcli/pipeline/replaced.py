"""What belongs to a checkpoint that another takes the place of, whoever made it: the files that go with it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from quantcli.errors import ModelError
from quantcli.formats.common import DESCRIPTIONS, DESCRIPTIONS_OF_OTHERS
from quantcli.formats.sums import SUMS, summed_files
from quantcli.formats.table import FORMATS
from quantcli.model.checkpoint import read_json
from quantcli.model.untrusted import TEMPLATES
from quantcli.pipeline.stages.export import weight_files

_CHAT = ("chat_template.jinja", "chat_template.json", f"{TEMPLATES}/*.jinja")
# As transformers and quantizers name what they save beside weights, and as weights were named before safetensors.
_SAVED = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model",
    "tekken.json", "tiktoken.model", "preprocessor_config.json", "processor_config.json",
    "video_preprocessor_config.json", "pytorch_model.bin", "pytorch_model-*-of-*.bin", *DESCRIPTIONS_OF_OTHERS,
)  # fmt: skip
_INDEXES = "*.safetensors.index.json"
_NAMING_CODE = ("config.json", "tokenizer_config.json")


def replaced_files(folder: Path) -> set[Path]:
    """The files of the checkpoint in `folder`: weights, configurations, tokenizer files and chat templates by their
    names, what its checksums name, and what it names itself (`named_files`). None that merely lies beside them."""
    stems = {form.STEM for form in FORMATS.values()}
    patterns = [*(pattern for stem in stems for pattern in weight_files(stem)), *DESCRIPTIONS, SUMS, "config.json"]
    patterns += [*_CHAT, *_SAVED, *(name for form in FORMATS.values() for name in getattr(form, "FILES", ()))]
    by_name = {file for pattern in patterns for file in folder.glob(pattern)}
    return by_name | {*summed_files(folder)} | named_files(folder)


def named_files(folder: Path) -> set[Path]:
    """Weights that an index of the checkpoint in `folder` names, that index, and code that its configuration does."""
    found: set[Path] = set()
    for index in folder.glob(_INDEXES):
        mapping = _object(index).get("weight_map")
        names = {name for name in mapping.values() if isinstance(name, str)} if isinstance(mapping, dict) else set()
        weights = {folder / name for name in names if name.endswith(".safetensors") and _is_file_of(folder, name)}
        found |= weights | ({index} if weights else set())
    for configuration in _NAMING_CODE:
        for module in _modules(_object(folder / configuration).get("auto_map")):
            if _is_file_of(folder, f"{module}.py"):
                found.add(folder / f"{module}.py")
    return found


def _modules(auto_map: Any) -> Iterator[str]:
    """Modules of `auto_map`, as in {"AutoModel": "modeling_x.XModel", "AutoTokenizer": ["tokenization_x.X", null]};
    those of another repository are `owner/name--module`, and lie there."""
    for value in auto_map.values() if isinstance(auto_map, dict) else ():
        for name in value if isinstance(value, list) else [value]:
            if isinstance(name, str) and "--" not in name:
                yield name.partition(".")[0]


def _is_file_of(folder: Path, name: str) -> bool:
    return Path(name).name == name and "\0" not in name and (folder / name).is_file()


def _object(file: Path) -> dict[str, Any]:
    try:
        return read_json(file)
    except ModelError:
        return {}
