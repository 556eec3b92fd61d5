"""Tasks of lm-evaluation-harness, asked of a model block by block."""

from __future__ import annotations

import importlib.metadata
import logging
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from quantcli.errors import DataError, RecipeError, first_line
from quantcli.model.hub import hub_asked
from quantcli.pipeline.context import Context
from quantcli.pipeline.sequences import Query, Reply
from quantcli.pipeline.source import known_positions
from quantcli.recipe.evaluation import HARNESS, TaskSection

if TYPE_CHECKING:
    from quantcli.pipeline.sequences import Model
    from quantcli.pipeline.tasks import Outcome

LONGEST = 2048
"""Tokens of a request where the model does not say how many it has positions for, as that library assumes."""

GENERATED_TOGETHER = 8
"""Requests that generate in a batch."""

NEW_TOKENS = 256
"""Tokens that are generated where a task does not say how many, as that library has it."""

Asked = Callable[[Sequence[Query]], list[Reply]]


def harness_version() -> str:
    """The installed version. Raises RecipeError where there is none."""
    try:
        return importlib.metadata.version("lm_eval")
    except importlib.metadata.PackageNotFoundError as error:
        raise RecipeError("evaluate.tasks: tasks of lm-evaluation-harness need that library, which is not installed.",
                          "pip install 'quantcli[lm-eval]'.") from error  # fmt: skip


def harness_outcome(context: Context, section: TaskSection, model: Model, asked: Asked) -> Outcome:
    """What the library makes of the model's answers: its own aggregates, and metrics between 0 and 1 of each question
    by each of the task's filters.

    Log-likelihoods of given text are computed block by block, those of all requests in one pass; where a task
    generates, the whole model is in memory if it fits.
    """
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HfHubHTTPError
    from lm_eval import simple_evaluate

    unreached: Any = HfHubHTTPError.__mro__[1]  # of its HTTP client, which goes by several names
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    name = section.task.removeprefix(HARNESS)
    manager = _task_manager(section.path)
    if name not in manager.all_tasks:
        raise DataError(f"evaluate.tasks: lm-evaluation-harness knows no task {name}.",
                        "Check the name, or set path to the directory with its YAML file.")  # fmt: skip
    with hub_asked() as obstacle:
        try:
            results = simple_evaluate(
                model=_streamed(context, section.task, model, asked),
                tasks=[name],
                num_fewshot=section.shots,
                limit=section.limit,
                task_manager=manager,
                log_samples=True,
                bootstrap_iters=0,
            )
        # nothing but its data comes from the hub
        except (ConnectionError, FileNotFoundError, DatasetsError, unreached) as error:
            if isinstance(error, FileNotFoundError) and error.errno is not None:
                raise  # the system's, of a file of ours
            reason = obstacle or first_line(error)
            raise DataError(f"evaluate.tasks: the questions of {name} cannot be had: {reason}.",
                            "Check the network, or set path to a task whose data is local.") from error  # fmt: skip
    subtasks = sorted(results["samples"])
    aggregates = {
        f"{subtask}: {metric}" if len(results["results"]) > 1 else metric: float(value)
        for subtask, found in results["results"].items()
        for metric, value in found.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool) and "stderr" not in metric and "," in metric
    }
    samples = [sample for subtask in subtasks for sample in _by_question(results["samples"][subtask])]
    names = [key for key in samples[0] if all(_is_share(each.get(key)) for each in samples)] if samples else []
    samples = [{key: float(sample[key]) for key in names} for sample in samples]
    shots = {subtask: int(results["n-shot"][subtask]) for subtask in subtasks}
    if refused := [subtask for subtask, used in shots.items() if section.shots not in (None, used)]:
        # the library keeps to a definition that says 0, and tells its log alone
        context.emit("warning", text=f"evaluate.tasks: {', '.join(refused)} is asked with 0 shots, as its definition "
                     f"says; shots: {section.shots} has no effect on it.")  # fmt: skip
    pooled = f", questions of {len(subtasks)} subtasks pooled" if len(subtasks) > 1 else ""
    version = harness_version()
    description = f"Task {name} of lm-evaluation-harness {version}, {_shots(shots.values())}{pooled}."
    directions = [results["higher_is_better"].get(subtask, {}) for subtask in subtasks]
    lower = [key for key in names if any(better.get(key.partition(",")[0]) is False for better in directions)]
    return {"description": description, "samples": samples, "aggregates": aggregates, "lower_is_better": lower}


def _by_question(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Metrics of each question in order, from a row for every question and filter. Of several filters, by which the
    library finds an answer in a text, each has metrics of its own, named as it names them: "exact_match,strict-match".
    """
    several = len({row["filter"] for row in rows}) > 1
    found: dict[int, dict[str, Any]] = {}
    for row in sorted(rows, key=lambda row: row["doc_id"]):
        named = {f"{key},{row['filter']}" if several else key: row.get(key) for key in row.get("metrics", ())}
        found.setdefault(row["doc_id"], {}).update(named)
    return list(found.values())


def _shots(used: Iterable[int]) -> str:
    counts = sorted(set(used)) or [0]
    return f"{' to '.join(map(str, dict.fromkeys((counts[0], counts[-1]))))} shot{'' if counts == [1] else 's'}"


@cache
def _task_manager(path: str | None) -> Any:
    """The library's list of tasks, which takes it seconds to read; the same for every task and both models."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=path)


def _is_share(value: Any) -> bool:
    return isinstance(value, (int, float)) and 0 <= value <= 1


def _streamed(context: Context, task: str, model: Model, asked: Asked) -> Any:
    """The model as the library sees one: a subclass of its own, which is why it is made here."""
    from lm_eval import utils
    from lm_eval.api.model import CacheHook, TemplateLM

    tokenizer = context.tokenizer()
    longest = known_positions(context.model) or LONGEST

    class Streamed(TemplateLM):
        @property
        def eot_token_id(self) -> int:
            return int(tokenizer.eos_token_id)

        @property
        def prefix_token_id(self) -> int:
            return int(tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id)

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
            starts = tokenizer.bos_token is not None and string.startswith(tokenizer.bos_token)
            special = not starts if add_special_tokens is None else add_special_tokens
            ids: list[int] = tokenizer(string, add_special_tokens=special, verbose=False).input_ids
            return ids

        def _loglikelihood_tokens(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
            queries = [_continued(context_ids, ids, longest) for _, context_ids, ids in requests]
            return [(float(r.logp.double().sum()), bool(r.greedy.all())) for r in asked(queries)]

        def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
            windows, owners = [], []
            for number, request in enumerate(requests):
                rolling = utils.get_rolling_token_windows(
                    self.tok_encode(request.args[0]), self.prefix_token_id, longest, context_len=1
                )
                for pair in map(utils.make_disjoint_window, rolling):
                    windows.append(("", *pair))
                    owners.append(number)
            sums = [0.0] * len(requests)
            for owner, (value, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
                sums[owner] += value
            return sums

        def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
            from lm_eval.models.huggingface import HFLM

            from quantcli.pipeline.generation import serving

            asked_for = [len(self.tok_encode(text)) + _new_tokens(how) for text, how in (r.args for r in requests)]
            tokens = GENERATED_TOGETHER * min(max(asked_for, default=0), longest)
            with serving(model, f"The task {task}", tokens, context.emit) as loaded:
                harness = HFLM(pretrained=loaded, tokenizer=tokenizer, batch_size=GENERATED_TOGETHER)
                harness.set_cache_hook(Answered(len(requests)))
                found: list[str] = harness.generate_until(list(requests), disable_tqdm=True)
            return found

    class Answered(CacheHook):
        """Is told of every text as soon as it is there, which the library means for keeping them."""

        def __init__(self, of: int) -> None:
            super().__init__(None)
            self.number, self.of = 0, of

        def add_partial(self, attr: str, req: Any, res: Any) -> None:
            self.number += 1
            context.emit("answered", number=self.number, of=self.of, model=model.name)

    return Streamed()


def _new_tokens(how: Any) -> int:
    """Tokens that a request lets be generated, as the library reads it."""
    return int(how.get("max_gen_toks", NEW_TOKENS)) if isinstance(how, dict) else NEW_TOKENS


def _continued(before: Sequence[int], after: Sequence[int], longest: int) -> Query:
    """What follows `before`, token by token of `after`; as the library has it, cut on the left to what fits."""
    tokens = [*before, *after][-(longest + 1) :]
    kept = min(len(after), len(tokens) - 1)
    return Query(tokens[:-1], len(tokens) - kept, [[token] for token in after[-kept:]])
