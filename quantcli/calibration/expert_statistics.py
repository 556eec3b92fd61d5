"""What enters the linears of experts: of the tokens that are routed to each, or of all."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

from torch import Tensor, nn
from torch.nn.functional import linear

from quantcli.calibration.statistics import InputStatistics
from quantcli.model.expert_loop import Weight, one_by_one
from quantcli.model.structure import Experts


@contextmanager
def experts_observed(
    block: nn.Module, experts: Iterable[Experts], device: str, *, every_token: bool = False
) -> Iterator[dict[str, InputStatistics]]:
    """Statistics that fill while the body runs `block`: of each expert two, by names of linears below the block.

    The first linear that reads the expert's input stands for all that do; the last has an input of its own. Second
    moments are those of the tokens that the expert computes: the ones routed to it, or all with `every_token`, while
    what it puts out for tokens that are not routed to it has no part in the block's output.
    """
    found: dict[str, InputStatistics] = {}

    def observe(name: str, x: Tensor, weight: Weight) -> Tensor:
        if name in found:
            found[name].update(x)
        return linear(x, weight())

    with ExitStack() as loops:
        for layer in experts:
            module = block.get_submodule(layer.name)
            entering, leaving = (int(block.get_parameter(name).shape[-1]) for name in layer.parameters)
            for names in layer.linears:
                found[names[0]] = InputStatistics(entering, device, counts=False)
                found[names[-1]] = InputStatistics(leaving, device, counts=False)
            loops.enter_context(one_by_one(module, layer, observe, every_token=every_token))
        yield found
