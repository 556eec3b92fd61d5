"""Tasks with right and wrong answers: their prompts, how an answer is scored, and accuracies with their intervals."""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from quantcli.errors import DataError, ModelError
from quantcli.evaluation.scores import Z95, t95


@dataclass(frozen=True)
class Question:
    """One question of a task: the prompt, and the answers that count as right."""

    prompt: str
    answers: tuple[str, ...]


Scored = dict[str, Any]
"""What came of one question: `answer`, what the model said, and the value of each metric between 0 and 1."""


# ------------------------------------------------------------------------------------------------------ BoolQ

BOOLQ_CHOICES = ("How can we learning machine learning: yes", "How can we learning machine learning: no")
"""The choices yes and no are the last tokens of these, so that they are tokenized as behind a colon."""

BOOLQ = (
    'Prompt "{title} -- {passage}", "Question: {question}?", "Answer:" on lines of their own; one forward pass; yes if '
    "its token is more probable at the last position than that of no, as msModelSlim's precision tool decides."
)


def boolq_question(row: Mapping[str, Any], place: str) -> Question:
    """A BoolQ row as msModelSlim's precision tool asks it. Raises DataError, naming `place`, for another form."""
    for key, kind in (("question", str), ("passage", str), ("answer", bool)):
        if not isinstance(row.get(key), kind):
            raise DataError(f"{place}: the BoolQ field {key} is missing or no {kind.__name__}.", "Mend the row.")
    prompt = f"{row.get('title') or ''} -- {row['passage']}\nQuestion: {row['question']}?\nAnswer:"
    return Question(prompt, ("yes" if row["answer"] else "no",))


def boolq_choices(tokenizer: Any) -> tuple[int, int]:
    """The tokens of yes and no. Raises ModelError for a tokenizer that does not tell them apart."""
    yes, no = (tokenizer(text, add_special_tokens=False).input_ids[-1] for text in BOOLQ_CHOICES)
    if yes == no:
        raise ModelError("The tokenizer ends yes and no in the same token.", "Leave the task boolq out.")
    return yes, no


def boolq_scored(question: Question, yes: float, no: float) -> Scored:
    """The answer by the log-probabilities of both choices; equal ones mean no."""
    answer = "yes" if yes > no else "no"
    return {"answer": answer, "accuracy": float(answer in question.answers)}


# ------------------------------------------------------------------------------------------------------ SQuAD

SQUAD = (
    'Prompt "Read the passage and answer the question below.", then "### Instruction:", the passage, "### Input:", the '
    'question and "### Response:"; greedy generation, of which the first line that is not blank counts; exact match '
    "and F1 of SQuAD 1.1's official evaluation, the best over the answers."
)


def squad_questions(content: Mapping[str, Any], place: str) -> list[Question]:
    """All questions of a file of SQuAD 1.1. Raises DataError for content of other form."""
    try:
        return [
            squad_question(paragraph["context"], asked["question"], [answer["text"] for answer in asked["answers"]])
            for article in content["data"]
            for paragraph in article["paragraphs"]
            for asked in paragraph["qas"]
        ]
    except (KeyError, TypeError) as error:
        raise DataError(f"{place} has not the form of SQuAD 1.1: {error!r}.", "Name its dev-v1.1.json.") from error


def squad_question(context: str, question: str, answers: Sequence[str]) -> Question:
    """The prompt is Golden Stick's."""
    prompt = (
        "Read the passage and answer the question below.\n\n### Instruction:\n"
        f"{context}\n\n### Input:\n{question}\n\n### Response:"
    )
    return Question(prompt, tuple(answers))


def squad_scored(question: Question, generated: str) -> Scored:
    """Exact match and F1 of the first line of what was generated, each the best over the answers."""
    answer = next((line.strip() for line in generated.splitlines() if line.strip()), "")
    wanted = question.answers or ("",)
    return {
        "answer": answer,
        "exact_match": max(float(normalized(answer) == normalized(each)) for each in wanted),
        "f1": max(token_f1(answer, each) for each in wanted),
    }


def normalized(text: str) -> str:
    """As SQuAD's evaluation compares answers: lower case, without ASCII punctuation and the articles a, an and the."""
    bare = "".join(mark for mark in text.lower() if mark not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())


def token_f1(answer: str, wanted: str) -> float:
    """2 · precision · recall / (precision + recall) of the words of normalized answers, each as often as it occurs."""
    found, right = normalized(answer).split(), normalized(wanted).split()
    shared = sum((Counter(found) & Counter(right)).values())
    return 2 * shared / (len(found) + len(right)) if shared else 0.0


# ------------------------------------------------------------------------------------------------------ statistics


def compared(exact: Sequence[Scored], rounded: Sequence[Scored], lower: Container[str] = ()) -> dict[str, Any]:
    """For each metric both models' means with errors and 95 % intervals, and the paired change. Of those in `lower`
    less is better.

    Intervals of metrics that are 0 or 1 are Wilson's, that of their change is `paired_interval`; others are Student's,
    cut off at 0 and 1, and that of the change from differences question by question. `flips` are the shares of
    questions that the float model has better (`lost`) and that the quantized one has better (`gained`); `same_answer`
    is the share of equal answers.
    """
    names = [key for key, value in exact[0].items() if isinstance(value, float)]
    metrics = {}
    for name in names:
        pairs = [(before[name], after[name]) for before, after in zip(exact, rounded, strict=True)]
        differences = [after - before for before, after in pairs]
        change, error = mean_and_error(differences)
        spread = t95(len(pairs)) * error
        interval = [change - spread, change + spread]
        risen, fallen = sum(d > 0 for d in differences), sum(d < 0 for d in differences)
        if not risen + fallen or {value for pair in pairs for value in pair} <= {0.0, 1.0}:
            interval = paired_interval(risen, fallen, len(pairs))
        metrics[name] = {
            "float_model": accuracy([before for before, _ in pairs]),
            "quantized": accuracy([after for _, after in pairs]),
            "change": change,
            "change_error": error,
            "change_interval": interval,
            "flips": {
                "lost": (risen if name in lower else fallen) / len(pairs),
                "gained": (fallen if name in lower else risen) / len(pairs),
            },
            **({"lower_is_better": True} if name in lower else {}),
        }
    found: dict[str, Any] = {"questions": len(exact), "metrics": metrics}
    if all("answer" in each for each in exact):
        same = sum(a["answer"] == b["answer"] for a, b in zip(exact, rounded, strict=True))
        found["same_answer"] = same / len(exact)
    return found


def accuracy(values: Sequence[float]) -> dict[str, Any]:
    """Mean, standard error and 95 % interval of values between 0 and 1."""
    mean, error = mean_and_error(values)
    if set(values) <= {0.0, 1.0}:
        return {"value": mean, "error": error, "interval": wilson(mean, len(values))}
    spread = t95(len(values)) * error
    return {"value": mean, "error": error, "interval": [max(0.0, mean - spread), min(1.0, mean + spread)]}


def wilson(share: float, count: int) -> list[float]:
    """Wilson's 95 % score interval of a share of `count` trials."""
    square = Z95 * Z95 / count
    middle = (share + square / 2) / (1 + square)
    half = Z95 / (1 + square) * math.sqrt(share * (1 - share) / count + square / (4 * count))
    return [max(0.0, middle - half), min(1.0, middle + half)]


def paired_interval(more: int, less: int, count: int) -> list[float]:
    """Tango's 95 % score interval of the change of a share (Statistics in Medicine 17, 1998), where of `count` pairs of
    0 or 1 `more` rise and `less` fall: the δ with |more − less − n·δ| ≤ 1.96 · √(n · (2q + δ(1 − δ))), where q is the
    likeliest share that falls if the change is δ.

    Where none rises or falls it is ± 1.96² / (n + 1.96²), which is Wilson's bound of the share that does.
    """

    def kept(change: float) -> bool:
        b = (2 * count - more + less) * change - more - less
        c = -less * change * (1 - change)
        falling = (math.sqrt(max(0.0, b * b - 8 * count * c)) - b) / (4 * count)
        variance = count * (2 * falling + change * (1 - change))
        return abs(more - less - count * change) <= Z95 * math.sqrt(max(0.0, variance))

    bounds = []
    for end in (-1.0, 1.0):
        inside, outside = (more - less) / count, end
        for _ in range(60):
            middle = (inside + outside) / 2
            inside, outside = (middle, outside) if kept(middle) else (inside, middle)
        bounds.append(outside)
    return bounds


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error; NaN for a single value."""
    count = len(values)
    mean = math.fsum(values) / count
    if count < 2:
        return mean, math.nan
    return mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1) / count)
