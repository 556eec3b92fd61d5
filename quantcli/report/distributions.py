"""How the predictions of the quantized model differ from the float model's: by how much, in which share of tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quantcli.report.markup import Markup, element, joined, table
from quantcli.report.numbers import NO_BREAK, percent, short

_PERCENTILES = {"0": "least", **{key: f"{key}{NO_BREAK}%" for key in ("1", "5")}, "50": "median",
                **{key: f"{key}{NO_BREAK}%" for key in ("95", "99", "99.9")}, "100": "largest"}  # fmt: skip


def distributions(scores: Mapping[str, Any] | None) -> Markup | None:
    """Tables of percentiles over tokens and of shares of tokens. Nothing where no distributions were measured."""
    if not scores or not scores.get("kl") or not scores.get("delta_p"):
        return None
    spread = table(
        ("over tokens", "mean", *_PERCENTILES.values()),
        [
            ("KL divergence, nats", *[short(scores["kl"].get(key)) for key in ("mean", *_PERCENTILES)]),
            (
                "Δp, probability of the text's token",
                *[percent(scores["delta_p"].get(key), signed=True) for key in ("mean", *_PERCENTILES)],
            ),
        ],
        numbers=range(1, 2 + len(_PERCENTILES)),
    )
    flips = scores.get("flips") or {}
    shares = [
        ("same top token", scores.get("agreement"), scores.get("agreement_error")),
        ("tokens among the first five of both", scores.get("top5_agreement"), scores.get("top5_error")),
        ("top token was the text's and is not any more", flips.get("lost"), None),
        ("top token became the text's", flips.get("gained"), None),
    ]
    rows = [
        (label, percent(share) + (f" ± {percent(error)}" if error is not None else ""))
        for label, share, error in shares
        if share is not None
    ]
    note = "Of the quantized model, for the tokens that were scored; differences from the float model."
    return element(
        "section",
        element("h2", "How predictions changed"),
        element("p", note, class_="note"),
        joined([spread, table(("share of tokens", ""), rows, numbers=[1])]),
        class_="dense",
    )
