"""auto: for every group the scale of least output error under the target scheme, of several methods and a descent."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import product

import torch
from torch import Tensor

from quantcli.smoothing.group import FLOOR, Found, Group, largest_input, largest_weight, shared_maximum
from quantcli.smoothing.objective import ExpectedNoise, Targets, output_error
from quantcli.smoothing.outliers import cbq, outlier_suppression

ALPHAS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
BETAS = (0.0, 0.15, 0.4)
STRENGTHS = [*product(ALPHAS, BETAS), (0.5, 0.5), (0.9, 0.1)]
"""Exponents α and β that are tried: a grid, and those of m1 and m4."""
MEASURED = 3
"""Strengths of least expected noise whose error is measured."""
THRESHOLDS = 20
"""Those of m2 that are compared by expected noise."""
ROWS = 512
"""Rows of a group's weights that it is taken of where many scales are compared, about."""
STEPS, STATIC_STEPS, RATE = 20, 8, 0.1
"""Of the descent. Behind a static range it evens channels out until many reach the end of it, which others then pass
on text that was not calibrated on: fewer steps measure better there, and worse elsewhere."""


def auto(group: Group, whole: Group, targets: Targets) -> Found:
    """The scale of least output error under `targets`, of every method and a descent.

    The trials are none, the MEASURED best by expected noise of A^α / Wmax^β on a grid (m1, m4, m6) and of mean|x|^α
    (m3; where inputs stay in float, of mean|x|^α / Wmax^β and those of m1 and m4), m2's with the threshold of least
    expected noise, and m5's. They are made from the statistics of `group`, which have not seen its kept tokens, and
    compared by their error on those. The winner is made anew from `whole`, whose statistics have seen all samples, as
    the range of a static input has, and moved downhill on the expected noise of its `fitted` tokens; of the two and
    none the best on the others is kept. A scale is divided by its geometric mean, which changes nothing that is
    rounded.
    """
    trials = _trials(group, targets)
    error = output_error(group, targets, "token")
    losses = {name: error(make(group)) for name, make in trials.items()}
    name = min(losses, key=losses.__getitem__)
    found = trials[name](whole)
    error = output_error(whole, targets, "token")
    static = any(target is not None and target.activations == "static" for target in targets)
    moved = downhill(found, whole, ExpectedNoise(whole, targets), STATIC_STEPS if static else STEPS)
    last = {"none": torch.ones_like(found), name: found, f"{name}, descent": moved}
    losses = {name: error(scale) for name, scale in last.items()}
    name = min(losses, key=losses.__getitem__)
    return Found(last[name], {"chosen": name, "error": losses[name]})


def _trials(group: Group, targets: Targets) -> dict[str, Callable[[Group], Tensor]]:
    """What makes the scales whose errors are to be measured, by name."""
    noise = ExpectedNoise(_thinned(group), targets)
    rounded = any(target is not None and target.activations != "none" for target in targets)
    strengths = {f"strength {a:g} {b:g}": partial(_strength, mean=not rounded, alpha=a, beta=b) for a, b in STRENGTHS}
    other, betas = ("awq", lambda alpha: 0.0) if rounded else ("smoothquant", lambda alpha: 1 - alpha)
    strengths |= {f"{other} {a:g}": partial(_strength, mean=rounded, alpha=a, beta=betas(a)) for a in ALPHAS}
    expected = {name: float(noise(make(group).log())) for name, make in strengths.items()}

    def suppressed(seen: Group) -> Tensor:
        own = noise if seen is group else ExpectedNoise(_thinned(seen), targets)
        return _around_one(outlier_suppression(seen, lambda scale: float(own(scale.log())), THRESHOLDS).scale)

    measured = {name: strengths[name] for name in sorted(expected, key=expected.__getitem__)[:MEASURED]}
    return measured | {
        "outlier_suppression": suppressed,
        "cbq": lambda seen: _around_one(cbq(seen, lambda scale: 0.0).scale),
        "none": lambda seen: torch.ones_like(seen.minimum),
    }


def _thinned(group: Group) -> Group:
    """The group with about ROWS rows of its weights, by which the noise of many scales is compared."""
    every = max(1, sum(len(weight) for weight in group.weights) // ROWS)
    return replace(group, weights=tuple(weight[::every] for weight in group.weights))


def downhill(scale: Tensor, group: Group, noise: ExpectedNoise, steps: int = STEPS) -> Tensor:
    """The scale after `steps` steps of Adam on log(noise) over the logarithms of a scale for each producer channel.
    Channels without input or weights stay at 1."""
    channels = group.channels
    size = int(channels.max()) + 1
    with torch.inference_mode(False), torch.enable_grad():
        start = scale.new_zeros(size).index_copy_(0, channels, scale.log())
        logarithm = start.clone().requires_grad_()
        optimizer = torch.optim.Adam([logarithm], lr=RATE)
        best, least = scale, float("inf")
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = RATE * (1 - step / steps)
            spread = logarithm[channels]
            loss = noise(spread).log()
            if float(loss.detach()) < least:
                best, least = spread.detach().exp(), float(loss.detach())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    used = (shared_maximum(largest_input(group), channels) > 0) & (shared_maximum(largest_weight(group), channels) > 0)
    return _around_one(torch.where(used, best, torch.nan))


def _strength(group: Group, mean: bool, alpha: float, beta: float) -> Tensor:
    """A^α / Wmax^β, with mean|x| in the place of A = max|x| or not; channels without input or weights are 1."""
    seen = group.mean_absolute if mean else largest_input(group)
    size, weight = (shared_maximum(each, group.channels) for each in (seen, largest_weight(group)))
    scale = size.clamp(min=FLOOR) ** alpha / weight.clamp(min=FLOOR) ** beta
    return _around_one(torch.where((size > 0) & (weight > 0), scale, torch.nan))


def _around_one(scale: Tensor) -> Tensor:
    """Divided by its geometric mean; channels that have no scale (NaN) get 1."""
    known = scale[torch.isfinite(scale)]
    centre = known.log().mean().exp() if len(known) else torch.ones(())
    return torch.nan_to_num(scale / centre, nan=1.0).clamp(min=FLOOR)
