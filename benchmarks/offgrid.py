"""The model of a .gguf file as a directory, and the same off the grid that its weights lie on.

python benchmarks/offgrid.py FILE.gguf OUT

OUT/plain is the dequantized model. A file of 4 bits is easy to quantize to 4 bits again, so OUT/offgrid has noise on
every linear: uniform, as wide as a 15th of the range of 32 inputs, which is a step of their grid.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from quantcli.model.gguf import convert_gguf

GROUP, STEPS = 32, 15


def main(file: Path, output: Path) -> None:
    plain = output / "plain"
    if not plain.exists():
        convert_gguf(file, plain)
    model = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in model.model.modules():
            if isinstance(module, torch.nn.Linear):
                groups = module.weight.view(len(module.weight), -1, GROUP)
                step = (groups.amax(-1, keepdim=True) - groups.amin(-1, keepdim=True)) / STEPS
                groups.add_((torch.rand(groups.shape, generator=generator) - 0.5) * step)
    model.to(torch.bfloat16).save_pretrained(output / "offgrid")
    AutoTokenizer.from_pretrained(plain).save_pretrained(output / "offgrid")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
