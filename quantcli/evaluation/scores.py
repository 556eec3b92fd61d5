"""Perplexity with its uncertainty, and divergence and agreement of the quantized with the float model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import repeat

import torch
from torch import Tensor


@dataclass
class WindowScores:
    """Sums over the scored tokens of one window, in nats. kl = Σ p_float·(log p_float − log p_quantized)."""

    tokens: int = 0
    nll_float: float = 0.0
    nll_quantized: float = 0.0
    kl: float = 0.0
    agreements: int = 0

    def add(self, float_logits: Tensor, quantized_logits: Tensor | None, labels: Tensor, masked: int | None) -> None:
        """Score positions of one window: logits float32 [positions, vocabulary], labels [positions].

        Labels equal to `masked` are left out. Without quantized logits, only the float model is scored.
        """
        if masked is not None:
            keep = labels != masked
            float_logits, labels = float_logits[keep], labels[keep]
            quantized_logits = None if quantized_logits is None else quantized_logits[keep]
        logp = torch.log_softmax(float_logits, -1)
        self.tokens += len(labels)
        self.nll_float -= logp.gather(1, labels[:, None]).double().sum().item()
        if quantized_logits is None:
            return
        logq = torch.log_softmax(quantized_logits, -1)
        self.nll_quantized -= logq.gather(1, labels[:, None]).double().sum().item()
        self.agreements += int((logp.argmax(-1) == logq.argmax(-1)).sum().item())
        # in place: the two tables of log-probabilities are the largest tensors of an evaluation
        difference = logq.neg_().add_(logp)
        self.kl += logp.exp_().mul_(difference).sum(-1).double().sum().item()


Pieces = Callable[[int, int], Iterable[tuple[slice, Tensor]]]
"""(batch, sample) → (positions, logits float32 [1, positions, vocabulary]) over all of its positions but the last."""


def score_windows(
    batches: Sequence[Tensor], of_float: Pieces, of_quantized: Pieces | None, masked: int | None
) -> list[WindowScores]:
    """Scores of every sample of every batch of token ids [samples, tokens], in order. Both models' logits come in equal
    pieces, since those of a whole window are large. Without a quantized model there is one to score."""
    scores = []
    for index, batch in enumerate(batches):
        for sample in range(batch.shape[0]):
            window = WindowScores()
            others = repeat((slice(0), None)) if of_quantized is None else of_quantized(index, sample)
            for (positions, exact), (_, rounded) in zip(
                of_float(index, sample), others, strict=of_quantized is not None
            ):
                labels = batch[sample, 1:][positions].to(exact.device)
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
    """The outcome of an evaluation. `increase` is the relative increase of perplexity with its standard error, from
    differences on the same windows; kl_divergence in nats a token; agreement is the share of equal top tokens."""

    tokens: int
    windows: int
    float_model: Perplexity
    quantized: Perplexity | None = None
    increase: float | None = None
    increase_error: float | None = None
    kl_divergence: float | None = None
    kl_error: float | None = None
    agreement: float | None = None
    per_window: list[list[float]] = field(default_factory=list)


def summarize(windows: Sequence[WindowScores], quantized: bool) -> Scores:
    """Means over all scored tokens. Standard errors take windows as independent, since the tokens of one are not."""
    tokens = sum(w.tokens for w in windows)
    float_model = _perplexity([w.nll_float for w in windows], windows)
    rows = [[w.tokens, w.nll_float, w.nll_quantized, w.kl] for w in windows]
    if not quantized:
        return Scores(tokens, len(windows), float_model, per_window=rows)
    difference, difference_error = mean_and_error([w.nll_quantized - w.nll_float for w in windows], windows)
    kl, kl_error = mean_and_error([w.kl for w in windows], windows)
    ratio = _exp(difference)
    return Scores(
        tokens=tokens,
        windows=len(windows),
        float_model=float_model,
        quantized=_perplexity([w.nll_quantized for w in windows], windows),
        increase=ratio - 1,
        increase_error=ratio * difference_error,
        kl_divergence=kl,
        kl_error=kl_error,
        agreement=sum(w.agreements for w in windows) / tokens,
        per_window=rows,
    )


def mean_and_error(sums: Sequence[float], windows: Sequence[WindowScores]) -> tuple[float, float]:
    """Mean a token of per-window sums, and its standard error by the ratio estimator; NaN with a single window."""
    tokens = sum(w.tokens for w in windows)
    mean = math.fsum(sums) / tokens
    count = len(windows)
    if count < 2:
        return mean, math.nan
    residual = math.fsum((s - mean * w.tokens) ** 2 for s, w in zip(sums, windows, strict=True))
    return mean, math.sqrt(residual * count / (count - 1)) / tokens


def _perplexity(sums: Sequence[float], windows: Sequence[WindowScores]) -> Perplexity:
    mean, error = mean_and_error(sums, windows)
    return Perplexity(_exp(mean), _exp(mean) * error)


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
