"""Several schemes in one model: written, read, described, and computed by transformers as by the evaluation."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_transformers import TOKENS, of_evaluation, of_transformers
from tiny_exports import SCHEMES, Export, export_tiny
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaAttention

from quantcli.errors import ModelError, VerificationError
from quantcli.formats import compressed_tensors
from quantcli.model.structure import Linear
from quantcli.quant.scheme import AttentionScheme, Scheme

MIXTURES: dict[str, tuple[str, dict[str, str]]] = {
    "two formats": ("W4A16 g32", {"*.mlp.down_proj": "W8A8 dynamic"}),
    "one format": ("W8A8 dynamic", {"*.mlp.*": "W8A8 static asym", "*.self_attn.o_proj": "W8A8 static"}),
    "weights alone": ("W8A16", {"*.0.mlp.*": "W4A16 g32", "*.1.mlp.down_proj": "W3A16 g32", "*.o_proj": "W8A16 g32"}),
    "integer inputs of all kinds": ("W4A8 dynamic g32", {"*.down_proj": "W4A4 dynamic", "*.o_proj": "W8A8 dynamic"}),
    "by block": ("W8A8 dynamic", {"model.layers.1.*": "W4A16 g64"}),
    "siblings apart": ("W4A16 g32", {"*.v_proj": "W8A8 dynamic"}),
    "the head too": ("W8A8 dynamic", {"lm_head": "W8A16 g32"}),
    "the head alike": ("W4A16 g32", {"lm_head": "W4A16 g32"}),
}
ASYMMETRIC = ("W8A8 static asym", {"*.mlp.down_proj": "W4A16 g32 asym", "*.o_proj": "W8A16 asym"})
FP8 = AttentionScheme(kv="fp8")
PARTS = [f"model.layers.{block}.{part}_proj" for block in (0, 1) for part in (
    "self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.up", "mlp.down")]  # fmt: skip


def mixed(place: Path, mixture: tuple[str, Mapping[str, str]], **changes: Any) -> Export:
    first, others = mixture
    return export_tiny(place, SCHEMES[first], others={name: SCHEMES[s] for name, s in others.items()}, **changes)


def quantization_config(made: Export) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((made.folder / "config.json").read_text())["quantization_config"]
    return content


def change_config(made: Export, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads((made.folder / "config.json").read_text())
    change(content["quantization_config"])
    (made.folder / "config.json").write_text(json.dumps(content))


# ------------------------------------------------------------------------------------------------------ round trip


@pytest.mark.parametrize("mixture", [*MIXTURES.values(), ASYMMETRIC], ids=[*MIXTURES, "asymmetric"])
def test_every_linear_comes_back_with_its_own_scheme_and_codes(
    mixture: tuple[str, dict[str, str]], tmp_path: Path
) -> None:
    made = mixed(tmp_path, mixture, dtype=torch.bfloat16)
    assert len(set(made.store.schemes.values())) == len({mixture[0], *mixture[1].values()})
    reader = made.reader()
    assert reader.schemes == made.store.schemes
    for name in made.store.schemes:
        stored, read = made.store.read(name).tensors(), reader.read_linear(name).tensors()
        assert stored.keys() == read.keys()
        assert all(torch.equal(read[part], stored[part]) for part in stored), name
    assert made.verify().linears == len(made.store.schemes)


def test_groups_have_the_format_of_their_tensors(tmp_path: Path) -> None:
    config = quantization_config(mixed(tmp_path, MIXTURES["two formats"]))
    packed, plain = config["config_groups"].values()
    assert (config["format"], packed["format"], plain["format"]) == (
        "mixed-precision",
        "pack-quantized",
        "int-quantized",
    )
    assert plain["targets"] == ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"]
    assert len(packed["targets"]) == 12
    assert config["ignore"] == ["lm_head", "model.embed_tokens"]


def test_groups_of_one_format_share_it(tmp_path: Path) -> None:
    config = quantization_config(mixed(tmp_path, MIXTURES["one format"]))
    assert config["format"] == "int-quantized"
    assert [len(group["targets"]) for group in config["config_groups"].values()] == [6, 6, 2]


def test_one_scheme_has_the_class_as_its_target_and_the_head_by_name(tmp_path: Path) -> None:
    (group,) = quantization_config(mixed(tmp_path, MIXTURES["the head alike"]))["config_groups"].values()
    assert group["targets"] == ["lm_head", "Linear"]
    content = compressed_tensors.configuration({"model.layers.0.mlp.up_proj": Scheme(8)}, ["lm_head"])
    assert content["config_groups"]["group_0"]["targets"] == ["Linear"]


SCHEME = st.sampled_from(list(SCHEMES.values()))
NAMES = [f"model.layers.{i}.{part}" for i in (0, 1, 10) for part in ("mlp.up_proj", "mlp.up_proj_2")] + ["lm_head"]


@given(schemes=st.dictionaries(st.sampled_from(NAMES), SCHEME, min_size=1), cached=st.booleans())
def test_any_mixture_is_read_back_from_json(schemes: dict[str, Scheme], cached: bool) -> None:
    """Names that begin alike (layers 1 and 10, up_proj and up_proj_2) stay apart."""
    kept = sorted(set(NAMES) - schemes.keys())
    content = compressed_tensors.configuration(schemes, kept, FP8 if cached else None)
    again = json.loads(json.dumps(content))
    assert compressed_tensors.parse_configuration(again, NAMES) == schemes
    assert compressed_tensors.parse_attention(again) == (FP8 if cached else None)


# ------------------------------------------------------------------------------------------------------ reading others'


def described(*groups: tuple[list[str], Scheme]) -> dict[str, Any]:
    content = compressed_tensors.configuration({str(i): scheme for i, (_, scheme) in enumerate(groups)}, [])
    for group, (targets, _) in zip(content["config_groups"].values(), groups, strict=True):
        group["targets"] = targets
    return content


def test_a_name_goes_before_the_class_in_any_order() -> None:
    """As in transformers and vLLM: the group of `Linear` has what no name and no expression has claimed."""
    groups = (["Linear"], SCHEMES["W4A16 g32"]), ([r"re:.*\.down_proj$"], SCHEMES["W8A8 dynamic"])
    linears = ["model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"]
    for content in (described(*groups), described(*reversed(groups))):
        found = compressed_tensors.parse_configuration(content, linears)
        assert list(found.values()) == [SCHEMES["W4A16 g32"], SCHEMES["W8A8 dynamic"]]


def test_two_claims_on_one_linear_are_refused() -> None:
    """vLLM would take the first expression of the file, compressed-tensors the first of the alphabet."""
    content = described(([r"re:.*proj$"], SCHEMES["W4A16 g32"]), ([r"re:.*down"], SCHEMES["W8A8 dynamic"]))
    with pytest.raises(ModelError, match=r"down_proj 2 schemes"):
        compressed_tensors.parse_configuration(content, ["model.layers.0.mlp.down_proj"])


# ------------------------------------------------------------------------------------------------------ false claims


def moved(config: dict[str, Any]) -> None:
    first, second = config["config_groups"].values()
    first["targets"].append(second["targets"].pop())


CLAIMS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "in the other group": moved,
    "in both groups": lambda c: c["config_groups"]["group_0"]["targets"].append("model.layers.0.mlp.down_proj"),
    "in both by the class": lambda c: c["config_groups"]["group_0"].update(targets=["Linear"]),
    "in none": lambda c: c["config_groups"]["group_1"]["targets"].pop(),
    "a target that is nothing": lambda c: c["config_groups"]["group_1"]["targets"].append("model.layers.7.mlp.up_proj"),
    "the format of one group": lambda c: c.update(format="pack-quantized"),
    "a group's format": lambda c: c["config_groups"]["group_1"].update(format="pack-quantized"),
    "no group's format": lambda c: c["config_groups"]["group_1"].update(format=None),
    "a cache": lambda c: c.update(kv_cache_scheme={"num_bits": 8, "type": "float"}),
}


@pytest.mark.parametrize("claim", CLAIMS)
def test_a_false_claim_of_a_mixed_configuration_is_found(claim: str, tmp_path: Path) -> None:
    made = mixed(tmp_path, MIXTURES["two formats"])
    change_config(made, CLAIMS[claim])
    with pytest.raises(VerificationError, match=r"config\.json"):
        made.verify()


def test_a_head_that_is_not_named_is_found(tmp_path: Path) -> None:
    made = mixed(tmp_path, MIXTURES["the head alike"])
    change_config(made, lambda c: c["config_groups"]["group_0"].update(targets=["Linear"]))
    with pytest.raises(VerificationError, match="lm_head"):
        made.verify()


def test_what_the_format_has_no_place_for_is_refused() -> None:
    linear = Linear("model.layers.0.mlp.up_proj", 64, 64)
    assert "not both" in compressed_tensors.refusal(linear, Scheme(8, activations="mix"))
    assert "symmetric weights" in compressed_tensors.refusal(linear, Scheme(4, symmetric=False, activations="dynamic"))
    for static in (Scheme(4, activations="static"), Scheme(8, activations="static", activation_bits=4)):
        assert "static activations of 8 bits" in compressed_tensors.refusal(linear, static)
    assert compressed_tensors.refusal(linear, Scheme(8, activations="static", sparse=True)) == ""
    for attention in (
        AttentionScheme(kv="int8"),
        AttentionScheme(kv="int8", kv_symmetric=False),
        AttentionScheme(heads=True),
    ):
        assert compressed_tensors.attention_refusal(attention)
        with pytest.raises(ModelError, match="compressed-tensors h"):
            compressed_tensors.configuration({}, [], attention)


# ------------------------------------------------------------------------------------------------------ transformers


@pytest.mark.parametrize("name", MIXTURES)
def test_transformers_gives_the_logits_of_the_evaluation_to_the_bit(name: str, tmp_path: Path) -> None:
    made = mixed(tmp_path, MIXTURES[name], dtype=torch.bfloat16)
    assert torch.equal(of_evaluation(made, "transformers"), of_transformers(made.folder))


class Fp8Cache(transformers.DynamicCache):
    """k_scale·e4m3(k / k_scale) in the place of k, and so for v, by block; scales in the model's dtype."""

    def __init__(self, scales: list[tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.scales = scales

    def update(self, key: Tensor, value: Tensor, layer: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        rounded = []
        for x, scale in zip((key, value), self.scales[layer], strict=True):
            limited = (x / scale).clamp(-448, 448)
            rounded.append(limited.to(torch.float8_e4m3fn).to(x.dtype) * scale)
        return super().update(*rounded, layer, *args, **kwargs)


@pytest.mark.parametrize("alone", [False, True], ids=["with linears", "alone"])
def test_transformers_quantizes_the_cache_by_the_scales_of_the_export(alone: bool, tmp_path: Path) -> None:
    """The export with a cache, against the same without and a cache that rounds by itself."""
    kept = PARTS if alone else ()
    made = export_tiny(tmp_path / "cached", SCHEMES["W4A16 g32"], kept=kept, attention=FP8)
    plain = export_tiny(tmp_path / "plain", SCHEMES["W4A16 g32"], kept=kept)
    assert ("quantization_config" in json.loads((plain.folder / "config.json").read_text())) != alone
    scales = [made.store.read_attention(f"model.layers.{block}.self_attn") for block in (0, 1)]
    cache = Fp8Cache([(parts["k_scale"], parts["v_scale"]) for parts in scales])
    model = transformers.AutoModelForCausalLM.from_pretrained(plain.folder).eval()
    with torch.inference_mode():
        wanted, without = model(TOKENS, past_key_values=cache).logits, model(TOKENS).logits
    # transformers 5.24 calls it `cache`, which compressed-tensors 0.20 does not look for: nothing is rounded then
    named = "past_key_values" in inspect.signature(LlamaAttention.forward).parameters
    torch.testing.assert_close(of_transformers(made.folder), wanted if named else without, rtol=0, atol=1e-5)
    assert (wanted - without).abs().max() > 0.01


def test_a_cache_comes_back_beside_several_schemes_and_its_damage_is_found(tmp_path: Path) -> None:
    made = mixed(tmp_path, MIXTURES["two formats"], attention=FP8)
    name = "model.layers.1.self_attn"
    reader = made.reader()
    assert (reader.schemes, reader.attention) == (made.store.schemes, FP8)
    assert reader.read_attention(name) == made.store.read_attention(name)
    made.verify()
    tensors = load_file(made.folder / "model.safetensors")
    tensors[f"{name}.v_scale"] *= 1.01
    save_file(tensors, made.folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(VerificationError, match=f"{name}: v_scale"):
        made.verify()
    change_config(made, lambda c: c.update(kv_cache_scheme=None))
    with pytest.raises(VerificationError, match="kv_cache_scheme"):
        made.verify()


def test_scales_of_a_cache_that_are_missing_or_many_are_refused() -> None:
    for parts in ({"k_scale": torch.ones(1)}, {"k_scale": torch.ones(1), "v_scale": torch.ones(8)}):
        with pytest.raises(ModelError, match=r"self_attn: v_scale"):
            compressed_tensors.attention_tensors("model.layers.0.self_attn", parts, FP8, "float32")
