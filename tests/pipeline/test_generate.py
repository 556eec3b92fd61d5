"""Stage generate: what both models write."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from run_contexts import changed, float_model, read
from tiny_models import save_tiny_model, tiny_tokenizer
from transformers import AutoTokenizer, LlamaForCausalLM

import quantcli
from quantcli.model.skeleton import Skeleton
from quantcli.pipeline import generation
from quantcli.pipeline.stages.generate import prompt_tokens

Recipe = dict[str, Any]
PROMPTS = ["The hill saw", "One old sheep and the hill", "Sheep"]
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<you>{% endif %}"
)


@torch.inference_mode()
def _written(directory: Path, prompts: list[list[int]], count: int) -> list[list[int]]:
    """Greedy decoding without a cache, the whole text anew for every token."""
    model, found = float_model(directory), []
    for prompt in prompts:
        tokens = list(prompt)
        for _ in range(count):
            tokens.append(int(model(torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax()))
            if tokens[-1] == 2:  # ends a text
                break
        found.append(tokens[len(prompt) :])
    return found


@pytest.mark.parametrize("family", ["llama", "gemma3", "opt"])
def test_texts_are_what_the_models_write_greedily(
    family: str, static_recipe: Callable[[Path], Recipe], tmp_path: Path
) -> None:
    model = save_tiny_model(family, tmp_path / "model", with_tokenizer=True)
    recipe = changed(
        static_recipe(tmp_path / "run"),
        model__path=str(model),
        quantize={"weights": {"bits": 4}},
        export={"formats": ["dense"]},
        evaluate__generate={"prompts": PROMPTS, "max_new_tokens": 8},
    )
    quantcli.run_stage("generate", recipe)
    content = read(recipe, "generate", "generated.json")
    tokenizer = AutoTokenizer.from_pretrained(model)
    prompts = [tokenizer(prompt).input_ids for prompt in PROMPTS]
    assert [entry["prompt"] for entry in content["prompts"]] == PROMPTS
    for name, directory in (("float", model), ("quantized", tmp_path / "run" / "export" / "dense")):
        written = [entry[name]["tokens"] for entry in content["prompts"]]
        assert written == _written(directory, prompts, 8)
        texts = [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in written]
        assert [entry[name]["text"] for entry in content["prompts"]] == texts


def test_integer_products_and_a_quantized_cache_are_part_of_it(
    static_recipe: Callable[[Path], Recipe], tmp_path: Path
) -> None:
    """Prompts have dynamic scales under `mix`, so that the first token is that of a scheme that has no others."""
    first = {}
    for name, quantize in (
        ("token", {"activations": {"bits": 8, "scope": "token"}}),
        ("mix", {"activations": {"bits": 8, "scope": "mix"}}),
        ("cache", {"activations": {"bits": 8, "scope": "token"}, "kv_cache": {"bits": 8}}),
    ):
        recipe = changed(static_recipe(tmp_path / name), quantize=quantize, export={"formats": ["ascend"]})
        quantcli.run_stage("generate", recipe)
        (entry,) = read(recipe, "generate", "generated.json")["prompts"]
        assert len(entry["quantized"]["tokens"]) == 3
        first[name] = entry["quantized"]["tokens"][0]
    assert first["mix"] == first["token"]


@pytest.mark.parametrize(
    ("family", "form", "quantize"),
    [
        ("gemma3", "compressed-tensors", {"weights": {"bits": 4}}),
        ("llama", "ascend", {"activations": {"bits": 8, "scope": "token"}, "kv_cache": {"bits": 8}}),
        ("mixtral", "compressed-tensors", {"activations": {"bits": 8, "scope": "token"}}),
        ("llama", "ascend", {"activations": {"bits": 8, "scope": "mix"}}),
    ],
    ids=["weights", "cache", "experts", "mix"],
)
def test_a_model_that_is_large_writes_the_same_with_one_block_in_memory(
    family: str,
    form: str,
    quantize: dict[str, Any],
    static_recipe: Callable[[Path], Recipe],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    resident = Skeleton.resident
    held: list[str] = []
    most: dict[bool, int] = {}

    @contextmanager
    def watched(self: Skeleton, names: Iterable[str], *rest: Any) -> Iterator[None]:
        names = [*names]
        block = next((path for path in self.blocks if any(name.startswith(f"{path}.") for name in names)), None)
        with resident(self, names, *rest):
            held.extend([block] if block else [])
            most[large] = max(most.get(large, 0), len(held))
            yield
            held[:] = held[: len(held) - bool(block)]

    model, found = save_tiny_model(family, tmp_path / "model", with_tokenizer=True), {}
    for large in (False, True):
        recipe = changed(
            static_recipe(tmp_path / f"run{large}"),
            model__path=str(model),
            quantize=quantize,
            export={"formats": [form]},
            evaluate__generate={"prompts": PROMPTS, "max_new_tokens": 5, "memory": "100kB" if large else "1GiB"},
        )
        quantcli.run_stage("export", recipe)
        with monkeypatch.context() as patched:
            patched.setattr(Skeleton, "resident", watched)
            quantcli.run_stage("generate", recipe)
        found[large] = read(recipe, "generate", "generated.json")
        events = [json.loads(line) for line in (tmp_path / f"run{large}" / "events.jsonl").open()]
        told = [e["text"] for e in events if e["event"] == "note" and e["text"].startswith("evaluate.generate runs")]
        assert len(told) == 2 * large
    assert found[True] == found[False]
    assert most == {False: float_model(model).config.num_hidden_layers, True: 1}


def test_a_model_that_is_too_large_writes_nothing_and_says_so(
    static_recipe: Callable[[Path], Recipe], tmp_path: Path
) -> None:
    recipe = changed(static_recipe(tmp_path / "run"), evaluate__generate={"memory": "500kB", "streamed": "1MB"})
    quantcli.run_stage("generate", recipe)
    content = read(recipe, "generate", "generated.json")
    assert content["skipped"].startswith("No text was generated: the model's weights (")
    assert "in all, is more than evaluate.generate.streamed (0.000931 GiB)." in content["skipped"]
    assert "prompts" not in content
    notes = [e["text"] for e in map(json.loads, (tmp_path / "run" / "events.jsonl").open()) if e["event"] == "note"]
    assert content["skipped"] in notes
    assert content["skipped"].replace("'", "&#x27;") in (tmp_path / "run" / "report.html").read_text()


def test_a_model_that_transformers_does_not_generate_by_is_evaluated_all_the_same(
    static_recipe: Callable[[Path], Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ValueError("the cache has no attention layers\nsecond line")

    monkeypatch.setattr(LlamaForCausalLM, "generate", fail)
    recipe = static_recipe(tmp_path / "run")
    outcome = quantcli.run(recipe)
    said = (
        "No text was generated: transformers generates no text by LlamaForCausalLM: the cache has no attention layers."
    )
    assert read(recipe, "generate", "generated.json")["skipped"] == said
    assert outcome.stages["eval-ppl"]
    assert said in (tmp_path / "run" / "report.html").read_text()


def test_what_was_left_out_for_want_of_free_memory_is_done_when_it_is_there(
    static_recipe: Callable[[Path], Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = changed(static_recipe(tmp_path / "run"), evaluate__generate__streamed="1kB")
    page = tmp_path / "run" / "report.html"

    def generated() -> tuple[bool, dict[str, Any]]:
        record = quantcli.run_stage("generate", recipe).stages["generate"]
        fingerprints.add(record["fingerprint"])
        return record["reused"], read(recipe, "generate", "generated.json")

    fingerprints: set[str] = set()
    monkeypatch.setattr(generation, "free_memory", lambda _: 100_000)
    reused, content = generated()
    assert not reused
    assert "are more than the memory that is free (9.31e-05 GiB)" in content["skipped"]
    assert content["skipped"].endswith(" Run again when there is more.")
    monkeypatch.setattr(generation, "free_memory", lambda _: content["needs"] - 1)
    assert generated() == (True, content)
    assert "No text was generated" in page.read_text()
    monkeypatch.setattr(generation, "free_memory", lambda _: content["needs"])
    reused, done = generated()
    assert not reused
    assert len(done["prompts"]) == 1
    assert "No text was generated" not in page.read_text()
    # what was generated stays, however little is free later
    monkeypatch.setattr(generation, "free_memory", lambda _: 100_000)
    assert generated() == (True, done)
    assert len(fingerprints) == 1


def test_a_text_whose_keys_and_values_are_too_large_is_not_written(
    static_recipe: Callable[[Path], Recipe], tmp_path: Path
) -> None:
    """Three blocks with two heads of 16 channels in float32: 768 bytes a token."""
    recipe = static_recipe(tmp_path / "run")
    weights = sum(value.numel() for value in float_model(Path(recipe["model"]["path"])).parameters()) * 4
    for room, count in ((768 * 100, 1000), (768 * 100, 50)):
        memory = f"{(weights + room) / 1000}kB"
        generate = {"prompts": ["The hill"], "max_new_tokens": count, "memory": memory, "streamed": "1kB"}
        quantcli.run_stage("generate", changed(recipe, evaluate__generate=generate))
        content = read(recipe, "generate", "generated.json")
        assert ("the keys and values of 10" in content["skipped"]) == (count == 1000)
        assert ("prompts" in content) == (count == 50)


def test_a_chat_model_is_asked_as_a_user_asks() -> None:
    tokenizer = tiny_tokenizer()
    assert prompt_tokens(tokenizer, "The hill") == tokenizer("The hill").input_ids
    tokenizer.chat_template = TEMPLATE
    asked = prompt_tokens(tokenizer, "The hill")
    assert asked == tokenizer("<user>The hill<you>", add_special_tokens=False).input_ids
