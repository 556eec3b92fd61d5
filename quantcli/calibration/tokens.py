"""Calibration tokens: texts cut into the samples that the model is run on."""

from __future__ import annotations

import random
import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

from quantcli.errors import DataError

_SEPARATOR = "\n\n"
# Chinese, Japanese and Korean scripts write no spaces between words (Korean does, but its blocks are syllables).
_CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff\U00020000-\U0003134f"
_WORD = re.compile(rf"[{_CJK}]|[^\W{_CJK}]+")
_WORD_SAMPLE = 20_000  # characters

FEWEST_SAMPLES = 8
"""Below this number of samples the statistics depend on which samples they are."""

Packing = Literal["packed", "line"]


@dataclass(frozen=True)
class TokenSet:
    """Samples for calibration.

    Attributes:
        samples: token ids, one list a sample; of equal length when packed (a single short one apart).
        tokens: number of tokens in all samples.
        documents_used: number of documents that at least one sample holds a token of.
        tokens_per_word: how finely the tokenizer cuts this text; far above 2, the tokenizer does not suit its language.
        notes: what differs from what was asked, or makes the samples unfit, one sentence each.
    """

    samples: list[list[int]]
    tokens: int
    documents_used: int
    tokens_per_word: float
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Source:
    """Documents to draw samples from, alone or mixed with other sources.

    Attributes:
        name: how messages call the source, as the beginning of a sentence.
        texts: the documents.
        places: where each document stands, for messages; as many as texts, or none.
        packing: how documents become samples, as in tokenize.
        share: weight of the source among those of a mix; positive, on any scale.
        special: whether the tokenizer adds its special tokens; texts of conversations have them.
    """

    name: str
    texts: Sequence[str]
    packing: Packing
    places: Sequence[str] = ()
    share: float = 1.0
    special: bool = True


def draw(
    tokenizer: Any,
    sources: Sequence[Source],
    *,
    samples: int,
    sequence_length: int,
    seed: int,
    begin: Sequence[int] = (),
    evaluated_length: int | None = None,
) -> TokenSet:
    """`samples` samples from all sources together, in proportion to their shares, each source spread over the whole.

    A source gives ⌊samples · share / Σ share⌋ samples; those left over go to the largest fractions, the earlier source
    first. Each is drawn as by tokenize, with the same seed. A source with too little text gives what it has, and the
    others no more for it. `documents_used` is the sum over the sources, `tokens_per_word` the largest.

    Args:
        tokenizer: a transformers tokenizer.
        begin: as tokenize takes it.
        evaluated_length: tokens in a sequence that the model is to be measured on, if it is.

    Raises:
        DataError: a source holds no token.
    """
    drawn, notes = [], []
    for source, count in zip(sources, apportion([source.share for source in sources], samples), strict=True):
        if count == 0:
            notes.append(f"{source.name} gives none of the {samples} samples; raise its share or calibration.samples.")
            continue
        found = tokenize(
            tokenizer,
            source.texts,
            samples=count,
            sequence_length=sequence_length,
            packing=source.packing,
            seed=seed,
            places=source.places,
            name=source.name,
            begin=begin,
            special=source.special,
        )
        drawn.append(found)
        notes += found.notes
    chosen = _interleaved([found.samples for found in drawn])
    return TokenSet(
        samples=chosen,
        tokens=sum(found.tokens for found in drawn),
        documents_used=sum(found.documents_used for found in drawn),
        tokens_per_word=max(found.tokens_per_word for found in drawn),
        notes=(*notes, *_doubts(chosen, sequence_length, evaluated_length)),
    )


def tokenize(
    tokenizer: Any,
    texts: Sequence[str],
    *,
    samples: int,
    sequence_length: int,
    packing: Packing,
    seed: int,
    places: Sequence[str] = (),
    name: str = "The calibration text",
    begin: Sequence[int] = (),
    special: bool = True,
) -> TokenSet:
    """Samples of at most `sequence_length` tokens, cut from documents.

    packed: the documents are joined by blank lines, tokenized once with the special tokens that the tokenizer adds,
    and cut into windows without overlap, each of which starts with the tokens `begin`. With seed 0 the first `samples`
    windows are used; with another seed, a random choice of all windows, in text order. A text that fills no window
    gives one shorter sample.
    line: one sample a document, cut off at `sequence_length`; a seed other than 0 shuffles the documents first.
    Documents in which the tokenizer finds nothing but special tokens are passed over, and a note says where they stand.

    Args:
        tokenizer: a transformers tokenizer.
        places: where each text stands, for the notes; its number where there are none.
        name: what notes and errors call the texts.
        begin: what every text starts with where the model is served, a BOS token as a rule; it counts among the tokens
            of a packed sample.
        special: whether the tokenizer adds its special tokens.

    Raises:
        DataError: the texts hold no token (packed: fewer than two).
    """
    numbered = [(text, places[i] if places else f"text {i + 1}") for i, text in enumerate(texts) if text.strip()]
    if not numbered:
        raise DataError(f"{name} is empty.", "Choose a data set, field or file that holds text.")
    filled = [text for text, _ in numbered]
    empty: list[int] = []
    if packing == "line":
        chosen, documents_used, empty = _lines(tokenizer, filled, samples, sequence_length, seed, special)
        unit = "document" + "s" * (len(chosen) != 1)
    else:
        chosen, documents_used = _windows(tokenizer, filled, samples, sequence_length, seed, special, list(begin))
        unit = f"window{'s' * (len(chosen) != 1)} of {sequence_length} tokens"
    if not chosen:
        raise DataError(f"{name} is empty to this tokenizer.", "Choose a data set, field or file that holds text.")

    notes = []
    if empty:
        where = numbered[min(empty)][1] + (f" and {len(empty) - 1} more" if len(empty) > 1 else "")
        notes.append(f"Passed over, for giving no token but special ones: {where}; mend or remove it.")
    if packing == "packed" and len(chosen[0]) < sequence_length:
        notes.append(f"{name} fills no window of {sequence_length} tokens: its {len(chosen[0])} are one sample.")
    elif len(chosen) < samples:
        notes.append(f"{name} gives {len(chosen)} {unit}, fewer than the {samples} asked for.")
    return TokenSet(
        samples=chosen,
        tokens=sum(map(len, chosen)),
        documents_used=documents_used,
        tokens_per_word=tokens_per_word(tokenizer, _head(filled)),
        notes=tuple(notes),
    )


def apportion(shares: Sequence[float], total: int) -> list[int]:
    """`total` divided in proportion to positive shares, by largest remainder (Hamilton's method).

    ⌊total · share / Σ share⌋ each; what is left goes to the largest fractions, among equal ones to the first. In exact
    arithmetic, so that the parts add up to `total`.
    """
    exact = [Fraction(share) for share in shares]
    quotas = [total * share / sum(exact) for share in exact]
    counts = [int(quota) for quota in quotas]
    fractions = [count - quota for count, quota in zip(counts, quotas, strict=True)]
    for index in sorted(range(len(shares)), key=fractions.__getitem__)[: total - sum(counts)]:
        counts[index] += 1
    return counts


def tokens_per_word(tokenizer: Any, text: str) -> float:
    """Tokens over words in the first 20 000 characters; a word is a run of letters and digits, or one CJK character.

    0.0 for a text without words.
    """
    text = text[:_WORD_SAMPLE]
    words = len(_WORD.findall(text))
    return len(tokenizer(text, add_special_tokens=False, verbose=False).input_ids) / words if words else 0.0


# ---------------------------------------------------------------------------------------------------------------


def _windows(
    tokenizer: Any, texts: list[str], samples: int, length: int, seed: int, special: bool, begin: list[int]
) -> tuple[list[list[int]], int]:
    joined = _SEPARATOR.join(texts)
    if seed == 0:
        encoded = _encode_start(tokenizer, joined, samples * length, special)
    else:
        encoded = _encode(tokenizer, joined, special)
    ids: list[int] = encoded.input_ids
    origin = len(begin) if begin and ids[: len(begin)] == begin else 0  # each window gets a beginning of its own
    length = max(1, length - len(begin))
    count = (len(ids) - origin) // length
    if count == 0:
        chosen = [0] if len(ids) > origin + (not begin) else []
    elif seed == 0:
        chosen = list(range(min(samples, count)))
    else:
        chosen = sorted(random.Random(seed).sample(range(count), min(samples, count)))
    starts = [origin + window * length for window in chosen]

    document_starts = [0]
    for text in texts[:-1]:
        document_starts.append(document_starts[-1] + len(text) + len(_SEPARATOR))
    used: set[int] = set()
    for start in starts:
        first, last = _characters(encoded, start, min(start + length, len(ids)), len(joined))
        used.update(range(bisect_right(document_starts, first) - 1, bisect_right(document_starts, last)))
    return [begin + ids[start : start + length] for start in starts], len(used)


def _lines(
    tokenizer: Any, texts: list[str], samples: int, length: int, seed: int, special: bool
) -> tuple[list[list[int]], int, list[int]]:
    """The samples, the number of texts used, and those that gave no token."""
    idle = set(tokenizer.all_special_ids)
    order = list(range(len(texts)))
    if seed != 0:
        random.Random(seed).shuffle(order)
    chosen: list[list[int]] = []
    empty: list[int] = []
    for index in order:
        if len(chosen) == samples:
            break
        ids: list[int] = _encode_start(tokenizer, texts[index], length, special).input_ids
        if idle.issuperset(ids):
            empty.append(index)
        else:
            chosen.append(ids[:length])
    return chosen, len(chosen), empty


def _interleaved(parts: list[list[list[int]]]) -> list[list[int]]:
    """All samples in one order, each part in its own and spread evenly: sample i of n stands at (i + ½) / n."""
    keyed = [(Fraction(2 * i + 1, 2 * len(part)), sample) for part in parts for i, sample in enumerate(part)]
    return [sample for _, sample in sorted(keyed, key=lambda entry: entry[0])]


def _doubts(samples: list[list[int]], sequence_length: int, evaluated_length: int | None) -> list[str]:
    """What makes samples a poor ground for statistics, each with its remedy."""
    doubts = []
    if len(samples) < FEWEST_SAMPLES:
        doubts.append(
            f"Calibration with fewer than {FEWEST_SAMPLES} samples ({len(samples)} here) depends on their choice; "
            "10 to 50 are usual, so raise calibration.samples or give more text."
        )
    mean = sum(map(len, samples)) / len(samples)
    used, key = sequence_length, "calibration"
    if evaluated_length is not None and evaluated_length > used:
        used, key = evaluated_length, "evaluate.perplexity"
    if 4 * mean < used:
        doubts.append(
            f"The samples have {mean:.0f} tokens on average, less than a quarter of {key}.sequence_length ({used}): "
            "give longer texts, set calibration.packing: packed, or bring the two lengths together."
        )
    return doubts


def _encode(tokenizer: Any, text: str, special: bool = True) -> Any:
    """The tokenizer's encoding, with its usual special tokens or none; without its warning, for the text is cut
    afterwards."""
    return tokenizer(text, verbose=False, add_special_tokens=special)


def _encode_start(tokenizer: Any, text: str, needed: int, special: bool = True) -> Any:
    """An encoding whose first `needed` tokens are those of the whole text, found without encoding a long rest.

    Tokenizers with a pre-tokenizer cut the text into pieces from left to right and encode each alone, so a cut of the
    text at a line's end reaches only the last piece. The needed tokens must end some pieces before it; a tokenizer that
    treats the text as one piece, or tells no pieces, gets the whole text.
    """
    characters = max(8 * needed, 4096)
    while tokenizer.is_fast and 2 * characters < len(text):
        cut = text.rfind("\n", characters // 2, characters)
        if cut < 0:
            break
        encoded = _encode(tokenizer, text[:cut], special)
        pieces = encoded.word_ids()
        inner = [piece for piece in pieces[needed - 1 :] if piece is not None]
        if len(inner) > 1 and inner[-1] - inner[0] > 16:
            return encoded
        if len(pieces) > needed + 64:  # enough tokens, but too few pieces: it does not split the text
            break
        characters *= 4
    return _encode(tokenizer, text, special)


def _characters(encoded: Any, start: int, stop: int, length: int) -> tuple[int, int]:
    """First and last character of the tokens start..stop−1; by proportion if the tokenizer does not tell."""
    tokens = len(encoded.input_ids)
    if not encoded.is_fast:
        return start * length // tokens, stop * length // tokens - 1
    spans = (encoded.token_to_chars(token) for token in range(start, stop))
    first = next((span.start for span in spans if span is not None), 0)
    spans = (encoded.token_to_chars(token) for token in range(stop - 1, start - 1, -1))
    last = next((span.end - 1 for span in spans if span is not None), first)
    return first, max(first, last)


def _head(texts: list[str]) -> str:
    """The joined texts, as far as tokens_per_word looks."""
    head = ""
    for text in texts:
        if len(head) >= _WORD_SAMPLE:
            break
        head += text[:_WORD_SAMPLE] + _SEPARATOR
    return head
