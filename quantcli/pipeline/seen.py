"""What smoothing sees of inputs while a block runs: statistics, and some tokens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from quantcli.model.structure import Block, SharedInput
from quantcli.pipeline.context import Context
from quantcli.pipeline.samples import spread

if TYPE_CHECKING:
    from torch import Tensor, nn

    from quantcli.calibration.channel_statistics import ChannelStatistics
    from quantcli.calibration.hessian import Hessian
    from quantcli.model.expert_loop import Weight


@dataclass(frozen=True)
class Seen:
    """What was seen of one input: the tokens that are kept of some samples, statistics of those samples where they are
    held `apart`, and of the `rest`: all samples where none are. Of one that experts read, also how many tokens were
    routed to each, by the names of its linears. `moments` where the method asks for second moments of all channels."""

    tokens: list[Tensor]
    apart: ChannelStatistics
    rest: ChannelStatistics
    routed: Counter[str] = field(default_factory=Counter)
    moments: Hessian | None = None

    @property
    def count(self) -> int:
        """Tokens of which there are statistics."""
        return self.apart.count + self.rest.count


@contextmanager
def inputs_seen(
    context: Context, module: nn.Module, block: Block, wanted: Sequence[SharedInput], samples: int
) -> Iterator[dict[str, tuple[SharedInput, Seen]]]:
    """Statistics of each wanted input and the tokens kept of it, which fill while the block runs.

    The first `search_samples` samples are kept in part; `auto` leaves them out of the statistics, so that it judges
    on tokens that they have not seen. At most half of the samples are. An expert's inner input is seen of the tokens
    that the expert computes, and kept of as many samples as it takes to have `search_tokens`: of a rare expert, those
    of few samples would be too few to search by.
    """
    from quantcli.calibration.channel_statistics import ChannelStatistics
    from quantcli.calibration.hessian import Hessian
    from quantcli.smoothing.methods import SMOOTHING_METHODS

    section = context.recipe.smooth
    assert section is not None
    most_kept = max(1, samples // 2) if section.method == "auto" else samples
    kept = min(section.search_samples, most_kept)
    per_sample = -(-section.search_tokens // kept)
    apart = section.method == "auto" and samples > 1
    method = SMOOTHING_METHODS.get(section.method)
    device, inside = context.device, {name for layer in block.experts for name in layer.leaving}
    found, treatments = {}, context.plan.treatments
    for shared in wanted:
        by_sample = any(treatments[name].averages for name in shared.linears if name in treatments)
        one, other = (ChannelStatistics(shared.width, device, by_sample) for _ in range(2))
        whole = method is not None and method.moments and shared.name not in inside  # of which there may be hundreds
        found[shared.name] = shared, Seen([], one, other, moments=Hessian(shared.width, device) if whole else None)

    position, batch = 0, (0, 0)  # samples before the batch that runs; its samples and tokens of each

    def enter(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal position, batch
        position += batch[0]
        hidden = args[0] if args else next(iter(kwargs.values()))
        batch = hidden.shape[0], hidden.shape[1]

    def look(shared: SharedInput, seen: Seen, x: Tensor) -> None:
        samples, length = batch
        if shared.name not in inside and x.numel() == samples * length * shared.width:
            x = x.reshape(samples, length, shared.width)  # some models take all tokens of a batch in one row
            first, most = max(0, min(samples, kept - position)), per_sample
            searched, others = x[:first], x[first:]
        else:  # tokens of an expert, which still are in the order of samples
            x = x.reshape(1, -1, shared.width)
            room = section.search_tokens - sum(map(len, seen.tokens))
            first = max(0, min(samples, most_kept - position)) if room else 0
            most = min(room, per_sample * first)
            searched, others = x.tensor_split([x.shape[1] * first // samples], dim=1)
        if seen.moments is not None:
            seen.moments.update(x)
        for sample in searched:
            seen.tokens.append(sample[spread(range(len(sample)), most)].float())
        seen.apart.update(searched if apart else x[:0])
        seen.rest.update(others if apart else x)

    with ExitStack() as watching:
        watching.callback(module.register_forward_pre_hook(enter, with_kwargs=True).remove)
        for path, hook in _hooks(block, found, look):
            watched = module.get_submodule(path.removeprefix(f"{block.name}."))
            watching.callback(watched.register_forward_pre_hook(hook, with_kwargs=True).remove)
        calibration = context.recipe.calibration
        every_token = calibration is not None and calibration.route_all_experts
        _see_inside_experts(watching, module, block, found, look, every_token)
        yield found


_Look = Callable[[SharedInput, Seen, "Tensor"], None]


def _hooks(block: Block, found: dict[str, tuple[SharedInput, Seen]], look: _Look) -> Iterator[tuple[str, Any]]:
    """Of each input the module that is given it, and the hook that looks at it."""

    def hook(shared: SharedInput, seen: Seen) -> Any:
        return lambda _module, args, kwargs: look(shared, seen, args[0] if args else next(iter(kwargs.values())))

    modules = {name for shared in block.inputs for name in shared.linears}
    for shared, seen in found.values():
        for layer in block.experts:
            entering = {name: expert for expert, names in enumerate(layer.linears) for name in names[:-1]}
            if entering.keys() & set(shared.linears):
                yield layer.name, _counting(entering, seen)
                if shared.name not in modules:
                    yield layer.name, hook(shared, seen)
        if shared.name in modules:
            yield shared.name, hook(shared, seen)


def _counting(entering: dict[str, int], seen: Seen) -> Any:
    from quantcli.model.expert_loop import chosen_experts

    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        counts = chosen_experts(args, kwargs).flatten().bincount(minlength=max(entering.values()) + 1).tolist()
        seen.routed.update({name: counts[expert] for name, expert in entering.items()})

    return hook


def _see_inside_experts(
    watching: ExitStack,
    module: nn.Module,
    block: Block,
    found: dict[str, tuple[SharedInput, Seen]],
    look: _Look,
    every_token: bool,
) -> None:
    from torch.nn.functional import linear

    from quantcli.model.expert_loop import one_by_one

    def compute(name: str, x: Tensor, weight: Weight) -> Tensor:
        if f"{block.name}.{name}" in found:
            look(*found[f"{block.name}.{name}"], x)
        return linear(x, weight())

    for layer in block.local_experts:
        if any(f"{block.name}.{names[-1]}" in found for names in layer.linears):
            loop = one_by_one(module.get_submodule(layer.name), layer, compute, every_token=every_token)
            watching.enter_context(loop)
