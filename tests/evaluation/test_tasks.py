"""Prompts, metrics and intervals of tasks against their definitions."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from quantcli.errors import DataError, ModelError
from quantcli.evaluation.scores import Z95, t95
from quantcli.evaluation.tasks import (
    boolq_choices,
    boolq_question,
    boolq_scored,
    compared,
    normalized,
    paired_interval,
    squad_questions,
    squad_scored,
    token_f1,
    wilson,
)


def test_boolq_asks_as_the_precision_tool_does() -> None:
    row = {"question": "is it so", "title": "It", "passage": "So it is.", "answer": True}
    question = boolq_question(row, "here")
    assert question.prompt == "It -- So it is.\nQuestion: is it so?\nAnswer:"
    assert boolq_scored(question, -1.0, -2.0) == {"answer": "yes", "accuracy": 1.0}
    assert boolq_scored(question, -1.0, -1.0) == {"answer": "no", "accuracy": 0.0}
    assert boolq_question({**row, "title": None}, "here").prompt.startswith(" -- So")
    for key, value in (("answer", "yes"), ("passage", None)):
        with pytest.raises(DataError, match=f"here: the BoolQ field {key}"):
            boolq_question({**row, key: value}, "here")


def test_the_choices_of_boolq_are_the_last_tokens_of_its_sentences() -> None:
    class Encoded:
        def __init__(self, ids: list[int]) -> None:
            self.input_ids = ids

    def tokenizer(text: str, add_special_tokens: bool) -> Encoded:
        assert not add_special_tokens
        return Encoded([7, len(text)])

    assert boolq_choices(tokenizer) == (len("How can we learning machine learning: yes"), 40)
    with pytest.raises(ModelError, match="yes and no"):
        boolq_choices(lambda *_, **__: Encoded([1]))


@pytest.mark.parametrize(
    ("answer", "wanted", "f1"),
    [
        ("The Eiffel Tower", "eiffel tower!", 1.0),
        ("in the tower", "tower of Eiffel", 0.4),  # 1 of 2 and 1 of 3
        ("a a b b", "b b b", 2 * (2 / 2) * (2 / 3) / (2 / 2 + 2 / 3)),  # the article goes
        ("", "tower", 0.0),
        ("cat", "dog", 0.0),
    ],
)
def test_f1_counts_words_of_normalized_answers(answer: str, wanted: str, f1: float) -> None:
    assert token_f1(answer, wanted) == pytest.approx(f1)


def test_squad_takes_the_best_answer_and_the_first_line() -> None:
    content = {
        "data": [
            {
                "title": "T",
                "paragraphs": [
                    {
                        "context": "Passage.",
                        "qas": [
                            {"id": "1", "question": "Who?", "answers": [{"text": "Anna"}, {"text": "the old Anna"}]},
                            {"id": "2", "question": "Where?", "answers": [{"text": "here"}]},
                        ],
                    }
                ],
            }
        ]
    }
    first, second = squad_questions(content, "file")
    assert first.prompt == (
        "Read the passage and answer the question below.\n\n### Instruction:\nPassage.\n\n"
        "### Input:\nWho?\n\n### Response:"
    )
    assert squad_scored(first, "\n  Old Anna.\nNonsense") == {"answer": "Old Anna.", "exact_match": 1.0, "f1": 1.0}
    assert squad_scored(first, "Anna Smith")["f1"] == pytest.approx(2 / 3)
    assert squad_scored(second, "")["f1"] == 0.0
    assert normalized("An  apple, the «pear» and THE theme") == "apple «pear» and theme"
    with pytest.raises(DataError, match=r"file has not the form of SQuAD 1\.1"):
        squad_questions({"rows": []}, "file")


@pytest.mark.parametrize(("share", "count"), [(0.0, 10), (0.3, 10), (0.75, 400), (1.0, 7)])
def test_wilson_bounds_are_shares_at_which_what_was_found_is_just_not_rejected(share: float, count: int) -> None:
    low, high = wilson(share, count)
    for bound in (low, high):
        if 0 < bound < 1:
            assert abs(share - bound) == pytest.approx(Z95 * math.sqrt(bound * (1 - bound) / count), rel=1e-6)
    assert low <= share <= high
    assert (low == 0) == (share == 0)


@pytest.mark.parametrize(("more", "less", "count"), [(1, 7, 21), (3, 3, 100), (0, 4, 9), (12, 0, 500)])
def test_paired_bounds_are_changes_at_which_what_was_found_is_just_not_rejected(
    more: int, less: int, count: int
) -> None:
    """The likeliest shares that rise and fall by this much apart are sought among many."""
    low, high = paired_interval(more, less, count)
    assert low < (more - less) / count < high
    for change in (low, high):
        falls = np.linspace(max(0.0, -change), (1 - change) / 2, 400_002)[1:-1]
        likelihood = less * np.log(falls) + (count - more - less) * np.log1p(-2 * falls - change)
        likelihood += more * np.log(falls + change)
        q = falls[likelihood.argmax()]
        deviation = math.sqrt(count * (2 * q + change * (1 - change)))
        assert abs(more - less - count * change) == pytest.approx(Z95 * deviation, rel=1e-3)


def test_the_paired_interval_is_that_of_published_examples() -> None:
    # Bentur and others (2009) as computed in Fagerland, Lydersen and Laake, Statistics in Medicine 33 (2014)
    assert paired_interval(1, 7, 21) == pytest.approx([-0.517, -0.026], abs=5e-4)


def test_no_changed_answer_is_no_proof_that_none_can_change() -> None:
    same = [{"accuracy": float(n % 2), "f1": n / 40} for n in range(40)]
    for metric in compared(same, same)["metrics"].values():
        assert (metric["change"], metric["change_error"]) == (0.0, 0.0)
        low, high = metric["change_interval"]
        assert high == pytest.approx(wilson(0.0, 40)[1], rel=1e-9)
        assert low == pytest.approx(-high)
    assert paired_interval(5, 0, 5)[1] == 1.0


def test_of_a_metric_that_should_be_low_less_is_gained() -> None:
    exact, rounded = ([{"wrong": value} for value in values] for values in ((0.0, 0.0, 1.0, 1.0), (1.0, 1.0, 0.0, 1.0)))
    found = compared(exact, rounded, ["wrong"])["metrics"]["wrong"]
    assert found["change"] == 0.25
    assert found["flips"] == {"lost": 0.5, "gained": 0.25}
    assert found["lower_is_better"] is True


def test_models_are_compared_question_by_question() -> None:
    exact = [{"answer": "yes", "accuracy": a, "f1": b} for a, b in ((1.0, 0.5), (1.0, 1.0), (0.0, 0.2), (1.0, 0.9))]
    rounded = [{"answer": c, "accuracy": a, "f1": b} for c, a, b in
               (("yes", 1.0, 0.25), ("no", 0.0, 1.0), ("no", 1.0, 0.2), ("yes", 1.0, 1.0))]  # fmt: skip
    found: dict[str, Any] = compared(exact, rounded)
    assert found["questions"] == 4
    assert found["same_answer"] == 0.5
    accuracy, f1 = found["metrics"]["accuracy"], found["metrics"]["f1"]
    assert accuracy["float_model"]["value"] == accuracy["quantized"]["value"] == 0.75
    assert accuracy["float_model"]["interval"] == wilson(0.75, 4)
    assert accuracy["flips"] == {"lost": 0.25, "gained": 0.25}
    assert accuracy["change"] == 0.0
    assert accuracy["change_error"] == pytest.approx(math.sqrt(2 / 3 / 4))
    differences = [-0.25, 0.0, 0.0, 0.1]
    mean = sum(differences) / 4
    error = math.sqrt(sum((d - mean) ** 2 for d in differences) / 3 / 4)
    assert f1["change"] == pytest.approx(mean)
    assert f1["change_interval"] == pytest.approx([mean - t95(4) * error, mean + t95(4) * error])
    assert accuracy["change_interval"] == paired_interval(1, 1, 4)
    assert f1["float_model"]["interval"][1] <= 1.0
