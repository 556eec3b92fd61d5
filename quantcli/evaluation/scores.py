"""Perplexity with its uncertainty, and divergence and agreement of the quantized with the float model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import repeat
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quantcli.evaluation.protocols import EvaluationText

COLUMNS = ("nll_float", "nll_quantized", "kl", "delta_p", "same_top", "top5", "hit_float", "hit_quantized")
"""What is kept of every scored token: the two negative log-likelihoods, Σ p·(log p − log q) over the vocabulary, the
change of the probability of the token that stands there, whether both models have the same first choice, the share of
the float model's first five choices among the other's first five, and whether each model's first stands there."""

PERCENTILES = (0.0, 0.1, 1.0, 5.0, 10.0, 25.0, 50.0, 75.0, 90.0, 95.0, 99.0, 99.9, 100.0)

SCORED_BYTES = 8 << 20
"""Logits of a model in float32 that exist at a time on a CPU. They stay in its cache over the dozen passes that scores
make of them (measured: a third of the time that as many positions take at once as the head computes)."""

_FIRST, _GROUP = 5, 64
"""Choices of a model that are compared, and tokens whose largest is found before they are."""

_EXP_IS_SAFE = 60.0
"""Below it sums of exp, of vocabularies of any size, are far from the ends of float32."""

Z95 = 1.959964
"""Half the width of a 95 % interval of a normal distribution, in standard deviations."""


def t95(count: int) -> float:
    """Half the width of a 95 % interval of a mean of `count` values, in standard errors that are found from them:
    Student's t for count − 1 degrees of freedom, NaN for one value.

    Exact for 1 and 2 degrees; for more the expansion of Cornish and Fisher to ν⁻⁴ (Abramowitz and Stegun 26.7.5), which
    is 0.12 % too small for 3 and nearer for all above.
    """
    freedom, z = count - 1, Z95
    if freedom < 3:
        return (math.nan, 1 / math.tan(math.pi * 0.025), 0.95 * math.sqrt(2 / (1 - 0.95**2)))[max(0, freedom)]
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / freedom**power for power, term in enumerate(terms, start=1))


@dataclass
class WindowScores:
    """Sums over the scored tokens of one window, in nats. kl = Σ p_float·(log p_float − log p_quantized).

    `parts` holds COLUMNS of its tokens, float32 [tokens, 8] in pieces, if there is a quantized model.
    """

    tokens: int = 0
    nll_float: float = 0.0
    nll_quantized: float = 0.0
    kl: float = 0.0
    agreements: int = 0
    parts: list[Tensor] = field(default_factory=list)

    def add(self, float_logits: Tensor, quantized_logits: Tensor | None, labels: Tensor, masked: int | None) -> None:
        """Score positions of one window: logits [positions, vocabulary], labels [positions]; scores in float32.

        Labels equal to `masked` are left out. Without quantized logits, only the float model is scored.
        """
        rows = max(1, SCORED_BYTES // (4 * float_logits.shape[-1])) if labels.device.type == "cpu" else len(labels)
        for begin in range(0, len(labels), rows):
            part = slice(begin, begin + rows)
            rounded = None if quantized_logits is None else quantized_logits[part]
            columns = _scored(float_logits[part], rounded, labels[part], masked)
            self.tokens += len(columns)
            # column by column, so that a model's sum is the same whether another is scored beside it
            totals = [column.contiguous().sum().item() for column in columns.unbind(1)]
            sums = dict(zip(COLUMNS, totals, strict=False))
            self.nll_float += sums["nll_float"]
            if quantized_logits is not None:
                self.nll_quantized += sums["nll_quantized"]
                self.kl += sums["kl"]
                self.agreements += int(sums["same_top"])
                self.parts.append(columns.float().cpu())


def _scored(float_logits: Tensor, quantized_logits: Tensor | None, labels: Tensor, masked: int | None) -> Tensor:
    """COLUMNS of the positions that are not masked, float64 [positions, 8]; only the first if no model is quantized."""
    if masked is not None:
        keep = labels != masked
        float_logits, labels = float_logits[keep], labels[keep]
        quantized_logits = None if quantized_logits is None else quantized_logits[keep]
    exact = _Rows.of(float_logits)
    label_p = exact.log_probabilities(labels)
    if quantized_logits is None:
        return -label_p[:, None]
    rounded = _Rows.of(quantized_logits)
    label_q = rounded.log_probabilities(labels)
    shared = (exact.five[:, :, None] == rounded.five[:, None, :]).any(-1).double().mean(-1)
    # Σ p·(log p − log q) = Σ p·(a − b) − (log Σ exp a − log Σ exp b), in the place of tables that are done with
    difference = torch.sub(exact.logits, rounded.logits, out=rounded.exponentials)
    kl = exact.exponentials.mul_(difference).sum(-1).double() / exact.sums - (exact.log_sums - rounded.log_sums)
    columns = (-label_p, -label_q, kl, label_q.exp() - label_p.exp(), exact.first == rounded.first, shared,
               exact.first == labels, rounded.first == labels)  # fmt: skip
    return torch.stack([column.double() for column in columns], 1)


@dataclass
class _Rows:
    """What is needed of a model's logits [positions, vocabulary], in as few passes over them as can be: float32, exp of
    them over exp(shift) of each row, the sums of those and the logarithms of the sums of exp in float64 [positions],
    and `_choices`."""

    logits: Tensor
    exponentials: Tensor
    sums: Tensor
    log_sums: Tensor
    first: Tensor
    five: Tensor

    @staticmethod
    def of(logits: Tensor) -> _Rows:
        logits = logits.float()
        largest, first, five = _choices(logits)
        if bool((largest.abs() < _EXP_IS_SAFE).all()):
            exponentials, shift = torch.exp(logits), torch.zeros_like(largest)
        else:
            exponentials, shift = torch.sub(logits, largest).exp_(), largest
        sums = exponentials.sum(-1).double()
        return _Rows(logits, exponentials, sums, sums.log() + shift[:, 0].double(), first, five)

    def log_probabilities(self, tokens: Tensor) -> Tensor:
        """Of one token a row, [positions] float64."""
        return self.logits.gather(1, tokens[:, None])[:, 0].double() - self.log_sums


def _choices(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The largest of each row [rows, 1], the token of it, of equal ones the first, and the five largest, in no order.

    They lie in the five groups of tokens with the largest maxima: one pass over the vocabulary, a quarter of the time
    of `max` and `topk`. Of equal tokens in the fifth place any may be taken.
    """
    rows, vocabulary = logits.shape
    groups = vocabulary // _GROUP
    if groups <= _FIRST:
        largest, first = logits.max(-1, keepdim=True)
        return largest, first[:, 0], logits.topk(min(_FIRST, vocabulary)).indices
    maxima = logits[:, : groups * _GROUP].view(rows, groups, _GROUP).amax(-1)
    best = maxima.topk(_FIRST).indices
    within = torch.arange(_GROUP, device=logits.device)
    rest = torch.arange(groups * _GROUP, vocabulary, device=logits.device).expand(rows, -1)
    places = torch.cat([(best[:, :, None] * _GROUP + within).flatten(1), rest], 1)
    values = logits.gather(1, places)
    largest = values.amax(-1, keepdim=True)
    first = places.masked_fill(values != largest, vocabulary).amin(-1)
    return largest, first, places.gather(1, values.topk(_FIRST).indices)


Pieces = Callable[[int, int, int], Iterable[tuple[slice, Tensor]]]
"""(batch, sample, first) → (positions, logits [1, positions, vocabulary]) over its positions from that before
token `first` to the last but one, counted from there."""


def score_windows(
    batches: Sequence[Tensor],
    of_float: Pieces,
    of_quantized: Pieces | None,
    masked: int | None,
    first: Sequence[int] = (),
) -> list[WindowScores]:
    """Scores of every sample of every batch of token ids [samples, tokens], in order. Both models' logits come in equal
    pieces, since those of a whole window are large. Without a quantized model there is one to score. `first` is the
    number of the first token of each sample that is scored, 1 where it is not given."""
    scores: list[WindowScores] = []
    for index, batch in enumerate(batches):
        for sample in range(batch.shape[0]):
            begin = first[len(scores)] if first else 1
            window = WindowScores()
            others = repeat((slice(0), None)) if of_quantized is None else of_quantized(index, sample, begin)
            for (positions, exact), (_, rounded) in zip(
                of_float(index, sample, begin), others, strict=of_quantized is not None
            ):
                labels = batch[sample, begin:][positions].to(exact.device)
                window.add(exact[0], None if rounded is None else rounded[0], labels, masked)
            scores.append(window)
    return scores


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log-likelihood, and the standard error of the mean carried over: ppl · se."""

    value: float
    error: float


@dataclass(frozen=True)
class Scores:
    """The outcome of an evaluation. `increase` is the relative increase of perplexity with its standard error and 95 %
    interval, from differences on the same windows; kl_divergence in nats a token; agreement is the share of equal top
    tokens, top5_agreement the mean share of the five most probable tokens that both models have in common. `kl`,
    `delta_p` and `flips` are `distributions` of tokens."""

    tokens: int
    windows: int
    float_model: Perplexity
    quantized: Perplexity | None = None
    increase: float | None = None
    increase_error: float | None = None
    increase_interval: list[float] | None = None
    kl_divergence: float | None = None
    kl_error: float | None = None
    agreement: float | None = None
    agreement_error: float | None = None
    top5_agreement: float | None = None
    top5_error: float | None = None
    kl: dict[str, float] | None = None
    delta_p: dict[str, float] | None = None
    flips: dict[str, float] | None = None
    nll_correlation: float | None = None
    per_window: list[list[float]] = field(default_factory=list)


def summarize(windows: Sequence[WindowScores], quantized: bool, batch: int | None = None) -> Scores:
    """Means over all scored tokens. Standard errors take windows as independent, since the tokens of one are not.

    With `batch`, which divides the windows, perplexities and their increase are of the mean over batches of so many,
    where each batch counts as one, whatever predictions of it are left out.
    """
    tokens = sum(w.tokens for w in windows)
    units = windows if batch is None else _batches(windows, batch)
    float_model = _perplexity([w.nll_float for w in units], units)
    rows = [[w.tokens, w.nll_float, w.nll_quantized, w.kl] for w in windows]
    if not quantized:
        return Scores(tokens, len(windows), float_model, per_window=rows)
    difference, difference_error = mean_and_error([w.nll_quantized - w.nll_float for w in units], units)
    kl, kl_error = mean_and_error([w.kl for w in windows], windows)
    ratio = _exp(difference)
    agreement, agreement_error = mean_and_error([w.agreements for w in windows], windows)
    shared = [float(torch.cat(w.parts)[:, COLUMNS.index("top5")].sum()) if w.parts else 0.0 for w in windows]
    top5, top5_error = mean_and_error(shared, windows)
    return Scores(
        tokens=tokens,
        windows=len(windows),
        float_model=float_model,
        quantized=_perplexity([w.nll_quantized for w in units], units),
        increase=ratio - 1,
        increase_error=ratio * difference_error,
        increase_interval=[_exp(difference + side * t95(len(units)) * difference_error) - 1 for side in (-1, 1)],
        kl_divergence=kl,
        kl_error=kl_error,
        agreement=agreement,
        agreement_error=agreement_error,
        top5_agreement=top5,
        top5_error=top5_error,
        per_window=rows,
    )


def per_token(windows: Sequence[WindowScores]) -> Tensor:
    """COLUMNS of every scored token of the windows, in order: float32 [tokens, 8]."""
    return torch.cat([part for window in windows for part in window.parts])


def with_distributions(scores: Scores, windows: Sequence[WindowScores]) -> Scores:
    """The scores with what is distributed over tokens, as llama.cpp's perplexity tool reports it.

    kl and delta_p: mean and PERCENTILES ("50" is the median, between tokens by linear interpolation); delta_p, the
    change of the probability of the token that stands in the text, also its root mean square `rms`. flips: shares of
    tokens where the first choice was right and is wrong (`lost`), or the other way (`gained`). nll_correlation:
    Pearson's, between both models' negative log-likelihoods.
    """
    columns = dict(zip(COLUMNS, per_token(windows).double().unbind(1), strict=True))
    was, now = columns["hit_float"].bool(), columns["hit_quantized"].bool()
    change, change_error = mean_and_error([float(_column(w, "delta_p").sum()) for w in windows], windows)
    both = torch.stack([columns["nll_float"], columns["nll_quantized"]])
    return replace(
        scores,
        kl={"mean": scores.kl_divergence or 0.0} | _percentiles(columns["kl"]),
        delta_p={
            "mean": change,
            "error": change_error,
            "rms": float(columns["delta_p"].square().mean().sqrt()),
        }
        | _percentiles(columns["delta_p"]),
        flips={"lost": float((was & ~now).double().mean()), "gained": float((now & ~was).double().mean())},
        nll_correlation=float(torch.corrcoef(both)[0, 1]),
    )


def _column(window: WindowScores, name: str) -> Tensor:
    return torch.cat(window.parts)[:, COLUMNS.index(name)].double()


def _percentiles(values: Tensor) -> dict[str, float]:
    found = np.percentile(values.numpy(), PERCENTILES)
    return {f"{percent:g}": float(value) for percent, value in zip(PERCENTILES, found, strict=True)}


def text_scores(windows: Sequence[WindowScores], text: EvaluationText, quantized: bool) -> dict[str, Any] | None:
    """word_perplexity, byte_perplexity and bits_per_byte as lm-evaluation-harness has them, of both models with errors.

    exp(Σ nll / Σ words), the same of bytes, and Σ nll / (Σ bytes · ln 2), over documents; errors are those of the ratio
    with documents as the sample. None for a text whose windows do not keep to documents.
    """
    if not text.documents:
        return None
    found: dict[str, Any] = {"word_perplexity": {}, "byte_perplexity": {}, "bits_per_byte": {}}
    models = {"float_model": [w.nll_float for w in windows]}
    if quantized:
        models["quantized"] = [w.nll_quantized for w in windows]
    for name, sums in models.items():
        nll = [0.0] * len(text.words)
        for document, value in zip(text.documents, sums, strict=True):
            nll[document] += value
        for unit, sizes in (("word", text.words), ("byte", text.bytes)):
            mean, error = ratio_and_error(nll, sizes)
            found[f"{unit}_perplexity"][name] = asdict(Perplexity(_exp(mean), _exp(mean) * error))
        found["bits_per_byte"][name] = asdict(Perplexity(mean / math.log(2), error / math.log(2)))
    return found


def mean_and_error(sums: Sequence[float], windows: Sequence[WindowScores]) -> tuple[float, float]:
    """Mean a token of per-window sums, and its standard error by the ratio estimator; NaN with a single window."""
    return ratio_and_error(sums, [w.tokens for w in windows])


def ratio_and_error(sums: Sequence[float], sizes: Sequence[int]) -> tuple[float, float]:
    """Σ sums / Σ sizes over a sample of pairs, and its standard error to first order; NaN for a sample of one."""
    total, count = sum(sizes), len(sums)
    mean = math.fsum(sums) / total
    if count < 2:
        return mean, math.nan
    residual = math.fsum((s - mean * size) ** 2 for s, size in zip(sums, sizes, strict=True))
    return mean, math.sqrt(residual * count / (count - 1)) / total


def _batches(windows: Sequence[WindowScores], size: int) -> list[WindowScores]:
    """Batches of windows as windows of one token, whose negative log-likelihood is the batch's mean."""
    found = []
    for begin in range(0, len(windows), size):
        part = windows[begin : begin + size]
        count = max(1, sum(w.tokens for w in part))
        sums = (sum(w.nll_float for w in part) / count, sum(w.nll_quantized for w in part) / count)
        found.append(WindowScores(1, *sums))
    return found


def _perplexity(sums: Sequence[float], windows: Sequence[WindowScores]) -> Perplexity:
    mean, error = mean_and_error(sums, windows)
    return Perplexity(_exp(mean), _exp(mean) * error)


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
