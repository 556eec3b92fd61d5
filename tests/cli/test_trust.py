"""Code that comes with a model runs only if who gives the command says so, whatever a recipe beside the model says."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_models import save_tiny_model

_CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
Path({mark!r}).write_text("ran")
class Own(LlamaConfig):
    model_type = "own_llama"
class Model(LlamaForCausalLM):
    config_class = Own
"""


@pytest.fixture
def own(tmp_path: Path) -> tuple[Path, Path]:
    """A model with code of its own, and the file that this code writes when it runs."""
    model, mark = save_tiny_model("llama", tmp_path / "model"), tmp_path / "mark"
    config = json.loads((model / "config.json").read_text())
    config |= {"model_type": "own_llama", "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Model"}}
    (model / "config.json").write_text(json.dumps(config))
    (model / "own.py").write_text(_CODE.format(mark=str(mark)))
    return model, mark


def forget(mark: Path) -> None:
    """Modules that have run in this process run again when they are imported."""
    mark.unlink()
    for name in [name for name in sys.modules if name.startswith("transformers_modules.")]:
        del sys.modules[name]


def test_the_recipe_of_a_run_that_is_judged_lets_no_code_run(
    quantcli: Any, own: tuple[Path, Path], tmp_path: Path
) -> None:
    model, mark = own
    run, changes = tmp_path / "run", ("--set", "evaluate=null", "--set", "model.trust_remote_code=true")
    made = quantcli("run", "w8a16", "--model", model, "--output", run, *changes)
    assert made.status == 0
    assert mark.exists()  # a user's own recipe does as it says
    forget(mark)
    export = run / "export" / "compressed-tensors"
    for path in (run, export):
        refused = quantcli("verify", path)
        assert refused.status == 2
        assert "--trust-remote-code" in refused.err
    for command in (("inspect", run), ("inspect", export), ("report", run, "--output", tmp_path / "page.html")):
        quantcli(*command)
    assert quantcli("convert", export, "--to", "dense", "--output", tmp_path / "dense").status == 3
    assert not mark.exists()
    assert quantcli("verify", run, "--trust-remote-code").status == 0
    assert mark.exists()
