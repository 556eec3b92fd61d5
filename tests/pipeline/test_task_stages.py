"""Tasks asked block by block and generated, against loops over transformers, whatever the batch and the padding."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from run_contexts import changed, opened
from tiny_models import save_tiny_model, tiny_tokenizer

import quantcli
from quantcli.errors import DataError, ModelError, RecipeError, RoomError
from quantcli.evaluation.tasks import boolq_choices
from quantcli.model import hub
from quantcli.pipeline import generation, harness
from quantcli.pipeline.context import Context
from quantcli.pipeline.sequences import Model, _padded
from quantcli.pipeline.served import exported_model
from quantcli.pipeline.stages import check
from quantcli.pipeline.tasks import NEW_TOKENS, questions_of, run_task
from quantcli.recipe import load_recipe
from quantcli.recipe.evaluation import TaskSection

Recipe = dict[str, Any]
WORDS = ["one", "two", "three", "four", "five", "six"]
SCHEMES: dict[str, dict[str, Any]] = {
    "W4A16": {},
    "W8A8": {
        "quantize": {"weights": {"bits": 8}, "activations": {"bits": 8, "scope": "token"}},
        "export": {"formats": ["compressed-tensors"]},
    },
}
"""Changes of the recipe below."""


@pytest.fixture
def boolq(tmp_path: Path) -> Path:
    """Questions of very different lengths."""
    file = tmp_path / "boolq" / "dev.jsonl"
    file.parent.mkdir()
    rows = [
        {"question": f"did {a} sheep see {b}", "title": a, "passage": f"The {a} of the hill saw {b} old sheep. " * n,
         "answer": n % 2 == 0}
        for n, (a, b) in enumerate(zip(WORDS * 2, WORDS[2:] + WORDS + WORDS[:2], strict=True), start=1)
    ]  # fmt: skip
    for row in rows:
        row["passage"] = row["passage"][:400]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture
def squad(tmp_path: Path) -> Path:
    file = tmp_path / "dev-v1.1.json"
    qas = [
        {"id": a, "question": f"Who saw {a}?" * n, "answers": [{"text": "the hill"}]} for n, a in enumerate(WORDS, 1)
    ]
    paragraphs = [{"context": "The hill saw sheep.", "qas": qas[:4]}, {"context": "One sheep.", "qas": qas[4:]}]
    file.write_text(json.dumps({"data": [{"title": "t", "paragraphs": paragraphs}]}))
    return file


@pytest.fixture
def recipe(static_recipe: Callable[[Path], Recipe], tmp_path: Path) -> Recipe:
    """W4A16, exported dense too, so that transformers can compute the same."""
    recipe = static_recipe(tmp_path / "runs" / "one")
    del recipe["calibration"], recipe["evaluate"]
    scheme = {"weights": {"bits": 4, "granularity": "group", "group_size": 32}}
    return changed(recipe, quantize=scheme, export={"formats": ["compressed-tensors", "dense"]})


def results(recipe: Recipe) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((Path(recipe["output"]) / "eval-tasks" / "results.json").read_text())
    return content["tasks"]


def loaded_model(model: Path, dtype: str = "float32") -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)).eval()


@contextmanager
def by_transformers(context: Context, model: Model) -> Iterator[Any]:
    """The whole model in transformers: the dense export where there is one; where inputs are rounded, which no float
    checkpoint does, with linears of integer products."""
    if model.exported is None:
        yield loaded_model(context.model, context.plan.structure.dtype)
    elif "dense" in context.recipe.export.formats:
        yield loaded_model(context.folder("export") / "dense", context.plan.structure.dtype)
    else:
        with generation.serving(model, "a test", 1000, context.emit) as loaded:
            yield loaded


@torch.inference_mode()
def last_logits(loaded: Any, tokenizer: Any, file: Path, side: str) -> torch.Tensor:
    """float64 [questions, vocabulary] behind each prompt by transformers: one question at a time, or all padded on a
    side, with mask and positions."""
    prompts = [tokenizer(q.prompt).input_ids for q in questions_of(TaskSection(task="boolq", path=str(file)))]
    if side == "none":
        return torch.stack([loaded(torch.tensor([ids])).logits[0, -1].double() for ids in prompts])
    longest = max(map(len, prompts))
    tokens, mask = torch.full((len(prompts), longest), tokenizer.pad_token_id), torch.zeros(len(prompts), longest)
    for row, ids in enumerate(prompts):
        place = slice(longest - len(ids), longest) if side == "left" else slice(0, len(ids))
        tokens[row, place], mask[row, place] = torch.tensor(ids), 1
    positions = (mask.cumsum(1) - 1).clamp(min=0).long()
    logits = loaded(tokens, attention_mask=mask.long(), position_ids=positions).logits.double()
    ends = [longest - 1 if side == "left" else len(ids) - 1 for ids in prompts]
    return logits[torch.arange(len(prompts)), ends]


def said(logits: torch.Tensor, choices: tuple[int, int]) -> list[str]:
    return ["yes" if yes > no else "no" for yes, no in logits[:, list(choices)].log_softmax(-1).tolist()]


def answers(model: Path, file: Path) -> list[str]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    return said(last_logits(loaded_model(model), tokenizer, file, "none"), boolq_choices(tokenizer))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(("dtype", "margin"), [("float32", 0.0), ("bfloat16", 0.02)])
def test_padding_and_batches_change_no_answer(
    recipe: Recipe, boolq: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, margin: float, scheme: str
) -> None:
    """In bfloat16 with choices of which no question is within a rounding, since nothing decides there."""
    section = TaskSection(task="boolq", path=str(boolq))
    with opened(changed(recipe, model__dtype=dtype, **SCHEMES[scheme]), "export") as context:
        tokenizer = context.tokenizer()
        models = {
            "float": Model("float", context.skeleton(original=True), None, "prefill"),
            "quantized": Model("quantized", *exported_model(context), "prefill"),
        }
        logits: dict[str, torch.Tensor] = {}
        padded: dict[str, list[torch.Tensor]] = {}
        for name, model in models.items():
            with by_transformers(context, model) as loaded:
                logits[name] = last_logits(loaded, tokenizer, boolq, "none")
                padded[name] = [last_logits(loaded, tokenizer, boolq, side) for side in ("left", "right")]
        # a random model always prefers the same answer; tokens that it is of two minds about stand for yes and no
        order = logits["float"].argsort(-1).argsort(-1).float().std(0).argsort(descending=True)[:40].tolist()
        apart = torch.stack([(one[:, order, None] - one[:, None, order]).abs().amin(0) for one in logits.values()])
        clear = (apart.amin(0) > margin).tolist()
        mixed = [(abs(said(logits["float"], (i, j)).count("yes") - 6), i, j)
                 for a, i in enumerate(order) for b, j in enumerate(order) if clear[a][b]]  # fmt: skip
        choices = min(mixed)[1:]
        monkeypatch.setattr("quantcli.evaluation.tasks.boolq_choices", lambda _: choices)
        for name, model in models.items():
            wanted = said(logits[name], choices)
            assert set(wanted) == {"yes", "no"}
            assert [said(found, choices) for found in padded[name]] == [wanted, wanted]
            for tokens in (1, 300, 100_000):
                outcome = run_task(context, section, model, tmp_path / "hidden", batch_tokens=tokens)
                assert [sample["answer"] for sample in outcome["samples"]] == wanted


def test_a_run_measures_tasks_and_reuses_the_float_models_answers(recipe: Recipe, boolq: Path, tmp_path: Path) -> None:
    recipe = changed(recipe, evaluate={"tasks": [{"task": "boolq", "path": str(boolq)}]})
    result = quantcli.run(recipe)
    found = results(recipe)["boolq"]
    assert result.tasks == {"tasks": {"boolq": found}}
    truth = [answer for q in questions_of(TaskSection(task="boolq", path=str(boolq))) for answer in q.answers]
    for name, model in (("float_model", recipe["model"]["path"]), ("quantized", result.path / "export" / "dense")):
        right = sum(a == b for a, b in zip(answers(Path(model), boolq), truth, strict=True))
        assert found["metrics"]["accuracy"][name]["value"] == pytest.approx(right / 12)
    assert found["questions"] == 12

    events: list[dict[str, Any]] = []
    beside = changed(recipe, output=str(tmp_path / "runs" / "two"), quantize__weights__bits=8)
    quantcli.run(beside, listener=events.append)
    assert {e["model"] for e in events if e["event"] == "block" and "tasks" in e["stage"]} == {"quantized"}
    assert results(beside)["boolq"]["metrics"]["accuracy"]["float_model"] == found["metrics"]["accuracy"]["float_model"]
    limited = changed(recipe, evaluate={"tasks": [{"task": "boolq", "path": str(boolq), "limit": 5}]})
    quantcli.run(limited)
    assert results(limited)["boolq"]["questions"] == 5


def test_generated_answers_are_those_of_transformers(
    recipe: Recipe, squad: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also by a model that does not fit into the memory that is free, which keys and values fill to the last byte."""
    recipe = changed(recipe, evaluate={"tasks": [{"task": "squad", "path": str(squad)}]})
    result = quantcli.run(recipe)
    questions = questions_of(TaskSection(task="squad", path=str(squad)))
    for stage, model in (
        ("reference-tasks", recipe["model"]["path"]),
        ("eval-tasks", result.path / "export" / "dense"),
    ):
        tokenizer = transformers.AutoTokenizer.from_pretrained(model)
        loaded = transformers.AutoModelForCausalLM.from_pretrained(model)
        samples = json.loads((result.path / stage / "squad.json").read_text())["samples"]
        for question, sample in zip(questions, samples, strict=True):
            ids = tokenizer(question.prompt, return_tensors="pt")
            out = loaded.generate(**ids, do_sample=False, max_new_tokens=NEW_TOKENS, pad_token_id=0)
            text = tokenizer.decode(out[0, ids.input_ids.shape[1] :], skip_special_tokens=True)
            assert sample["answer"] == next((line.strip() for line in text.splitlines() if line.strip()), "")
    assert set(results(recipe)["squad"]["metrics"]) == {"exact_match", "f1"}

    lengths = [len(tokenizer(question.prompt).input_ids) for question in questions]
    free = 4 * generation.cached_tokens(lengths, NEW_TOKENS) * generation.cached_values(loaded.config)
    monkeypatch.setattr(generation, "free_memory", lambda _: free)
    told: list[str] = []
    beside = changed(recipe, output=str(tmp_path / "apart" / "run"))
    quantcli.run(beside, listener=lambda event: told.extend([event["text"]] if event["event"] == "note" else []))
    assert results(beside) == results(recipe)
    for model in ("float", "quantized"):
        assert sum(f"The task squad runs the {model} model one block at a time" in text for text in told) == 1

    monkeypatch.setattr(generation, "free_memory", lambda _: free - 1)
    with pytest.raises(RoomError, match=r"The task squad generates text, .* of \d+ tokens \(.* and 0.\d+ GB are free"):
        quantcli.run(changed(recipe, quantize__weights__bits=8))


def test_an_answer_ends_with_every_token_that_ends_a_text(recipe: Recipe, squad: Path, tmp_path: Path) -> None:
    """Also with those that generation_config.json alone names: Qwen's instructed models end a text that is no chat with
    another than the tokenizer's, and go on on the same line."""
    model = shutil.copytree(recipe["model"]["path"], tmp_path / "ending")
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    prompts = [question.prompt for question in questions_of(TaskSection(task="squad", path=str(squad)))]

    def written(prompt: str) -> list[int]:
        ids = tokenizer(prompt, return_tensors="pt")
        out = loaded_model(model).generate(**ids, do_sample=False, max_new_tokens=NEW_TOKENS, pad_token_id=0)
        found: list[int] = out[0, ids.input_ids.shape[1] :].tolist()
        return found

    whole = written(prompts[0])
    ends = {"eos_token_id": [tokenizer.eos_token_id, next(token for token in whole[2:] if token not in whole[:2])]}
    (model / "generation_config.json").write_text(json.dumps(ends))
    assert len(written(prompts[0])) < len(whole)
    evaluate = {"tasks": [{"task": "squad", "path": str(squad)}], "generate": None}
    run = quantcli.run(changed(recipe, model__path=str(model), evaluate=evaluate)).path
    samples = json.loads((run / "reference-tasks" / "squad.json").read_text())["samples"]
    for prompt, sample in zip(prompts, samples, strict=True):
        text = tokenizer.decode(written(prompt), skip_special_tokens=True)
        assert sample["answer"] == next((line.strip() for line in text.splitlines() if line.strip()), "")


def test_questions_that_are_not_there_are_refused_at_once(recipe: Recipe, tmp_path: Path) -> None:
    for path in (tmp_path / "none.jsonl", tmp_path):
        with pytest.raises(DataError):
            quantcli.run(changed(recipe, evaluate={"tasks": [{"task": "boolq", "path": str(path)}]}))
    pytest.importorskip("datasets")
    for task in ("boolq", "squad"):
        with pytest.raises(DataError, match="HF_HUB_OFFLINE is set, and no earlier copy is here"):
            quantcli.run(changed(recipe, evaluate={"tasks": [task]}))
    assert not Path(recipe["output"]).exists()


@pytest.mark.parametrize(
    ("tasks", "words"),
    [
        (["bolq"], "is no known task"),
        (["boolq", {"task": "boolq", "limit": 3}], "names boolq twice"),
        ([{"task": "squad", "shots": 2}], "is for tasks of lm-evaluation-harness"),
        (["lm-eval/"], "names no task"),
    ],
)
def test_tasks_that_make_no_sense_are_refused(recipe: Recipe, tasks: list[Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        load_recipe(changed(recipe, evaluate={"tasks": tasks}))


def test_a_model_that_is_only_asked_tasks_is_checked_on_the_text_at_hand(
    recipe: Recipe, boolq: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tokenizer that gives too many tokens spoils tasks as it spoils a perplexity."""
    monkeypatch.setattr(check, "MOST_TOKENS_A_WORD", 1.0)
    recipe = changed(recipe, evaluate={"tasks": [{"task": "boolq", "path": str(boolq), "limit": 2}]})
    with pytest.raises(ModelError, match="tokens a word; sane ones need"):
        quantcli.run(changed(recipe, model__sanity_check="stop"))
    assert not (Path(recipe["output"]) / "reference-tasks").exists()
    outcome = quantcli.run_stage("reference-tasks", recipe)  # which only warns
    assert list(outcome.stages) == ["check", "reference-tasks"]
    found = json.loads((outcome.path / "check" / "sanity.json").read_text())
    assert found["tokens"] == 256  # as many as the model has positions for
    assert found["tokens_per_word"] > 1
    without = changed(recipe, model__sanity_check="off")
    assert "check" not in quantcli.run_stage("quantize", without | {"output": recipe["output"] + "-off"}).stages


def harness_task(place: Path, name: str, rows: list[dict[str, Any]], rest: str) -> Path:
    """The directory of a task of the harness, with its rows and a cache of its own."""
    place.mkdir()
    (place / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (place / f"{name}.yaml").write_text(
        f"task: {name}\ndataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {place / 'data.jsonl'}}}, cache_dir: {place.parent / 'cache'}}}\n"
        f"test_split: test\n{rest}"
    )
    return place


@pytest.fixture
def no_other_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks of a directory alone: the library's own thirteen thousand files take it fifteen seconds to read."""
    tasks = pytest.importorskip("lm_eval.tasks")

    def manager(path: str | None) -> Any:
        return tasks.TaskManager(include_path=path, include_defaults=False)

    monkeypatch.setattr(harness, "_task_manager", manager)


def test_a_task_of_the_harness_is_what_the_harness_finds(recipe: Recipe, tmp_path: Path) -> None:
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    rows = [{"query": f"The {a} of the hill saw", "choices": [f"{b} old sheep" for b in WORDS[:3]], "gold": n % 3}
            for n, a in enumerate(WORDS)]  # fmt: skip
    place = harness_task(
        tmp_path / "tasks", "sheep", rows,
        "output_type: multiple_choice\ndoc_to_text: '{{query}}'\ndoc_to_choice: '{{choices}}'\n"
        "doc_to_target: gold\nmetric_list: [{metric: acc}, {metric: acc_norm, higher_is_better: false}]\n",
    )  # fmt: skip
    recipe = changed(recipe, evaluate={"tasks": [{"task": "lm-eval/sheep", "path": str(place)}]})
    run = quantcli.run(recipe).path
    found = results(recipe)["lm-eval/sheep"]
    for name, model in (("float_model", recipe["model"]["path"]), ("quantized", run / "export" / "dense")):
        lm = HFLM(pretrained=str(model), device="cpu", dtype="float32", batch_size=4)
        wanted = lm_eval.simple_evaluate(
            lm,
            tasks=["sheep"],
            task_manager=TaskManager(include_path=str(place), include_defaults=False),
            bootstrap_iters=0,
        )["results"]["sheep"]
        for metric in ("acc", "acc_norm"):
            assert found["lm_eval"][name][f"{metric},none"] == pytest.approx(wanted[f"{metric},none"])
            assert found["metrics"][metric][name]["value"] == pytest.approx(wanted[f"{metric},none"])
    assert found["questions"] == len(rows)
    assert {name for name, metric in found["metrics"].items() if metric.get("lower_is_better")} == {"acc_norm"}


@pytest.mark.parametrize("broken", [False, True], ids=["offline", "broken off"])
def test_questions_that_only_the_hub_has_are_missed_in_our_words(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_other_tasks: None, broken: bool
) -> None:
    from huggingface_hub.errors import HfHubHTTPError

    reason = r"HF_HUB_OFFLINE is set\."
    if broken:  # as its HTTP client says it, whichever that is

        def load_dataset(*_: Any, **__: Any) -> None:
            raise HfHubHTTPError.__mro__[1]("the server went away.")

        monkeypatch.setattr(hub, "_obstacle", lambda: "")
        monkeypatch.setattr("datasets.load_dataset", load_dataset)
        reason = r"the server went away\."

    place = tmp_path / "tasks"
    place.mkdir()
    (place / "far.yaml").write_text("task: far\ndataset_path: some-org/far\noutput_type: multiple_choice\n")
    with pytest.raises(DataError, match=rf"the questions of far cannot be had: {reason} Check the net"):
        quantcli.run(changed(recipe, evaluate={"tasks": [{"task": "lm-eval/far", "path": str(place)}]}))


def test_a_task_that_generates_says_how_far_it_is_and_is_what_the_harness_finds(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_other_tasks: None
) -> None:
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    rows = [{"query": f"The {a} of the hill saw", "gold": "one"} for a in WORDS * 2]
    place = harness_task(
        tmp_path / "tasks", "goes_on", rows,
        "output_type: generate_until\ndoc_to_text: '{{query}}'\ndoc_to_target: '{{gold}}'\n"
        "generation_kwargs: {until: ['.'], max_gen_toks: 4, do_sample: false}\n"
        "metric_list: [{metric: exact_match}]\n",
    )  # fmt: skip
    recipe = changed(recipe, evaluate={"tasks": [{"task": "lm-eval/goes_on", "path": str(place)}], "generate": None})
    events: list[dict[str, Any]] = []
    run = quantcli.run(recipe, listener=events.append).path
    for name, stage, model in (
        ("float", "reference-tasks", recipe["model"]["path"]),
        ("quantized", "eval-tasks", run / "export" / "dense"),
    ):
        told = [e for e in events if e["event"] == "answered" and e["stage"] == stage]
        assert [(e["number"], e["of"], e["model"]) for e in told] == [(n, 12, name) for n in range(1, 13)]
        lm = HFLM(pretrained=str(model), device="cpu", dtype="float32", batch_size=3)
        manager = TaskManager(include_path=str(place), include_defaults=False)
        wanted = lm_eval.simple_evaluate(lm, tasks=["goes_on"], task_manager=manager, bootstrap_iters=0)
        found = results(recipe)["lm-eval/goes_on"]["lm_eval"]["float_model" if name == "float" else name]
        assert found["exact_match,none"] == pytest.approx(wanted["results"]["goes_on"]["exact_match,none"])

    monkeypatch.setattr(generation, "free_memory", lambda _: 1000)
    with pytest.raises(RoomError, match=r"The task lm-eval/goes_on generates text, .* the keys and values of"):
        quantcli.run(changed(recipe, quantize__weights__bits=8))


@torch.inference_mode()
def of_two_minds(place: Path, boolq: Path) -> Path:
    """A random model whose tokenizer has yes and no as tokens, and which finds both likely: what all questions have in
    common is taken out of the difference of their rows in the head."""
    model = save_tiny_model("llama", place / "model")
    answers = " ".join(["Answer: yes", "Answer: no"] * 50)
    tokenizer = tiny_tokenizer([answers + boolq.read_text()])
    tokenizer.save_pretrained(model)
    yes, no = boolq_choices(tokenizer)
    assert tokenizer("Answer: yes").input_ids[:-1] == tokenizer("Answer:").input_ids
    loaded = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    questions = questions_of(TaskSection(task="boolq", path=str(boolq)))
    ends = torch.stack([loaded.model(torch.tensor([tokenizer(q.prompt).input_ids])).last_hidden_state[0, -1]
                        for q in questions])  # fmt: skip
    head, common = loaded.lm_head.weight, ends.mean(0)
    head[yes] -= common * ((ends @ (head[yes] - head[no])).mean() / (common @ common))
    loaded.save_pretrained(model)
    return model


@pytest.mark.parametrize("scheme", SCHEMES)
def test_boolq_is_what_the_harness_finds_on_the_same_prompts(
    recipe: Recipe, boolq: Path, tmp_path: Path, no_other_tasks: None, scheme: str
) -> None:
    """By its task, which asks as `boolq` does, and by its own model of transformers, whatever the size of a batch."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    place = tmp_path / "tasks"
    place.mkdir()
    (place / "same.yaml").write_text(
        "task: same_boolq\ndataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {boolq}}}, cache_dir: {tmp_path / 'cache'}}}\n"
        'test_split: test\noutput_type: multiple_choice\ndoc_to_choice: ["no", "yes"]\n'
        'doc_to_text: "{{title}} -- {{passage}}\\nQuestion: {{question}}?\\nAnswer:"\n'
        "doc_to_target: '{{answer | int}}'\nmetric_list: [{metric: acc}]\n"
    )
    tasks = [{"task": "boolq", "path": str(boolq)}, {"task": "lm-eval/same_boolq", "path": str(place)}]
    recipe = changed(recipe, evaluate={"tasks": tasks, "generate": None}, **SCHEMES[scheme])
    recipe = changed(recipe, model__path=str(of_two_minds(tmp_path, boolq)), model__sanity_check="off")
    run = quantcli.run(recipe).path
    for stage in ("reference-tasks", "eval-tasks"):
        ours, theirs = (
            json.loads((run / stage / f"{name}.json").read_text()) for name in ("boolq", "lm-eval-same_boolq")
        )
        assert {sample["answer"] for sample in ours["samples"]} == {"yes", "no"}
        assert [sample["accuracy"] for sample in ours["samples"]] == [sample["acc"] for sample in theirs["samples"]]
        mean = sum(sample["accuracy"] for sample in ours["samples"]) / len(ours["samples"])
        assert theirs["aggregates"]["acc,none"] == pytest.approx(mean)
    requests = [
        Instance("loglikelihood", {}, (question.prompt, f" {word}"), index)
        for index, question in enumerate(questions_of(TaskSection(task="boolq", path=str(boolq))))
        for word in ("yes", "no")
    ]
    with opened(recipe, "export") as context:
        for stage, model in (
            ("reference-tasks", Model("float", context.skeleton(original=True), None, "prefill")),
            ("eval-tasks", Model("quantized", *exported_model(context), "prefill")),
        ):
            with by_transformers(context, model) as loaded:
                for size in (1, 3, 8):
                    harness = HFLM(pretrained=loaded, tokenizer=context.tokenizer(), batch_size=size)
                    likely = [value for value, _ in harness.loglikelihood(requests, disable_tqdm=True)]
                    words = ["yes" if yes > no else "no" for yes, no in zip(likely[::2], likely[1::2], strict=True)]
                    samples = json.loads((run / stage / "boolq.json").read_text())["samples"]
                    assert [sample["answer"] for sample in samples] == words


def test_a_name_alone_is_a_task_with_the_defaults() -> None:
    recipe = load_recipe({"model": {"path": "a/b"}, "quantize": {}, "evaluate": {"tasks": ["boolq"]}, "output": "o"})
    assert recipe.evaluate is not None
    assert recipe.evaluate.tasks == (TaskSection(task="boolq"),)


def test_a_sequence_alone_in_its_batch_is_not_padded() -> None:
    sequences = [[1, 2, 3], [4], [5] * 40]
    order, batches = _padded(sequences, 1)
    assert order == [[1], [0], [2]]
    assert [batch.tolist() for batch in batches] == [[sequences[index]] for (index,) in order]


def test_a_file_of_another_form_than_squads_says_what_is_read(tmp_path: Path) -> None:
    rows = tmp_path / "squad.jsonl"
    rows.write_text('{"context": "a", "question": "b"}\n{"context": "c", "question": "d"}\n')
    with pytest.raises(DataError, match=r"squad\.jsonl.*dev-v1\.1\.json"):
        questions_of(TaskSection(task="squad", path=str(rows)))
