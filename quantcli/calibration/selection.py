"""Which samples to keep for calibration, by what quantization does to the model's output on each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

from quantcli.errors import DataError


def keep_samples(differences: Sequence[float], share: float) -> list[int]:
    """Indices of the samples that stay, in order, when those of the largest difference are dropped.

    Of n samples, share · n are dropped, rounded to the nearest (halves up), but never all. Of equal differences the
    later is dropped first. A difference that is not a number counts as infinite. msModelSlim's guide to accuracy
    tuning advises to drop data on which the outputs of the original and of the quantized model differ most.

    Args:
        differences: how far the outputs differ on each sample; larger is worse, in any unit.
        share: what part to drop, from 0 to below 1.

    Raises:
        DataError: `share` is not from 0 to below 1.
    """
    if not 0 <= share < 1:
        raise DataError(f"A share of {share} of the samples cannot be dropped.", "Give a number from 0 to below 1.")
    # The decimal digits, since 0.35 · 10 in binary is below 3.5.
    dropped = math.floor(Fraction(str(share)) * len(differences) + Fraction(1, 2))
    kept = len(differences) - min(dropped, max(0, len(differences) - 1))
    worst_last = [math.inf if math.isnan(difference) else difference for difference in differences]
    return sorted(sorted(range(len(differences)), key=worst_last.__getitem__)[:kept])
