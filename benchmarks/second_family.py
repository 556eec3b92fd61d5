"""Do the weight methods keep their order on another family and on other texts? A small Qwen3 is trained for it.

    python benchmarks/second_family.py --train FILE… --calibration A --evaluation B C… [--minutes 10] [--work DIR]

The files hold plain text, and what is trained on is none of the others. Tokenizer (BPE of 4096 tokens) and weights come
from the training files and the prose that comes with Python (its language reference and docstrings); the model has
q and k norms, tied embeddings and grouped queries. Then every method runs with its defaults, as it is shipped, and a
line is printed as it ends. A model in the work folder is not trained again.
"""

from __future__ import annotations

import argparse
import ast
import json
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

VOCABULARY, LENGTH, BATCH = 4096, 512, 16
METHODS = {
    "minmax": ("w4a16", ["quantize.weights.method=minmax", "quantize.weights.importance=none"]),
    "mse, no data": ("w4a16", ["quantize.weights.importance=none"]),
    "hqq": ("w4a16", ["quantize.weights.method=hqq", "quantize.weights.importance=none"]),
    "mse": ("w4a16", []),
    "gptq": ("w4a16-gptq", []),
    "gptq, asymmetric": ("w4a16-gptq", ["quantize.gptq.asymmetric=true"]),
}


def prose() -> Iterator[str]:
    """English that every Python has: the language reference, and docstrings of the standard library."""
    from pydoc_data.topics import topics

    yield from topics.values()
    for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8", errors="replace"))):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                yield ast.get_docstring(node) or ""


def train(texts: list[str], minutes: float, folder: Path) -> float:
    """Tokenizer and model in `folder`; returns the loss of the last steps."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<end>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(texts, trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(folder)
    tokens = torch.tensor([token for text in texts for token in (*tokenizer.encode(text).ids, 0)])
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCABULARY, hidden_size=384, intermediate_size=1024, num_hidden_layers=8, num_attention_heads=6,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=2048, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=0,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    print(f"{len(tokens)} tokens, {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters", file=sys.stderr)
    started, last, step = time.monotonic(), float("nan"), 0
    while (done := (time.monotonic() - started) / (60 * minutes)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1.0, (step + 1) / 100) * max(0.02, 1 - done)
        begins = torch.randint(0, len(tokens) - LENGTH, (BATCH,))
        batch = torch.stack([tokens[begin : begin + LENGTH] for begin in begins])
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        last, step = loss.item() if step == 0 else 0.95 * last + 0.05 * loss.item(), step + 1
        if step % 50 == 0:
            print(f"step {step}, loss {last:.3f}", file=sys.stderr, flush=True)
    model.to(torch.bfloat16).save_pretrained(folder)
    return last


def measured(arguments: argparse.Namespace, method: str, bits: int, text: Path) -> dict[str, Any]:
    """What eval-ppl finds of a method at so many bits on a text."""
    recipe, changes = METHODS[method]
    output = arguments.work / f"{method}-{bits}".replace(", ", "-").replace(" ", "-")
    where = f"dataset: text, path: {{}}, sequence_length: {LENGTH}"
    changes = [
        *changes, f"quantize.weights.bits={bits}", "quantize.weights.group_size=64",
        f"calibration={{{where.format(arguments.calibration.resolve())}, samples: 64}}",
        f"evaluate={{perplexity: {{{where.format(text.resolve())}}}, output_error: null, generate: null}}",
    ]  # fmt: skip
    command = [sys.executable, "-m", "quantcli", "run", recipe, "--quiet", "--model", str(arguments.work / "model")]
    command += ["--output", str(output), *(part for change in changes for part in ("--set", change))]
    subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads((output / "eval-ppl" / "results.json").read_text(encoding="utf-8"))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, nargs="+", required=True)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--evaluation", type=Path, nargs="+", required=True)
    parser.add_argument("--minutes", type=float, default=10, help="of training")
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3])
    parser.add_argument("--work", type=Path, help="where the model and the runs go; temporary if not set")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        arguments.work = arguments.work or Path(temporary)
        if not (arguments.work / "model" / "config.json").exists():
            texts = [file.read_text(encoding="utf-8") for file in arguments.train]
            loss = train([*texts, *prose()], arguments.minutes, arguments.work / "model")
            print(f"trained to a loss of {loss:.3f}", file=sys.stderr)
        print("| bits | method |" + "".join(f" {text.stem}: perplexity | KL |" for text in arguments.evaluation))
        print("|---|---|" + "---|---|" * len(arguments.evaluation))
        for bits in arguments.bits:
            for method in METHODS:
                row = [measured(arguments, method, bits, text) for text in arguments.evaluation]
                cells = (f" {r['quantized']['value']:.3f} | {r['kl_divergence']:.4f} |" for r in row)
                print(f"| {bits} | {method} |" + "".join(cells), flush=True)
        floats = (
            f"{text.stem} {r['float_model']['value']:.3f}" for text, r in zip(arguments.evaluation, row, strict=True)
        )
        print("float: " + ", ".join(floats))


if __name__ == "__main__":
    main()
