"""A scheme as JSON and back, and JSON that is no scheme."""

from __future__ import annotations

import json
from typing import Any

import pytest

from quantcli.quant.scheme import AttentionScheme, Scheme

SCHEMES = [
    Scheme(8), Scheme(4, False, "group", 64, "dynamic", activation_bits=4), Scheme(8, type="float", sparse=True),
    AttentionScheme(), AttentionScheme("int8", kv_symmetric=False), AttentionScheme(heads=True),
]  # fmt: skip


@pytest.mark.parametrize("scheme", SCHEMES, ids=repr)
def test_json_and_back(scheme: Scheme | AttentionScheme) -> None:
    assert type(scheme).from_json(json.loads(json.dumps(scheme.to_json()))) == scheme


@pytest.mark.parametrize(
    "entry",
    [{"bits": "8"}, {"bits": True}, {"bits": 0}, {"bits": 8.0}, {"symmetric": 1}, {"granularity": "row"}, {"type": []},
     {"group_size": -64}, {"group_size": "32"}, {"activations": {}}, {"activations": None}, {"kind": 1}],
)  # fmt: skip
def test_json_that_is_no_scheme(entry: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=next(iter(entry))):
        Scheme.from_json({"bits": 8} | entry)


def test_json_that_is_no_scheme_of_attention() -> None:
    for entry in ({"kv": "int4"}, {"kv": None}, {"heads": 0}, {"keys": True}):
        with pytest.raises(TypeError, match=next(iter(entry))):
            AttentionScheme.from_json(entry)
