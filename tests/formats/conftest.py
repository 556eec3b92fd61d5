"""Exports that tests only read, made once."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tiny_exports import SCHEMES, Export, export_tiny

Exported = Callable[..., Export]


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """(name of a scheme, dtype) → an export of the tiny llama, not to be changed."""
    made: dict[tuple[str, torch.dtype], Export] = {}

    def get(name: str, dtype: torch.dtype = torch.bfloat16) -> Export:
        if (name, dtype) not in made:
            made[name, dtype] = export_tiny(tmp_path_factory.mktemp("export"), SCHEMES[name], dtype=dtype)
        return made[name, dtype]

    return get
