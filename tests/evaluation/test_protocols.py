"""Evaluation protocols against windows cut by hand."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from quantcli.calibration.datasets import load_texts
from quantcli.errors import DataError
from quantcli.evaluation.protocols import clean_wikitext, evaluation_windows

TEXTS = load_texts("builtin", split="test")[:12]
WIKITEXT = Path(__file__).parents[2].parent / "shared" / "data" / "wikitext-2"

ARTICLE = """ \n = Robert Boulter = \n \n Robert Boulter is an actor . He had a role ( in 2000 ) , in " The Bill " ; \
a two @-@ part episode at 9 @.@ 5 ° C . \n He 's known . \n \n = = Career = = \n \n In 2006 : N people ! \n"""
PARAGRAPHS = [
    'Robert Boulter is an actor. He had a role (in 2000), in "The Bill"; a two-part episode at 9.5°C.\nHe\'s known.',
    "In 2006: 1 people!\n",
]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<pad>", "<s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(TEXTS, trainer)
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)], pair=None)
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", bos_token="<s>", model_max_length=64)


def test_standard_scores_windows_of_the_text_tokenized_once(tokenizer: Any) -> None:
    ids = tokenizer("\n\n".join(TEXTS)).input_ids
    whole = evaluation_windows(TEXTS, tokenizer, "standard", 100, None)
    assert [token for window in whole.windows for token in window] == ids[: len(ids) // 100 * 100]
    assert {len(window) for window in whole.windows} == {100}
    assert whole.tokens == 99 * len(whole.windows)
    assert whole.masked_token is None
    some = evaluation_windows(TEXTS, tokenizer, "standard", 100, 3)
    assert some.windows == whole.windows[:3]
    assert some.tokens == 3 * 99
    assert f"the first 3 of {len(whole.windows)}" in some.description


def test_standard_keeps_a_short_window_only_if_it_is_the_only_one(tokenizer: Any) -> None:
    ids = tokenizer("A short text.").input_ids
    assert evaluation_windows(["A short text."], tokenizer, "standard", 1000, 5).windows == [ids]
    assert evaluation_windows(["A short text."], tokenizer, "standard", len(ids) - 1, 5).windows == [ids[:-1]]


def test_golden_stick_joins_cleaned_paragraphs_without_headings(tokenizer: Any) -> None:
    ids = [token for paragraph in PARAGRAPHS for token in tokenizer(paragraph).input_ids]
    assert ids.count(tokenizer.bos_token_id) == 2
    result = evaluation_windows([ARTICLE], tokenizer, "golden-stick", 11, None)
    assert result.windows == [ids[start : start + 10] for start in range(0, len(ids) - 9, 10)]
    assert result.tokens == 9 * len(result.windows)
    assert result.masked_token == tokenizer.pad_token_id == 0


def test_golden_stick_drops_a_short_window_even_if_it_is_the_only_one(tokenizer: Any) -> None:
    with pytest.raises(DataError, match="too few for a window of 999 by protocol golden-stick"):
        evaluation_windows([ARTICLE], tokenizer, "golden-stick", 1000, None)


@pytest.mark.parametrize("protocol", ["standard", "golden-stick"])
def test_no_text_is_refused(tokenizer: Any, protocol: Any) -> None:
    with pytest.raises(DataError, match="gives 0 tokens"):
        evaluation_windows([" \n"], tokenizer, protocol, 8, None)


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("the boys ' house", "the boys' house"),
        ("1 @,@ 000 well @-@ known", "1,000 well-known"),
        ("a [ b ] { c } ( d ( e )", "a [b] {c} (d ( e)"),
        ("he said ' no ' .", "he said 'no' ."),
        ("= = = Title = = =", "=== Title ==="),
        ("x . \n \n y", "x.\n\ny"),
    ],
)
def test_cleaning_rules(raw: str, clean: str) -> None:
    assert clean_wikitext(raw) == clean


@pytest.mark.skipif(not WIKITEXT.is_dir(), reason="no wikitext-2 beside the checkout")
@pytest.mark.parametrize(
    ("split", "digest"),
    [
        ("valid", "690623f8b014db8936214a63f29caee6503f4b9a21f0e883957c278868a9be34"),
        ("test", "f7a499621c56efe6af6dfcf0000730cb19f60063656a277e0dc881c165d6c397"),
    ],
)
def test_cleaning_equals_the_original_on_wikitext2(split: str, digest: str) -> None:
    # Digests of what Golden Stick's WikiText2Dataset._clean returns.
    text = (WIKITEXT / f"wiki.{split}.tokens").read_text(encoding="utf-8")
    assert hashlib.sha256(clean_wikitext(text).encode()).hexdigest() == digest
