"""Norms and biases that are tuned: which of a model's parameters they are, and how far a relative change moves them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from quantcli.model.skeleton import Skeleton


def tunable_vectors(skeleton: Skeleton, names: Iterable[str]) -> list[str]:
    """Those of the parameters that are one vector of floats, of a norm or a bias, which a checkpoint holds as it is and
    no other parameter shares."""
    shared = Counter(id(source) for source in skeleton.sources.values())
    found = []
    for name in names:
        path, _, leaf = name.rpartition(".")
        value, source = skeleton.module(path)._parameters.get(leaf), skeleton.sources[name]
        alone = source.converter is None and shared[id(source)] == 1
        if value is not None and value.ndim == 1 and value.is_floating_point() and alone:
            found.append(name)
    return found


def read_vectors(skeleton: Skeleton, names: Iterable[str]) -> dict[str, Tensor]:
    """The named vectors as the model has them, but float32, where it computes."""
    return {name: value.to(skeleton.device, torch.float32) for name, value in skeleton.read(names).items()}


def moved(value: Tensor, change: Tensor) -> Tensor:
    """v_c + d_c (|v_c| + mean|v| / 10), float32 [channels], with the gradient of d: a change d that is relative also
    moves what is near 0, as weights of norms that multiply by 1 + w are. A vector of zeros moves by d itself."""
    unit = value.abs() + value.abs().mean() / 10
    return value + change * torch.where(unit > 0, unit, 1.0)


def put_in_place(skeleton: Skeleton, vectors: Mapping[str, Tensor]) -> None:
    """Give resident parameters other values, in their own dtypes, until they are let go."""
    for name, value in vectors.items():
        path, _, leaf = name.rpartition(".")
        owner = skeleton.module(path)
        own = owner.get_parameter(leaf)
        owner.register_parameter(leaf, nn.Parameter(value.to(own.device, own.dtype), requires_grad=False))


def by_tensor(skeleton: Skeleton, vectors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Vectors of parameters by the names of their tensors in the checkpoint, on the CPU, as files take them."""
    return {skeleton.sources[name].tensors[0]: value.detach().cpu() for name, value in vectors.items()}
