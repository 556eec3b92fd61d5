"""Which serving engines load which scheme.

Read from the engines' sources (vLLM 0.32 kernels/linear and quantization/compressed_tensors; transformers 5 with
compressed-tensors 0.20) and, for vLLM on a CPU and transformers, run by the tests.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from quantcli.model.structure import Linear
from quantcli.quant.scheme import Scheme

_NO_TENSOR = "takes packed weights with a scale a channel or group, not a tensor"


@dataclass(frozen=True)
class Verdict:
    engine: str
    loads: bool
    note: str = ""


def verdicts(scheme: Scheme, linears: Iterable[Linear]) -> list[Verdict]:
    """For each engine, whether it loads a compressed-tensors checkpoint of these linears under the scheme."""
    return [_vllm_cpu(scheme, list(linears)), _vllm_gpu(scheme), _transformers(scheme)]


def _vllm_cpu(scheme: Scheme, linears: list[Linear]) -> Verdict:
    engine = "vLLM on a CPU"
    if scheme.activations != "none":
        return Verdict(engine, True, "int8 products (oneDNN)")
    if scheme.granularity == "tensor":
        return Verdict(engine, False, _NO_TENSOR)
    if scheme.bits != 4:
        return Verdict(engine, False, f"has no kernel for {scheme.bits}-bit weights with float activations")
    odd = [linear.name for linear in linears if linear.in_features % 32 or linear.out_features % 32]
    if odd:
        return Verdict(engine, False, f"needs widths that are multiples of 32; {odd[0]} has none")
    return Verdict(engine, True, "weights unpacked in the kernel")


def _vllm_gpu(scheme: Scheme) -> Verdict:
    engine = "vLLM on a GPU"
    if scheme.activations != "none":
        return Verdict(engine, True, "int8 products (CUTLASS); not run here")
    if scheme.granularity == "tensor":
        return Verdict(engine, False, _NO_TENSOR)
    if scheme.bits not in (4, 8):
        return Verdict(engine, False, f"has no kernel for {scheme.bits}-bit weights")
    if scheme.bits == 8 and not scheme.symmetric:
        return Verdict(engine, False, "has no kernel for asymmetric 8-bit weights")
    if scheme.group_size not in (None, 32, 64, 128):
        return Verdict(engine, False, f"Marlin kernels take groups of 32, 64 or 128, not {scheme.group_size}")
    return Verdict(engine, True, "Marlin kernels; not run here")


def _transformers(scheme: Scheme) -> Verdict:
    engine = "transformers"
    if scheme.activations == "none" and not scheme.symmetric and scheme.granularity != "tensor":
        return Verdict(engine, False, "compressed-tensors 0.20 fails to load packed zero points, its own too")
    return Verdict(engine, True, "with the compressed-tensors package")
