"""Static W8A8 under each range method, with ever more linears in float: perplexity, KL divergence and BoolQ accuracy.

    python benchmarks/rollback_table.py MODEL --calibration wiki.valid.tokens --text wiki.test.tokens --boolq dev.jsonl

Calibrates and ranks once (64 × 512 tokens), then measures every row in the float model with quantized linears put in
place, as eval-ppl does with an export. BoolQ as msModelSlim's precision_tool scores it: one forward a question, the
likelier of " yes" and " no" at the last position. Prints a table in Markdown, row by row.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from quantcli.evaluation.protocols import EvaluationText
from quantcli.formats.store import Store, StoredLinear
from quantcli.pipeline import engine
from quantcli.pipeline.context import Context
from quantcli.pipeline.plan import Treatment, make_plan
from quantcli.pipeline.rundir import open_run
from quantcli.pipeline.samples import windows_of
from quantcli.pipeline.stages.calibrate import read_statistics
from quantcli.pipeline.treatment import input_parameters, observed_of, with_input
from quantcli.pipeline.trial import TrialModel
from quantcli.recipe import load_recipe
from quantcli.recipe.data import PerplexitySection

CHOICES = ("How can we learning machine learning: yes", "How can we learning machine learning: no")


class OtherRanges(Store):
    """A store whose static inputs have the ranges of another method."""

    def __init__(self, context: Context, method: str) -> None:
        super().__init__(context.folder("quantize"))
        self.inputs = {}
        for name, treatment in context.plan.treatments.items():
            section = treatment.activations.model_copy(update={"method": method})
            other = Treatment(treatment.scheme, treatment.weights, section)
            self.inputs[name] = input_parameters(observed_of(read_statistics(context, name)), other)[:2]

    def read(self, name: str) -> StoredLinear:
        return with_input(super().read(name), *self.inputs[name])


class Questions:
    """BoolQ prompts, and how often the model prefers the right answer."""

    def __init__(self, context: Context, store: Store, file: Path, count: int) -> None:
        tokenizer = context.tokenizer()
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()[:count]]
        prompts = [f"{row['title']} -- {row['passage']}\nQuestion: {row['question']}?\nAnswer:" for row in rows]
        encoded = [tokenizer(prompt).input_ids for prompt in prompts]
        order = sorted(range(len(rows)), key=lambda i: len(encoded[i]))  # equal lengths share a batch
        self.answers = [bool(rows[i]["answer"]) for i in order]
        self.choices = [tokenizer(text, add_special_tokens=False).input_ids[-1] for text in CHOICES]
        text = EvaluationText("boolq", [encoded[i] for i in order], 0, None, "")
        self.model = TrialModel(context, store, None, text, "prefill")

    def accuracy(self, hidden: Sequence[torch.Tensor]) -> float:
        right, position = 0, 0
        with self.model.stream.head(), torch.inference_mode():
            for states in hidden:
                ((_, logits),) = self.model.stream.logits(states[:, -1:])
                for yes, no in logits[:, -1, self.choices].tolist():
                    right += (yes > no) == self.answers[position]
                    position += 1
        return right / len(self.answers)


def rows(
    context: Context, ranking: list[dict[str, float]], levels: Sequence[int]
) -> Iterator[tuple[str, str, set[str]]]:
    """(range method, what is in float, the linears in float)"""

    def first(metric: str, count: int) -> set[str]:
        names = [row["name"] for row in sorted(ranking, key=lambda row: -row[metric])[:count]]
        plan = make_plan(context.recipe, context.model, context.plan.structure, dict.fromkeys(names, "ranked"))
        return set(plan.kept) - {context.plan.structure.head}

    down = {name for name in context.plan.treatments if name.endswith("down_proj")}
    for method in ("minmax", "histogram", "mixed"):
        for level in levels:
            yield method, f"L{level} by range_parm" if level else "nothing", first("range_parm", level)
        yield method, "down_proj by hand", down
    for level in levels:
        if level:
            yield "mixed", f"L{level} by block_error", first("block_error", level)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--boolq", type=Path)
    parser.add_argument("--windows", type=int, default=20)
    parser.add_argument("--questions", type=int, default=100)
    parser.add_argument("--levels", type=int, nargs="*", default=[0, 1, 5, 10, 30])
    parser.add_argument("--output", type=Path, help="run directory to keep, so that another call need not calibrate")
    arguments = parser.parse_args()
    recipe = load_recipe(
        {
            "model": {"path": str(arguments.model)},
            "calibration": {"dataset": "wikitext2", "path": str(arguments.calibration.absolute())},
            # a histogram, so that value counts are gathered for every range method
            "quantize": {"activations": {"bits": 8, "method": "histogram"}, "rollback": {"metric": "block_error"}},
            "output": str(arguments.output or tempfile.mkdtemp()),
        }
    )
    ranking = engine.rank_linears(recipe)["linears"]
    result = engine.run_recipe(recipe, until="quantize")
    scored = PerplexitySection(dataset="wikitext2", path=str(arguments.text), windows=arguments.windows)
    with open_run(Path(recipe.output), result.plan.model) as run:
        context = Context(
            recipe,
            result.plan.model,
            result.plan,
            run,
            engine.choose_device(recipe.model.device),
            results=result.stages,
        )
        measure(context, ranking, windows_of(scored, context.tokenizer()), arguments)


def measure(
    context: Context, ranking: list[dict[str, float]], text: EvaluationText, arguments: argparse.Namespace
) -> None:
    base = Store(context.folder("quantize"))
    model = TrialModel(context, base, None, text, "prefill")
    questions = Questions(context, base, arguments.boolq, arguments.questions) if arguments.boolq else None
    scores = model.measure(base.schemes)
    asked = f"{questions.accuracy(questions.model.exact):.3f}" if questions else ""
    print(f"float: perplexity {scores.float_model.value:.3f}, BoolQ {asked}; {len(text.windows)} windows of 1024\n")
    print("| ranges | in float | linears | perplexity | increase | KL | BoolQ | seconds |\n" + "|---" * 8 + "|")
    ranges: dict[str, OtherRanges] = {}
    known: dict[tuple[str, frozenset[str]], str] = {}
    for method, what, chosen in rows(context, ranking, arguments.levels):
        store = ranges.setdefault(method, OtherRanges(context, method))
        alike = next((m for m in ranges if m != method and same_inputs(ranges[m], store)), method)
        key = (alike, frozenset(chosen))
        started = time.perf_counter()
        if key not in known:
            for trial in (model, questions.model) if questions else (model,):
                if trial.base is not ranges[alike]:
                    trial.base, trial.paths = ranges[alike], []
            scores = model.measure(chosen)
            accuracy = f"{questions.accuracy(questions.model.hidden(frozenset(chosen))):.3f}" if questions else ""
            assert scores.quantized is not None
            known[key] = (f"{scores.quantized.value:.2f} | {scores.increase:+.1%} | {scores.kl_divergence:.4f} | "
                          f"{accuracy}")  # fmt: skip
        seconds = time.perf_counter() - started
        print(f"| {method} | {what} | {len(chosen)} | {known[key]} | {seconds:.0f} |", flush=True)


def same_inputs(one: OtherRanges, other: OtherRanges) -> bool:
    def plain(store: OtherRanges) -> list[list[float]]:
        return [[float(part) for part in parts if part is not None] for parts in store.inputs.values()]

    return plain(one) == plain(other)


if __name__ == "__main__":
    main()
