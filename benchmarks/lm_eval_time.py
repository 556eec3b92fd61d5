"""Seconds for the word perplexity of a text in wikitext's form: quantcli beside lm-evaluation-harness.

    python benchmarks/lm_eval_time.py MODEL wiki.test.tokens [--export DIR] [--pages N] [--batches 1 4] [--length 2048]

Each is a process of its own that loads the model, scores every page and ends: the harness with its wikitext rules on
the same local pages, once for each batch size; quantcli by `eval-ppl --checkpoint` with protocol lm-eval, of the model
and, if one is given, of an export. The harness takes the softmax in the model's dtype unless `--softmax` says another,
which is quantcli's float32 for equal numbers. Needs quantcli[lm-eval]. Processor seconds are of all threads.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from quantcli.evaluation.protocols import wikitext_pages

TASK = """task: local_pages
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {cache}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ''
doc_to_target: !function rules.wikitext_detokenizer
process_results: !function rules.process_results
metric_list: [{{metric: word_perplexity}}, {{metric: byte_perplexity}}, {{metric: bits_per_byte}}]
"""
RULES = "from lm_eval.tasks.wikitext.preprocess_wikitext import process_results, wikitext_detokenizer\n"


def harness(model: str, tasks: str, length: int, batch: int, softmax: str | None) -> dict[str, Any]:
    """The harness's own results, in this process."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    lm = HFLM(pretrained=model, device="cpu", dtype="auto", max_length=length, batch_size=batch, softmax_dtype=softmax)
    manager = TaskManager(include_path=tasks)
    found = lm_eval.simple_evaluate(lm, tasks=["local_pages"], task_manager=manager, bootstrap_iters=0)
    results: dict[str, Any] = found["results"]["local_pages"]
    return results


def measured(command: list[str], place: Path) -> tuple[dict[str, Any], float, float]:
    """(the JSON that a command prints last, seconds, processor seconds)."""
    output = place / "output"
    started = time.perf_counter()
    with output.open("w", encoding="utf-8") as out, (place / "errors").open("w", encoding="utf-8") as errors:
        process = subprocess.Popen(command, stdout=out, stderr=errors)
        _, status, used = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    if status:
        raise SystemExit(f"{' '.join(command)}:\n{(place / 'errors').read_text(encoding='utf-8')[-3000:]}")
    text = output.read_text(encoding="utf-8")
    return json.loads(text[text.index("{") :]), seconds, used.ru_utime + used.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--export", type=Path, help="A checkpoint of quantcli's, to be scored too.")
    parser.add_argument("--pages", type=int, help="Only so many pages, from the start.")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--softmax", help="The dtype of the harness's softmax.")
    parser.add_argument("--child", nargs=2, metavar=("TASKS", "BATCH"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        print(
            json.dumps(
                harness(str(given.model), given.child[0], given.length, int(given.child[1]), given.softmax), default=str
            )
        )
        return
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        pages = wikitext_pages(given.text.read_text(encoding="utf-8"))[: given.pages]
        text, data, tasks = place / "wiki.test.tokens", place / "pages.jsonl", place / "tasks"
        text.write_text("\n".join(pages), encoding="utf-8")
        assert wikitext_pages(text.read_text(encoding="utf-8")) == pages
        data.write_text("".join(json.dumps({"page": page}) + "\n" for page in pages), encoding="utf-8")
        tasks.mkdir()
        (tasks / "rules.py").write_text(RULES, encoding="utf-8")
        (tasks / "local.yaml").write_text(TASK.format(data=data, cache=place / "cache"), encoding="utf-8")

        print(f"{len(pages)} pages, windows of {given.length}\n")
        print("| what | word perplexity | bits per byte | seconds | processor seconds |\n|---|---:|---:|---:|---:|")
        for batch in given.batches:
            own = [sys.executable, __file__, str(given.model), str(given.text), "--length", str(given.length)]
            own += ["--softmax", given.softmax] if given.softmax else []
            found, *times = measured([*own, "--child", str(tasks), str(batch)], place)
            numbers = [float(found[f"{key},none"]) for key in ("word_perplexity", "bits_per_byte")]
            row(f"lm-evaluation-harness, batches of {batch}", numbers, times)
        section = {"dataset": "wikitext2", "path": str(text), "protocol": "lm-eval", "windows": None,
                   "sequence_length": given.length}  # fmt: skip
        for label, checkpoint in (("quantcli", given.model), ("quantcli, the export", given.export)):
            if checkpoint is None:
                continue
            command = [sys.executable, "-m", "quantcli", "eval-ppl", "--checkpoint", str(checkpoint), "--json"]
            command += ["--quiet", "--set", f"evaluate.perplexity={json.dumps(section)}"]
            found, *times = measured(command, place)
            numbers = [found["per_text"][key]["quantized"]["value"] for key in ("word_perplexity", "bits_per_byte")]
            row(label, numbers, times)


def row(label: str, numbers: list[float], times: list[float]) -> None:
    print(f"| {label} | {numbers[0]:.4f} | {numbers[1]:.5f} | {times[0]:.1f} | {times[1]:.1f} |", flush=True)


if __name__ == "__main__":
    main()
