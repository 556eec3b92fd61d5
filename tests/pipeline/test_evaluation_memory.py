"""What smoothing and an evaluation hold in memory: one block, whatever their number. Each in a fresh process, as it
records it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import save_tiny_model

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="reads VmHWM")]

WIDTH, BLOCKS = 1024, (4, 16)
"""Hidden size of a model whose blocks take 24 MB, beside which a peak varies by one or two of them."""
SEARCHED_WIDTH, SEARCHED_BLOCKS = 512, (2, 7)
"""Of a model that is searched for seconds in every block, of 6 MB."""
SCHEMES: dict[str, Any] = {
    "W8A8": {"weights": {"bits": 8, "method": "minmax"}, "activations": {"bits": 8, "scope": "token"}},
    "W4A16": {"weights": {"bits": 4, "granularity": "group", "group_size": 64, "method": "minmax"}},
}
SEARCHES: dict[str, tuple[str, dict[str, Any]]] = {
    "auto, rotated and saved": ("W8A8", {"method": "auto", "rotation": {}, "save_model": True}),
    "awq with clip": ("W4A16", {"method": "awq"}),
}
STAGE = """
import sys, json, quantcli
from pathlib import Path
recipe, stage = json.loads(sys.argv[1]), sys.argv[2]
if "apart" in sys.argv:  # holes between tensors in the heap, which differ from run to run by more than a small block
    from quantcli.model import heap
    heap.HEAP_BLOCK_BYTES = heap.SMALL_BLOCK_BYTES
result = quantcli.run_stage(stage, recipe)
peak = int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) * 1024
assert not result.stages[stage]["reused"]
print(json.dumps([result.stages[stage]["peak_memory"], peak]))
"""


@pytest.fixture(scope="module")
def model_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, int], Path]:
    """The path of a model of a width and number of blocks."""
    place = tmp_path_factory.mktemp("models")

    @cache
    def make(width: int, blocks: int) -> Path:
        shape = {"hidden_size": width, "intermediate_size": 11 * width // 4, "num_hidden_layers": blocks,
                 "num_attention_heads": width // 64, "num_key_value_heads": width // 128}  # fmt: skip
        return save_tiny_model("llama", place / f"{width}-{blocks}", dtype=torch.bfloat16, with_tokenizer=True, **shape)

    return make


def block_bytes(width: int) -> int:
    """In bfloat16: q and o, k and v of half the width, gate, up and down."""
    return 2 * width * (2 * width + width + 3 * 11 * width // 4)


def recipe_of(model: Path, prose: Path, output: Path, scheme: str, **sections: Any) -> dict[str, Any]:
    text = {"dataset": "text", "path": str(prose), "sequence_length": 64}
    return {
        "model": {"path": str(model), "sanity_check": "off"},
        "calibration": {**text, "samples": 4},
        "quantize": SCHEMES[scheme],
        "evaluate": {"perplexity": {**text, "windows": 2}, "generate": None},
        "output": str(output),
        **sections,
    }


def peak(recipe: dict[str, Any], stage: str, *options: str) -> int:
    """What a fresh process records of a stage: bytes, not those of the process that started it."""
    command = [sys.executable, "-c", STAGE, json.dumps(recipe), stage, *options]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    recorded, found = json.loads(done.stdout.splitlines()[-1])
    assert 0.9 * found < recorded <= found
    return int(recorded)


def assert_flat(what: str, peaks: list[int], width: int, blocks: tuple[int, int]) -> None:
    """More blocks add less than a third of what they take themselves, which is more than a peak varies by."""
    fewer, more = peaks
    added = (blocks[1] - blocks[0]) * block_bytes(width)
    assert more - fewer < 0.3 * added, f"{what}: {fewer / 1e6:.0f} → {more / 1e6:.0f} MB"


@pytest.mark.timeout(600)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_more_blocks_take_no_more_memory(
    model_of: Callable[[int, int], Path], prose: Path, tmp_path: Path, scheme: str
) -> None:
    smooth = {"smooth": {"method": "smoothquant"}} if scheme == "W8A8" else {}
    peaks: dict[str, list[int]] = {stage: [] for stage in (*smooth, "reference", "eval-ppl")}
    for count in BLOCKS:
        recipe = recipe_of(model_of(WIDTH, count), prose, tmp_path / str(count), scheme, **smooth)
        for stage in (*smooth, "export", "reference", "eval-ppl"):
            found = peak(recipe, stage)
            if stage in peaks:
                peaks[stage].append(found)
    for stage, both in peaks.items():
        assert_flat(stage, both, WIDTH, BLOCKS)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", SEARCHES)
def test_searches_of_more_blocks_take_no_more_memory(
    model_of: Callable[[int, int], Path], prose: Path, tmp_path: Path, name: str
) -> None:
    scheme, section = SEARCHES[name]
    smooth = {**section, "search_tokens": 32}  # for less time; what may pile up is weights
    peaks = []
    for count in SEARCHED_BLOCKS:
        recipe = recipe_of(model_of(SEARCHED_WIDTH, count), prose, tmp_path / str(count), scheme, smooth=smooth)
        peaks.append(peak(recipe, "smooth", "apart"))
    assert_flat(name, peaks, SEARCHED_WIDTH, SEARCHED_BLOCKS)
