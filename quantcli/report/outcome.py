"""The outcome of a run and the schemes of a plan, as rows of text."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from quantcli.report.numbers import PLAIN, Plain, rate, size

MOST_NAMES = 64
"""Linears that are rolled back: so many are named, and the rest counted."""


def outcome_rows(
    plan: Mapping[str, Any], result: Mapping[str, Any], numbers: Plain = PLAIN
) -> Iterator[tuple[str, str]]:
    """(label, value): what got which scheme, size and perplexity before and after, time, memory, files. `numbers` says
    how they are written."""
    counts: dict[str, int] = {}
    for linear in plan["linears"]:
        counts[linear["scheme"]] = counts.get(linear["scheme"], 0) + 1
    yield "schemes", ", ".join(f"{_count(n, 'linear')} {scheme}" for scheme, n in counts.items())
    if allocation := result.get("allocation"):
        yield "mixed bits", _allocated(allocation)
    if found := result.get("rolled_back"):
        yield "rolled back", _rolled_back(found)
    if smoothing := result.get("smoothing"):
        yield "smoothing", _smoothed(smoothing)
    if (experts := result.get("experts")) and experts["few"]:
        few = f"{len(experts['few'])} of {experts['observed']}"
        yield "experts", f"{few} saw fewer than {experts['least']} tokens and are quantized without them"
    for note in plan["notes"]:
        yield "note", note
    before, after = stored_sizes(result)
    yield "size", f"{size(before)} → {size(after)} ({numbers.percent(after / before - 1, 1, signed=True)})"
    if scores := result["perplexity"]:
        yield from _score_rows(scores, numbers)
    for task, found in ((result.get("tasks") or {}).get("tasks") or {}).items():
        yield from _task_rows(task, found, numbers)
    if throughput := result.get("throughput"):
        yield from _throughput_rows(throughput, numbers)
    if gates := result.get("gates"):
        missed = [gate["name"] for gate in gates if not gate["passed"]]
        yield "gates", f"{len(gates) - len(missed)} of {len(gates)} kept" + "".join(f"; missed: {n}" for n in missed)
    # seconds are not known of a stage whose record went with that of one before it
    ran = {n: r["seconds"] for n, r in result["stages"].items() if not r.get("reused") and r["seconds"] is not None}
    times = ", ".join(f"{name} {numbers.seconds(seconds)}" for name, seconds in ran.items())
    reused = ", ".join(name for name in result["stages"] if name not in ran)
    yield "time", "; ".join(filter(None, [times, reused and f"up to date: {reused}"]))
    yield "peak memory", f"{result['peak_memory'] / 1e9:.2f} GB"
    for export in result["exports"]:
        yield "checkpoint", export


def stored_sizes(result: Mapping[str, Any]) -> tuple[int, int]:
    """Bytes of the float checkpoint and of the one that is measured, as stored; as planned before an export."""
    sizes, planned = result.get("sizes") or {}, (result["size_before"], result["size_after"])
    measured = Path(result["exports"][0]).name if len(result.get("exports") or ()) == 1 else ""
    measured = (result.get("perplexity") or {}).get("checkpoint", measured)
    before, after = (sizes.get(name, {}).get("bytes") for name in ("float", measured))
    return before or planned[0], after or planned[1]


def _allocated(found: Mapping[str, Any]) -> str:
    """What the stage allocate reached, and among how many linears of which scheme."""
    target = found["target"]
    bound = f"{target['size']:g} GB" if "size" in target else f"{target['bits_per_weight']:g} bits"
    shared = ", ".join(f"{_count(count, 'linear')} {name}" for name, count in found["linears"].items())
    return f"{found['bits_per_weight']:.3f} bits a weight for at most {bound}: {shared}"


def _rolled_back(found: Mapping[str, str]) -> str:
    """Linears by name, each with what it was ranked by where that is known."""
    ranks = {name: why.partition(", to ")[0].removeprefix("rolled back by ") for name, why in found.items()}
    shown = [f"{name} ({rank})" if rank != found[name].partition(", to ")[0] else name for name, rank in ranks.items()]
    more = len(shown) - MOST_NAMES
    return ", ".join(shown[:MOST_NAMES]) + (f" and {more} more" if more > 0 else "")


def _smoothed(found: Mapping[str, Any]) -> str:
    """What the stage smooth did: what was rotated; groups scaled, by method without exponents; groups left, by
    cause."""
    scaled = sum(found["methods"].values())
    counts: dict[str, int] = {}
    for method, count in found["methods"].items():
        name = re.split(r"[ ,]", method)[0]
        name = "descent" if name == "none" else name  # auto began at no scale
        counts[name] = counts.get(name, 0) + count
    parts = [f"{what} rotated" for what in found["rotated"]]
    if found["methods"] or not parts:
        methods = ", ".join(f"{name} {count}" for name, count in counts.items())
        parts.append(f"{_count(scaled, 'group')} of linears scaled" + (f" ({methods})" if methods else ""))
    if found["left"]:
        causes = ", ".join(f"{cause} {count}" for cause, count in found["left"].items())
        parts.append(f"{sum(found['left'].values())} left as found ({causes})")
    return "; ".join(parts)


def _score_rows(scores: Mapping[str, Any], numbers: Plain) -> Iterator[tuple[str, str]]:
    plain, quantized = scores["float_model"], scores["quantized"]
    yield (
        "perplexity",
        f"{_with_error(plain, numbers)} → {_with_error(quantized, numbers)} "
        f"({numbers.percent(scores['increase'], signed=True)} ± {numbers.percent(scores['increase_error'])}"
        f"{_interval(scores.get('increase_interval'), numbers)})",
    )
    spread = f", {numbers.tail(kl['99'])} for 1 in 100" if (kl := scores.get("kl")) else ""
    divergence = numbers.divergence(scores["kl_divergence"], scores["kl_error"])
    yield "KL divergence", f"{divergence} nats a token{spread}"
    yield "same top token", numbers.percent(scores["agreement"], 1)
    for name, pair in (scores.get("per_text") or {}).items():
        yield (
            name.replace("_", " "),
            " → ".join(_with_error(pair[key], numbers) for key in ("float_model", "quantized")),
        )
    yield "protocol", protocol_line(scores)


def protocol_line(scores: Mapping[str, Any]) -> str:
    """What a perplexity depends on beside the model, as far as its record says, in one line."""
    masked, begin = scores.get("masked") or {}, scores.get("begin")
    parts = [
        scores["protocol"],
        data_name(scores),
        f"{_count(scores['windows'], 'window')} of {scores['sequence_length']}"
        + (f" every {stride} tokens" if (stride := scores.get("stride")) else ""),
        f"begun with {' '.join(map(str, begin))}" if begin else "",
        f"mean over batches of {batch}" if (batch := scores.get("batch_size")) else "",
        _count(scores["tokens"], "token"),
        f"{_count(masked['predictions'], 'prediction')} of {masked['token']} masked" if masked else "",
        _ARITHMETICS.get(scores.get("arithmetic", "engine"), ""),
    ]
    return ", ".join(filter(None, parts))


def data_name(scores: Mapping[str, Any]) -> str:
    """The text that was scored: its kind, and its file, or its subset and split."""
    data = scores.get("data") or {}
    return " ".join(data[key] for key in ("dataset", "file", "subset", "split") if data.get(key))


_ARITHMETICS = {  # where inputs or the cache are not rounded as most engines do
    "transformers": "inputs rounded as by transformers",
    "vllm-cpu": "cache rounded towards zero as by vLLM on a CPU",
}


def _task_rows(task: str, found: Mapping[str, Any], numbers: Plain) -> Iterator[tuple[str, str]]:
    """Both models' metrics with 95 % intervals, and the paired change with its error and interval."""
    for name, metric in found.get("metrics", {}).items():
        models = [metric["float_model"], metric["quantized"]]
        shown = [
            f"{numbers.percent(m['value'], 1)} ({' to '.join(numbers.percent(x, 1) for x in m['interval'])})"
            for m in models
        ]
        change = f"{numbers.percent(metric['change'], signed=True)} ± {numbers.percent(metric['change_error'])}"
        change += _interval(metric.get("change_interval"), numbers)
        yield f"{task} {name}".replace("_", " "), f"{' → '.join(shown)} ({change}) on {found['questions']} questions"


def _throughput_rows(found: Mapping[str, Any], numbers: Plain) -> Iterator[tuple[str, str]]:
    """Medians of both models with their quartiles, memory, and what it was measured on."""
    models = found["float_model"], found["quantized"]
    changes = {key: numbers.percent(change, 1, signed=True) for key, change in found["change"].items()}
    for key in ("prefill", "decode"):
        rates = [{name: rate(value) for name, value in model[key].items()} for model in models]
        shown = [f"{each['median']} ({each['low']} to {each['high']})" for each in rates]
        yield key, f"{' → '.join(shown)} tokens/s, {changes[key]}"
    memory = [numbers.fixed(m["peak_memory"] and m["peak_memory"] / 1e9) for m in models]
    yield "memory in use", f"{' → '.join(memory)} GB, {changes['peak_memory']}"
    yield "measured in", throughput_setting(found)


def throughput_setting(found: Mapping[str, Any]) -> str:
    """In what speed and memory were measured, on what, and how often."""
    return (
        f"{found['engine']} {found['version']}{', eager' if found['eager'] else ''}, on {found['device']}: "
        f"{_count(found['batch'], 'prompt')} of {found['prompt_tokens']} tokens, {found['new_tokens']} new ones, "
        f"{found['rounds']} × {_count(found['repeats'], 'time')} each"
    )


def _with_error(perplexity: Mapping[str, Any], numbers: Plain) -> str:
    return f"{numbers.fixed(perplexity['value'])} ± {numbers.fixed(perplexity['error'])}"


def _interval(bounds: Sequence[float | None] | None, numbers: Plain) -> str:
    low, high = bounds or (None, None)
    if low is None or high is None:
        return ""
    shown = (numbers.percent(bound, signed=True) for bound in (low, high))
    return f"; 95{numbers.sign} interval {' to '.join(shown)}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def scheme_rows(
    linears: Iterable[Mapping[str, Any]], *, every: bool = False
) -> Iterator[tuple[str, str, str, str, str]]:
    """(name, count, shape, scheme, reason) of linears; those that differ only in their block number share a row."""
    groups: dict[tuple[str, str, str, str], list[str]] = {}
    for linear in linears:
        name = linear["name"] if every else re.sub(r"\.\d+\.", ".*.", linear["name"])
        shape = f"{linear['shape'][0]} × {linear['shape'][1]}"
        groups.setdefault((name, shape, linear["scheme"], linear["reason"]), []).append(linear["name"])
    for (name, shape, scheme, reason), names in groups.items():
        yield name, str(len(names)), shape, scheme, reason
