"""One token far out: which other tokens suffer tells one scale a token from one a tensor and one a channel."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from quantcli.evaluation.simulate import simulated
from quantcli.formats.store import StoredLinear
from quantcli.pipeline.treatment import Phase, replacement
from quantcli.quant.activation import static_parameters
from quantcli.quant.grid import QuantizedWeight
from quantcli.quant.scheme import Scheme

OUT, IN = 24, 48
OUTLIER = (1, 3)  # sequence, token


def tokens(factor: float) -> Tensor:
    """[2, 6, IN]; one token of the second sequence is `factor` times as large."""
    x = torch.randn(2, 6, IN, generator=torch.Generator().manual_seed(3))
    x[OUTLIER] *= factor
    return x


def stored(symmetric: bool, widest: Tensor) -> StoredLinear:
    """Random int8 weights, with the static scale of a calibration that saw `widest`."""
    generator = torch.Generator().manual_seed(4)
    codes = torch.randint(-128, 128, (OUT, IN), generator=generator, dtype=torch.int8)
    weight = QuantizedWeight(codes, torch.rand(OUT, 1, generator=generator) * 0.01 + 1e-3, None)
    scale, zero = static_parameters(float(widest.min()), float(widest.max()), symmetric)
    return StoredLinear(weight, scale, None if symmetric else zero)


def output(mode: str, phase: Phase, x: Tensor, symmetric: bool = True) -> Tensor:
    block = nn.ModuleDict({"proj": nn.Linear(IN, OUT, bias=False)})
    scheme = Scheme(8, activations=mode, activations_symmetric=symmetric)
    how = replacement(stored(symmetric, tokens(1000)), scheme, x.dtype, "cpu", phase)
    with simulated(block, {"proj": how}):
        return block["proj"](x)


def exact(x: Tensor) -> Tensor:
    """Float64 product of the float input with the weights that the codes stand for."""
    weight = stored(True, tokens(1000)).weight
    return x.double() @ (weight.codes.double() * weight.scale.double()).t()


def slow(x: Tensor, scale: Tensor) -> Tensor:
    """Float64 product with the input rounded to codes of the given scales [..., 1], [IN] or [1]."""
    scale = scale.double()
    return exact((x.double() / scale).round().clamp(-128, 127) * scale)


def per_token(x: Tensor) -> Tensor:
    """max|x| / 127 of each token, one by one."""
    scale = torch.empty(*x.shape[:-1], 1)
    for sequence in range(x.shape[0]):
        for token in range(x.shape[1]):
            scale[sequence, token] = max(abs(float(value)) for value in x[sequence, token]) / 127
    return scale


def per_channel(x: Tensor) -> Tensor:
    """max|x| / 127 of each channel over all tokens: the known mistake, called per token elsewhere."""
    return x.reshape(-1, x.shape[-1]).abs().amax(0) / 127


def others() -> Tensor:
    """Marks all tokens but the outlier."""
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[OUTLIER] = False
    return mask


def error(found: Tensor, x: Tensor) -> Tensor:
    """Relative error of every token's output."""
    wanted = exact(x)
    return (found.double() - wanted).norm(dim=-1) / wanted.norm(dim=-1)


DYNAMIC: list[tuple[str, Phase]] = [("dynamic", "prefill"), ("dynamic", "decode"), ("mix", "prefill")]
STATIC: list[tuple[str, Phase]] = [("static", "prefill"), ("static", "decode"), ("mix", "decode")]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("mode", "phase"), DYNAMIC)
def test_with_a_scale_a_token_the_others_never_notice(mode: str, phase: Phase, symmetric: bool) -> None:
    usual, with_outlier = output(mode, phase, tokens(1), symmetric), output(mode, phase, tokens(1000), symmetric)
    assert torch.equal(usual[others()], with_outlier[others()])
    assert not torch.equal(usual[OUTLIER], with_outlier[OUTLIER])
    # absolute steps of the outlier's own row are a thousand times as coarse, as its values are
    lost, usually_lost = with_outlier - exact(tokens(1000)), usual - exact(tokens(1))
    assert lost[OUTLIER].norm() > 300 * usually_lost[OUTLIER].norm()
    assert (error(with_outlier, tokens(1000)) < 0.03).all()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("mode", "phase"), STATIC)
def test_with_a_scale_for_the_tensor_all_others_are_lost(mode: str, phase: Phase, symmetric: bool) -> None:
    x = tokens(1000)
    found = error(output(mode, phase, x, symmetric), x)
    assert found[OUTLIER] < 0.03
    assert (found[others()] > 0.5).all()  # a step is larger than nearly all of their values


def test_a_scale_a_channel_over_tokens_is_neither() -> None:
    x = tokens(1000)
    wrong = slow(x, per_channel(x))
    assert not torch.equal(slow(tokens(1), per_channel(tokens(1)))[others()], wrong[others()])
    for mode, phase in DYNAMIC + STATIC:
        found = output(mode, phase, x).double()
        assert ((found - wrong).norm(dim=-1) > 0.001 * wrong.norm(dim=-1)).all(), (mode, phase)
    assert (error(wrong, x)[others()] > 0.3).all()


def test_prompts_of_mix_have_no_zero_points_though_decoding_has_one() -> None:
    x = tokens(1000)
    assert torch.equal(output("mix", "prefill", x, symmetric=False), output("dynamic", "prefill", x))
    assert not torch.equal(output("mix", "decode", x, symmetric=False), output("mix", "decode", x))
    assert not torch.equal(output("dynamic", "prefill", x, symmetric=False), output("dynamic", "prefill", x))


@pytest.mark.parametrize("factor", [1, 1000])
def test_each_is_its_reference(factor: float) -> None:
    x = tokens(factor)
    for mode, phase in DYNAMIC:
        torch.testing.assert_close(output(mode, phase, x).double(), slow(x, per_token(x)), rtol=1e-5, atol=1e-5)
    scale = tokens(1000).abs().amax().view(1) / 127
    for mode, phase in STATIC:
        torch.testing.assert_close(output(mode, phase, x).double(), slow(x, scale), rtol=1e-5, atol=1e-5)
