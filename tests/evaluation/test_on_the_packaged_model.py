"""Protocol golden-stick and BoolQ on a real model and real data, against slow loops and other tools."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import quantcli
from quantcli.evaluation.tasks import boolq_choices
from quantcli.pipeline.source import locate_model
from quantcli.pipeline.standalone import score_recipe
from quantcli.pipeline.tasks import questions_of
from quantcli.recipe import load_recipe
from quantcli.recipe.evaluation import TaskSection
from quantcli.recipe.schema import ModelSection

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "models" / "SmolLM2-135M-Instruct.gguf"
DATA = ROOT.parent / "shared" / "data"
WIKITEXT_2 = DATA / "wikitext-2" / "wiki.test.tokens"
BOOLQ = DATA / "boolq" / "dev.jsonl"
ROWS = 12

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.xdist_group("packaged"),  # one process makes the run that they share
    pytest.mark.skipif(not (MODEL.exists() and DATA.exists()), reason="needs models/ and ../shared"),
]

Loaded = tuple[Any, Any]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packaged model in float32, so that rounding decides no answer."""
    source = locate_model(ModelSection(path=str(MODEL)))
    place = Path(shutil.copytree(source, tmp_path_factory.mktemp("packaged") / "model"))
    transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def loaded(model: Path) -> Loaded:
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    return transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval(), tokenizer


def detokenized(text: str) -> str:
    """The field's rules for wikitext, one after the other."""
    text = text.replace("s '", "s'")
    text = re.sub(r"/' [0-9]/", r"/'[0-9]/", text)
    for joiner in "-,.":
        text = text.replace(f" @{joiner}@ ", joiner)
    for mark in ":;.!?,":
        text = text.replace(f" {mark} ", f"{mark} ")
    for left, right in (("(", ")"), ("[", "]"), ("{", "}")):
        text = re.sub(rf"\{left}\s*([^\{right}]*?)\s*\{right}", rf"{left}\1{right}", text)
    for quote in "\"'":
        text = re.sub(rf"{quote}\s*([^{quote}]*?)\s*{quote}", rf"{quote}\1{quote}", text)
    for count in (4, 3, 2):
        text = text.replace(" ".join("=" * count), "=" * count)
    text = text.replace(" \u00b0 ", "\u00b0").replace(" \n", "\n")
    return text.replace("\n ", "\n").replace(" N ", " 1 ").replace(" 's", "'s")


@torch.inference_mode()
def test_golden_stick_is_its_slow_self_on_wikitext(model: Path, loaded: Loaded, tmp_path: Path) -> None:
    """Windows one at a time and alone; loss · mask summed over a batch, over the sum of its mask; the mean over
    full batches; exp."""
    length, batch, windows = 256, 2, 5
    text = tmp_path / "text.txt"
    text.write_text(WIKITEXT_2.read_text(encoding="utf-8")[:20_000], encoding="utf-8")
    network, tokenizer = loaded
    ids: list[int] = []
    for paragraph in detokenized(text.read_text(encoding="utf-8")).split("\n\n"):
        if paragraph.strip() and not paragraph.strip().startswith("="):
            ids += tokenizer(paragraph).input_ids
    sums = []
    for start in range(0, windows * (length - 1), length - 1):
        chunk = torch.tensor(ids[start : start + length - 1])
        logp = network(chunk[None]).logits[0, :-1].double().log_softmax(-1)
        mask = (chunk[1:] != tokenizer.pad_token_id).double()
        losses = -logp.gather(1, chunk[1:, None])[:, 0]
        sums.append((float((losses * mask).sum()), float(mask.sum())))
    batches = [sums[begin : begin + batch] for begin in range(0, windows - batch + 1, batch)]
    means = [sum(loss for loss, _ in part) / sum(count for _, count in part) for part in batches]
    section = {"dataset": "text", "path": str(text), "windows": windows, "protocol": "golden-stick",
               "sequence_length": length, "batch_size": batch}  # fmt: skip
    recipe = {"model": {"path": str(model)}, "quantize": {}, "evaluate": {"perplexity": section}, "output": "unused"}
    found = score_recipe(load_recipe(recipe))
    assert found["quantized"]["value"] == pytest.approx(math.exp(sum(means) / len(means)), rel=1e-5)


@torch.inference_mode()
def test_standard_is_plain_transformers_in_bfloat16(tmp_path: Path) -> None:
    """A window of 1024 tokens at a time and alone, as users score it: products of more rows round otherwise. Of the
    model's blocks the first eight; `test_perplexity_protocols` has all."""
    length, windows = 1024, 2
    source = shutil.copytree(locate_model(ModelSection(path=str(MODEL))), tmp_path / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    network = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16, num_hidden_layers=8)
    network.eval().save_pretrained(source)
    ids = tokenizer(WIKITEXT_2.read_text(encoding="utf-8"), return_tensors="pt").input_ids[0]
    losses = []
    for window in ids[: length * windows].view(windows, length):
        logits = network(window[None]).logits[0, :-1].float()
        losses.append(torch.nn.functional.cross_entropy(logits, window[1:]).item())
    section = {"dataset": "wikitext2", "path": str(WIKITEXT_2), "windows": windows, "sequence_length": length}
    recipe = {"model": {"path": str(source)}, "quantize": {}, "evaluate": {"perplexity": section}, "output": "unused"}
    found = score_recipe(load_recipe(recipe))
    assert found["quantized"]["value"] == pytest.approx(math.exp(sum(losses) / windows), rel=1e-5)


@pytest.fixture(scope="module")
def run(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A W8A8 run, inputs rounded per token, with the answers of both models to the first questions."""
    folder = tmp_path_factory.mktemp("boolq")
    file = folder / "dev.jsonl"
    file.write_text("".join(BOOLQ.read_text(encoding="utf-8").splitlines(keepends=True)[:ROWS]), encoding="utf-8")
    tasks: list[Any] = [{"task": "boolq", "path": str(file)}]
    recipe = {
        "model": {"path": str(model)},
        "quantize": {"weights": {"bits": 8}, "activations": {"bits": 8, "scope": "token"}},
        "evaluate": {"tasks": tasks, "generate": None},
        "output": str(folder / "run"),
    }
    return quantcli.run(recipe).path


def questions(run: Path) -> list[Any]:
    return questions_of(TaskSection(task="boolq", path=str(run.parent / "dev.jsonl")))


def answers(run: Path, stage: str) -> list[str]:
    return [sample["answer"] for sample in json.loads((run / stage / "boolq.json").read_text())["samples"]]


@torch.inference_mode()
def batched(network: Any, tokenizer: Any, prompts: list[list[int]], size: int, side: str) -> Iterator[torch.Tensor]:
    """Logits behind each prompt, `size` prompts padded on a side at a time, with mask and positions."""
    for begin in range(0, len(prompts), size):
        part = prompts[begin : begin + size]
        longest = max(map(len, part))
        tokens, mask = torch.full((len(part), longest), tokenizer.pad_token_id), torch.zeros(len(part), longest).long()
        for row, ids in enumerate(part):
            place = slice(longest - len(ids), longest) if side == "left" else slice(0, len(ids))
            tokens[row, place], mask[row, place] = torch.tensor(ids), 1
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        logits = network(tokens, attention_mask=mask, position_ids=positions).logits
        for row, ids in enumerate(part):
            yield logits[row, -1 if side == "left" else len(ids) - 1]


@pytest.mark.parametrize(("size", "side"), [(1, "none"), (3, "left"), (3, "right"), (8, "left"), (8, "right")])
def test_batches_and_padding_change_no_answer_of_the_float_model(
    run: Path, loaded: Loaded, size: int, side: str
) -> None:
    network, tokenizer = loaded
    yes, no = boolq_choices(tokenizer)
    prompts = [tokenizer(question.prompt).input_ids for question in questions(run)]
    said = ["yes" if x[yes] > x[no] else "no" for x in batched(network, tokenizer, prompts, size, side)]
    assert answers(run, "reference-tasks") == said
    assert len(said) == ROWS


@pytest.mark.parametrize("stage", ["reference-tasks", "eval-tasks"])
def test_batches_change_no_answer_of_either_model(
    run: Path, model: Path, loaded: Loaded, tmp_path: Path, stage: str
) -> None:
    """The evaluation itself, from one prompt in a batch to many: of the float model and of the W8A8 export, whose
    inputs are rounded per token."""
    from quantcli.pipeline.context import Context
    from quantcli.pipeline.engine import run_recipe
    from quantcli.pipeline.rundir import open_run
    from quantcli.pipeline.sequences import Model
    from quantcli.pipeline.served import exported_model
    from quantcli.pipeline.tasks import run_task

    recipe = load_recipe(run / "recipe.yaml")
    result = run_recipe(recipe)
    section = TaskSection(task="boolq", path=str(run.parent / "dev.jsonl"))
    longest = max(len(loaded[1](question.prompt).input_ids) for question in questions(run))
    with open_run(run, model) as opened:
        context = Context(recipe, model, result.plan, opened, "cpu", results=result.stages)
        skeleton, exported = exported_model(context)
        quantized = Model("quantized", skeleton, exported, "prefill")
        asked = quantized if stage == "eval-tasks" else Model("float", context.skeleton(original=True), None, "prefill")
        for size in (1, 3, 8):
            found = run_task(context, section, asked, tmp_path / "hidden", batch_tokens=size * longest)
            assert [sample["answer"] for sample in found["samples"]] == answers(run, stage)


def test_the_harness_says_the_same_of_the_float_model(run: Path, loaded: Loaded) -> None:
    """lm-evaluation-harness's own model of transformers, asked how likely both answers are behind the same prompts."""
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    network, tokenizer = loaded
    for size in (1, 8):  # others on tiny models, in `test_task_stages`
        harness = HFLM(pretrained=network, tokenizer=tokenizer, batch_size=size)
        requests = [
            Instance("loglikelihood", {}, (question.prompt, f" {word}"), index)
            for index, question in enumerate(questions(run))
            for word in ("yes", "no")
        ]
        likely = [value for value, _ in harness.loglikelihood(requests, disable_tqdm=True)]
        said = ["yes" if yes > no else "no" for yes, no in zip(likely[::2], likely[1::2], strict=True)]
        assert answers(run, "reference-tasks") == said
