"""Scores against a direct float64 computation on whole logits, and the float perplexity against a plain loop."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import transformers
from tiny_exports import SCHEMES, export_tiny
from tiny_models import token_batches
from torch import Tensor

from quantcli.evaluation import scores as scores_module
from quantcli.evaluation.scores import (
    PERCENTILES,
    Z95,
    Scores,
    WindowScores,
    mean_and_error,
    summarize,
    t95,
    with_distributions,
)
from quantcli.model.skeleton import Skeleton
from quantcli.model.stream import BlockStream

VOCABULARY = 37


def some_windows(lengths: list[int], seed: int = 0) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(float logits, quantized logits, labels) of windows of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    windows = []
    for length in lengths:
        plain = torch.randn(length, VOCABULARY, generator=generator) * 3
        quantized = plain + torch.randn(length, VOCABULARY, generator=generator) * 0.4
        windows.append((plain, quantized, torch.randint(0, VOCABULARY, (length,), generator=generator)))
    return windows


def score(windows: list[tuple[Tensor, Tensor, Tensor]], masked: int | None = None, step: int = 10**9) -> Scores:
    scores = []
    for plain, quantized, labels in windows:
        window = WindowScores()
        for begin in range(0, len(labels), step):
            part = slice(begin, begin + step)
            window.add(plain[part].clone(), quantized[part].clone(), labels[part], masked)
        scores.append(window)
    return summarize(scores, quantized=True)


def reference(windows: list[tuple[Tensor, Tensor, Tensor]], masked: int | None = None) -> dict[str, float]:
    """The same from definitions: in float64, a token at a time; standard errors of ratio estimators over windows."""
    sums = []
    for plain, quantized, labels in windows:
        total = {"tokens": 0, "p": 0.0, "q": 0.0, "kl": 0.0, "same": 0}
        for a, b, label in zip(plain.double(), quantized.double(), labels.tolist(), strict=True):
            if label == masked:
                continue
            p, q = a.softmax(0), b.softmax(0)
            total["tokens"] += 1
            total["p"] -= math.log(p[label])
            total["q"] -= math.log(q[label])
            total["kl"] += sum(x * math.log(x / y) for x, y in zip(p.tolist(), q.tolist(), strict=True))
            total["same"] += int(p.argmax() == q.argmax())
        sums.append(total)
    tokens = sum(t["tokens"] for t in sums)

    def mean_error(values: list[float]) -> tuple[float, float]:
        mean, count = sum(values) / tokens, len(values)
        residuals = [(v - mean * t["tokens"]) * count / tokens for v, t in zip(values, sums, strict=True)]
        return mean, math.sqrt(sum(r * r for r in residuals) / (count - 1) / count)

    float_mean, float_error = mean_error([t["p"] for t in sums])
    quantized_mean, quantized_error = mean_error([t["q"] for t in sums])
    difference, difference_error = mean_error([t["q"] - t["p"] for t in sums])
    kl, kl_error = mean_error([t["kl"] for t in sums])
    return {
        "tokens": tokens,
        "float": math.exp(float_mean),
        "float error": math.exp(float_mean) * float_error,
        "quantized": math.exp(quantized_mean),
        "quantized error": math.exp(quantized_mean) * quantized_error,
        "increase": math.exp(quantized_mean) / math.exp(float_mean) - 1,
        "increase error": math.exp(difference) * difference_error,
        "kl": kl,
        "kl error": kl_error,
        "agreement": sum(t["same"] for t in sums) / tokens,
    }


def as_dictionary(scores: Scores) -> dict[str, float | None]:
    assert scores.quantized is not None
    return {
        "tokens": scores.tokens,
        "float": scores.float_model.value,
        "float error": scores.float_model.error,
        "quantized": scores.quantized.value,
        "quantized error": scores.quantized.error,
        "increase": scores.increase,
        "increase error": scores.increase_error,
        "kl": scores.kl_divergence,
        "kl error": scores.kl_error,
        "agreement": scores.agreement,
    }


@pytest.mark.parametrize("masked", [None, 5])
@pytest.mark.parametrize("lengths", [[20] * 6, [20, 20, 20, 7], [31, 12, 5]])
def test_against_definitions_in_float64(lengths: list[int], masked: int | None) -> None:
    windows = some_windows(lengths)
    assert as_dictionary(score(windows, masked)) == pytest.approx(reference(windows, masked), rel=1e-5)


def percentile(values: list[float], percent: float) -> float:
    """Between the two values that stand around it in order, linearly."""
    ordered = sorted(values)
    place = percent / 100 * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


@pytest.mark.parametrize("masked", [None, 5])
def test_distributions_over_tokens_against_definitions_in_float64(masked: int | None) -> None:
    windows = some_windows([31, 12, 45])
    for plain, quantized, labels in windows:  # hits, which a random label is not
        labels[::3], labels[1::3] = plain[::3].argmax(-1), quantized[1::3].argmax(-1)
    scores = []
    kl, change, shared, nll = [], [], [], []
    lost = gained = 0
    for plain, quantized, labels in windows:
        scores.append(WindowScores())
        scores[-1].add(plain.clone(), quantized.clone(), labels, masked)
        for a, b, label in zip(plain.double(), quantized.double(), labels.tolist(), strict=True):
            if label == masked:
                continue
            p, q = a.softmax(0).tolist(), b.softmax(0).tolist()
            kl.append(sum(x * math.log(x / y) for x, y in zip(p, q, strict=True)))
            change.append(q[label] - p[label])
            nll.append((-math.log(p[label]), -math.log(q[label])))
            order = [sorted(range(VOCABULARY), key=lambda i, of=of: -of[i]) for of in (p, q)]
            shared.append(len(set(order[0][:5]) & set(order[1][:5])) / 5)
            lost += order[0][0] == label != order[1][0]
            gained += order[1][0] == label != order[0][0]
    found = with_distributions(summarize(scores, quantized=True), scores)
    count = len(kl)
    assert found.top5_agreement == pytest.approx(sum(shared) / count, rel=1e-6)
    assert found.flips == pytest.approx({"lost": lost / count, "gained": gained / count})
    assert lost
    assert gained
    assert found.kl is not None
    assert found.delta_p is not None
    for percent in PERCENTILES:
        assert found.kl[f"{percent:g}"] == pytest.approx(percentile(kl, percent), rel=1e-4, abs=1e-6)
        assert found.delta_p[f"{percent:g}"] == pytest.approx(percentile(change, percent), rel=1e-4, abs=1e-6)
    assert found.kl["mean"] == pytest.approx(sum(kl) / count, rel=1e-5)
    assert found.delta_p["mean"] == pytest.approx(sum(change) / count, rel=1e-4)
    assert found.delta_p["rms"] == pytest.approx(math.sqrt(sum(x * x for x in change) / count), rel=1e-5)
    means = [sum(pair[i] for pair in nll) / count for i in (0, 1)]
    products = [[sum((n[i] - means[i]) * (n[j] - means[j]) for n in nll) for j in (0, 1)] for i in (0, 1)]
    expected = products[0][1] / math.sqrt(products[0][0] * products[1][1])
    assert found.nll_correlation == pytest.approx(expected, rel=1e-5)
    assert found.increase_interval is not None
    assert found.increase is not None
    assert found.increase_interval[0] < found.increase < found.increase_interval[1]
    assert found.increase_error is not None
    half = math.log1p(found.increase_interval[1]) - math.log1p(found.increase)
    assert half == pytest.approx(t95(found.windows) * found.increase_error / (1 + found.increase))


def test_masked_labels_count_nowhere() -> None:
    windows = some_windows([40, 40, 40])
    kept = [(plain[labels != 5], quantized[labels != 5], labels[labels != 5]) for plain, quantized, labels in windows]
    assert any(len(labels) < 40 for _, _, labels in kept)
    assert as_dictionary(score(windows, 5)) == as_dictionary(score(kept))


@pytest.mark.parametrize("step", [1, 7, 16])
def test_logits_in_pieces_give_what_the_whole_gives(step: int) -> None:
    windows = some_windows([40, 23])
    assert as_dictionary(score(windows, 3, step)) == pytest.approx(as_dictionary(score(windows, 3)), rel=1e-7)


@pytest.mark.parametrize("offset", [100.0, -100.0, 1000.0])
def test_logits_far_from_zero_give_the_same_scores(offset: float) -> None:
    windows = some_windows([40, 23])
    moved = [(plain.double() + offset, quantized.double() + offset, labels) for plain, quantized, labels in windows]
    near = as_dictionary(score(windows))
    far = as_dictionary(score([(a.float(), b.float(), labels) for a, b, labels in moved]))
    assert far == pytest.approx(near, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_so_do_the_parts_that_are_scored_at_a_time(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    windows = [(plain.to(dtype), quantized.to(dtype), labels) for plain, quantized, labels in some_windows([40, 23])]
    whole = as_dictionary(score(windows, 3))
    exact = [(plain.float(), quantized.float(), labels) for plain, quantized, labels in windows]
    assert as_dictionary(score(exact, 3)) == whole
    for rows in (1, 6):
        monkeypatch.setattr(scores_module, "SCORED_BYTES", 4 * VOCABULARY * rows)
        assert as_dictionary(score(windows, 3)) == pytest.approx(whole, rel=1e-7)


@pytest.mark.parametrize("vocabulary", [3, 64 * 5, 64 * 6, 1000])
def test_choices_are_those_of_the_whole_vocabulary(vocabulary: int) -> None:
    generator = torch.Generator().manual_seed(0)
    logp = torch.rand(200, vocabulary, generator=generator)
    largest, first, five = scores_module._choices(logp)
    assert torch.equal(largest[:, 0], logp.amax(-1))
    assert torch.equal(first, logp.argmax(-1))
    assert torch.equal(five.sort(-1).values, logp.topk(min(5, vocabulary)).indices.sort(-1).values)
    logp[:, [2, vocabulary // 2, vocabulary - 1]] = 2.0  # equal ones
    assert torch.equal(scores_module._choices(logp)[1], torch.full((200,), min(2, vocabulary // 2)))


def test_one_window_has_no_error() -> None:
    scores = score(some_windows([40]))
    assert math.isfinite(scores.float_model.value)
    assert math.isnan(scores.float_model.error)
    assert math.isnan(scores.increase_error or 0.0)
    assert math.isnan(scores.kl_error or 0.0)


def test_windows_scored_alike_have_no_uncertainty() -> None:
    windows = [WindowScores(tokens=n, nll_float=2.0 * n) for n in (10, 20, 30)]
    assert mean_and_error([w.nll_float for w in windows], windows) == (2.0, 0.0)


def test_equal_models_diverge_by_nothing() -> None:
    scores = score([(plain, plain, labels) for plain, _, labels in some_windows([20, 20])])
    assert scores.increase == 0.0
    assert scores.kl_divergence == 0.0
    assert scores.agreement == 1.0


def test_large_logits_and_hopeless_models_stay_defined() -> None:
    """Logits in the thousands must not overflow; a perplexity beyond float64 is infinite and not an exception."""
    plain = torch.zeros(4, VOCABULARY)
    quantized = torch.full((4, VOCABULARY), 5000.0)
    labels = torch.arange(4)
    quantized[torch.arange(4), labels] = 0.0
    scores = score([(plain, quantized, labels)] * 2)
    assert scores.quantized is not None
    assert scores.quantized.value == math.inf
    assert scores.kl_divergence == pytest.approx(5000 / VOCABULARY - math.log(VOCABULARY / (VOCABULARY - 1)), rel=1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_streamed_float_perplexity_is_that_of_a_plain_loop(family: str, tmp_path: Path) -> None:
    made = export_tiny(tmp_path, SCHEMES["W8A16"], family)
    (batch,) = token_batches((5, 40))
    stream = BlockStream(Skeleton(made.model, made.structure), [batch])
    (hidden,) = stream.start()
    for index in range(len(made.structure.blocks)):
        with stream.block(index):
            hidden = stream.run(index, 0, hidden)
    windows = []
    with stream.head():
        for sample in range(len(batch)):
            windows.append(WindowScores())
            for positions, logits in stream.logits(hidden[sample : sample + 1, :-1]):
                windows[-1].add(logits[0], None, batch[sample, 1:][positions], None)
    found = summarize(windows, quantized=False)

    model = transformers.AutoModelForCausalLM.from_pretrained(made.model)
    nll = []
    with torch.inference_mode():
        for window in batch:
            logp = model(window[None]).logits[0].double().log_softmax(-1)
            nll.append(-sum(logp[i, window[i + 1]].item() for i in range(len(window) - 1)))
    assert found.tokens == 5 * 39
    assert found.float_model.value == pytest.approx(math.exp(sum(nll) / found.tokens), rel=1e-6)
    assert found.quantized is None


def test_intervals_of_few_values_are_wider_than_normal_ones() -> None:
    table = {2: 12.7062, 3: 4.30265, 5: 2.77645, 6: 2.57058, 11: 2.22814, 31: 2.04227, 121: 1.97993}
    for count, quantile in table.items():
        assert t95(count) == pytest.approx(quantile, rel=4e-4)
    assert t95(4) == pytest.approx(3.18245, rel=2e-3)
    assert t95(10**7) == pytest.approx(Z95)
    assert math.isnan(t95(1))
