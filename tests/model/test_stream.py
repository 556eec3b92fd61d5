"""A forward pass one block at a time, against transformers' own on the whole model: equal in every bit."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import FAMILIES, tiny_config, token_batches
from torch import Tensor
from transformers import AutoModelForCausalLM

from quantcli.errors import ModelError
from quantcli.model import stream as stream_module
from quantcli.model.checkpoint import INDEX_NAME, SINGLE_NAME, Checkpoint
from quantcli.model.hidden import HiddenCache
from quantcli.model.skeleton import Skeleton, TensorSource
from quantcli.model.stream import BlockStream
from quantcli.model.structure_cache import find_structure

BATCHES = token_batches((2, 20), (2, 20), (1, 13))  # longer than the sliding windows, which are 8
IN_MEMORY, MAPPED = 1 << 30, 0
BFLOAT16 = torch.bfloat16


def plain_logits(
    directory: Path, dtype: str | torch.dtype = "auto", batches: Sequence[Tensor] = BATCHES
) -> list[Tensor]:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()
    with torch.inference_mode():
        return [model(batch, use_cache=False).logits.float() for batch in batches]


def streamed_logits(
    directory: Path,
    folder: Path,
    *,
    limit: int = IN_MEMORY,
    dtype: str = "auto",
    checkpoint: TensorSource | None = None,
    batches: Sequence[Tensor] = BATCHES,
) -> list[Tensor]:
    skeleton = Skeleton(directory, find_structure(directory, dtype=dtype), dtype=dtype, checkpoint=checkpoint)
    stream = BlockStream(skeleton, batches)
    entering = list(stream.start())
    assert [tuple(hidden.shape) for hidden in entering] == stream.hidden_shapes()
    cache = HiddenCache(folder, stream.hidden_shapes(), skeleton.dtype, limit)
    for i, hidden in enumerate(entering):
        cache.put(i, hidden)
    cache.commit(0)
    for block in range(len(skeleton.blocks)):
        with stream.block(block):
            for i in range(len(batches)):
                cache.put(i, stream.run(block, i, cache.get(i)))
        cache.commit(block + 1)
    with stream.head():
        logits = [torch.cat([piece for _, piece in stream.logits(cache.get(i))], dim=1) for i in range(len(batches))]
    assert all(parameter.is_meta for parameter in skeleton.model.parameters()), "weights stayed behind"
    return logits


def assert_same(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        assert other.std() > 0.05, "a model that says nothing would hide every mistake"
        torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_streams_to_the_same_bits(family: str, tiny_model, tmp_path: Path) -> None:
    directory = tiny_model(family)
    expected = plain_logits(directory)
    assert_same(streamed_logits(directory, tmp_path / "memory"), expected)
    assert_same(streamed_logits(directory, tmp_path / "mapped", limit=MAPPED), expected)


@pytest.mark.parametrize("family", ["bamba", "gemma4"])
def test_blocks_that_return_or_are_given_more_than_states(family: str, tiny_model, tmp_path: Path) -> None:
    directory = tiny_model(family)
    assert_same(streamed_logits(directory, tmp_path), plain_logits(directory))


@pytest.mark.parametrize("limit", [IN_MEMORY, MAPPED])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3"])
def test_bfloat16(family: str, limit: int, tiny_model, tmp_path: Path) -> None:
    directory = tiny_model(family, dtype=BFLOAT16)
    assert_same(streamed_logits(directory, tmp_path, limit=limit), plain_logits(directory))


def test_the_dtype_of_the_recipe_wins_over_the_checkpoint(tiny_model, tmp_path: Path) -> None:
    directory = tiny_model("llama")
    ours = streamed_logits(directory, tmp_path, dtype="bfloat16")
    assert_same(ours, plain_logits(directory, BFLOAT16))
    assert not torch.equal(ours[0], plain_logits(directory)[0])


@pytest.mark.parametrize("family", ["llama-tied", "gemma3", "gpt2", "opt"])
def test_of_an_embedding_in_another_dtype_only_rows_of_the_text_are_held(family: str, tiny_model) -> None:
    directory = tiny_model(family, dtype=BFLOAT16)
    batch = token_batches((1, 13))
    skeleton = Skeleton(directory, find_structure(directory, dtype="float32"), dtype="float32")
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    expected: list[Tensor] = []
    handle = model.get_submodule(skeleton.blocks[0]).register_forward_pre_hook(
        lambda _, args, kwargs: expected.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    model(batch[0], use_cache=False)
    handle.remove()
    for hidden in BlockStream(skeleton, batch).start():
        torch.testing.assert_close(hidden, expected[0], rtol=0, atol=0)
        weight = skeleton.model.get_input_embeddings().weight
        assert weight.abs().sum(1).nonzero().flatten().tolist() == batch[0].unique().tolist()


@pytest.mark.parametrize("family", ["llama-tied", "mixtral", "gpt2"])
def test_shards(family: str, tiny_model, tmp_path: Path) -> None:
    directory = tiny_model(family, max_shard_size="60KB")
    assert (directory / INDEX_NAME).is_file()
    assert_same(streamed_logits(directory, tmp_path), plain_logits(tiny_model(family)))


def test_sparse_and_dense_blocks_in_one_model(tiny_model, tmp_path: Path) -> None:
    directory = tiny_model("qwen2-moe", num_hidden_layers=4, mlp_only_layers=[0, 2])
    assert_same(streamed_logits(directory, tmp_path), plain_logits(directory))


def test_opt_that_normalizes_after_the_block(tiny_model, tmp_path: Path) -> None:
    directory = tiny_model("opt", do_layer_norm_before=False)
    assert_same(streamed_logits(directory, tmp_path), plain_logits(directory))


@pytest.mark.parametrize("family", ["gpt2", "llama", "opt"])
def test_checkpoint_of_the_base_model(family: str, tiny_model, tmp_path: Path) -> None:
    """GPT-2 as it was first published has no `transformer.` in its names, and carries masks that nobody reads."""
    original = tiny_model(family, tie_word_embeddings=True)
    directory = tmp_path / "model"
    directory.mkdir()
    prefix = {"gpt2": "transformer.", "llama": "model.", "opt": "model."}[family]
    tensors = {name.removeprefix(prefix): value for name, value in load_file(original / SINGLE_NAME).items()}
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 8, 8).tril()
    save_file(tensors, directory / SINGLE_NAME, metadata={"format": "pt"})
    (directory / "config.json").write_text((original / "config.json").read_text())
    assert_same(streamed_logits(directory, tmp_path / "hidden"), plain_logits(original))
    assert Skeleton(directory, find_structure(directory)).unused_tensors == ["h.0.attn.bias"]


def test_a_head_of_its_own_wins_over_tying(tiny_model, tmp_path: Path) -> None:
    """A fine-tuned head beside `tie_word_embeddings: true`: the checkpoint is what counts, as in transformers."""
    original = tiny_model("llama-tied")
    directory = tmp_path / "model"
    directory.mkdir()
    tensors = load_file(original / SINGLE_NAME)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * 2 + 0.1
    save_file(tensors, directory / SINGLE_NAME, metadata={"format": "pt"})
    (directory / "config.json").write_text((original / "config.json").read_text())
    ours = streamed_logits(directory, tmp_path / "hidden")
    assert_same(ours, plain_logits(directory))
    assert not torch.equal(ours[0], plain_logits(original)[0])


def test_what_stays_in_float32(tiny_model, tmp_path: Path) -> None:
    """DeepSeek's routing bias does, although everything else is bfloat16."""
    directory = tiny_model("deepseek-v3")
    assert_same(streamed_logits(directory, tmp_path, dtype="bfloat16"), plain_logits(directory, BFLOAT16))
    skeleton = Skeleton(directory, find_structure(directory), dtype="bfloat16")
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    torch.testing.assert_close(skeleton.read([name])[name], load_file(directory / SINGLE_NAME)[name], rtol=0, atol=0)


class Rounded(Checkpoint):
    """A checkpoint whose second up projection is read in coarser steps."""

    name = "model.layers.1.mlp.up_proj.weight"

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        return {name: v.round(decimals=1) if name == self.name else v for name, v in super().read(names).items()}


def test_weights_from_another_source(tiny_model, tmp_path: Path) -> None:
    directory = tiny_model("llama")
    only_config = tmp_path / "model"
    tiny_config("llama").save_pretrained(only_config)
    ours = streamed_logits(only_config, tmp_path / "hidden", checkpoint=Rounded(directory))
    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    with torch.inference_mode():
        model.get_parameter(Rounded.name).copy_(model.get_parameter(Rounded.name).round(decimals=1))
        expected = [model(batch, use_cache=False).logits for batch in BATCHES]
    assert_same(ours, expected)
    assert not torch.equal(ours[0], plain_logits(directory)[0])


def test_what_is_left_out_is_not_read(tiny_model) -> None:
    directory = tiny_model("llama")
    skeleton = Skeleton(directory, find_structure(directory))
    left_out = "model.layers.0.mlp.up_proj.weight"
    with BlockStream(skeleton, BATCHES).block(0, {left_out}) as block:
        assert [n for n, p in block.named_parameters(prefix="model.layers.0") if p.is_meta] == [left_out]


def test_logits_in_pieces_cover_every_position(tiny_model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = tiny_model("gemma2")  # soft-caps its logits
    whole = plain_logits(directory)
    monkeypatch.setattr(stream_module, "HEAD_BYTES", 4 * 2 * 512 * 3)  # three positions of two samples
    for ours, theirs in zip(streamed_logits(directory, tmp_path), whole, strict=True):
        # smaller matrix products may add up in another order
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_weights_leave_when_the_body_fails(tiny_model) -> None:
    directory = tiny_model("llama")
    skeleton = Skeleton(directory, find_structure(directory))
    stream = BlockStream(skeleton, BATCHES)

    def fail() -> None:
        with stream.block(0) as block:
            assert not any(parameter.is_meta for parameter in block.parameters())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert all(parameter.is_meta for parameter in skeleton.model.parameters())


def rewrite(directory: Path, source: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    """A copy of a single-file checkpoint with changed tensors."""
    directory.mkdir()
    tensors = load_file(source / SINGLE_NAME)
    change(tensors)
    save_file(tensors, directory / SINGLE_NAME)
    (directory / "config.json").write_text((source / "config.json").read_text())
    return directory


def test_missing_parameter_is_named(tiny_model, tmp_path: Path) -> None:
    name = "model.layers.1.self_attn.k_proj.weight"
    directory = rewrite(tmp_path / "model", tiny_model("llama"), lambda tensors: tensors.pop(name))
    with pytest.raises(ModelError, match=rf"lacks {name} \(1 of \d+ parameters") as caught:
        Skeleton(directory, find_structure(directory))
    assert caught.value.remedy


def test_missing_expert_is_named(tiny_model, tmp_path: Path) -> None:
    name = next(n for n in load_file(tiny_model("mixtral") / SINGLE_NAME) if "experts.2" in n)
    directory = rewrite(tmp_path / "model", tiny_model("mixtral"), lambda tensors: tensors.pop(name))
    with pytest.raises(ModelError, match=r"layers\.0\..*experts"):
        streamed_logits(directory, tmp_path / "hidden")


@pytest.mark.parametrize(
    "name", ["model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight", "model.norm.weight"]
)
def test_wrong_shape_is_named(name: str, tiny_model, tmp_path: Path) -> None:
    directory = rewrite(tmp_path / "model", tiny_model("llama"), lambda t: t.update({name: t[name][:-1].contiguous()}))
    with pytest.raises(ModelError, match=rf"{name} has shape \(\d+.*in the checkpoint") as caught:
        streamed_logits(directory, tmp_path / "hidden")
    assert "config.json" in caught.value.remedy


def test_a_model_that_is_not_a_decoder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5", "d_model": 32, "num_layers": 2}))
    with pytest.raises(ModelError, match="t5"):
        find_structure(tmp_path)


def test_configuration_of_another_size(tiny_model, tmp_path: Path) -> None:
    directory = rewrite(tmp_path / "model", tiny_model("llama"), lambda tensors: None)
    tiny_config("llama", num_hidden_layers=3).save_pretrained(directory)
    with pytest.raises(ModelError, match=r"lacks model\.layers\.2\."):
        Skeleton(directory, find_structure(directory))
