"""Tiny models, saved once a session, and a structure cache that is not the user's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_models import save_tiny_model

TinyModel = Callable[..., Path]


@pytest.fixture(autouse=True)
def _structures_in_a_temporary_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    """`save_tiny_model` without the directory: each different model is written once. Tests must not change it."""
    saved: dict[str, Path] = {}

    def get(family: str, **settings: Any) -> Path:
        key = repr((family, sorted(settings.items())))
        if key not in saved:
            saved[key] = save_tiny_model(family, tmp_path_factory.mktemp(family), **settings)
        return saved[key]

    return get
