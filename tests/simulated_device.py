"""An accelerator without one: tensors that say they lie on `npu:0`, computed on the CPU by the rules of two memories.

    with simulated_device():
        run(recipe with model.device "npu:0")

What PyTorch refuses on a real device is refused: an operation on tensors of both places (but for those of no dimension
and for indices), a generator of the other place, NumPy's view of a tensor that is not on the CPU, an operation that
accelerators do not have, and integer products of shapes that CUDA's kernel does not take. Numbers are the CPU's, so
that a run should give what it gives there. Not simulated: kernels, rounding, speed and memory of an accelerator.

PyTorch lets a backend be written in Python under the name of its spare device type. `cuda` is none of those, and npu is
a device that recipes may name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils import backend_registration
from torch.utils._mode_utils import no_dispatch
from torch.utils._pytree import tree_leaves, tree_map

NAME = "npu:0"
# what makes tensors of nothing: all others begin with one of the first two
_FACTORIES = {
    "empty.memory_format": torch.empty,
    "empty_strided": torch.empty_strided,
    "arange": torch.arange,
    "arange.start": torch.arange,
    "arange.start_step": torch.arange,
    "eye": torch.eye,
    "eye.m": torch.eye,
    "linspace": torch.linspace,
}
_LIBRARY = torch.library.Library("aten", "IMPL")
_MOVES = {"to", "_to_copy", "copy_", "_copy_from"}
_INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}
_ABSENT = {"histogram", "histogramdd", "_histogramdd_bin_edges"}
_CPU_LIBRARIES = {"mkldnn", "mkldnn_prepacked", "onednn", "quantized"}


class _Module:
    """What stands at `torch.npu`. There is a device while one is simulated, so that other tests see none."""

    simulated = False

    def is_available(self) -> bool:
        return self.simulated

    def is_initialized(self) -> bool:
        return True

    def device_count(self) -> int:
        return int(self.simulated)

    def current_device(self) -> int:
        return 0

    def mem_get_info(self, device: object = None) -> tuple[int, int]:
        return 8 << 30, 8 << 30

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        pass


class OnDevice(Tensor):
    """A tensor that says it is on the simulated device; `here` holds its values."""

    here: Tensor

    @staticmethod
    def __new__(cls, here: Tensor) -> OnDevice:
        made: OnDevice = Tensor._make_wrapper_subclass(
            cls, here.shape, strides=here.stride(), storage_offset=here.storage_offset(), dtype=here.dtype, device=NAME
        )
        made.here = here
        return made

    def __repr__(self) -> str:  # type: ignore[override]
        return f"OnDevice({self.here!r})"

    def tolist(self) -> Any:
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _computed(func, args, kwargs or {})


@contextmanager
def simulated_device() -> Iterator[None]:
    """There is a device `npu:0`, on which tensors can be made, for the code inside."""
    module = _registered()
    module.simulated = True
    try:
        # tensors of inference mode cannot be wrapped: it says of gradients what it otherwise says, and no more
        with mock.patch.multiple(torch.inference_mode, __enter__=_enter, __exit__=_leave):
            yield
    finally:
        module.simulated = False


def _enter(mode: torch.inference_mode) -> None:
    mode.gradients = torch.set_grad_enabled(not mode.mode)


def _leave(mode: torch.inference_mode, *_: object) -> None:
    mode.gradients.__exit__(*_)


@cache
def _registered() -> _Module:
    module = _Module()
    backend_registration._setup_privateuseone_for_python_backend("npu", backend_module=module)
    for name, function in _FACTORIES.items():
        _LIBRARY.impl(name, partial(_made, function), "PrivateUse1")
    _LIBRARY.impl("_copy_from", _copied, "PrivateUse1")
    return module


def _made(function: Callable[..., Tensor], *arguments: Any, device: Any = None, **options: Any) -> Tensor:
    return OnDevice(function(*arguments, **{**options, "pin_memory": False}))


def _copied(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    _plain(target).copy_(_plain(source))
    return target


def _computed(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    library, _, name = func._schema.name.partition("::")
    leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    there = [leaf for leaf in leaves if isinstance(leaf, OnDevice)]
    named = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False))
    named.update(kwargs)
    target = named.get("device")
    on_device = bool(there) if target is None else torch.device(target).type == "npu"
    if there:
        _require_one_device(name, func, args, leaves)
    if on_device:
        _require_kernel(library, name, func, args)
        generator = kwargs.get("generator")
        if generator is not None and generator.device.type != "npu":
            raise RuntimeError(f"{func}: expected a generator of {NAME}, found one of {generator.device}")
    known = {id(tensor.here): tensor for tensor in there} if on_device else {}
    plain_args, plain_kwargs = tree_map(_plain, (args, kwargs))
    if on_device and name == "histc":  # of integers on devices alone
        plain_args = (plain_args[0].double(), *plain_args[1:])
    made = func(*plain_args, **plain_kwargs)
    same = args[0] if name in _MOVES and args else None

    def placed(value: Any) -> Any:
        if not isinstance(value, Tensor) or value is same or value.device.type == "meta":
            return value
        if id(value) in known:
            if torch.Tag.inplace_view in func.tags:
                with no_dispatch():
                    func(*args, **kwargs)
            elif known[id(value)].shape != value.shape:
                raise NotImplementedError(f"{func} changed the shape of a tensor in place, which is not simulated")
            return known[id(value)]
        return OnDevice(value) if on_device else value

    return tree_map(placed, made)


def _plain(leaf: Any) -> Any:
    if isinstance(leaf, torch.device) and leaf.type == "npu":
        return torch.device("cpu")
    return leaf.here if isinstance(leaf, OnDevice) else leaf


def _require_one_device(name: str, func: Any, args: Sequence[Any], leaves: list[Tensor]) -> None:
    if name in _MOVES:
        return
    elsewhere = [leaf for leaf in leaves if not isinstance(leaf, OnDevice) and leaf.device.type == "cpu"]
    if name in _INDEXED:  # of those only indices may be elsewhere
        elsewhere = [leaf for leaf in elsewhere if any(leaf is argument for argument in args)]
    if any(leaf.dim() > 0 for leaf in elsewhere):
        raise RuntimeError(f"{func}: expected all tensors to be on the same device, found {NAME} and cpu")


def _require_kernel(library: str, name: str, func: Any, args: Sequence[Any]) -> None:
    if library in _CPU_LIBRARIES or name in _ABSENT:
        raise NotImplementedError(f"{func} has no kernel for accelerators")
    if name == "_int_mm":
        (rows, inner), (_, columns) = args[0].shape, args[1].shape
        if rows <= 16 or inner % 8 or columns % 8:
            raise RuntimeError(f"{func}: {rows} rows are not more than 16, or {inner} or {columns} no multiple of 8")
