"""The directory that the documents' examples are run in."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from doc_blocks import MODEL
from safetensors.torch import load_file, save_file
from tiny_models import save_seeing_model, save_tiny_model


@pytest.fixture(scope="session")
def example_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model("llama", tmp_path_factory.mktemp("example") / "model", with_tokenizer=True)


@pytest.fixture(scope="session")
def other_models(example_model: Path) -> dict[str, Path]:
    """Models that have to be saved anew before they are quantized, by the names that examples give them."""
    seeing = save_seeing_model(example_model.parent / "seeing")
    pickled = shutil.copytree(example_model, example_model.parent / "pickled")
    torch.save(load_file(pickled / "model.safetensors"), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    return {"gemma-3-4b-it": seeing, "old-model": pickled, "model-fp8": _in_fp8(example_model)}


def _in_fp8(model: Path) -> Path:
    """The model in bfloat16, its linears in FP8 with a scale for each block of 32 × 32."""
    folder, side = shutil.copytree(model, model.parent / "fp8"), 32
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if name.endswith("_proj.weight"):
            blocks = tensor.view(len(tensor) // side, side, -1, side)
            scale = blocks.abs().amax((1, 3)) / 448
            tensors[f"{name}_scale_inv"] = scale
            tensors[name] = (blocks / scale[:, None, :, None]).view_as(tensor).to(torch.float8_e4m3fn)
        else:
            tensors[name] = tensor.bfloat16()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    scheme = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [side, side]}
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16", "quantization_config": scheme}))
    return folder


@pytest.fixture
def examples(
    example_model: Path, other_models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """An empty directory, made the current one, with the files that examples name; a tiny model stands for theirs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(example_model.parent / "cache"))
    (tmp_path / MODEL).symlink_to(example_model)
    for name, model in other_models.items():
        (tmp_path / name).symlink_to(model)
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / f"{MODEL}.gguf").symlink_to(example_model)
    sentence = "The river came down from the hills in the spring and carried the winter with it.\n"
    for name in ("wiki.test.tokens", "wiki.valid.tokens"):
        (tmp_path / name).write_text(sentence * 200, encoding="utf-8")
    for name, key in (("prompts.jsonl", "prompt"), ("mix_calib.jsonl", "inputs_pretokenized")):
        (tmp_path / name).write_text(
            "".join(json.dumps({key: sentence * 3}) + "\n" for _ in range(8)), encoding="utf-8"
        )
    return tmp_path


@pytest.fixture
def quantcli(capsys: pytest.CaptureFixture[str]) -> Callable[[list[str]], tuple[int, str, str]]:
    """Run a command line in this process: exit status, standard output, standard error."""
    from quantcli.cli import run_command

    def run(arguments: list[str]) -> tuple[int, str, str]:
        capsys.readouterr()
        status = run_command(arguments)
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run
