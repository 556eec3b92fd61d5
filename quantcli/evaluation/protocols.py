"""Which tokens a perplexity is measured on: the protocols by which a text becomes windows of tokens."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from quantcli.errors import DataError


@dataclass(frozen=True)
class EvaluationText:
    """Windows to score, and the protocol that made them.

    A window of n tokens gives n − 1 predictions; perplexity is exp of the mean negative log-likelihood over all.

    Attributes:
        protocol: name of the protocol.
        windows: token ids; each window is scored alone, from an empty context.
        tokens: predictions in all windows, masked ones included.
        masked_token: predictions of this token are left out of the mean; null means that none are.
        description: the protocol in one sentence, for reports.
    """

    protocol: str
    windows: list[list[int]]
    tokens: int
    masked_token: int | None
    description: str


def evaluation_windows(
    texts: Sequence[str],
    tokenizer: Any,
    protocol: Literal["standard", "golden-stick"],
    sequence_length: int,
    windows: int | None,
) -> EvaluationText:
    """The text's tokens in windows without overlap, by one of two protocols.

    standard: the documents are joined by blank lines and tokenized once with the special tokens that the tokenizer
    adds; windows of `sequence_length` tokens; a last short window is dropped, unless it is the only one.
    golden-stick: as Golden Stick's wikitext2 evaluation of a text file does it. The text is detokenized
    (clean_wikitext) and split at blank lines, headings (which start with "=") are dropped, each paragraph is tokenized
    alone with special tokens; the tokens are joined and cut into windows of `sequence_length` − 1, a last short one is
    dropped. Predictions of the tokenizer's pad token are masked. Golden Stick takes the mean over batches of each
    batch's mean; with windows of one length and none masked that is the mean over tokens.

    Args:
        tokenizer: a transformers tokenizer.
        windows: use at most so many, from the start; null for all.

    Raises:
        DataError: the text gives no window.
    """
    text = "\n\n".join(text for text in texts if text.strip())
    if protocol == "golden-stick":
        length = sequence_length - 1
        ids: list[int] = []
        for paragraph in clean_wikitext(text).split("\n\n"):
            if paragraph.strip() and not paragraph.strip().startswith("="):
                ids += tokenizer(paragraph, verbose=False).input_ids
        masked_token = tokenizer.pad_token_id
        unit = "paragraphs without headings, detokenized, each tokenized alone with special tokens, then joined"
        remainder = "a last short window is dropped"
        mask = "predictions of the pad token are left out" if masked_token is not None else "there is no pad token"
    else:
        length = sequence_length
        ids = tokenizer(text, verbose=False).input_ids if text else []
        masked_token = None
        unit = "the text as it stands, tokenized once with the tokenizer's special tokens"
        remainder = "a last short window is dropped unless it is the only one"
        mask = "every prediction counts"

    count = len(ids) // length if length > 1 else 0
    cut = [ids[start : start + length] for start in range(0, count * length, length)]
    if not cut and protocol != "golden-stick" and len(ids) > 1:
        cut = [ids]
    if not cut:
        raise DataError(
            f"The evaluation text gives {len(ids)} tokens, too few for a window of {length} by protocol {protocol}.",
            "Choose a longer text or a smaller sequence_length.",
        )
    if windows is not None:
        cut = cut[:windows]
    limit = "" if len(cut) == max(count, 1) else f", the first {len(cut)} of {count}"
    return EvaluationText(
        protocol=protocol,
        windows=cut,
        tokens=sum(len(window) - 1 for window in cut),
        masked_token=masked_token,
        description=(
            f"Protocol {protocol}: {unit}; windows of {length} tokens without overlap{limit}; {remainder}; "
            f"each window is scored from its second token on, {mask}."
        ),
    )


_SPACED = {"s '": "s'", " @-@ ": "-", " @,@ ": ",", " @.@ ": "."} | {f" {mark} ": f"{mark} " for mark in ":;.!?,"}
_PAIRED = (("(", ")"), ("[", "]"), ("{", "}"), ('"', '"'), ("'", "'"))
_REST = {
    "= = = =": "====",
    "= = =": "===",
    "= =": "==",
    " ° ": "°",
    " \n": "\n",
    "\n ": "\n",
    " N ": " 1 ",
    " 's": "'s",
}


def clean_wikitext(text: str) -> str:
    """Undoes wikitext's tokenization, by the rules that the field's wikitext evaluations share, in their order.

    Spaces before punctuation and inside brackets and quotes go, " @-@ " becomes "-", headings' "= =" close up. The
    rules run over the whole text: a quotation mark without partner shifts the pairs of all that follow it.
    """
    for old, new in _SPACED.items():
        text = text.replace(old, new)
    for opening, closing in _PAIRED:
        inside = rf"{re.escape(opening)}\s*([^{re.escape(closing)}]*?)\s*{re.escape(closing)}"
        text = re.sub(inside, lambda match, o=opening, c=closing: o + match[1] + c, text)  # type: ignore[misc]
    for old, new in _REST.items():
        text = text.replace(old, new)
    return text
