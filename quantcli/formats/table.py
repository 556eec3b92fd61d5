"""The formats that can be written and read. A new one is a file beside this and a line here."""

from __future__ import annotations

from types import ModuleType

from quantcli.formats import compressed_tensors

FORMATS: dict[str, ModuleType] = {compressed_tensors.NAME: compressed_tensors}
"""Name in a recipe → module with `refusal`, `layout`, `encode`, `decode`, `configuration` and `parse_configuration`."""
