"""A shift of channels where the architecture has no biases: they are added, keep the float model the same function, and
are in every file and every number; where an engine would not add them, nothing is shifted."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from run_contexts import Recipe, changed, float_model, opened, read
from safetensors.torch import load_file, save_file
from tiny_models import save_tiny_model, token_batches
from torch import Tensor

import quantcli
from quantcli.errors import ModelError, RecipeError, VerificationError
from quantcli.formats.sums import SUMS
from quantcli.formats.verify_ascend import check_added_biases
from quantcli.model.checkpoint import Checkpoint
from quantcli.model.discovery import discover
from quantcli.model.folding import Fold, added_biases, exact_shift, fold_changes, missing_biases, unties
from quantcli.model.skeleton import Skeleton
from quantcli.model.structure import Structure, biased, rms_norms
from quantcli.pipeline.convert import convert_checkpoint
from quantcli.pipeline.held import addable_biases
from quantcli.pipeline.smoothed import added_names, biased_checkpoint, folded_checkpoint
from quantcli.pipeline.standalone import open_checkpoint, score_recipe
from quantcli.pipeline.verify import verify_path
from quantcli.quant.scheme import Scheme
from quantcli.recipe import load_recipe

ATTENTION, MLP = "model.layers.0.self_attn", "model.layers.0.mlp"
EXACT = 1e-5
STATIC = Scheme(8, activations="static", activations_symmetric=False)


def with_outliers(family: str, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """A model whose residual stream has a channel that is far from 0 at every token, by its embedding and its norms."""
    model = save_tiny_model(family, folder, with_tokenizer=True, dtype=dtype)
    tensors = load_file(model / "model.safetensors")
    for name, tensor in tensors.items():
        if re.search(r"layernorm\.weight$", name):
            tensor[9] = 12
        elif name.endswith("embed_tokens.weight"):
            tensor[:, 9] += 2
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    return model


def asked(model: Path, prose: Path, output: Path, **values: Any) -> Recipe:
    text = {"dataset": "text", "path": str(prose)}
    whole = {
        "version": 1,
        "model": {"path": str(model), "sanity_check": "off"},
        "calibration": {**text, "samples": 4, "sequence_length": 24},
        "smooth": {"method": "m4", "shift": True, "search_tokens": 64},
        "quantize": {"activations": {"bits": 8, "scope": "tensor"}},
        "export": {"formats": ["ascend"]},
        "evaluate": {
            "perplexity": {**text, "sequence_length": 32, "windows": 2},
            "output_error": None,
            "generate": None,
        },
        "output": str(output),
    }
    return changed(whole, **values)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, prose: Path) -> Recipe:
    """A finished run of a tiny Qwen3 in bfloat16, exported in each format that holds the biases."""
    place = tmp_path_factory.mktemp("shifted")
    model = with_outliers("qwen3", place / "model", torch.bfloat16)
    recipe = asked(model, prose, place / "run", export__formats=["ascend", "mindie", "numpy"])
    quantcli.run(recipe)
    return recipe


def export_of(run: Recipe, form: str = "ascend") -> Path:
    return Path(run["output"]) / "export" / form


def logits(skeleton: Skeleton) -> Tensor:
    (tokens,) = token_batches((2, 20))
    with torch.inference_mode(), skeleton.resident(skeleton.model.state_dict()):
        return skeleton.model(input_ids=tokens, use_cache=False).logits  # type: ignore[no-any-return]


# The float model stays the same function.


@pytest.mark.parametrize("family", ["llama-tied", "qwen3", "qwen2"])
def test_a_shifted_model_is_the_same_function(family: str, tmp_path: Path, prose: Path) -> None:
    """In float64, as transformers computes the original."""
    model = with_outliers(family, tmp_path / "model")
    with opened(asked(model, prose, tmp_path / "run"), until="smooth") as context:
        biases = added_biases(context.checkpoint)
        found = logits(context.skeleton(dtype="float64"))
        assert not context.untied
        assert set(biases) <= context.structure.parameters.keys() - context.plan.structure.parameters.keys()
    (tokens,) = token_batches((2, 20))
    with torch.inference_mode():
        wanted = float_model(model, torch.float64, attn_implementation="eager")(tokens).logits
    assert float((found - wanted).norm() / wanted.norm()) < EXACT
    assert {f"{MLP}.gate_proj.bias", f"{MLP}.up_proj.bias", "model.layers.0.input_layernorm.bias"} <= set(biases)
    assert (f"{ATTENTION}.q_proj.bias" in biases) == (family != "qwen2")  # which has its own
    assert not [name for name in biases if "down_proj" in name or name == "model.norm.bias"]


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_folds_with_shifts_of_any_size_change_nothing(family: str, tmp_path: Path) -> None:
    """Norms to q, k and v and to gate and up, and v to o through attention, with random scales and shifts."""
    directory = save_tiny_model(family, tmp_path / "model", dtype=torch.float64)
    structure, plain = discover(directory), Checkpoint(directory)
    generator, folds = torch.Generator().manual_seed(0), []
    for shared in (shared for block in structure.blocks for shared in block.inputs):
        if shared.producer is not None and not shared.name.endswith("down_proj"):
            channels = torch.tensor(shared.producer.channels(shared.width))
            scale, shift = torch.randn(2, 64, generator=generator, dtype=torch.float64)[:, channels]
            folds.append(Fold(shared.producer, shared.linears, scale.exp(), 5 * shift))
    assert len(folds) == 6
    biases = missing_biases(structure, folds)
    assert len(biases) == 2 * 8
    names = {name: name for name in structure.parameters}
    zeros = biased_checkpoint(plain, structure, biases, names)
    assert added_biases(zeros) == tuple(biases)
    assert not unties(zeros)
    names |= added_names(zeros)
    whole = biased(structure, biases)
    found, same, wanted = (
        logits(Skeleton(directory, own, checkpoint=read))
        for own, read in (
            (whole, folded_checkpoint(zeros, whole, folds, names)), (whole, zeros), (structure, plain)
        )
    )  # fmt: skip
    assert torch.equal(same, wanted)
    assert float((found - wanted).norm() / wanted.norm()) < 1e-12
    with pytest.raises(ModelError, match="has no bias that a shift"):
        fold_changes(structure, folds, lambda name: plain.read([name])[name])


def test_a_norm_in_few_bits_gives_the_shift_away_exactly() -> None:
    generator = torch.Generator().manual_seed(0)
    bias, shift, scale = torch.randn(3, 64, generator=generator)
    scale = scale.exp()
    for dtype in (torch.bfloat16, torch.float16):
        exact = exact_shift(bias, shift, scale, dtype)
        stored = (bias - exact) / scale
        torch.testing.assert_close(stored, stored.to(dtype).float(), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(exact, shift, rtol=0, atol=0.1)
        assert not torch.equal(exact, shift)
    too_large = exact_shift(torch.zeros(2), torch.tensor([1e9, 2.0]), torch.ones(2), torch.float16)
    assert too_large.tolist() == [0.0, 2.0]


# What the exports hold.


def test_the_export_holds_the_biases_of_the_shift(run: Recipe) -> None:
    found, original = (
        load_file(export_of(run) / "quant_model_weights.safetensors"),
        load_file(Path(run["model"]["path"]) / "model.safetensors"),
    )
    folds = load_file(Path(run["output"]) / "smooth" / "block-00000.safetensors")
    scale, shift = (folds[f"{ATTENTION}.q_proj.{part}"].double() for part in ("scale", "shift"))
    norm = found["model.layers.0.input_layernorm.bias"]
    assert norm.dtype == torch.bfloat16
    torch.testing.assert_close(norm.double(), -shift / scale, rtol=1e-6, atol=0)  # nothing was rounded
    weight = original[f"{ATTENTION}.q_proj.weight"].double()
    bias = found[f"{ATTENTION}.q_proj.bias"]
    assert bias.dtype == torch.bfloat16
    torch.testing.assert_close(bias.double(), weight @ shift, rtol=2**-8, atol=1e-6)
    codes, deq_scale, offset, quant_bias = (
        found[f"{ATTENTION}.q_proj.{part}"] for part in ("weight", "deq_scale", "input_offset", "quant_bias")
    )
    sums = codes.double().sum(1) * offset.double()
    assert float((quant_bias - ((bias.float() / deq_scale).double() - sums)).abs().max()) <= 0.5
    assert float((quant_bias + sums).abs().max()) > 1  # without W z it is another


def test_the_description_names_the_biases(run: Recipe) -> None:
    for form, file in (("ascend", "quant_model_description.json"), ("mindie", "quant_model_description_w8a8.json")):
        described = json.loads((export_of(run, form) / file).read_text())
        biases = {name for name in described if name.endswith(".bias")}
        assert {described[name] for name in biases} == {"FLOAT"}
        assert f"{ATTENTION}.q_proj.bias" in biases
        assert any("norm.bias" in name for name in biases)  # by which vLLM-Ascend knows that there are any


def test_every_reader_computes_the_same(run: Recipe, prose: Path, tmp_path: Path) -> None:
    wanted = read(run, "eval-ppl", "results.json")["quantized"]
    assert set(read(run, "verify", "verified.json")) == {"ascend", "mindie", "numpy"}
    text = {"dataset": "text", "path": str(prose), "sequence_length": 32, "windows": 2}
    for form in ("ascend", "numpy"):
        recipe = {"model": {"path": str(export_of(run, form))}, "quantize": {}, "evaluate": {"perplexity": text},
                  "output": "unused"}  # fmt: skip
        assert score_recipe(load_recipe(recipe))["quantized"] == wanted
    copy, source = tmp_path / "numpy", export_of(run)
    for form in ("numpy", "mindie", "ascend"):
        copy = tmp_path / form
        convert_checkpoint(source, form, copy)
        assert verify_path(copy)["linears"] == 14
        source = copy
    one, other = (load_file(folder / "quant_model_weights.safetensors") for folder in (export_of(run), copy))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("form", ["compressed-tensors", "dense"])
def test_they_are_not_lost_in_a_format_that_does_not_hold_them(form: str, run: Recipe, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=f"{form} does not hold biases that the architecture lacks"):
        convert_checkpoint(export_of(run), form, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_damaged_bias_is_found(run: Recipe, tmp_path: Path) -> None:
    """One that is not that of quant_bias, which engines add."""
    bias = load_file(export_of(run) / "quant_model_weights.safetensors")[f"{ATTENTION}.k_proj.bias"]
    folder = tampered(run, tmp_path / "made", {f"{ATTENTION}.k_proj.bias": bias + 1})
    with pytest.raises(VerificationError, match=r"k_proj.quant_bias is not that of the codes, scales and bias"):
        verify_path(folder)


# Where nothing is shifted.


@pytest.fixture(scope="module")
def structures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Structure]]:
    place = tmp_path_factory.mktemp("structures")
    models = {family: save_tiny_model(family, place / family) for family in ("llama", "gemma2", "opt", "qwen2-moe")}
    return {family: (model, discover(model)) for family, model in models.items()}


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"export__formats": ["compressed-tensors"]}, "compressed-tensors does not hold biases"),
        ({"export__formats": ["ascend", "dense"]}, "dense does not hold biases"),
        ({"export": None, "evaluate": None}, "no export is made"),
        ({"smooth__save_model": True}, "smooth.save_model asks for cannot have biases"),
        ({"quantize__rollback__target": {"kl_divergence": 0.1}}, "free to roll every linear back"),
        ({"quantize__target": {"bits_per_weight": 12}}, "free to roll every linear back"),
        ({"quantize__activations__scope": "token"}, "where inputs are static"),
        ({"quantize__activations__scope": "mix"}, "where inputs are static"),
        ({"quantize__activations": {"bits": 16}}, "where inputs are static"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_the_plan_says_why_nothing_is_shifted(
    values: dict[str, Any], reason: str, structures: dict[str, tuple[Path, Structure]], prose: Path, tmp_path: Path
) -> None:
    notes = quantcli.plan(asked(structures["llama"][0], prose, tmp_path / "run", **values)).notes
    (note,) = (note for note in notes if "shift" in note)
    assert note.startswith("Linears are smoothed without a shift where they or their norm have no bias: ")
    assert reason in note


def test_the_plan_names_engines_that_add_the_biases(
    structures: dict[str, tuple[Path, Structure]], prose: Path, tmp_path: Path
) -> None:
    plan = quantcli.plan(asked(structures["llama"][0], prose, tmp_path / "run"))
    assert [note for note in plan.notes if note.startswith("A shift may add biases")]
    for engine in plan.engines:
        assert engine.loads
        assert "adds the biases of a shift" in engine.note
    assert {"vLLM-Ascend", "MindIE", "SGLang"} == {engine.engine for engine in plan.engines}
    unshifted = quantcli.plan(asked(structures["llama"][0], prose, tmp_path / "run", smooth__shift=False))
    assert not [note for note in unshifted.notes if "shift" in note]
    assert not [engine for engine in unshifted.engines if "shift" in engine.note]


def test_which_biases_may_be_added(structures: dict[str, tuple[Path, Structure]], prose: Path, tmp_path: Path) -> None:
    """Those of RMSNorm without an offset and of linears that are static: others engines would drop."""

    def addable(family: str, *, left: str = "") -> tuple[set[str], str]:
        model, structure = structures[family]
        names = [linear.name for linear in structure.linears() if not left or left not in linear.name]
        recipe = load_recipe(asked(model, prose, tmp_path / "run"))
        found, reason = addable_biases(recipe, structure, dict.fromkeys(names, STATIC))
        return {name.removesuffix(".bias") for name in found}, reason

    whole, _ = addable("llama")
    assert {norm.name for norm in rms_norms(structures["llama"][1])} < whole
    assert {f"{ATTENTION}.{name}" for name in ("q_proj", "v_proj", "o_proj")} < whole
    assert f"{ATTENTION}.q_proj" not in addable("llama", left="layers.0.self_attn.q_proj")[0]
    gemma, _ = addable("gemma2")
    assert not [name for name in gemma if "norm" in name]  # engines have another class for 1 + w
    assert f"{ATTENTION}.v_proj" in gemma
    assert addable("opt") == (set(), "")  # which lacks none
    assert f"{MLP}.gate" not in addable("qwen2-moe", left="mlp")[0]


def test_a_group_with_a_linear_in_float_is_not_shifted(tmp_path: Path, prose: Path) -> None:
    """A bias of a linear in float is one that engines do not add."""
    model = with_outliers("llama", tmp_path / "model")
    values = {"quantize__rollback__names": ["*.0.self_attn.k_proj"], "quantize__rollback__siblings": "apart"}
    recipe = asked(model, prose, tmp_path / "run", export__formats=["numpy"], **values)
    with opened(recipe, until="smooth") as context:
        biases = added_biases(context.checkpoint)
    assert f"{ATTENTION}.q_proj.bias" not in biases
    assert "model.layers.0.input_layernorm.bias" not in biases
    assert f"{MLP}.gate_proj.bias" in biases


def test_what_has_got_a_bias_is_not_rolled_back_by_rank(tmp_path: Path, prose: Path) -> None:
    """Nor what engines fuse with it: the most sensitive of the others are."""
    model = with_outliers("llama", tmp_path / "model")
    recipe = asked(model, prose, tmp_path / "run", quantize__rollback__level=3, smooth__folds=["norm"])
    (note,) = (note for note in quantcli.plan(recipe).notes if note.startswith("A shift may add"))
    assert "not rolled back by rank" in note
    with opened(recipe, until="verify") as context:
        biased_linears = {name.removesuffix(".bias") for name in added_biases(context.checkpoint)}
        schemes = context.plan.schemes
    ranking = [entry["name"] for entry in read(recipe, "sensitivity", "sensitivity.json")["linears"]]
    others = [name for name in ranking if name.endswith(("o_proj", "down_proj"))]
    assert set(ranking) - set(schemes) == set(others[:3])
    assert biased_linears & set(ranking[: ranking.index(others[2])])
    everything = changed(recipe, quantize__rollback__level=40)
    with opened(everything, until="sensitivity") as context:
        assert {name.rpartition(".")[2] for name in set(ranking) - set(context.plan.schemes)} == {"o_proj", "down_proj"}
    warnings = [event["text"] for event in map(json.loads, (tmp_path / "run" / "events.jsonl").read_text().splitlines())
                if event["event"] == "warning"]  # fmt: skip
    assert any("all but 10, which have biases that a shift added, are rolled back" in text for text in warnings)


def test_another_format_beside_smooths_again(tmp_path: Path, prose: Path) -> None:
    """Without the biases, which that format does not hold."""
    model = with_outliers("llama", tmp_path / "model")
    recipe = asked(model, prose, tmp_path / "run")
    with opened(recipe, until="smooth") as context:
        assert added_biases(context.checkpoint)
    with opened(changed(recipe, export__formats=["ascend", "compressed-tensors"]), until="smooth") as context:
        assert not added_biases(context.checkpoint)


def test_verify_refuses_a_bias_that_no_engine_adds() -> None:
    store: Any = SimpleNamespace(
        schemes={"a": STATIC, "b": Scheme(8, activations="dynamic"), "c": Scheme(8, activations="mix")}
    )
    weights = {name: f"{name}.weight" for name in "abcd"}
    check_added_biases(["a.bias", "layers.0.input_layernorm.bias"], store, weights)
    for name in ("b.bias", "c.bias", "d.bias", "layers.0.ln_1.bias"):
        with pytest.raises(VerificationError, match=rf"^{name} is added"):
            check_added_biases([name], store, weights)


# What others write.


def tampered(run: Recipe, folder: Path, change: dict[str, Tensor | None]) -> Path:
    """The export with other tensors (None: without it), and with neither checksums nor stale descriptions of them."""
    convert_checkpoint(export_of(run), "ascend", folder, restrict_permissions=False)
    (folder / SUMS).unlink()
    file, description = folder / "quant_model_weights.safetensors", folder / "quant_model_description.json"
    tensors, described = load_file(file), json.loads(description.read_text())
    for name, tensor in change.items():
        if tensor is None:
            del tensors[name], described[name]
        else:
            tensors[name], described[name] = tensor, "FLOAT"
    save_file(tensors, file, {"format": "pt"})
    description.write_text(json.dumps(described))
    return folder


def test_a_shift_that_is_not_taken_back_is_refused(run: Recipe, tmp_path: Path) -> None:
    folder = tampered(run, tmp_path / "made", {f"{ATTENTION}.k_proj.bias": None})
    for use in (open_checkpoint, verify_path):
        with pytest.raises((ModelError, VerificationError), match="k_proj has no bias that takes the shift back"):
            use(folder)  # type: ignore[operator]


@pytest.mark.parametrize(
    ("name", "reason"),
    [("model.norm", "Engines add none that"), (f"{ATTENTION}.q_norm", "Engines add none that"),
     ("lm_head", "Engines add none of a linear in float")],
)  # fmt: skip
def test_biases_that_engines_do_not_add_are_refused(name: str, reason: str, run: Recipe, tmp_path: Path) -> None:
    size = {"model.norm": 64, "lm_head": 512}.get(name, 16)
    zeros = tampered(run, tmp_path / "zeros", {f"{name}.bias": torch.zeros(size, dtype=torch.bfloat16)})
    assert f"{name}.bias" not in open_checkpoint(zeros)[1].entries
    made = tampered(run, tmp_path / "made", {f"{name}.bias": torch.ones(size, dtype=torch.bfloat16)})
    for use in (open_checkpoint, verify_path):
        with pytest.raises((ModelError, VerificationError), match=f"{name}.bias is not zero.*{reason}"):
            use(made)  # type: ignore[operator]
