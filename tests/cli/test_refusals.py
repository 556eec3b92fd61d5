"""Bad input: an exit status, one or two sentences that say where and what to do, and nothing written or lost."""

from __future__ import annotations

import errno
import json
import os
import re
import resource
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tiny_models import save_tiny_model

from quantcli.cli import run_command
from quantcli.pipeline.rundir import open_run

Tree = dict[str, str]
ReadTree = Callable[[Path], Tree]
RecipeFile = Callable[..., Path]


def said(outcome: Any, status: int, *patterns: str) -> None:
    """The command failed with this status and one short message, without a traceback, that matches the patterns."""
    assert outcome.status == status, outcome.err
    assert "Traceback" not in outcome.err
    message = outcome.err.strip().splitlines()[-1]
    for pattern in patterns:
        assert re.search(pattern, message), message
    assert len(re.findall(r"[.?!](?: |$)", message)) <= 3, message
    assert len(message) < 500, message


@pytest.fixture
def model(tiny_llama: Path, tmp_path: Path) -> Path:
    """A copy of the tiny Llama, to be spoilt."""
    return Path(shutil.copytree(tiny_llama, tmp_path / "model"))


def truncate(model: Path) -> None:
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def garble_header(model: Path) -> None:
    file = model / "model.safetensors"
    file.write_bytes(b"\xff" * 64 + file.read_bytes()[64:])


def lose_a_shard(model: Path) -> None:
    index = {"weight_map": {"lm_head.weight": "model-00002-of-00002.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))


def leave_the_directory(model: Path) -> None:
    shutil.copy(model / "model.safetensors", model.parent / "evil.safetensors")
    index = {"weight_map": {"lm_head.weight": "../evil.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))


def pickle_the_weights(model: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")


def lose_a_tensor(model: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(model / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, model / "model.safetensors")


def know_no_such_architecture(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "model_type": "llamma", "architectures": ["Llamma"]}))


def bring_code(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}}
    (model / "config.json").write_text(json.dumps(config))
    (model / "own.py").write_text(f"open({str(model / 'executed')!r}, 'w')")


def break_the_configuration(model: Path) -> None:
    (model / "config.json").write_text('{"model_type": "llama",')


def be_quantized_already(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))


def be_quantized_by_its_tensors(model: Path) -> None:
    """As AutoGPTQ's older checkpoints, whose config.json says nothing of it."""
    import torch
    from safetensors.torch import load_file, save_file

    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.qweight"] = torch.zeros(8, 96, dtype=torch.int32)
    save_file(tensors, model / "model.safetensors")
    (model / "quantize_config.json").write_text('{"bits": 4, "group_size": 32}')


def be_quantized_for_ascend(model: Path) -> None:
    (model / "quant_model_description.json").write_text('{"model_quant_type": "W8A8"}')


@pytest.mark.parametrize(
    ("spoil", "patterns"),
    [
        (truncate, [r"model\.safetensors is truncated or damaged", "Download it again"]),
        (garble_header, [r"model\.safetensors is truncated or damaged"]),
        (lose_a_shard, [r"names model-00002-of-00002\.safetensors, which is not there", "Download"]),
        (leave_the_directory, [r"names '\.\./evil\.safetensors', which is not a safetensors file beside it"]),
        (pickle_the_weights, [r"pickled weights \(pytorch_model\.bin\)", "save_pretrained"]),
        (lose_a_tensor, [r"lacks model\.layers\.1\.mlp\.up_proj\.weight"]),
        (know_no_such_architecture, ["'llamma' is not an architecture"]),
        (bring_code, ["needs code from the checkpoint", "trust_remote_code: true"]),
        (break_the_configuration, [r"config\.json cannot be read as JSON"]),
        (be_quantized_already, [r"already quantized \(gptq\)", "float model"]),
        (be_quantized_by_its_tensors, [r"already quantized \(gptq\)", "float model"]),
        (be_quantized_for_ascend, [r"already quantized \(ascend\)", "float model"]),
    ],
)
def test_a_model_that_cannot_be_used(
    quantcli: Any,
    recipe_file: RecipeFile,
    model: Path,
    tree: ReadTree,
    spoil: Callable[[Path], None],
    patterns: list[str],
) -> None:
    spoil(model)
    file = recipe_file(**{"model.path": str(model)})
    before = tree(model), tree(file.parent)
    said(quantcli("run", file), 3, *patterns)
    assert (tree(model), tree(file.parent)) == before


def test_weights_that_are_not_numbers(quantcli: Any, recipe_file: RecipeFile, model: Path, tree: ReadTree) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.2.self_attn.v_proj.weight"][3, 5] = float("nan")
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    before = tree(model)
    data_free = {"quantize.activations": {"bits": 16}, "evaluate": None, "calibration": None}
    said(
        quantcli("run", recipe_file(**{"model.path": str(model)}, **data_free)),
        3,
        r"model\.layers\.2\.self_attn\.v_proj\.weight holds values that are not finite",
    )
    said(quantcli("run", recipe_file(**{"model.path": str(model), "model.sanity_check": "off"})), 3, "are not finite")
    said(quantcli("run", recipe_file(**{"model.path": str(model), "model.sanity_check": "stop"})), 3, "broken")
    assert tree(model) == before


def test_a_model_that_is_not_there(quantcli: Any, recipe_file: RecipeFile, tree: ReadTree, tmp_path: Path) -> None:
    file = recipe_file()
    said(quantcli("run", file, "--model", tmp_path / "nowhere"), 3, r"There is no model at .*nowhere", "model.path")
    said(quantcli("plan", file, "--model", tmp_path / "nowhere"), 3, "There is no model at")
    said(quantcli("plan", file, "--model", "gpt2"), 3, "There is no model at gpt2", "A name on the hub is ORG/NAME")
    assert not (file.parent / "run").exists()
    assert tree(tmp_path) == {}


def test_a_model_without_a_tokenizer(quantcli: Any, recipe_file: RecipeFile, model: Path) -> None:
    file = recipe_file(**{"model.path": str(model)})
    (model / "tokenizer.json").write_text("{}")
    said(quantcli("run", file), 3, "has no usable tokenizer: ", "Put the tokenizer's files beside the weights")
    for part in model.glob("*token*"):
        part.unlink()
    said(quantcli("run", file), 3, r"has no usable tokenizer: there is no file of one\. Put")


@pytest.mark.parametrize(
    ("content", "pattern"),
    [(None, "does not exist"), ("", "is empty"), (" \n\n", "is empty"), (b"\xff\xfe\x00", "not UTF-8")],
)
def test_text_that_cannot_be_used(
    quantcli: Any, recipe_file: RecipeFile, tmp_path: Path, content: str | bytes | None, pattern: str
) -> None:
    text = tmp_path / "text.txt"
    if content is not None:
        text.write_bytes(content if isinstance(content, bytes) else content.encode())
    for section in ("calibration", "evaluate.perplexity"):
        file = recipe_file(**{f"{section}.path": str(text)})
        said(quantcli("run", file), 3, pattern, r"text\.txt")
        assert not (file.parent / "run").exists()


def test_places_that_hold_something_else(
    quantcli: Any, recipe_file: RecipeFile, tiny_llama: Path, tmp_path: Path, tree: ReadTree
) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("It was a dark night.")
    (tmp_path / "file").write_text("text")
    before, model = tree(tmp_path), tree(tiny_llama)
    file = recipe_file()
    said(
        quantcli("run", file, "--output", tmp_path / "thesis"), 2, r"something else \(chapter1\.tex\)", "new directory"
    )
    said(quantcli("run", file, "--output", tmp_path / "file"), 2, "is a file")
    said(quantcli("run", file, "--output", tmp_path / "file" / "below"), 2, "cannot be made: Not a directory")
    said(quantcli("run", file, "--output", tiny_llama), 2, "in one another")
    said(quantcli("run", file, "--output", tiny_llama / "out"), 2, "in one another")
    said(quantcli("run", file, "--output", tiny_llama.parent), 2, "in one another")
    assert (tree(tmp_path), tree(tiny_llama)) == (before, model)


def test_a_directory_that_is_read_only(quantcli: Any, recipe_file: RecipeFile, tmp_path: Path) -> None:
    if os.geteuid() == 0:  # permissions do not bind root; /proc binds everybody
        place, why = Path("/proc/quantcli-run"), "cannot be made"
    else:
        place, why = tmp_path / "closed", "Permission denied"
        place.mkdir(mode=0o500)
    said(quantcli("run", recipe_file(), "--output", place), 2, why, "another output")


@contextmanager
def largest_file(limit: int) -> Iterator[None]:
    """Files may not grow beyond the limit: what a full disk is like, without filling one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk(quantcli: Any, recipe_file: RecipeFile, finished: Path, tree: ReadTree, tmp_path: Path) -> None:
    """The run says so, keeps what is finished, and goes on when there is room again."""
    file = recipe_file()
    for limit in (3_000, 30_000, 150_000):
        with largest_file(limit):
            said(quantcli("run", file, "--quiet"), 6, "No room is left to write", "Free some")
        assert not list(file.parent.rglob("*.part"))
    assert quantcli("run", file, "--quiet").status == 0
    assert tree(file.parent / "run" / "export") == tree(finished / "export")


def test_a_disk_that_is_too_small_is_told_before_work_begins(
    quantcli: Any, recipe_file: RecipeFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = recipe_file()
    usage = shutil.disk_usage(file)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    said(quantcli("run", file), 6, "GB free, and the run needs about")
    assert not (file.parent / "run").exists()


def test_two_runs_at_once(quantcli: Any, recipe_file: RecipeFile, tiny_llama: Path) -> None:
    file = recipe_file()
    with open_run(file.parent / "run", tiny_llama):
        said(quantcli("run", file), 2, "Another run is using", "Wait for it")
    assert sorted(path.name for path in (file.parent / "run").iterdir()) == ["run.json"]


@pytest.mark.parametrize(
    ("changes", "patterns"),
    [
        (
            {"quantize.wieghts": {"bits": 8}},
            [r"recipe\.yaml:\d+: quantize\.wieghts: unknown key", "Did you mean weights"],
        ),
        ({"quantize.weights": {"bits": 5}}, [r"recipe\.yaml:\d+: quantize\.weights\.bits", "Allowed"]),
        ({"quantize.rollback": {"names": ["*.mlp.dwon_proj"]}}, ["matches no linear", r"mlp\.down_proj"]),
        ({"quantize.rollback": {"names": ["*"]}}, ["every linear is rolled back"]),
        (
            {"quantize.overrides": [{"match": "*.mlp.gate_porj", "scheme": "W8A16"}]},
            [r"quantize\.overrides\[0\]\.match: '\*\.mlp\.gate_porj' matches no linear", r"mlp\.gate_proj"],
        ),
        (
            {"quantize.overrides": [{"match": "*.mlp.gate_proj", "scheme": "W8A16"}]},
            ["gate_proj and .*up_proj have different schemes", "siblings: apart"],
        ),
        ({"quantize.kv_cache": {}}, ["compressed-tensors cannot hold C8", "another format"]),
        ({"calibration": None}, ["static scales need calibration"]),
        (
            {"calibration": None, "quantize.activations": {"bits": 16}, "quantize.rollback": {"level": 1}},
            [r"quantize\.rollback\.level: ranks linears by what they are fed", "calibration: {}"],
        ),
        ({"model.device": "cuda:63"}, ["there is no cuda:63 on this machine", "--device cpu"]),
    ],
)
def test_a_recipe_that_is_wrong(
    quantcli: Any, recipe_file: RecipeFile, tree: ReadTree, changes: dict[str, Any], patterns: list[str]
) -> None:
    file = recipe_file(**changes)
    before = tree(file.parent)
    said(quantcli("run", file), 2, *patterns)
    assert tree(file.parent) == before


@pytest.mark.parametrize(
    ("arguments", "patterns"),
    [
        (["run", "w8a88", "--model", "m", "--output", "o"], ["w8a88: neither a file nor", "Did you mean w8a8"]),
        (["run", "no/such.yaml"], ["no such recipe file"]),
        (["run", "w8a16", "--model", "m"], ["output: is missing", "--output"]),
        (["run", "w8a16", "--output", "o"], ["model.path: is missing", "--model"]),
        (["run", "w8a16", "--set", "quantize.weights.bit=4", "--model", "m", "--output", "o"],
         ["--set quantize.weights.bit=4: quantize.weights.bit: unknown key", "Did you mean bits"]),
        (["run", "w8a16", "--set", "bits"], ["is no KEY=VALUE"]),
        (["run", "w8a16", "--device", "gpu", "--model", "m", "--output", "o"], ["--device", "Allowed: auto, cpu"]),
        (["recipes", "show", "w9"], ["neither a file nor a shipped recipe", "Shipped recipes: "]),
        (["verify", "."], ["neither a run directory nor a checkpoint"]),
        (["eval-ppl"], ["there is no recipe", "--checkpoint DIR"]),
        (["convert", "c", "--to", "exl2", "--output", "o"], ["there is no format 'exl2'", "Known formats: "]),
        (["convert", "c", "--output", "o"], ["Missing option '--to'"]),
        (["convert", "c", "--to", "awq", "--output", "o", "--shard-size", "5"],
         ["--shard-size: '5' is no size", "with its unit, as 1GiB or 500MB"]),
        (["convert", "c", "--to", "awq", "--output", "o", "--shard-size", "0.1B"], ["is no room for a tensor"]),
        (["frobnicate"], ["No such command"]),
        (["run"], ["Missing argument"]),
        (["run", "w8a16", "--frob"], ["No such option"]),
        (["sensitivity", "w8a16", "--model", "m", "--output", "o", "--metric", "std"],
         ["--set quantize.rollback.metric=std: quantize.rollback.metric: is 'std'", "Allowed: range_parm"]),
        (["sensitivity", "w8a16", "--model", "m", "--output", "o", "--top", "0"], ["--top"]),
    ],
)  # fmt: skip
def test_a_command_line_that_is_wrong(
    quantcli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], patterns: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = quantcli(*arguments)
    said(outcome, 2, *patterns)
    assert outcome.out == ""
    assert list(tmp_path.iterdir()) == []


def test_a_stage_that_the_recipe_has_nothing_for(quantcli: Any, recipe_file: RecipeFile) -> None:
    file = recipe_file(**{"quantize.activations": {"bits": 16}, "evaluate": None})
    said(quantcli("calibrate", file), 2, "nothing for stage calibrate")
    said(quantcli("eval-ppl", file), 2, "nothing for stage eval-ppl", "evaluate.perplexity")
    said(quantcli("search", file), 2, "nothing for stage search", "quantize.rollback.target")
    assert not (file.parent / "run").exists()


def test_a_target_that_cannot_be_reached(quantcli: Any, recipe_file: RecipeFile) -> None:
    file = recipe_file(**{"quantize.rollback": {"target": {"size": 1e-6}}})
    said(quantcli("search", file), 2, r"target\.size: 1e-06 GB is less than the 0\.\d+ GB .* nothing rolled back")
    few = ["--set", "quantize.rollback.target={kl_divergence: 1.0e-9, evaluations: 3}"]
    outcome = quantcli("search", file, *few)
    assert outcome.status == 0
    assert "Warning: The target a KL divergence of 1e-09 is not met after 3 trials" in outcome.err


def test_a_missed_gate_keeps_the_run(quantcli: Any, recipe_file: RecipeFile, finished: Path, tree: ReadTree) -> None:
    file = recipe_file(**{"evaluate.gates": {"kl_divergence": 1e-9}})
    outcome = quantcli("run", file)
    said(outcome, 4, r"evaluate\.gates\.kl_divergence: \S+ ± \S+ is above 1e-09", "The run is complete in")
    assert "KL divergence" in outcome.out  # the table says by how much
    assert tree(file.parent / "run" / "export") == tree(finished / "export")
    outcome = quantcli("run", file, "--json")
    assert outcome.status == 4
    assert "kl_divergence" in json.loads(outcome.out)["missed_gate"]
    assert quantcli("run", file, "--quiet", "--set", "evaluate.gates=null").status == 0


def test_an_edited_file_of_an_export_is_replaced_with_overwrite(quantcli: Any, recipe_file: RecipeFile) -> None:
    file = recipe_file(evaluate=None)
    assert quantcli("export", file, "--quiet").status == 0
    config = file.parent / "run" / "export" / "compressed-tensors" / "config.json"
    written = config.read_text()
    config.write_text("{}")
    for command in ("run", "export"):
        said(quantcli(command, file), 2, r"config\.json was changed since the run wrote it", "--overwrite")
    assert quantcli("quantize", file, "--quiet").status == 0  # which touches no export
    assert config.read_text() == "{}"
    assert quantcli("run", file, "--overwrite", "--quiet").status == 0
    assert config.read_text() == written


def test_an_export_that_was_tampered_with(quantcli: Any, finished: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    weights = run / "export" / "compressed-tensors" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-5] ^= 1
    weights.write_bytes(content)
    for path in (run, weights.parent):
        outcome = quantcli("verify", path)
        said(outcome, 5, r"model\.safetensors is not what was exported")
        assert outcome.out == ""


@pytest.mark.parametrize(
    ("command", "export", "what", "before"),
    [
        ("run", "export=null", "its recipe says export: null", "Name a format and export: quantcli "),
        ("quantize", "export={}", "has no export yet", "Export it: quantcli "),
    ],
)
def test_verify_of_a_run_without_an_export(
    quantcli: Any, recipe_file: RecipeFile, command: str, export: str, what: str, before: str
) -> None:
    """The command that the refusal names makes one."""
    file = recipe_file(evaluate=None)
    run = file.parent / "run"
    assert quantcli(command, file, "--set", export, "--quiet").status == 0
    outcome = quantcli("verify", run)
    said(outcome, 2, what)
    assert quantcli(*shlex.split(outcome.err.partition(before)[2]), "--quiet").status == 0
    assert quantcli("verify", run).status == 0


def test_a_model_of_experts(quantcli: Any, tmp_path: Path) -> None:
    model = save_tiny_model("mixtral", tmp_path / "model")
    for recipe, scheme in (("w8a8", "W8A8-dynamic"), ("w8a8-fp8-static", "W8A8-fp8")):
        override = f'[{{match: "*.experts.*", scheme: {scheme}}}]'
        said(quantcli("plan", recipe, "--model", model), 2, "is of an expert", f"overrides: {override}")
        assert quantcli("plan", recipe, "--model", model, "--set", f"quantize.overrides={override}").status == 0


def test_an_error_of_ours_is_one_line_and_a_traceback_only_when_asked_for(
    quantcli: Any, recipe_file: RecipeFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    from quantcli.pipeline import engine

    def broken(*_: Any, **__: Any) -> None:
        raise KeyError("a defect")

    monkeypatch.setattr(engine, "make_plan", broken)
    said(quantcli("run", recipe_file()), 1, "Internal error: KeyError: 'a defect'", "--verbose shows where")
    assert "Traceback" in quantcli("run", recipe_file(), "--verbose").err


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("unshare"), reason="mounting a small disk needs root")
def test_a_disk_that_runs_full(recipe_file: RecipeFile, tmp_path: Path) -> None:
    """A real one, of 300 kB, in a mount namespace of its own."""
    import sys

    disk, file = tmp_path / "disk", recipe_file()
    disk.mkdir()
    script = (
        f'mount -t tmpfs -o size=300k none "{disk}" && exec "{sys.executable}" -m quantcli run "{file}" --quiet "$@"'
    )
    command = ["unshare", "--mount", "sh", "-c", script, "sh", "--output", str(disk / "run")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if "unshare" in done.stderr or "mount:" in done.stderr:
        pytest.skip("this machine allows no mounts")
    assert done.returncode == 6, done.stderr
    assert re.search(r"GB free, and the run needs|No room is left", done.stderr)
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (PermissionError(errno.EACCES, "Permission denied", "/m/config.json"), 3, "/m/config.json: Permission denied"),
        (IsADirectoryError(errno.EISDIR, "Is a directory", "/r/a.json"), 2, "/r/a.json is a directory where a file"),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory", "/dev/null/a"), 2, "/dev/null stands where a directory"),
        (OSError(errno.ENOSPC, "No space left on device"), 6, "No room is left"),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), 6, "The memory is too small"),
        (RuntimeError("shapes differ"), 1, "Internal error: RuntimeError: shapes differ"),
    ],
)
def test_what_the_system_refuses_has_the_status_of_its_kind(
    error: Exception, status: int, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("quantcli.pipeline.inspect.inspect_path", fails)
    assert run_command(["inspect", "."]) == status
    assert words in capsys.readouterr().err
