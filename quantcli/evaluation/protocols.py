"""Which tokens a perplexity is measured on: the protocols by which a text becomes windows of tokens."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any, Literal

from quantcli.errors import DataError

Protocol = Literal["standard", "golden-stick", "lm-eval"]


@dataclass(frozen=True)
class EvaluationText:
    """Windows to score, and the protocol that made them.

    A window of n tokens whose first scored one is number f (from 0) gives n − f predictions; perplexity is exp of the
    mean negative log-likelihood over all.

    Attributes:
        protocol: name of the protocol.
        windows: token ids; each window is scored alone, from an empty context.
        tokens: predictions in all windows, masked ones included.
        masked_token: predictions of this token are left out of the mean; null means that none are.
        description: the protocol in one sentence, for reports.
        first: of each window the number of its first token that is scored; empty means 1 for all.
        batch: the mean is taken over batches of so many windows, each counting as one; null for over tokens.
        documents: of each window its document; empty where windows do not keep to documents.
        words, bytes: of each document, counted before it is tokenized; empty where windows do not keep to documents.
        begin: tokens before those of the text that each window, or each document, starts with.
    """

    protocol: str
    windows: list[list[int]]
    tokens: int
    masked_token: int | None
    description: str
    first: list[int] = field(default_factory=list)
    batch: int | None = None
    documents: list[int] = field(default_factory=list)
    words: list[int] = field(default_factory=list)
    bytes: list[int] = field(default_factory=list)
    begin: list[int] = field(default_factory=list)

    def digest(self) -> str:
        """SHA-256, in hexadecimal, of the tokens in all windows and of which of them are scored."""
        return sha256(json.dumps([self.windows, self.first, self.masked_token]).encode()).hexdigest()


def evaluation_windows(
    texts: Sequence[str],
    tokenizer: Any,
    protocol: Protocol,
    sequence_length: int,
    windows: int | None,
    *,
    stride: int | None = None,
    begin: Sequence[int] = (),
    batch: int = 1,
    wikitext: bool = False,
    table: bool = False,
) -> EvaluationText:
    """The text's tokens in windows, by one of three protocols: `_standard`, `_golden_stick`, `_lm_eval`.

    Args:
        tokenizer: a transformers tokenizer.
        windows: use at most so many, from the start; null for all.
        stride: of standard, the tokens from the start of a window to that of the next; null for `sequence_length`.
        begin: of standard, what every window starts with, a BOS token as a rule.
        batch: of golden-stick, the windows in a batch.
        wikitext: the text is wikitext, which lm-eval cuts into articles.
        table: the texts are the rows of a table, blank ones included: golden-stick takes them as they are, and of
            wikitext each is a line.

    Raises:
        DataError: the text gives no window.
    """
    filled = [text for text in texts if text.strip()]
    if protocol == "lm-eval":
        whole = ["".join(map(_line, texts))] if table and wikitext else filled
        return _lm_eval(whole, tokenizer, sequence_length, windows, wikitext)
    if protocol == "golden-stick":
        text = "\n\n".join(texts if table else filled)
        return _golden_stick(text, tokenizer, sequence_length, windows, batch, table)
    text = "\n\n".join(filled)
    return _standard(text, tokenizer, sequence_length, windows, stride, list(begin))


def _standard(
    text: str, tokenizer: Any, length: int, windows: int | None, stride: int | None, begin: list[int]
) -> EvaluationText:
    """The documents, joined by blank lines, are tokenized once with the special tokens that the tokenizer adds. A
    window of `length` tokens begins every `stride` tokens; one that would end behind the text is dropped, unless it is
    the only one. Each window is scored from its second token on, but no token that an earlier window scored. With
    `begin` a window is that and so many tokens fewer of the text, all of which it scores, but for those of an earlier
    one."""
    ids = tokenizer(text, verbose=False).input_ids if text else []
    origin = len(begin) if begin and ids[: len(begin)] == begin else 0
    own = max(1, length - len(begin))
    step = stride or own
    starts = list(range(origin, len(ids) - own + 1, step)) or [origin]
    cut = [begin + ids[start : start + own] for start in starts]
    lead = max(1, len(begin))
    if len(cut[0]) <= lead:
        raise _too_short(ids, length, "standard")
    kept = cut[:windows]
    first = [lead, *(max(lead, len(begin) + own - step) for _ in kept[1:])]
    apart = "without overlap" if step == own else f"every {step} tokens"
    scored = "behind the end of the one before it on"
    if step >= own:
        scored = "its second token on" if lead == 1 else "the first token of the text on"
    begun = f"; each starts with {' '.join(map(str, begin))}, as the tokenizer starts a text" if begin else ""
    return EvaluationText(
        protocol="standard",
        windows=kept,
        tokens=sum(len(window) - scored_from for window, scored_from in zip(kept, first, strict=True)),
        masked_token=None,
        description=(
            "Protocol standard: the text as it stands, tokenized once with the tokenizer's special tokens; windows of "
            f"{length} tokens {apart}{_limited(kept, len(cut))}{begun}; a last short window is dropped unless it is "
            f"the only one; each window is scored from {scored}, every prediction counts."
        ),
        first=[] if set(first) == {1} else first,
        begin=begin,
    )


def _golden_stick(
    text: str, tokenizer: Any, sequence_length: int, windows: int | None, batch: int, rows: bool
) -> EvaluationText:
    """As Golden Stick's wikitext2 evaluation does it. The text of a file is detokenized (clean_wikitext) and split at
    blank lines, headings (which start with "=") are dropped, each paragraph is tokenized alone with special tokens;
    rows of a table, joined by blank lines, are tokenized once as they are. The tokens are cut into windows of
    `sequence_length` − 1, a last short one is dropped, and so is a last short batch. Predictions of the tokenizer's pad
    token are masked. The mean is that of batches, each of which is the mean of its predictions."""
    length = sequence_length - 1
    paragraphs = [text] if rows else clean_wikitext(text).split("\n\n")
    ids: list[int] = []
    for paragraph in paragraphs:
        if paragraph.strip() and (rows or not paragraph.strip().startswith("=")):
            ids += tokenizer(paragraph, verbose=False).input_ids
    count = len(ids) // length if length > 1 else 0
    if not count:
        raise _too_short(ids, length, "golden-stick")
    used = count if windows is None else min(windows, count)
    if used < batch:
        raise DataError(
            f"Protocol golden-stick drops a short last batch, and {used} windows are fewer than a batch of {batch}.",
            "Choose a smaller batch_size, more windows or a longer text.",
        )
    kept = [ids[start : start + length] for start in range(0, used // batch * batch * length, length)]
    masked = tokenizer.pad_token_id
    unit = "rows joined by blank lines and tokenized once with special tokens"
    if not rows:
        unit = "paragraphs without headings, detokenized, each tokenized alone with special tokens, then joined"
    return EvaluationText(
        protocol="golden-stick",
        windows=kept,
        tokens=sum(len(window) - 1 for window in kept),
        masked_token=masked,
        description=(
            f"Protocol golden-stick: {unit}; windows of {length} tokens without overlap{_limited(kept, count)}; a last "
            f"short window{' and a last short batch are' if batch > 1 else ' is'} dropped; each window is scored from "
            "its second token on, "
            f"{'there is no pad token' if masked is None else 'predictions of the pad token are left out'}; the mean "
            f"over batches of {batch} of the mean of each."
        ),
        batch=batch,
    )


def _lm_eval(texts: Sequence[str], tokenizer: Any, length: int, windows: int | None, wikitext: bool) -> EvaluationText:
    """As lm-evaluation-harness's tasks of rolling log-likelihood. Each document (of wikitext each article,
    detokenized) is tokenized alone with the special tokens that the tokenizer adds. Every token is predicted, the first
    from the BOS token, or the EOS token if there is none: `length` tokens a window, of which each is fed the `length`
    tokens before it at most. Only a document's last window, which is short, sees tokens of the one before it. `windows`
    limits whole documents, of which one is always taken."""
    prefix = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if prefix is None:
        raise DataError("Protocol lm-eval begins documents with the BOS or the EOS token, and the tokenizer has none.",
                        "Use protocol: standard.")  # fmt: skip
    pages = [page for text in texts for page in wikitext_pages(text)] if wikitext else list(texts)
    cut: list[list[int]] = []
    first: list[int] = []
    documents: list[int] = []
    taken: list[str] = []
    for page in pages:
        ids = [prefix, *tokenizer(clean_wikitext(page) if wikitext else page, verbose=False).input_ids]
        ends = [min(begin + length, len(ids)) for begin in range(1, len(ids), length)]
        if windows is not None and cut and len(cut) + len(ends) > windows:
            break
        for begin, end in zip(range(1, len(ids), length), ends, strict=True):
            # fed: the `length` tokens before the last one predicted, with which it makes length + 1
            start = max(0, end - length - 1)
            cut.append(ids[start:end])
            first.append(begin - start)
            documents.append(len(taken))
        taken.append(page)
    if not cut:
        raise _too_short([], length, "lm-eval")
    limit = "" if len(taken) == len(pages) else f", the first {len(taken)} of {len(pages)}"
    return EvaluationText(
        protocol="lm-eval",
        windows=cut,
        tokens=sum(len(window) - begin for window, begin in zip(cut, first, strict=True)),
        masked_token=None,
        description=(
            f"Protocol lm-eval: {'articles, detokenized,' if wikitext else 'documents'} each tokenized alone with the "
            f"tokenizer's special tokens{limit}; every token predicted, the first from token {prefix}; windows of"
            f" {length} predictions without overlap, a document's last one with as much context as fits; "
            f"words and bytes are those of the {'articles as they stand' if wikitext else 'documents'}."
        ),
        first=first,
        documents=documents,
        words=[len(re.split(r"\s+", page)) for page in taken],
        bytes=[len(page.encode()) for page in taken],
        begin=[prefix],
    )


def _limited(kept: Sequence[object], count: int) -> str:
    return "" if len(kept) == count else f", the first {len(kept)} of {count}"


def _too_short(ids: Sequence[int], length: int, protocol: str) -> DataError:
    return DataError(
        f"The evaluation text gives {len(ids)} tokens, too few for a window of {length} by protocol {protocol}.",
        "Choose a longer text or a smaller sequence_length.",
    )


def _line(row: str) -> str:
    """The line of the wikitext file that a row of the hub's table was: the table has an empty row in the place of a
    line that is a space."""
    return row if row.endswith("\n") else f"{row or ' '}\n"


def wikitext_pages(text: str) -> list[str]:
    """The articles of a wikitext file, as the document-level wikitext sets cut them: an article begins at a line with a
    heading of the first level, "= Title =". What stands before the first is one too, if it is not blank."""
    pages: list[list[str]] = [[]]
    for line in text.split("\n"):
        closed = line.replace("= = =", "===").replace("= =", "==").strip()
        if closed.startswith("= ") and closed.endswith(" ="):
            pages.append([])
        pages[-1].append(line)
    joined = ("\n".join(lines) for lines in pages)
    return [page for page in joined if page.strip()]


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
