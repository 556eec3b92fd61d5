"""Experts computed one by one, linear by linear, in the place of a product that takes all of them at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from quantcli.model.structure import Experts

Weight = Callable[[], Tensor]
ExpertLinear = Callable[[str, Tensor, Weight], Tensor]
"""(name of the linear, its input [tokens, in], what gives its float weight [out, in]) to its output [tokens, out]."""


def run_expert(module: nn.Module, experts: Experts, index: int, x: Tensor, compute: ExpertLinear) -> Tensor:
    """What expert `index` of `module` puts out for x [tokens, in]: W_down (act(W_gate x) ∘ W_up x), by `compute`."""
    first, last = (name.rpartition(".")[2] for name in experts.parameters)
    *entering, leaving = experts.linears[index]

    def part(place: int) -> Weight:
        return lambda: getattr(module, first)[index].chunk(len(entering))[place]

    outputs = [compute(name, x, part(place)) for place, name in enumerate(entering)]
    act: Callable[[Tensor], Tensor] = module._apply_gate if len(outputs) > 1 else module.act_fn  # type: ignore[assignment]
    return compute(leaving, act(torch.cat(outputs, -1)), lambda: getattr(module, last)[index])


def chosen_experts(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The experts that each token is routed to, [tokens, k], of what a module of experts is called with."""
    index: Tensor = kwargs["top_k_index"] if "top_k_index" in kwargs else args[1]
    return index


@contextmanager
def one_by_one(
    module: nn.Module, experts: Experts, compute: ExpertLinear, *, every_token: bool = False
) -> Iterator[None]:
    """While the body runs, `module`, which holds `experts`, calls `compute` for each linear of each expert.

    Of expert e, which token t weighs by p_te:  y_t = Σ_e p_te · W_down (act(W_gate x_t) ∘ W_up x_t), the sum over the
    experts that the router chose for t, in float32 where p is, and rounded to x's dtype once, as transformers does
    (integrations/moe.py). An expert computes the tokens that are routed to it; with `every_token` all of them, of which
    those that are not have no part in y. An expert that computes no token is not called.
    """

    def forward(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        dtype = torch.promote_types(hidden_states.dtype, top_k_weights.dtype)
        parts = hidden_states.new_zeros(*top_k_index.shape, hidden_states.shape[-1], dtype=dtype)
        for index in range(len(experts.linears)):
            token, place = torch.where(top_k_index == index)
            if every_token and len(hidden_states):
                output = run_expert(module, experts, index, hidden_states, compute)[token]
            elif len(token):
                output = run_expert(module, experts, index, hidden_states[token], compute)
            else:
                continue
            parts[token, place] = (output * top_k_weights[token, place, None]).to(dtype)
        return parts.sum(1).to(hidden_states.dtype)

    try:
        module.__dict__["forward"] = forward
        yield
    finally:
        module.__dict__.pop("forward", None)
