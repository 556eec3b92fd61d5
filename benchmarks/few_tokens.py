"""What GPTQ makes of few tokens, as an expert of a mixture sees them, with and without shrinkage of its Hessian.

python benchmarks/few_tokens.py MODEL CALIBRATION_TEXT EVALUATION_TEXT [--tokens 64 512 2048 8192] [--blocks 5 20]
    [--linears mlp.gate_proj mlp.down_proj] [--rows 256]

4-bit weights in symmetric groups of 64. Of each linear the first `--rows` outputs are found from tokens drawn at random
from the first 16,384 of one text. Their output error tr((W − Ŵ) H (W − Ŵ)ᵀ) is taken under the second moments H of as
many tokens of another. Printed is the mean over linears of its ratio to that of `mse` without data.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from quantcli.quant.gptq import factored
from quantcli.quant.grid import QuantizedWeight, WeightGrid
from quantcli.quant.refine import output_error
from quantcli.quant.search import mse
from quantcli.quant.shrinkage import shrunk
from quantcli.quant.solver import solved

GRID = WeightGrid(4, True, "group", 64, torch.float32)
SEEN, LENGTH = 16_384, 512


def inputs(
    model: nn.Module, tokenizer: Callable[[str], dict[str, list[int]]], text: Path, names: list[str]
) -> dict[str, Tensor]:
    """What these linears read of the first tokens of a text, without the first token of each window."""
    characters = text.read_text(encoding="utf-8")[: 12 * SEEN]
    windows = torch.tensor(tokenizer(characters)["input_ids"][:SEEN]).view(-1, LENGTH)
    seen: dict[str, list[Tensor]] = {name: [] for name in names}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, kept=kept: kept.append(args[0][:, 1:].flatten(0, 1))
        )
        for name, kept in seen.items()
    ]
    with torch.no_grad():
        for window in windows.split(4):
            model.base_model(window, use_cache=False)  # type: ignore[operator]
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in seen.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "calibration", "evaluation"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--tokens", type=int, nargs="+", default=[64, 512, 2048, 8192])
    parser.add_argument("--blocks", type=int, nargs="+", default=[5, 20])
    parser.add_argument("--linears", nargs="+", default=["mlp.gate_proj", "mlp.down_proj"])
    parser.add_argument("--rows", type=int, default=256)
    arguments = parser.parse_args()

    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    names = [f"model.layers.{block}.{linear}" for linear in arguments.linears for block in arguments.blocks]
    calibration, evaluation = (
        inputs(model, tokenizer, text, names) for text in (arguments.calibration, arguments.evaluation)
    )
    draw = torch.randperm(len(calibration[names[0]]), generator=torch.Generator().manual_seed(0))
    print("| tokens | `mse` under the second moment | GPTQ | GPTQ, shrunk | ρ |\n|---|---|---|---|---|")
    for count in arguments.tokens:
        ratios: list[list[float]] = []
        for name in names:
            weight = model.get_submodule(name).weight.detach()[: arguments.rows]
            x, y = calibration[name][draw[:count]], evaluation[name]
            h, wanted = x.t() @ x / len(x), y.t() @ y / len(y)

            def lost(found: QuantizedWeight, weight: Tensor = weight, wanted: Tensor = wanted) -> float:
                return float(output_error(weight, found, wanted).sum())

            drawn, share = shrunk(h.clone(), count)
            found = [mse(weight, GRID, h.diagonal())]
            found += [solved(weight, GRID, factored(hessian), 2)[0] for hessian in (h, drawn)]
            base = lost(mse(weight, GRID, None))
            ratios.append([*(lost(each) / base for each in found), share])
        means = " | ".join(f"{statistics.fmean(column):.2f}" for column in zip(*ratios, strict=True))
        print(f"| {count} | {means} |", flush=True)


if __name__ == "__main__":
    main()
