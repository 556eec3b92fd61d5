"""One task put to one model: questions read, asked block by block or generated, and scored."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantcli.errors import DataError, ModelError
from quantcli.model.checkpoint import file_digest
from quantcli.pipeline.context import Context
from quantcli.pipeline.sequences import Query, ask
from quantcli.pipeline.source import known_positions
from quantcli.recipe.evaluation import HARNESS, TaskSection

if TYPE_CHECKING:
    from quantcli.evaluation.tasks import Question, Scored
    from quantcli.pipeline.sequences import Model

NEW_TOKENS = 32
"""Tokens of an answer to a question of SQuAD, at most."""

Outcome = dict[str, Any]
"""`description`, `samples` (a Scored each question) and, of lm-evaluation-harness, its own `aggregates`."""


def task_file(section: TaskSection) -> str:
    """The name of the file that holds what came of a task's questions."""
    return f"{section.task.replace('/', '-')}.json"


def require_readable(section: TaskSection) -> None:
    """Refuse a task whose data is not there, before anything is computed. Raises DataError, or RecipeError where
    lm-evaluation-harness is not installed."""
    if section.path is not None and not Path(section.path).exists():
        raise DataError(f"evaluate.tasks: {section.path} of the task {section.task} does not exist.", "Correct path.")
    if section.task.startswith(HARNESS):
        from quantcli.pipeline.harness import harness_version

        harness_version()
    else:
        questions_of(section)


def task_identity(section: TaskSection) -> dict[str, Any]:
    """The section with digests of local files in the place of their paths, and the version of lm-evaluation-harness."""
    keys = section.model_dump(exclude={"path"})
    if section.path is not None:
        path = Path(section.path)
        files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
        keys["data"] = [[file.relative_to(path).as_posix(), file_digest(file)] for file in files]
    if section.task.startswith(HARNESS):
        from quantcli.pipeline.harness import harness_version

        keys["lm_eval"] = harness_version()
    return keys


def run_task(
    context: Context, section: TaskSection, model: Model, folder: Path, *, batch_tokens: int | None = None
) -> Outcome:
    """What the model makes of a task. Hidden states lie in `folder` meanwhile.

    Without `batch_tokens` prompts of boolq, whose whole answer is one comparison, are each alone in a batch: the number
    of rows decides how products round in 16 bits, and one answer in a hundred of a small model changed with it.

    Raises DataError for questions that cannot be read, RoomError where text is generated and its keys and values do not
    fit.
    """
    from quantcli.evaluation.tasks import BOOLQ, SQUAD

    if batch_tokens is None and section.task == "boolq":
        batch_tokens = 1
    options = {} if batch_tokens is None else {"batch_tokens": batch_tokens}
    numbers = count()
    memory = context.recipe.model.cache_memory

    def asked(queries: Sequence[Query]) -> list[Any]:
        # a folder each, so that an interrupted pass is never taken for another
        place = folder / f"hidden-{task_file(section).removesuffix('.json')}-{model.name}-{next(numbers)}"
        return ask(model, queries, place, memory, context.emit, **options)

    if section.task == "boolq":
        return {"description": BOOLQ, "samples": _boolq(context, section, asked)}
    if section.task == "squad":
        return {"description": SQUAD, "samples": _squad(context, section, model)}
    from quantcli.pipeline.harness import harness_outcome

    return harness_outcome(context, section, model, asked)


def _boolq(context: Context, section: TaskSection, asked: Callable[[Sequence[Query]], list[Any]]) -> list[Scored]:
    from quantcli.evaluation.tasks import boolq_choices, boolq_scored

    tokenizer, questions = context.tokenizer(), questions_of(section)
    choices = boolq_choices(tokenizer)
    prompts = _encoded(context, tokenizer, questions, 0)
    replies = asked([Query(prompt, len(prompt), [choices]) for prompt in prompts])
    pairs = (reply.logp[0].tolist() for reply in replies)
    return [boolq_scored(question, yes, no) for question, (yes, no) in zip(questions, pairs, strict=True)]


def _squad(context: Context, section: TaskSection, model: Model) -> list[Scored]:
    from quantcli.evaluation.tasks import squad_scored
    from quantcli.pipeline.generation import cached_tokens, generate, serving, text_ends

    tokenizer, questions = context.tokenizer(), questions_of(section)
    prompts = _encoded(context, tokenizer, questions, NEW_TOKENS)
    found: dict[int, Scored] = {}
    tokens = cached_tokens([len(prompt) for prompt in prompts], NEW_TOKENS)
    with serving(model, f"The task {section.task}", tokens, context.emit) as loaded:
        own = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        ends = list(dict.fromkeys([*own, *text_ends(context.model, model.skeleton.config)]))
        for index, written in generate(loaded, prompts, NEW_TOKENS, ends, tokenizer.pad_token_id):
            text = tokenizer.decode(written, skip_special_tokens=True)
            found[index] = squad_scored(questions[index], text)
            context.emit("answered", number=len(found), of=len(prompts), model=model.name)
    return [found[index] for index in range(len(prompts))]


def questions_of(section: TaskSection) -> list[Question]:
    """The questions of boolq or squad, as many as the section wants. Raises DataError if there is none."""
    from quantcli.calibration.datasets import boolq_rows, squad_rows
    from quantcli.evaluation.tasks import boolq_question, squad_question, squad_questions
    from quantcli.model.checkpoint import read_json

    path = None if section.path is None else Path(section.path)
    if section.task == "boolq":
        found = [boolq_question(row, place) for row, place in boolq_rows(path, "dev")]
    elif path is not None:
        try:
            content = read_json(path)
        except ModelError as error:
            raise DataError(
                error.message, "Name SQuAD 1.1's own JSON, dev-v1.1.json: no table of rows is read."
            ) from error
        found = squad_questions(content, str(path))
    else:
        found = [squad_question(row["context"], row["question"], row["answers"]["text"]) for row in squad_rows()]
    if not found:
        raise DataError(f"The task {section.task} has no questions in {path or 'the hub'}.", "Choose another file.")
    return found[: section.limit]


def _encoded(context: Context, tokenizer: Any, questions: Sequence[Question], behind: int) -> list[list[int]]:
    """The prompts' tokens, with room for `behind` more; too long ones lose their beginning, with a warning."""
    positions = known_positions(context.model)
    longest = None if positions is None else positions - behind
    prompts: list[list[int]] = [tokenizer(question.prompt, verbose=False).input_ids for question in questions]
    if longest is not None and (cut := sum(len(prompt) > longest for prompt in prompts)):
        context.emit("warning", text=f"{cut} of {len(prompts)} prompts are longer than the {positions} positions of "
                     "the model and lose their beginning.")  # fmt: skip
    return prompts if longest is None else [prompt[-longest:] for prompt in prompts]
