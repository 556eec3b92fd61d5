"""Samples: equal to windows of the tokens of the whole text, however little of it was tokenized."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast
from transformers.utils import logging

from quantcli.calibration.datasets import load_texts
from quantcli.calibration.tokens import (
    Packing,
    Source,
    TokenSet,
    _encode_start,
    apportion,
    draw,
    tokenize,
    tokens_per_word,
)
from quantcli.errors import DataError

TRAIN = load_texts("builtin")


def windows(ids: list[int], length: int) -> list[list[int]]:
    return [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)]


def unsplit_tokenizer() -> PreTrainedTokenizerFast:
    """A unigram tokenizer that takes the whole text as one piece, as converted SentencePiece tokenizers do."""
    core = Tokenizer(models.Unigram())
    core.normalizer = normalizers.Replace(" ", "▁")
    core.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
    trainer = trainers.UnigramTrainer(vocab_size=300, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False)
    core.train_from_iterator([document[:500] for document in TRAIN[:40]], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")


def test_packed_samples_are_the_first_windows_of_the_whole_text(tokenizer: Any) -> None:
    ids = tokenizer("\n\n".join(TRAIN)).input_ids
    result = tokenize(tokenizer, TRAIN, samples=7, sequence_length=50, packing="packed", seed=0)
    assert result.samples == windows(ids, 50)[:7]
    assert result.tokens == 350
    assert result.notes == ()
    assert ids[0] == tokenizer.bos_token_id


def test_one_document_is_tokenized_verbatim(tokenizer: Any, wikitext: Path) -> None:
    text = (wikitext / "wiki.valid.tokens").read_text(encoding="utf-8")[:200_000]
    result = tokenize(tokenizer, [text], samples=64, sequence_length=128, packing="packed", seed=0)
    assert result.samples == windows(tokenizer(text).input_ids, 128)[:64]


@pytest.mark.parametrize("needed", [1, 50, 3000, 20_000])
def test_a_start_encodes_to_the_same_tokens_as_the_whole_and_stays_short(tokenizer: Any, needed: int) -> None:
    text = "\n\n".join(TRAIN)
    whole = tokenizer(text).input_ids
    start = _encode_start(tokenizer, text, needed).input_ids
    assert start[:needed] == whole[:needed]
    assert len(start) < min(len(whole), 8 * needed + 4096)


def test_a_tokenizer_that_does_not_split_gets_the_whole_text() -> None:
    tokenizer = unsplit_tokenizer()
    text = "\n\n".join(TRAIN)[:40_000]
    assert _encode_start(tokenizer, text, 50).input_ids == tokenizer(text).input_ids


def test_text_without_line_ends_is_encoded_whole(tokenizer: Any) -> None:
    text = " ".join(TRAIN).replace("\n", " ")[:40_000]
    assert _encode_start(tokenizer, text, 50).input_ids == tokenizer(text).input_ids


def test_a_seed_chooses_distinct_windows_in_order_and_repeats(tokenizer: Any) -> None:
    texts = TRAIN[:10]
    every = windows(tokenizer("\n\n".join(texts)).input_ids, 32)
    draws = [tokenize(tokenizer, texts, samples=20, sequence_length=32, packing="packed", seed=s) for s in (3, 3, 4)]
    positions = [every.index(sample) for sample in draws[0].samples]
    assert positions == sorted(set(positions))
    assert len(positions) == 20
    assert draws[0] == draws[1]
    assert draws[0].samples != draws[2].samples
    everything = tokenize(tokenizer, texts, samples=10**6, sequence_length=32, packing="packed", seed=5)
    assert everything.samples == every
    assert "fewer than the 1000000" in everything.notes[0]


def test_documents_used_counts_those_that_samples_touch(tokenizer: Any) -> None:
    texts = ["alpha beta gamma delta " * 20, " ", "one two three four five " * 20, "never reached " * 20]
    first = len(tokenizer(texts[0]).input_ids)
    for tokens, expected in ((first // 2, 1), (first + 10, 2), (10**4, 3)):
        result = tokenize(tokenizer, texts, samples=1, sequence_length=tokens, packing="packed", seed=0)
        assert result.documents_used == expected


def test_a_tokenizer_without_offsets_gives_the_same_windows() -> None:
    tokenizer = ByT5Tokenizer()  # one token a byte, in Python
    assert not tokenizer.is_fast
    texts = ["a" * 500, "b" * 500, "c" * 500]
    ids = tokenizer("\n\n".join(texts)).input_ids
    result = tokenize(tokenizer, texts, samples=3, sequence_length=250, packing="packed", seed=0)
    assert result.samples == windows(ids, 250)[:3]
    assert result.documents_used == 2


def test_short_text_is_one_short_sample_and_said_so(tokenizer: Any) -> None:
    result = tokenize(tokenizer, ["Hello there"], samples=4, sequence_length=512, packing="packed", seed=0)
    assert result.samples == [tokenizer("Hello there").input_ids]
    said = f"The calibration text fills no window of 512 tokens: its {result.tokens} are one sample."
    assert result.notes == (said,)


def test_too_few_windows_are_said(tokenizer: Any) -> None:
    text = "word " * 100
    result = tokenize(tokenizer, [text], samples=1000, sequence_length=10, packing="packed", seed=0)
    expected = windows(tokenizer(text).input_ids, 10)
    assert result.samples == expected
    assert f"gives {len(expected)} windows of 10 tokens, fewer than the 1000" in result.notes[0]


@pytest.mark.parametrize("packing", ["packed", "line"])
def test_text_without_tokens_is_refused(tokenizer: Any, packing: Any) -> None:
    with pytest.raises(DataError, match="calibration text is empty"):
        tokenize(tokenizer, ["", " \n"], samples=1, sequence_length=8, packing=packing, seed=0)


def test_lines_are_truncated_documents_without_the_empty_ones(tokenizer: Any) -> None:
    texts = ["a short one", "", "a long one " * 3000, "another"]
    result = tokenize(tokenizer, texts, samples=8, sequence_length=16, packing="line", seed=0)
    assert result.samples == [tokenizer(text).input_ids[:16] for text in texts if text]
    assert result.documents_used == 3
    assert "gives 3 documents, fewer than the 8" in result.notes[0]
    shuffled = tokenize(tokenizer, texts, samples=8, sequence_length=16, packing="line", seed=2)
    assert sorted(shuffled.samples) == sorted(result.samples)
    orders = {
        str(tokenize(tokenizer, texts, samples=2, sequence_length=16, packing="line", seed=seed).samples)
        for seed in range(1, 9)
    }
    assert len(orders) > 1


def test_documents_of_special_tokens_alone_are_passed_over_and_named(tokenizer: Any) -> None:
    texts = ["one", "<s></s>", "", "two", "</s>"]
    places = [f"p.jsonl:{line}" for line in range(1, 6)]
    result = tokenize(tokenizer, texts, samples=2, sequence_length=9, packing="line", seed=0, places=places)
    assert result.samples == [tokenizer("one").input_ids[:9], tokenizer("two").input_ids[:9]]
    assert result.notes == ("Passed over, for giving no token but special ones: p.jsonl:2; mend or remove it.",)
    result = tokenize(tokenizer, texts, samples=3, sequence_length=9, packing="line", seed=0)
    assert "special ones: text 2 and 1 more; mend" in result.notes[0]
    assert "gives 2 documents, fewer than the 3" in result.notes[1]
    with pytest.raises(DataError, match="The file is empty to this tokenizer"):
        tokenize(tokenizer, ["<s>"], samples=1, sequence_length=9, packing="line", seed=0, name="The file")


# ---------------------------------------------------------------------------------------------------- mixes


@given(st.lists(st.floats(1e-300, 1e300), min_size=1, max_size=6), st.integers(1, 10**6))
def test_shares_are_met_within_one_sample_and_add_up(shares: list[float], total: int) -> None:
    counts = apportion(shares, total)
    assert sum(counts) == total
    whole = sum(map(Fraction, shares))
    assert all(abs(count - total * Fraction(share) / whole) < 1 for count, share in zip(counts, shares, strict=True))


def test_shares_by_largest_remainder() -> None:
    # Hamilton's method, by hand: quotas 4.7, 1.6, 1.5, 2.2 of 10 leave two seats, for .7 and .6.
    assert apportion([47, 16, 15, 22], 10) == [5, 2, 1, 2]
    assert apportion([0.3, 0.7], 10) == [3, 7]
    assert apportion([1, 1, 1], 4) == [2, 1, 1]
    assert apportion([95, 5], 4) == [4, 0]


def source(name: str, texts: list[str], packing: Packing, share: float = 1.0) -> Source:
    return Source(name, texts, packing, [f"{name}:{i + 1}" for i in range(len(texts))], share)


@pytest.mark.parametrize("seed", [0, 7])
def test_a_mix_holds_what_each_source_alone_gives_spread_evenly(tokenizer: Any, seed: int) -> None:
    prompts = [f"prompt number {i} of a list" for i in range(50)]
    sources = [source("a", TRAIN[:6], "packed", 3), source("b", prompts, "line", 1)]
    mixed = draw(tokenizer, sources, samples=16, sequence_length=24, seed=seed)
    alone = [
        tokenize(tokenizer, each.texts, samples=count, sequence_length=24, packing=each.packing, seed=seed)
        for each, count in zip(sources, (12, 4), strict=True)
    ]
    kinds = "".join("b" if sample in alone[1].samples else "a" for sample in mixed.samples)
    assert kinds in ("aabaaabaaabaaaba", "abaaabaaabaaabaa")  # of four in a row, one is of the smaller source
    assert [s for s, kind in zip(mixed.samples, kinds, strict=True) if kind == "a"] == alone[0].samples
    assert [s for s, kind in zip(mixed.samples, kinds, strict=True) if kind == "b"] == alone[1].samples
    assert mixed.tokens == sum(map(len, mixed.samples))
    assert mixed.documents_used == alone[0].documents_used + 4
    assert mixed.tokens_per_word == max(part.tokens_per_word for part in alone)
    assert draw(tokenizer, sources, samples=16, sequence_length=24, seed=seed) == mixed


def test_one_source_gives_what_tokenize_gives(tokenizer: Any) -> None:
    texts = TRAIN[:9]
    whole = tokenize(tokenizer, texts, samples=9, sequence_length=40, packing="packed", seed=3)
    assert draw(tokenizer, [source("x", texts, "packed", 0.2)], samples=9, sequence_length=40, seed=3) == whole


def test_a_source_with_too_little_text_gives_what_it_has_and_is_named(tokenizer: Any) -> None:
    sources = [source("Little", ["one", "two"], "line"), source("Much", TRAIN[:9], "packed")]
    mixed = draw(tokenizer, sources, samples=20, sequence_length=24, seed=0)
    assert len(mixed.samples) == 12
    assert mixed.notes == ("Little gives 2 documents, fewer than the 10 asked for.",)
    sources[0] = source("Little", ["one", "two"], "line", 0.001)
    mixed = draw(tokenizer, sources, samples=20, sequence_length=24, seed=0)
    assert mixed.notes == ("Little gives none of the 20 samples; raise its share or calibration.samples.",)
    with pytest.raises(DataError, match=r"Little is empty\."):
        draw(tokenizer, [source("Little", [" "], "line"), sources[1]], samples=4, sequence_length=24, seed=0)


# ---------------------------------------------------------------------------------------------------- doubts


def test_few_samples_are_doubted_with_the_remedy(tokenizer: Any) -> None:
    def drawn(samples: int) -> TokenSet:
        return draw(tokenizer, [source("x", TRAIN[:9], "packed")], samples=samples, sequence_length=24, seed=0)

    assert drawn(8).notes == ()
    (note,) = drawn(7).notes
    assert "fewer than 8 samples (7 here)" in note
    assert "raise calibration.samples" in note


def test_short_samples_are_doubted_against_the_longer_of_calibration_and_evaluation(tokenizer: Any) -> None:
    def notes(packing: Packing, sequence_length: int, evaluated: int | None) -> tuple[str, ...]:
        sources = [source("x", [text[:60] for text in TRAIN[:9]], packing)]
        return draw(
            tokenizer, sources, samples=8, sequence_length=sequence_length, seed=0, evaluated_length=evaluated
        ).notes

    mean = sum(len(tokenizer(text[:60]).input_ids) for text in TRAIN[:8]) / 8
    assert 16 < mean < 60
    assert notes("line", 64, None) == notes("line", 64, 64) == ()
    (note,) = notes("line", 256, None)
    assert f"have {mean:.0f} tokens on average" in note
    assert "a quarter of calibration.sequence_length (256)" in note
    (note,) = notes("line", 64, 1024)
    assert "a quarter of evaluate.perplexity.sequence_length (1024)" in note
    assert notes("packed", 16, 64) == ()
    assert "have 16 tokens" in notes("packed", 16, 65)[0]


def test_no_warning_about_length(tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    logging.set_verbosity_warning()  # other test files silence transformers
    assert tokenizer.model_max_length < 100
    tokenizer.deprecation_warnings.clear()
    tokenize(tokenizer, TRAIN[:3], samples=2, sequence_length=200, packing="packed", seed=0)
    assert "longer than" not in caplog.text
    tokenizer(TRAIN[0])  # the warning does come where nothing silences it
    assert "longer than" in caplog.text


def test_tokens_per_word_counts_runs_and_cjk_characters(tokenizer: Any) -> None:
    def tokens(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False).input_ids)

    assert tokens_per_word(tokenizer, "the quick, brown fox!") == tokens("the quick, brown fox!") / 4
    assert tokens_per_word(tokenizer, "模型量化 int8") == tokens("模型量化 int8") / 5
    assert tokens_per_word(tokenizer, "... !") == 0.0
    # Text in a script that the tokenizer never saw is cut finely.
    assert tokens_per_word(tokenizer, "модель квантуется без потерь") > 2 * tokens_per_word(tokenizer, TRAIN[0])
