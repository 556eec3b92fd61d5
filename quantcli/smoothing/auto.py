"""auto: for every group the scale of least output error under the target scheme, of several methods and a descent."""

from __future__ import annotations

import torch
from torch import Tensor

from quantcli.smoothing.group import (
    FLOOR,
    ErrorOf,
    Found,
    Group,
    largest_input,
    largest_weight,
    shared_maximum,
)
from quantcli.smoothing.objective import ExpectedNoise
from quantcli.smoothing.outliers import cbq

ALPHAS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
BETAS = (0.0, 0.15, 0.3, 0.5)
MEASURED = 3
"""Strengths of least expected noise whose error is measured."""
STEPS, RATE = 40, 0.05


def auto(group: Group, error: ErrorOf, noise: ExpectedNoise) -> Found:
    """The scale of least `error` among: none, the MEASURED best of A^α / Wmax^β on a grid by expected noise (mean|x|^α
    where inputs stay in float), CBQ's, and the best of all moved downhill on the expected noise.

    Trials are compared by `error` on tokens that the statistics A and mean|x| have not seen, so that the most elaborate
    does not win by fitting. A scale is normalized to a geometric mean of 1, which changes nothing that is rounded.
    """
    weight = shared_maximum(largest_weight(group), group.channels)
    seen = group.mean_absolute if noise.target.activations == "none" else largest_input(group)
    size = shared_maximum(seen, group.channels)
    grid = {(alpha, beta): _strength(size, weight, alpha, beta) for alpha in ALPHAS for beta in BETAS}
    expected = {exponents: float(noise(scale.log())) for exponents, scale in grid.items()}
    best = sorted(expected, key=expected.__getitem__)[:MEASURED]
    trials = {f"strength {alpha:g} {beta:g}": grid[alpha, beta] for alpha, beta in best}
    trials["cbq"] = _centred(cbq(group, error).scale)
    losses = {name: error(scale) for name, scale in trials.items()}
    start = min(losses, key=losses.__getitem__)
    trials |= {"descent": downhill(trials[start], group.channels, noise), "none": torch.ones_like(size)}
    losses |= {name: error(trials[name]) for name in ("descent", "none")}
    name = min(losses, key=losses.__getitem__)
    return Found(trials[name], {"chosen": name, "error": losses[name]})


def downhill(scale: Tensor, channels: Tensor, noise: ExpectedNoise) -> Tensor:
    """The scale after STEPS steps of Adam on log(noise) over the logarithms of a scale for each producer channel."""
    size = int(channels.max()) + 1
    with torch.inference_mode(False), torch.enable_grad():
        start = scale.new_zeros(size).index_copy_(0, channels, scale.log())
        logarithm = start.clone().requires_grad_()
        optimizer = torch.optim.Adam([logarithm], lr=RATE)
        best, least = scale, float("inf")
        for step in range(STEPS):
            optimizer.param_groups[0]["lr"] = RATE * (1 - step / STEPS)
            spread = logarithm[channels]
            loss = noise(spread).log()
            if float(loss.detach()) < least:
                best, least = spread.detach().exp(), float(loss.detach())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return _centred(best)


def _strength(large: Tensor, weight: Tensor, alpha: float, beta: float) -> Tensor:
    """A^α / Wmax^β; channels without input or weights are left alone."""
    scale = large.clamp(min=FLOOR) ** alpha / weight.clamp(min=FLOOR) ** beta
    return _centred(torch.where((large > 0) & (weight > 0), scale, torch.nan))


def _centred(scale: Tensor) -> Tensor:
    """Divided by its geometric mean; channels that have no scale (NaN) get 1."""
    known = scale[torch.isfinite(scale)]
    centre = known.log().mean().exp() if len(known) else torch.ones(())
    return torch.nan_to_num(scale / centre, nan=1.0).clamp(min=FLOOR)
