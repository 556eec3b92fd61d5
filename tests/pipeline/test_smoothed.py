"""Stages behind `smooth` read the float model with its folds and rotations, stages before it the stored one."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from run_contexts import changed, float_model, opened, read
from safetensors.torch import load_file, save_file
from tiny_models import save_tiny_model, tiny_tokenizer
from torch import Tensor

from quantcli.errors import ModelError, VerificationError
from quantcli.formats.store import Store
from quantcli.formats.sums import SUMS, write_sums
from quantcli.model.checkpoint import Checkpoint, file_digest
from quantcli.model.folding import Fold, TransformedCheckpoint, exact_scale
from quantcli.model.rotation import ModelRotation
from quantcli.pipeline.batches import batched
from quantcli.pipeline.context import Context
from quantcli.pipeline.engine import STAGES
from quantcli.pipeline.smoothed import folds_file, read_folds, smoothed_checkpoint, write_folds, write_rotation
from quantcli.pipeline.treatment import WeightSource
from quantcli.pipeline.verify import verify_path
from quantcli.quant.grid import dequantize
from quantcli.recipe import resolved_yaml
from quantcli.recipe.smoothing import RotationSection, SmoothSection

Recipe = dict[str, Any]
BF16 = torch.bfloat16
QUANTIZED = ("quantize", "export", "verify", "reference", "eval-ppl")
UP = "model.layers.1.mlp.up_proj"
NORM = "model.layers.1.post_attention_layernorm"


@pytest.fixture(scope="module")
def tied_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama in bfloat16 whose output head is its embedding."""
    return save_tiny_model("llama-tied", tmp_path_factory.mktemp("tied"), dtype=BF16, with_tokenizer=True)


@pytest.fixture
def recipe(static_recipe: Callable[[Path], Recipe], tied_model: Path, tmp_path: Path) -> Recipe:
    """W8A8 with a scale a token: nothing but what smoothing does needs calibration."""
    return changed(static_recipe(tmp_path / "run"), model__path=str(tied_model), quantize__activations__scope="token")


@contextmanager
def smoothing(recipe: Recipe, **section: Any) -> Iterator[Context]:
    """A context as the stages behind `smooth` have it; the folder of that stage is the test's to fill."""
    with opened(recipe, until="check") as context:
        context.recipe = context.recipe.model_copy(update={"smooth": SmoothSection(**section)})
        context.folder("smooth").mkdir()
        yield context


def run_stages(context: Context, *names: str) -> None:
    for stage in STAGES:
        if stage.name in names:
            context.stage = stage.name
            folder = context.run.stage(stage.name)
            folder.begin("by the test", stage.writes(context))
            stage.run(context, folder)
            folder.finish()


def write_random_folds(context: Context) -> list[list[Fold]]:
    """Scales of 1/4 to 4 for every input that can be scaled, those of norms as a stored norm gives them away."""
    generator, checkpoint = torch.Generator().manual_seed(0), Checkpoint(context.model)
    found = []
    for index, block in enumerate(context.plan.structure.blocks):
        folds = []
        for shared in block.inputs:
            assert shared.producer is not None
            channels = torch.tensor(shared.producer.channels(shared.width))
            scale = (4 ** (2 * torch.rand(int(channels.max()) + 1, generator=generator) - 1))[channels]
            if shared.producer.kind == "norm":
                name = f"{shared.producer.name}.weight"
                scale = exact_scale(checkpoint.read([name])[name], scale, 0.0, BF16)
            folds.append(Fold(shared.producer, shared.linears, scale))
        write_folds(context.folder("smooth"), index, folds)
        found.append(folds)
    return found


def scale_of(folds: list[list[Fold]], linear: str) -> Tensor:
    return next(fold.scale for block in folds for fold in block if linear in fold.linears)


def test_an_export_holds_the_folded_model(recipe: Recipe) -> None:
    with smoothing(recipe) as context:
        folds = write_random_folds(context)
        run_stages(context, *QUANTIZED)
    plain = Path(recipe["model"]["path"])
    original, export = load_file(plain / "model.safetensors"), Path(recipe["output"]) / "export" / "compressed-tensors"
    exported = load_file(export / "model.safetensors")
    # norms give away 1/s, rounded once, and codes are those of up·diag(s) with the rows that down gives away
    norm, columns, rows = f"{NORM}.weight", scale_of(folds, UP), scale_of(folds, "model.layers.1.mlp.down_proj")
    assert torch.equal(exported[norm], (original[norm].float() / columns).to(BF16))
    assert not torch.equal(exported[norm], original[norm])
    assert torch.equal(exported["model.norm.weight"], original["model.norm.weight"])
    stored = Store(Path(recipe["output"]) / "quantize").read(UP)
    folded = original[f"{UP}.weight"].float() * columns / rows[:, None]
    distance = (dequantize(stored.weight, torch.float32) - folded).abs() / stored.weight.scale.float()
    assert distance.max() < 0.51
    assert "lm_head.weight" not in exported
    assert json.loads((export / "config.json").read_text())["tie_word_embeddings"] is True

    results = read(recipe, "eval-ppl", "results.json")
    assert 0 < results["kl_divergence"] < 0.01  # a scale that one side forgot would give more than 1


def test_the_float_side_is_the_stored_model(recipe: Recipe) -> None:
    """The perplexity that a smoothed model is compared with is that of the file, not of its folded weights."""
    with smoothing(recipe) as context:
        write_random_folds(context)
        run_stages(context, *QUANTIZED)
        (batch,) = batched(context.evaluation_text.windows)
    logits = float_model(Path(recipe["model"]["path"]), BF16)(batch).logits[:, :-1].detach().float()
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()).exp()
    found = read(recipe, "eval-ppl", "results.json")["float_model"]["value"]
    assert found == pytest.approx(float(expected), rel=1e-5)


def test_who_reads_what(recipe: Recipe) -> None:
    with smoothing(recipe) as context:
        folds = write_random_folds(context)
        weight = f"{UP}.weight"
        stored = Checkpoint(context.model).read([weight])[weight]
        folded = stored.float() * scale_of(folds, UP) / scale_of(folds, "model.layers.1.mlp.down_proj")[:, None]
        assert torch.equal(context.skeleton(original=True).read([weight])[weight], stored)
        assert torch.equal(WeightSource(context, original=True).read(UP), stored)
        torch.testing.assert_close(WeightSource(context).read(UP), folded, rtol=1e-6, atol=0)
        assert torch.equal(context.skeleton().read([weight])[weight], WeightSource(context).read(UP).to(BF16))
        assert context.checkpoint is context.checkpoint  # files of the stage are read once


def test_without_the_section_the_checkpoint_is_the_file(recipe: Recipe) -> None:
    with opened(recipe, until="check") as context:
        assert not isinstance(context.checkpoint, TransformedCheckpoint)
        assert not context.untied


def test_an_export_that_is_not_folded_is_found(recipe: Recipe) -> None:
    with smoothing(recipe) as context:
        write_random_folds(context)
        run_stages(context, "quantize", "export", "verify")
        file = context.folder("export") / "compressed-tensors" / "model.safetensors"
        tensors = load_file(file)
        tensors[f"{NORM}.weight"] = Checkpoint(context.model).read([f"{NORM}.weight"])[f"{NORM}.weight"]
        save_file(tensors, file, {"format": "pt"})
        record_again(context)
        with pytest.raises(VerificationError, match=f"{NORM}.weight differs from the float model's"):
            run_stages(context, "verify")


def record_again(context: Context) -> None:
    """The files of the export as they are now become its record, as if it had written them."""
    folder = context.run.stage("export")
    for form in (place for place in folder.path.iterdir() if place.is_dir()):
        files = sorted(file for file in form.iterdir() if file.name != SUMS)
        files.append(write_sums(form, {file.name: file_digest(file) for file in files}))
        for file in files:
            folder.add(file)
    folder.finish()


def test_a_run_is_verified_from_outside_too(recipe: Recipe) -> None:
    with smoothing(recipe) as context:
        folds = write_random_folds(context)
        run_stages(context, "quantize", "export")
        context.run.record["stages"]["export"] = {}
        context.run.write_record()
        context.run.write_recipe(resolved_yaml(context.recipe))
    run = Path(recipe["output"])
    assert verify_path(run)["compressed-tensors: linears"] == 14
    folds[1][0].scale[3] *= 2
    write_folds(run / "smooth", 1, folds[1])
    with pytest.raises(VerificationError, match="input_layernorm"):
        verify_path(run)


@pytest.mark.parametrize("form", ["compressed-tensors", "ascend"])
def test_a_rotated_model_has_a_head_of_its_own(form: str, recipe: Recipe) -> None:
    rotation = ModelRotation(seed=3, hidden=True, heads=True, head_dim=16)
    with smoothing(changed(recipe, export__formats=[form]), method="rotate") as context:
        write_rotation(context.folder("smooth"), rotation)
        assert context.untied
        run_stages(context, *QUANTIZED)
        export = context.folder("export") / form
        config = json.loads((export / "config.json").read_text())
        assert config["tie_word_embeddings"] is False
        (file,) = export.glob("*.safetensors")
        tensors = load_file(file)
        original = load_file(context.model / "model.safetensors")["model.embed_tokens.weight"].float()
        head, embedding = tensors["lm_head.weight"].float(), tensors["model.embed_tokens.weight"].float()
        # both are products with one orthogonal matrix, the head with the gain of the last norm in it
        gain = load_file(context.model / "model.safetensors")["model.norm.weight"].float()
        torch.testing.assert_close(embedding @ embedding.t(), original @ original.t(), rtol=0, atol=3e-2)
        torch.testing.assert_close(head @ embedding.t(), (original * gain) @ original.t(), rtol=0, atol=3e-2)
        assert torch.equal(tensors["model.norm.weight"], torch.ones(64, dtype=BF16))
        assert 0 < read(recipe, "eval-ppl", "results.json")["kl_divergence"] < 0.02
        (export / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
        record_again(context)
        with pytest.raises(VerificationError, match="ties an output head that is not"):
            run_stages(context, "verify")


def test_folds_of_a_rotated_model(recipe: Recipe) -> None:
    """Rotation comes first: scales divide the norm that a rotation left as ones."""
    with smoothing(recipe, rotation=RotationSection()) as context:
        write_rotation(context.folder("smooth"), ModelRotation(seed=3, hidden=True, heads=False))
        folds = write_random_folds(context)
        norm = f"{NORM}.weight"
        torch.testing.assert_close(context.checkpoint.read([norm])[norm], 1 / scale_of(folds, UP))
        run_stages(context, *QUANTIZED)
    assert 0 < read(recipe, "eval-ppl", "results.json")["kl_divergence"] < 0.02


def test_a_head_beside_tying_is_what_is_rotated(tmp_path: Path, recipe: Recipe) -> None:
    """A fine-tuned head in the file of a model whose configuration says tied."""
    model = save_tiny_model("llama-tied", tmp_path / "model")
    tiny_tokenizer().save_pretrained(model)
    tensors = load_file(model / "model.safetensors")
    tensors["lm_head.weight"] = torch.randn(512, 64, generator=torch.Generator().manual_seed(0))
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    with smoothing(changed(recipe, model__path=str(model)), method="rotate") as context:
        write_rotation(context.folder("smooth"), ModelRotation(seed=3, hidden=True, heads=False))
        found = context.checkpoint.read(["lm_head.weight", "model.embed_tokens.weight"])
    expected = (tensors["lm_head.weight"] * tensors["model.norm.weight"]) @ tensors["model.embed_tokens.weight"].t()
    products = found["lm_head.weight"] @ found["model.embed_tokens.weight"].t()
    torch.testing.assert_close(products, expected, rtol=1e-5, atol=1e-5)


# The stage's files.


def test_folds_come_back_from_their_file(recipe: Recipe, tmp_path: Path) -> None:
    with opened(recipe, until="check") as context:
        structure = context.plan.structure
    first, *_, last = structure.blocks[1].inputs
    assert first.producer is not None
    assert last.producer is not None
    folds = [
        Fold(first.producer, first.linears, torch.rand(64), torch.randn(64)),
        Fold(last.producer, last.linears, torch.rand(96)),
    ]
    write_folds(tmp_path, 1, folds)
    for written, found in zip(folds, read_folds(tmp_path, 1, structure), strict=True):
        assert (found.producer, found.linears) == (written.producer, written.linears)
        assert torch.equal(found.scale, written.scale)
        assert (found.shift is None) == (written.shift is None)
        assert written.shift is None or torch.equal(found.shift, written.shift)
    digest = write_folds(tmp_path, 0, [])
    assert read_folds(tmp_path, 0, structure) == []
    assert digest == write_folds(tmp_path, 0, [])


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        (None, "block-00001.safetensors cannot be read"),
        ({"model.layers.0.mlp.gate_proj.scale": torch.ones(64)}, r"holds model\.layers\.0\.mlp\.gate_proj\.scale"),
        ({"model.layers.1.mlp.up_proj.scale": torch.ones(64)}, r"holds model\.layers\.1\.mlp\.up_proj\.scale"),
        ({"model.layers.1.mlp.gate_proj.shift": torch.ones(64)}, r"the input of model\.layers\.1\.mlp\.gate_proj"),
        ({"model.layers.1.mlp.gate_proj.scale": torch.ones(63)}, r"shape \(63,\)"),
        ({"model.layers.1.mlp.gate_proj.scale": -torch.ones(64)}, "not positive"),
    ],
)
def test_a_damaged_file_is_refused(tensors: dict[str, Tensor] | None, words: str, recipe: Recipe) -> None:
    with smoothing(recipe) as context:
        write_folds(context.folder("smooth"), 0, [])
        if tensors is not None:
            save_file(tensors, folds_file(context.folder("smooth"), 1))
        with pytest.raises(ModelError, match=words) as caught:
            smoothed_checkpoint(context.recipe, context.model, context.plan.structure, context.folder("smooth"))
        assert caught.value.remedy


@pytest.mark.parametrize("content", [None, "{}", '{"seed": 0, "hidden": true, "heads": false, "angle": 90}'])
def test_a_damaged_rotation_is_refused(content: str | None, recipe: Recipe) -> None:
    with smoothing(recipe, method="rotate") as context:
        if content is not None:
            (context.folder("smooth") / "rotation.json").write_text(content)
        with pytest.raises(ModelError, match=r"rotation\.json"):
            context.checkpoint  # noqa: B018
