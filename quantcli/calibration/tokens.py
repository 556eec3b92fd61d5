"""Calibration tokens: texts cut into the samples that the model is run on."""

from __future__ import annotations

import random
import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from quantcli.errors import DataError

_SEPARATOR = "\n\n"
# Chinese, Japanese and Korean scripts write no spaces between words (Korean does, but its blocks are syllables).
_CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff\U00020000-\U0003134f"
_WORD = re.compile(rf"[{_CJK}]|[^\W{_CJK}]+")
_WORD_SAMPLE = 20_000  # characters


@dataclass(frozen=True)
class TokenSet:
    """Samples for calibration.

    Attributes:
        samples: token ids, one list a sample; of equal length when packed (a single short one apart).
        tokens: number of tokens in all samples.
        documents_used: number of documents that at least one sample holds a token of.
        tokens_per_word: how finely the tokenizer cuts this text; far above 2, the tokenizer does not suit its language.
        note: what differs from what was asked, as one sentence; empty if nothing does.
    """

    samples: list[list[int]]
    tokens: int
    documents_used: int
    tokens_per_word: float
    note: str


def tokenize(
    tokenizer: Any,
    texts: Sequence[str],
    *,
    samples: int,
    sequence_length: int,
    packing: Literal["packed", "line"],
    seed: int,
) -> TokenSet:
    """Samples of at most `sequence_length` tokens, cut from documents.

    packed: the documents are joined by blank lines, tokenized once with the special tokens that the tokenizer adds,
    and cut into windows without overlap. With seed 0 the first `samples` windows are used; with another seed, a random
    choice of all windows, in text order. A text that fills no window gives one shorter sample.
    line: one sample a document, cut off at `sequence_length`; a seed other than 0 shuffles the documents first.

    Args:
        tokenizer: a transformers tokenizer.

    Raises:
        DataError: the texts hold no token (packed: fewer than two).
    """
    filled = [text for text in texts if text.strip()]
    if not filled:
        raise DataError("The calibration text is empty.", "Choose a data set, field or file that holds text.")
    if packing == "line":
        chosen, documents_used = _lines(tokenizer, filled, samples, sequence_length, seed)
        unit = "documents"
    else:
        chosen, documents_used = _windows(tokenizer, filled, samples, sequence_length, seed)
        unit = f"windows of {sequence_length} tokens"
    if not chosen:
        raise DataError(
            "The calibration text is empty to this tokenizer.", "Choose a data set, field or file that holds text."
        )

    note = ""
    if packing == "packed" and len(chosen[0]) < sequence_length:
        note = f"The calibration text fills no window of {sequence_length} tokens: its {len(chosen[0])} are one sample."
    elif len(chosen) < samples:
        note = f"The calibration text gives {len(chosen)} {unit}, fewer than the {samples} asked for."
    return TokenSet(
        samples=chosen,
        tokens=sum(map(len, chosen)),
        documents_used=documents_used,
        tokens_per_word=tokens_per_word(tokenizer, _head(filled)),
        note=note,
    )


def tokens_per_word(tokenizer: Any, text: str) -> float:
    """Tokens over words in the first 20 000 characters; a word is a run of letters and digits, or one CJK character.

    0.0 for a text without words.
    """
    text = text[:_WORD_SAMPLE]
    words = len(_WORD.findall(text))
    return len(tokenizer(text, add_special_tokens=False, verbose=False).input_ids) / words if words else 0.0


# ---------------------------------------------------------------------------------------------------------------


def _windows(tokenizer: Any, texts: list[str], samples: int, length: int, seed: int) -> tuple[list[list[int]], int]:
    joined = _SEPARATOR.join(texts)
    encoded = _encode_start(tokenizer, joined, samples * length) if seed == 0 else _encode(tokenizer, joined)
    ids: list[int] = encoded.input_ids
    count = len(ids) // length
    if count == 0:
        starts = [0] if len(ids) > 1 else []
    elif seed == 0:
        starts = [window * length for window in range(min(samples, count))]
    else:
        chosen = random.Random(seed).sample(range(count), min(samples, count))
        starts = [window * length for window in sorted(chosen)]

    document_starts = [0]
    for text in texts[:-1]:
        document_starts.append(document_starts[-1] + len(text) + len(_SEPARATOR))
    used: set[int] = set()
    for start in starts:
        first, last = _characters(encoded, start, min(start + length, len(ids)), len(joined))
        used.update(range(bisect_right(document_starts, first) - 1, bisect_right(document_starts, last)))
    return [ids[start : start + length] for start in starts], len(used)


def _lines(tokenizer: Any, texts: list[str], samples: int, length: int, seed: int) -> tuple[list[list[int]], int]:
    order = list(range(len(texts)))
    if seed != 0:
        random.Random(seed).shuffle(order)
    chosen: list[list[int]] = []
    for index in order:
        if len(chosen) == samples:
            break
        ids = _encode_start(tokenizer, texts[index], length).input_ids[:length]
        if ids:
            chosen.append(ids)
    return chosen, len(chosen)


def _encode(tokenizer: Any, text: str) -> Any:
    """The tokenizer's encoding with its usual special tokens; without its warning, for the text is cut afterwards."""
    return tokenizer(text, verbose=False)


def _encode_start(tokenizer: Any, text: str, needed: int) -> Any:
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
        encoded = _encode(tokenizer, text[:cut])
        pieces = encoded.word_ids()
        inner = [piece for piece in pieces[needed - 1 :] if piece is not None]
        if len(inner) > 1 and inner[-1] - inner[0] > 16:
            return encoded
        if len(pieces) > needed + 64:  # enough tokens, but too few pieces: it does not split the text
            break
        characters *= 4
    return _encode(tokenizer, text)


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
