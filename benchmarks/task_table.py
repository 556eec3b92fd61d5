"""A task's metrics with 95 % intervals, of the float model and of several recipes. Results go to BENCHMARKS.md by hand.

    python benchmarks/task_table.py MODEL --task boolq --path dev.jsonl [--recipes w8a8-dynamic w8a8 w4a16] [--limit N]

Runs lie beside each other, so the float model answers once. Changes are paired, question by question.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import quantcli


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--task", default="boolq")
    parser.add_argument("--path", type=Path, help="The task's local data.")
    parser.add_argument("--limit", type=int, help="Only so many questions.")
    parser.add_argument("--recipes", nargs="+", default=["w8a8-dynamic", "w8a8", "w4a16"])
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="A change of every recipe.")
    parser.add_argument("--work", type=Path, help="Folder for the runs; kept.")
    given = parser.parse_args()
    task = {"task": given.task, "path": given.path and str(given.path.absolute()), "limit": given.limit}
    changes = [f"evaluate={{tasks: [{json.dumps(task)}]}}", "evaluate.generate=null", *given.set]
    print("| model | metric | value | 95 % interval | change | ± | lost, gained |\n|---|---|---:|---:|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as name:
        shown = False
        for recipe in given.recipes:
            output = (given.work or Path(name)) / recipe
            result = quantcli.run(recipe, overrides=changes, model=str(given.model), output=str(output))
            assert result.tasks is not None
            found = result.tasks["tasks"][given.task]
            for metric, numbers in found["metrics"].items():
                if not shown:
                    row(f"float, {found['questions']} questions", metric, numbers["float_model"], "", "", "")
                lost = ", ".join(f"{numbers['flips'][key]:.1%}" for key in ("lost", "gained"))
                change, error = numbers["change"], numbers["change_error"]
                row(recipe, metric, numbers["quantized"], f"{change:+.2%}", f"{error:.2%}", lost)
            shown = True


def row(label: str, metric: str, found: dict[str, object], change: str, error: str, flips: str) -> None:
    low, high = found["interval"]  # type: ignore[misc]
    print(f"| {label} | {metric} | {found['value']:.2%} | {low:.1%} to {high:.1%} | {change} | {error} | {flips} |",
          flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
