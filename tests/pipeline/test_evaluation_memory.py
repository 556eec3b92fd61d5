"""What smoothing and an evaluation hold in memory: one block, whatever their number. Each in a fresh process, as it
records it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import save_tiny_model

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="reads VmHWM")]

WIDTH, BLOCK = 1024, 2 * 1024 * (2 * 1024 + 2 * 512 + 3 * 2816)
"""Hidden size, and bytes of a block in bfloat16: 24 MB, beside which a peak varies by one or two of them."""
BLOCKS = 4, 16
SCHEMES: dict[str, Any] = {
    "W8A8": {"weights": {"bits": 8, "method": "minmax"}, "activations": {"bits": 8, "scope": "token"}},
    "W4A16": {"weights": {"bits": 4, "granularity": "group", "group_size": 64, "method": "minmax"}},
}
STAGE = """
import sys, json, quantcli
from pathlib import Path
recipe, stage = json.loads(sys.argv[1]), sys.argv[2]
result = quantcli.run_stage(stage, recipe)
peak = int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) * 1024
assert not result.stages[stage]["reused"]
print(json.dumps([result.stages[stage]["peak_memory"], peak]))
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    place = tmp_path_factory.mktemp("models")
    shape = {"hidden_size": WIDTH, "intermediate_size": 2816, "num_attention_heads": 16, "num_key_value_heads": 8}
    return {
        count: save_tiny_model(
            "llama", place / str(count), dtype=torch.bfloat16, with_tokenizer=True, num_hidden_layers=count, **shape
        )
        for count in BLOCKS
    }


def peak(recipe: dict[str, Any], stage: str) -> int:
    """What a fresh process records of a stage: bytes, not those of the process that started it."""
    command = [sys.executable, "-c", STAGE, json.dumps(recipe), stage]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    recorded, found = json.loads(done.stdout.splitlines()[-1])
    assert 0.9 * found < recorded <= found
    return int(recorded)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_more_blocks_take_no_more_memory(models: dict[int, Path], prose: Path, tmp_path: Path, scheme: str) -> None:
    smooth = {"smooth": {"method": "smoothquant"}} if scheme == "W8A8" else {}
    peaks: dict[str, list[int]] = {stage: [] for stage in (*smooth, "reference", "eval-ppl")}
    for count, model in models.items():
        text = {"dataset": "text", "path": str(prose), "sequence_length": 64, "windows": 2}
        seen = {"dataset": "text", "path": str(prose), "sequence_length": 64, "samples": 4}
        recipe = {"model": {"path": str(model), "sanity_check": "off"}, "calibration": seen, **smooth,
                  "quantize": SCHEMES[scheme], "evaluate": {"perplexity": text, "generate": None},
                  "output": str(tmp_path / str(count))}  # fmt: skip
        for stage in (*smooth, "export", "reference", "eval-ppl"):
            found = peak(recipe, stage)
            if stage in peaks:
                peaks[stage].append(found)
    added = (BLOCKS[1] - BLOCKS[0]) * BLOCK
    for stage, (fewer, more) in peaks.items():
        assert more - fewer < 0.3 * added, f"{stage}: {fewer / 1e6:.0f} → {more / 1e6:.0f} MB"
