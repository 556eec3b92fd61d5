"""GGUF exports, scored by `quantcli eval-ppl --checkpoint` and by llama.cpp (package xllamacpp) on the same tokens.

    python benchmarks/llama_cpp_perplexity.py RUN/export/gguf… --text wiki.test.tokens [--windows 6] [--length 512]

Without --text the built-in test text is read. Results go to BENCHMARKS.md by hand.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path

from bench import scored
from transformers import AutoTokenizer

from quantcli.pipeline.samples import windows_of
from quantcli.recipe.data import PerplexitySection

SCRIPT = Path(__file__).parents[1] / "tests" / "serving" / "llama_cpp.py"


def by_llama_cpp(export: Path, windows: list[list[int]]) -> float:
    with tempfile.TemporaryDirectory() as place:
        questions, answers = Path(place, "questions.json"), Path(place, "answers.json")
        questions.write_text(json.dumps({"windows": windows}), encoding="utf-8")
        command = [sys.executable, SCRIPT, export / "model.gguf", questions, answers]
        subprocess.run(list(map(str, command)), check=True, stderr=subprocess.DEVNULL)
        lost = json.loads(answers.read_text(encoding="utf-8"))["nll"]
    return math.exp(sum(lost) / sum(len(window) - 1 for window in windows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("exports", type=Path, nargs="+")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--windows", type=int, default=6)
    parser.add_argument("--length", type=int, default=512)
    arguments = parser.parse_args()
    section: dict[str, object] = {"dataset": "builtin"}
    if arguments.text is not None:
        section = {"dataset": "wikitext2", "path": str(arguments.text.absolute())}
    section |= {"sequence_length": arguments.length, "windows": arguments.windows}
    print("| export | quantcli `eval-ppl` | llama.cpp | difference |")
    print("|---|---|---|---|", flush=True)
    for export in arguments.exports:
        windows = windows_of(PerplexitySection.model_validate(section), AutoTokenizer.from_pretrained(export)).windows
        ours, theirs = scored(export, section), by_llama_cpp(export, windows)
        print(f"| {export} | {ours:.3f} | {theirs:.3f} | {theirs / ours - 1:+.2%} |", flush=True)


if __name__ == "__main__":
    main()
