"""The structure of a model, remembered between runs so that a plan needs no torch."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
from pathlib import Path

from quantcli.model.checkpoint import stored_dtype
from quantcli.model.structure import Structure
from quantcli.model.untrusted import MAXIMUM_JSON_BYTES, read_regular

LAYOUT = 14
"""Raised when `Structure` or its discovery changes, so that remembered ones are found anew."""


def find_structure(directory: Path, *, dtype: str = "auto", trust_remote_code: bool = False) -> Structure:
    """`discovery.discover`, remembered by the content of config.json and the versions of transformers and torch.

    The structure depends on nothing else, but for a dtype that the configuration does not name. It is kept under
    $XDG_CACHE_HOME/quantcli (a few kB a block; safe to delete). Models that bring code of their own are not
    remembered, since the code may change.
    """
    config = directory / "config.json"
    cache = None
    if config.exists() and not trust_remote_code and (folder := cache_directory()) is not None:
        text = read_regular(config, MAXIMUM_JSON_BYTES)
        silent = b'dtype"' not in text and dtype == "auto"  # then it is that of the weights
        cache = folder / "structures" / f"{_key(text, f'{stored_dtype(directory)}' if silent else dtype)}.json"
        try:
            return Structure.from_json(json.loads(cache.read_text(encoding="utf-8")))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            pass  # absent or damaged: found anew below
    from quantcli.model.discovery import discover

    structure = discover(directory, dtype=dtype, trust_remote_code=trust_remote_code)
    if cache is not None:
        _remember(cache, structure)
    return structure


def cache_directory() -> Path | None:
    """$XDG_CACHE_HOME/quantcli, or that below ~/.cache; None for a user who has no home, as in some containers."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "quantcli"
    except RuntimeError:
        return None


def _key(config: bytes, dtype: str) -> str:
    versions = [importlib.metadata.version(name) for name in ("transformers", "torch")]
    return hashlib.sha256(config + json.dumps([LAYOUT, dtype, *versions]).encode()).hexdigest()[:32]


def _remember(cache: Path, structure: Structure) -> None:
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        temporary = cache.with_suffix(f".{os.getpid()}.part")
        temporary.write_text(json.dumps(structure.to_json()), encoding="utf-8")
        temporary.replace(cache)
    except OSError:
        pass  # a read-only home only costs the next plan two seconds
