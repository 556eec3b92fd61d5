"""What a normalization module computes, found by trying it on numbers."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from quantcli.model.structure import Norm


def is_norm(module: nn.Module) -> bool:
    """A module without children whose weight is a vector and that takes one tensor [·, channels] and gives another."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, nn.Parameter) or weight.ndim != 1 or any(module.children()):
        return False
    try:
        return _try(module, 0.0, _probe(module)).shape == (1, weight.shape[0])
    except Exception:  # whatever it raises, such as for want of a gate, it is something else
        return False


def is_norm_of(module: nn.Module, tensor: Tensor) -> bool:
    """Whether the weight is one number a channel of that tensor."""
    return tensor.shape[-1] == module.get_parameter("weight").shape[0]


def norm_offset(norm: nn.Module) -> float:
    """1.0 for a norm that multiplies by 1 + w (Gemma), 0.0 for one that multiplies by w, which w = 0 silences."""
    return 1.0 if _try(norm, 0.0, _probe(norm)).abs().max() > 0 else 0.0


def describe_norm(name: str, norm: nn.Module) -> Norm:
    """`norm` is left as it is, and may be on the meta device. `centred`: x and x + 1 give the same."""
    offset, probe = norm_offset(norm), _probe(norm)
    plain, moved = (_try(norm, 1.0 - offset, x) for x in (probe, probe + 1.0))
    return Norm(name, offset, bool(torch.allclose(plain, moved, atol=1e-3)), getattr(norm, "bias", None) is not None)


def turns_with_its_input(norm: nn.Module) -> bool:
    """Whether the norm, without its weight, is x / rms(x) (of x less its mean, if centred), which commutes with every
    rotation R (that keeps the mean, if centred): norm(x R) = norm(x) R."""
    facts, x = describe_norm("", norm), _probe(norm)
    centred = x - x.mean() if facts.centred else x
    expected = centred / centred.square().mean().sqrt()
    return bool(torch.allclose(_try(norm, 1.0 - facts.weight_offset, x), expected, atol=1e-3))


def _probe(norm: nn.Module) -> Tensor:
    """[1, channels] from -1 to 2, so that neither mean nor variance is trivial."""
    return torch.linspace(-1.0, 2.0, norm.get_parameter("weight").shape[0]).view(1, -1)


def _try(norm: nn.Module, weight: float, x: Tensor) -> Tensor:
    """The output for x when every weight is `weight` and every other parameter is 0."""
    trial = copy.deepcopy(norm).to_empty(device="cpu").float()
    with torch.no_grad():
        for name, parameter in trial.named_parameters():
            parameter.fill_(weight if name == "weight" else 0.0)
        output: Tensor = trial(x)
    return output
